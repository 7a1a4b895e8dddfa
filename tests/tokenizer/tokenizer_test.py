import json
import pickle
import sys

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer import sentencepiece_tokenizer
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.tiktoken_tokenizer import TiktokenTokenizer, llama3_special_names
from llama_jax.tokenizer.tokenizer import load_tokenizer

LLAMA2_GOLDEN = {
    'Hello world': [15043, 3186],
    'Hello, world! 12345': [15043, 29892, 3186, 29991, 29871, 29896, 29906, 29941, 29946, 29945],
    '日本語': [29871, 30325, 30346, 30968],
    'I believe the meaning of life is': [306, 4658, 278, 6593, 310, 2834, 338],
    'a\n\nb': [263, 13, 13, 29890],
    'naïve café': [1055, 30085, 345, 274, 28059],
    'Привет': [7203, 7616],
    ' leading': [29871, 8236],
    '  two  spaces': [259, 1023, 29871, 8162],
    '😀': [29871, 243, 162, 155, 131],
    '\n': [29871, 13],
    'a\tb': [263, 12, 29890],
    '3,000': [29871, 29941, 29892, 29900, 29900, 29900],
    'Hello ': [15043, 29871],
    '': [],
    '<s></s>': [529, 29879, 2565, 29879, 29958],  # control tokens in text are text
}
LLAMA3_GOLDEN = {
    'Hello world': [9906, 1917],
    'Hello, world! 12345': [9906, 11, 1917, 0, 220, 4513, 1774],
    ' leading': [6522],
    '日本語': [102433, 102158],
    'This is a test sentence.': [2028, 374, 264, 1296, 11914, 13],
    '\n': [198],
    '\n\n': [271],
    '1984': [3753, 19],
    'Привет': [54745, 28089, 8341],
    'system': [9125],
    'user': [882],
    'assistant': [78191],
    'ipython': [23799, 4690],
    '  two  spaces': [220, 1403, 220, 12908],
    '😀': [76460, 222],
    'Hello world!\n\nHow are you?': [9906, 1917, 2268, 4438, 527, 499, 30],
    '12345678': [4513, 10961, 2495],
    "I'll don'T": [40, 3358, 1541, 17773],
    '': [],
    '<|eot_id|>': [27, 91, 68, 354, 851, 91, 29],
}


@pytest.mark.parametrize(('name', 'golden'), [('llama2', LLAMA2_GOLDEN), ('llama3', LLAMA3_GOLDEN)])
def test_released_tokenizers_give_the_published_ids_and_the_text_back(shared_data, name, golden):
    tokenizer = load_tokenizer(shared_data / 'tokenizers' / name)
    vectors = json.loads((shared_data / 'tokenizers' / name / 'vectors.json').read_text())
    golden = [*golden.items(), *((vector['text'], vector['ids']) for vector in vectors)]
    assert len(vectors) > 10
    for text, ids in golden:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    batch = tokenizer.encode_batch([text for text, _ in golden])
    assert [ids.tolist() for ids in batch] == [ids for _, ids in golden]


def test_bos_and_eos_come_from_flags(shared_data):
    llama2 = load_tokenizer(shared_data / 'tokenizers/llama2')
    llama3 = load_tokenizer(shared_data / 'tokenizers/llama3')
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id) == (32000, 1, 2)
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (128256, 128000, 128001)
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]  # Meta's own test
    assert llama3.encode('This is a test sentence.', bos=True, eos=True) == ids
    assert llama2.decode(llama2.encode('Hello', bos=True, eos=True)) == 'Hello'
    assert (
        llama3.decode([128006, 882, 128007, 128009]) == '<|start_header_id|>user<|end_header_id|><|eot_id|>'
    )
    assert llama3.special_tokens['<|reserved_special_token_245|>'] == 128255
    with pytest.raises(InputError, match='token id -1 is outside the vocabulary, 0 to 31999'):
        llama2.decode([15043, -1])
    assert llama2.encode('a\ud800b') == llama2.encode('a\ufffdb')  # a lone surrogate, as JSON can spell


def test_long_runs_are_cut_for_tiktoken_and_nothing_is_lost(shared_data):
    tokenizer = load_tokenizer(shared_data / 'tokenizers/llama3')
    run = 'x' * 60_000
    cut = [*tokenizer.encode('x' * 25_000), *tokenizer.encode('x' * 25_000), *tokenizer.encode('x' * 10_000)]
    assert tokenizer.encode(run) == cut
    assert tokenizer.encode('a ' + run) == tokenizer.encode('a ' + 'x' * 25_000) + cut[len(cut) * 25 // 60 :]
    mixed = 'word ' * 100_000 + ' ' * 30_000 + run
    assert tokenizer.decode(tokenizer.encode(mixed)) == mixed


def test_a_long_text_is_cut_for_sentencepiece_where_no_id_changes(shared_data, monkeypatch):
    tokenizer = load_tokenizer(shared_data / 'tokenizers/llama2/tokenizer.model')
    files = ('tinyshakespeare.txt', 'c4_demo.jsonl', 'wikitext2_valid.txt')
    texts = [(shared_data / 'text' / file).read_text()[:30_000] for file in files]
    texts += ['a  b   c ' * 100, ' ' * 200, '▁ a▁ b' * 50, 'é中 \n x\t ' * 60, 'a ' * 30 + ' ', 'x' * 300, '']
    whole = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert whole == [tokenizer.encode(text) for text in texts]
    for length in (1, 2, 7, 50):
        monkeypatch.setattr(sentencepiece_tokenizer, '_CUT_CHARS', length)
        assert len(list(tokenizer._cut(texts[0]))) > 30_000 / (length + 30)
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == whole


def test_special_tokens_are_named_by_publisher_and_some_of_them_end_an_answer(shared_data):
    for huggingface, expected in {  # offsets from 128000, as each publisher's own files have them
        False: {4: 'finetune_right_pad_id', 8: 'eom_id', 11: 'image', 255: 'reserved_special_token_245'},
        True: {5: 'reserved_special_token_2', 10: 'python_tag', 255: 'reserved_special_token_247'},
    }.items():
        names = llama3_special_names(huggingface)
        assert len(set(names)) == 256 and names[:2] == ['<|begin_of_text|>', '<|end_of_text|>']
        assert names[6:8] == ['<|start_header_id|>', '<|end_header_id|>'] and names[9] == '<|eot_id|>'
        assert {i: names[i] for i in expected} == {i: f'<|{name}|>' for i, name in expected.items()}
    llama3 = load_tokenizer(shared_data / 'tokenizers/llama3')
    assert llama3.stop_ids == (128001, 128008, 128009)
    names = ['<|reserved|>' if name == '<|eom_id|>' else name for name in llama3_special_names()]
    older = TiktokenTokenizer(llama3.path, llama3.file_bytes, names)
    assert older.stop_ids == (128001, 128009) and older.vocab_size == 128256
    assert load_tokenizer(shared_data / 'tokenizers/llama2').stop_ids == (2,)


@pytest.fixture
def huggingface(shared_data, tmp_path):
    """A folder as transformers would have it, of the smallest tokenizer."""
    native = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    files = huggingface_files(native, max_seq_len=512)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (tmp_path / name).write_bytes(files[name])
    return tmp_path


def test_a_tokenizer_json_is_found_and_takes_its_ends_from_the_file_beside_it(shared_data, huggingface):
    native = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    tokenizer = load_tokenizer(huggingface)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.path.endswith('tokenizer.json')
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (512, 1, 2, (2,))
    text = 'One day, <s> Lily\ud800 </s>'  # tags in text are text, and a lone surrogate is none
    assert tokenizer.encode(text, bos=True, eos=True) == native.encode(text, bos=True, eos=True)
    assert [ids.tolist() for ids in tokenizer.encode_batch([text, ''])] == [native.encode(text), []]
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text) == native.encode(text)
    byte = [3 + 0xE2, 3 + 0x0A, 0]  # half a character, a good byte after it, the unknown token
    assert tokenizer.decode([1, *native.encode('One day'), *byte[:2], 2]) == 'One day\ufffd\n'
    assert tokenizer.decode(byte) == '\ufffd\n \u2047 '
    begun = [3 + 0xE2, 3 + 0x80]  # two bytes of three
    assert tokenizer.decode(begun) == native.decode(begun) == '\ufffd' * 2
    config = json.loads((huggingface / 'tokenizer_config.json').read_text())
    config['eos_token'] = {'content': '<unk>', 'lstrip': False}
    (huggingface / 'tokenizer_config.json').write_text(json.dumps(config))
    assert load_tokenizer(huggingface / 'tokenizer.json').eos_id == 0
    (huggingface / 'tokenizer_config.json').unlink()
    assert load_tokenizer(huggingface).eos_id == 2  # by its usual name
    (huggingface / 'tokenizer.json').rename(
        huggingface / 'tokenizer.model'
    )  # the content tells, not the name
    assert isinstance(load_tokenizer(huggingface), HuggingFaceTokenizer)


def test_a_damaged_tokenizer_json_is_refused_in_one_line(huggingface, monkeypatch):
    good, rng = (huggingface / 'tokenizer.json').read_bytes(), np.random.default_rng(0)
    messages = []
    for _ in range(150):
        data = bytearray(good)
        for at in rng.integers(0, len(data), 2):
            data[at] = rng.integers(0, 256)
        del data[rng.integers(len(data) // 2, 3 * len(data)) :]
        try:
            HuggingFaceTokenizer(str(huggingface / 'tokenizer.json'), bytes(data)).encode('Once upon')
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all('\n' not in message and 'tokenizer.json' in message for message in messages)
    for data, message in (
        (b'{' * 100_000, 'is not JSON'),
        (b'{"a":' + b'[' * 100_000, 'is not JSON'),
        (b'{}', 'is not a tokenizer.json'),
        (  # the library panics
            good.replace(
                b'"continuing_subword_prefix": null', b'"continuing_subword_prefix": "%s"' % (b'x' * 999)
            ),
            'is not a tokenizer.json',
        ),
        (good.replace(b'</s>', b'</t>'), 'holds none of </s>'),
    ):
        with pytest.raises(InputError, match=message) as caught:
            HuggingFaceTokenizer(str(huggingface / 'tokenizer.json'), data)
        assert '\n' not in str(caught.value)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(InputError, match=r"pip install 'llama_jax\[hf\]'"):
        load_tokenizer(huggingface)


def test_errors_are_one_line(tmp_path, shared_data):
    def error(call, *args):
        with pytest.raises(InputError) as caught:
            call(*args)
        assert '\n' not in str(caught.value)
        return str(caught.value)

    assert f'no tokenizer at {tmp_path}/none' in error(load_tokenizer, tmp_path / 'none')
    assert 'no *.model file' in error(load_tokenizer, tmp_path)
    (tmp_path / 'a.model').write_bytes(b'\x00garbage' * 10)
    assert 'neither a sentencepiece model nor a tiktoken' in error(load_tokenizer, tmp_path)
    (tmp_path / 'b.model').write_bytes(b'')
    assert 'found a.model, b.model' in error(load_tokenizer, tmp_path)
    assert 'the file is empty' in error(load_tokenizer, tmp_path / 'b.model')
    ranks = (shared_data / 'tokenizers/llama3/tokenizer.model').read_bytes().splitlines(keepends=True)
    (tmp_path / 'b.model').write_bytes(b''.join(ranks[:10] + ranks[11:300]))
    assert 'line 11: rank 11 where a new token of rank 10 belongs' in error(
        load_tokenizer, tmp_path / 'b.model'
    )
    (tmp_path / 'b.model').write_bytes(b''.join(ranks[:200]))
    assert 'lacks 56 of the 256' in error(load_tokenizer, tmp_path / 'b.model')
    (tmp_path / 'b.model').write_bytes(b''.join(ranks[:300]) + b'!!! 300\n')
    assert 'line 301' in error(load_tokenizer, tmp_path / 'b.model')
