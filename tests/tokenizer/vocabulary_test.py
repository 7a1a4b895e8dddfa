import json

import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.conversion import model_file, vocabulary_of
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary, tokenizer_from_gguf
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_jax.tokenizer.tiktoken_tokenizer import TiktokenTokenizer, llama3_special_names
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.training import train_sentencepiece
from llama_jax.tokenizer.vocabulary import SPELLING
from tests.tokenizer.kinds import random_texts


@pytest.fixture(scope='module', params=['llama2', 'llama3', 'trained'])
def native(request, tmp_path_factory):
    """A tokenizer with a file of its own, many texts and what it makes of them, and its vocabulary in GGUF's words."""
    if request.param == 'trained':
        folder = tmp_path_factory.mktemp('trained')
        texts = [f'  {i} green bottles,\t{"é" * (i % 3)} hanging on the wall' for i in range(200)]
        train_sentencepiece(texts, 330, folder / 'tokenizer.model')
        vectors = []
    else:
        folder = request.getfixturevalue('shared_data') / 'tokenizers' / request.param
        vectors = json.loads((folder / 'vectors.json').read_text())
    tokenizer = load_tokenizer(folder)
    texts = [vector['text'] for vector in vectors] + random_texts(600)
    ids = [row.tolist() for row in tokenizer.encode_batch(texts)]
    assert ids[: len(vectors)] == [vector['ids'] for vector in vectors]
    return tokenizer, texts, ids, gguf_vocabulary(tokenizer)


def assert_same(tokenizer, native):
    expected, texts, ids, _ = native
    for text, got, want in zip(texts, tokenizer.encode_batch(texts), ids, strict=True):
        assert got.tolist() == want, repr(text)
    assert [tokenizer.decode(row) for row in ids] == [expected.decode(row) for row in ids]
    for name in ('vocab_size', 'bos_id', 'eos_id', 'stop_ids'):
        assert getattr(tokenizer, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    'native', ['trained', pytest.param('llama2', marks=pytest.mark.slow), 'llama3'], indirect=True
)
def test_gguf_and_back_gives_the_same_ids(native):
    keys = native[3]
    assert {type(value) for value in keys.values()} <= {str, int, bool, list}
    back = tokenizer_from_gguf(keys, 'model.gguf')
    assert_same(back, native)
    if isinstance(back, TiktokenTokenizer):
        assert back.file_bytes == native[0].file_bytes
    else:
        assert gguf_vocabulary(back) == keys


@pytest.mark.parametrize(
    'native',
    ['trained', *(pytest.param(name, marks=pytest.mark.slow) for name in ('llama2', 'llama3'))],
    indirect=True,
)
def test_a_tokenizer_json_and_back_gives_the_same_ids(native):
    files = huggingface_files(native[0], max_seq_len=64)
    tokenizer = HuggingFaceTokenizer('none/tokenizer.json', files['tokenizer.json'])
    assert_same(tokenizer, native)
    data = model_file(tokenizer)
    assert_same(type(native[0])('tokenizer.model', data), native)
    # Llama 3's file has one form; sentencepiece's own scores are not in a tokenizer.json, only their order is.
    assert (data == native[0].file_bytes) == isinstance(native[0], TiktokenTokenizer)
    assert huggingface_files(tokenizer, max_seq_len=64)['tokenizer.json'] == files['tokenizer.json']
    assert model_file(native[0]) is native[0].file_bytes


@pytest.mark.parametrize('native', ['llama3'], indirect=True)
def test_keys_of_llama3_are_those_of_the_released_files(native):
    keys = {key.removeprefix('tokenizer.ggml.'): value for key, value in native[3].items()}
    assert (keys['model'], keys['pre'], keys['bos_token_id'], keys['eos_token_id']) == (
        'gpt2', 'llama-bpe', 128000, 128001,
    )  # fmt: skip
    assert (keys['add_bos_token'], keys['add_eos_token'], 'scores' in keys) == (True, False, False)
    assert keys['tokens'][220] == 'Ġ' and keys['tokens'][128005] == '<|reserved_special_token_2|>'
    assert keys['token_type'] == [1] * 128000 + [3] * 256
    assert len(keys['merges']) == 280147 and keys['merges'][0] == 'Ġ Ġ'


def test_keys_of_sentencepiece_are_those_of_a_file_of_llama_cpp(shared_data):
    gguf = pytest.importorskip('gguf', reason="needs gguf: pip install 'llama_jax[gguf]'")
    reader = gguf.GGUFReader(shared_data / 'weights/stories260K/stories260K.gguf')
    theirs = {key: field.contents() for key, field in reader.fields.items() if key.startswith('tokenizer.')}
    original = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    ours = gguf_vocabulary(original)
    for key in (
        'model',
        'tokens',
        'token_type',
        'scores',
        'bos_token_id',
        'eos_token_id',
        'unknown_token_id',
    ):
        assert ours[f'tokenizer.ggml.{key}'] == theirs[f'tokenizer.ggml.{key}'], key
    opened = tokenizer_from_gguf(theirs, 'stories260K.gguf')
    # That file does not say that extra spaces go, which its tokenizer does and Llama's do not; the rest is the same.
    for text in random_texts(600):
        text = '_'.join(text.replace('▁', '').split(' '))
        assert opened.encode(text) == original.encode(text), repr(text)
    assert (
        tokenizer_from_gguf(ours, '').encode(' a  b ') == original.encode(' a  b ') != opened.encode(' a  b ')
    )


def test_ids_that_only_the_model_has_become_unused_tokens(shared_data):
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    keys = gguf_vocabulary(tokenizer, vocab_size=514)
    assert keys['tokenizer.ggml.tokens'][510:] == [
        *vocabulary_of(tokenizer).tokens[510:],
        '[PAD512]',
        '[PAD513]',
    ]
    assert keys['tokenizer.ggml.token_type'][-3:] == [1, 5, 5] and len(keys['tokenizer.ggml.scores']) == 514
    assert tokenizer_from_gguf(keys, '').vocab_size == 512


def one_line_error(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def test_metadata_that_contradict_themselves_are_refused_in_one_line(shared_data):
    good = gguf_vocabulary(load_tokenizer(shared_data / 'weights/stories260K/tok512.model'))
    tokens, types = good['tokenizer.ggml.tokens'], good['tokenizer.ggml.token_type']
    llama3 = ['!'] + [chr(c) for c in range(34, 127)]
    for changes, message in (
        ({'model': None}, 'tokenizer.ggml.model is None'),
        ({'model': 'bert'}, "'bert'; Llama has llama or gpt2"),
        ({'tokens': None}, 'tokens is missing'),
        ({'tokens': 'abc'}, 'tokens is of type str'),
        ({'tokens': [1, *tokens[1:]]}, 'tokens holds a int'),
        ({'tokens': [*tokens[:-1], tokens[-2]]}, 'repeats a token'),
        ({'tokens': ['', *tokens[1:]]}, 'not a tokenizer'),
        ({'tokens': ['\ud800', *tokens[1:]]}, 'holds what is no Unicode'),
        ({'token_type': types[:-1]}, '511 elements for 512 tokens'),
        ({'token_type': [7, *types[1:]]}, 'holds 7; the types are 1 to 6'),
        ({'token_type': [True, *types[1:]]}, 'holds a bool'),
        ({'scores': [float('nan')] * 512}, 'not finite'),
        ({'scores': [0.0]}, '1 values for 512 tokens'),
        ({'bos_token_id': 512}, 'bos_token_id is 512; it must be an id, 0 to 511'),
        ({'precompiled_charsmap': [1, 2, 3]}, 'precompiled_charsmap normalizes characters'),
        ({'add_bos_token': 'yes'}, "add_bos_token is 'yes'; it must be true or false"),
        ({'eos_token_id': '2'}, "eos_token_id is '2'"),
        ({'tokens': [], 'token_type': []}, '0 to -1'),
        ({'model': 'gpt2', 'pre': 'smollm'}, "pre is 'smollm'"),
        ({'model': 'gpt2', 'pre': 'llama-bpe'}, 'merges is missing'),
        ({'model': 'gpt2', 'pre': 'llama-bpe', 'merges': []}, 'spells no bytes'),
        (
            {'model': 'gpt2', 'pre': 'llama-bpe', 'merges': [], 'tokens': llama3, 'token_type': [1] * 94},
            'lacks 162',
        ),
        (
            {
                'model': 'gpt2',
                'pre': 'llama-bpe',
                'merges': ['a b'],
                'tokens': [*map(chr, SPELLING.values()), '</s>'],
                'token_type': [1] * 256 + [3],
                'eos_token_id': 256,
            },
            'out of vocabulary',
        ),
    ):
        keys = good | {f'tokenizer.ggml.{key}': value for key, value in changes.items()}
        error = one_line_error(tokenizer_from_gguf, keys, 'model.gguf')
        assert message in error and 'model.gguf' in error, (changes, error)


def test_what_no_other_format_can_hold_is_refused(shared_data, tmp_path):
    llama3 = load_tokenizer(shared_data / 'tokenizers/llama3')
    more = TiktokenTokenizer('more', llama3.file_bytes, [*llama3_special_names(), '<|mine|>'])
    assert '257 special tokens' in one_line_error(model_file, more)
    # transformers' newer splitter of Llama 2 differs in texts that begin with a space, and is accepted.
    small = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    definition = json.loads(huggingface_files(small, max_seq_len=8)['tokenizer.json'])
    definition['normalizer'] = None
    definition['pre_tokenizer'] = {
        'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False,
    }  # fmt: skip
    newer = HuggingFaceTokenizer('newer.json', json.dumps(definition).encode())
    assert SentencePieceTokenizer('', model_file(newer)).encode('Once upon') == small.encode('Once upon')
    definition['normalizer'] = {'type': 'Lowercase'}
    lower = HuggingFaceTokenizer('lower.json', json.dumps(definition).encode())
    assert 'lower.json splits texts differently' in one_line_error(model_file, lower)
    definition['normalizer'] = None
    definition['model']['vocab']['far'] = 514
    gap = HuggingFaceTokenizer('gap.json', json.dumps(definition).encode())
    keys = gguf_vocabulary(gap)
    assert keys['tokenizer.ggml.tokens'][512:] == ['[PAD512]', '[PAD513]', 'far']
    assert keys['tokenizer.ggml.token_type'][512:] == [5, 5, 1]


def test_long_tokens_cost_no_more_than_their_file(shared_data):
    """The time to find merges grows with the squares of the lengths."""
    small = gguf_vocabulary(load_tokenizer(shared_data / 'weights/stories260K/tok512.model'))
    more = [f'{i:04}' + 'x' * 1000 for i in range(2000)]
    for key, filler in (('tokens', more), ('token_type', [1] * 2000), ('scores', [-9.0] * 2000)):
        small[f'tokenizer.ggml.{key}'] = [*small[f'tokenizer.ggml.{key}'], *filler]
    assert 'tokens of 8' in one_line_error(tokenizer_from_gguf, small, 'a.gguf')
