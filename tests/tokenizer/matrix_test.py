"""Every kind of tokenizer in every format, and what transformers and llama.cpp themselves answer."""

import pytest

from llama_jax.errors import InputError
from llama_jax.inference.detokenizer import Detokenizer
from llama_jax.tokenizer.conversion import model_file, own_files
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary, tokenizer_from_gguf
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.protocol import prompt_ids
from llama_jax.tokenizer.tokenizer import load_tokenizer, tokenizer_of_files
from tests.tokenizer import kinds

pytest.importorskip('tokenizers', reason="needs tokenizers: pip install 'llama_jax[hf]'")
NAMES = [
    'llama2', 'llama3', 'chatml on llama2, transformers 4', 'chatml on llama2, transformers 5', 'hermes', 'dolphin',
    'added plain tokens', 'one token more', 'one fewer', 'unigram', 'special tokens first',
    'bytes, special tokens first', 'no BOS', 'hand-made',
    'llama2 with a plain token', 'tokenizer.model and added tokens',
]  # fmt: skip
# Texts whose ids differ where transformers 5 puts the space before a text itself, as no other format does.
SPACED = 'chatml on llama2, transformers 5'


@pytest.fixture(scope='module')
def all_kinds():
    found = kinds.kinds()
    assert list(found) == NAMES
    return found


@pytest.fixture(params=NAMES)
def folder(request, all_kinds, tmp_path):
    """Name of the kind, its folder, its tokenizer, what ends an answer, whether BOS is put."""
    files, stop_ids, add_bos = all_kinds[request.param]
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return request.param, tmp_path, load_tokenizer(tmp_path), stop_ids, add_bos


def texts_of(tokenizer):
    names = [*getattr(tokenizer, 'added_tokens', {}), *list(tokenizer.special_tokens)[:12]]
    return kinds.PROBES + [text for name in names for text in (f'a{name}b', f'{name} c', name)]


def test_a_kind_is_read_and_written_without_loss(folder):
    name, _, tokenizer, stop_ids, add_bos = folder
    assert (set(tokenizer.stop_ids), tokenizer.add_bos) == (stop_ids, add_bos)
    own = tokenizer_of_files('own', own_files(tokenizer, 'TEMPLATE'))
    assert own_files(own).keys() <= own_files(tokenizer).keys()
    assert own.ends == tokenizer.ends
    texts = texts_of(tokenizer)
    for text in texts:
        assert own.encode(text) == tokenizer.encode(text), text
        assert own.encode(text, special=True) == tokenizer.encode(text, special=True), text
    rows = -(-tokenizer.vocab_size // 64) * 64
    if name == 'unigram':
        with pytest.raises(InputError, match='spells bytes in a Unigram'):
            gguf_vocabulary(tokenizer, vocab_size=rows)
        return
    keys = gguf_vocabulary(tokenizer, vocab_size=rows)
    back = tokenizer_from_gguf(keys, 'a.gguf')
    assert (back.bos_id, back.eos_id, back.add_bos) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos)
    assert set(back.stop_ids) >= stop_ids and back.vocab_size == tokenizer.vocab_size
    alike = [text for text in texts if not (name == SPACED and text.startswith(' '))]
    assert [back.encode(text) for text in alike] == [tokenizer.encode(text) for text in alike]
    assert gguf_vocabulary(back, vocab_size=rows) == keys
    files = huggingface_files(back, max_seq_len=64)
    again = tokenizer_of_files('again', files)
    assert [again.encode(text) for text in texts] == [back.encode(text) for text in texts]
    assert (again.bos_id, again.eos_id, again.add_bos) == (back.bos_id, back.eos_id, back.add_bos)


def test_a_row_without_a_token_prints_nothing(folder):
    """As in transformers and llama.cpp: an embedding padded with rows may well have one of them drawn."""
    tokenizer = folder[2]
    size = tokenizer.vocab_size
    ids = tokenizer.encode('green bottles')

    def text_of(prompt, new):
        row = Detokenizer(tokenizer, prompt)
        return row.push(new) + row.flush()

    assert text_of(ids, [size, size + 40]) == ''
    assert text_of(ids, ids) == text_of([*ids, size], [*ids, size])
    assert all(isinstance(tokenizer.decode([id]), str) for id in range(size))


def test_the_line_says_which_description_is_taken_only_where_they_differ(all_kinds, caplog):
    caplog.set_level('INFO')
    tokenizer_of_files('same', all_kinds['llama2'][0])
    assert not caplog.messages
    tokenizer_of_files('differ', all_kinds['chatml on llama2, transformers 4'][0])
    assert caplog.messages == [
        'differ: the tokenizer is tokenizer.json, which says more of its tokens than the other'
    ]


def test_what_a_tokenizer_model_cannot_say_is_refused(all_kinds):
    for name, reason in (
        ('dolphin', 'has added tokens or merges of its own'),
        ('chatml on llama2, transformers 4', 'stops at the ids 2, '),
        ('no BOS', 'has added tokens'),
    ):
        with pytest.raises(InputError, match=reason) as error:
            model_file(tokenizer_of_files('a', all_kinds[name][0]))
        assert '\n' not in str(error.value)


@pytest.mark.slow
def test_ids_are_those_of_transformers(folder):
    transformers = pytest.importorskip(
        'transformers', reason="needs transformers: pip install 'llama_jax[parity]'"
    )
    name, path, tokenizer, *_ = folder
    if not (path / 'tokenizer.json').exists():
        return  # transformers builds its own from a tokenizer.model
    opened = [(path, tokenizer)]
    if name != 'unigram':
        back = tokenizer_from_gguf(gguf_vocabulary(tokenizer), 'a.gguf')
        (path / 'back').mkdir()
        for file, data in huggingface_files(back, max_seq_len=64).items():
            (path / 'back' / file).write_bytes(data)
        opened.append((path / 'back', back))
    for place, ours in opened:
        (place / 'config.json').write_text('{"model_type": "llama"}')
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        for text in kinds.PROBES:
            assert prompt_ids(ours, text, special=True) == theirs(text)['input_ids'], text
        for text in texts_of(ours):
            ids = theirs(text, add_special_tokens=False)['input_ids']
            assert ours.encode(text, special=True) == ids, text


@pytest.mark.slow
def test_ids_are_those_of_llama_cpp(folder, tmp_path):
    llama_cpp = pytest.importorskip(
        'llama_cpp', reason="needs llama-cpp-python: pip install 'llama_jax[parity]'"
    )
    name, _, tokenizer, *_ = folder
    if name == 'unigram':
        return  # llama.cpp knows no Unigram with bytes
    keys = gguf_vocabulary(tokenizer, vocab_size=tokenizer.vocab_size + 3)
    ours = tokenizer_from_gguf(keys, 'a.gguf')
    kinds.write_vocabulary(tmp_path / 'a.gguf', keys)
    theirs = llama_cpp.Llama(str(tmp_path / 'a.gguf'), vocab_only=True, verbose=False)
    for text in texts_of(ours):
        for special in (False, True):
            ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
            assert ours.encode(text, special=special) == ids, (text, special)
    vocabulary = llama_cpp.llama_model_get_vocab(theirs._model.model)
    ends = [i for i in range(ours.vocab_size) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
    assert ends == list(ours.stop_ids)
    assert llama_cpp.llama_vocab_get_add_bos(vocabulary) == ours.add_bos
    assert llama_cpp.llama_vocab_eos(vocabulary) == ours.eos_id
