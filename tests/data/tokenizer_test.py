import inspect
import json
import pickle
import tokenize

import numpy as np
import pytest

from llama_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from llama_jax.types import InputError

LLAMA2_GOLDEN = {
    'Hello world': [15043, 3186],
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
    '  two  spaces': [220, 1403, 220, 12908],
    '😀': [76460, 222],
    'Hello world!\n\nHow are you?': [9906, 1917, 2268, 4438, 527, 499, 30],
    '12345678': [4513, 10961, 2495],
    "I'll don'T": [40, 3358, 1541, 17773],
    '': [],
    '<|eot_id|>': [27, 91, 68, 354, 851, 91, 29],
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('trained') / 'tokenizer.model'
    train_sentencepiece(_python_sources(), 1024, path)
    return load_tokenizer(path.parent)


def _python_sources():
    return [inspect.getsource(module) for module in (inspect, json, pickle, tokenize)] + [
        '\tx = "é", 2024\r\n' * 50
    ]


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


def test_training_follows_llama_and_round_trips_source_code(trained):
    assert (trained.vocab_size, trained.bos_id, trained.eos_id) == (1024, 1, 2)
    for text in _python_sources():
        assert trained.decode(trained.encode(text)) == text
    assert trained.encode('\n')[-1:] == [3 + ord('\n')]  # newline is its byte token, as in Llama's vocabulary
    pieces = trained._processor.IdToPiece(list(range(259, 1024)))
    assert not [piece for piece in pieces if sum(map(str.isdigit, piece)) > 1]  # digits stay single
    assert trained.decode(trained.encode('語\x00\t')) == '語\x00\t'  # unseen characters fall back to bytes


def test_training_is_deterministic_and_uses_long_lines(trained, tmp_path):
    train_sentencepiece(iter(_python_sources()), 1024, tmp_path / 'again.model')
    assert load_tokenizer(tmp_path / 'again.model').sha256 == trained.sha256
    one_line = ' '.join(
        _python_sources()[0].split()
    )  # 100 kB: far over what sentencepiece takes as a sentence
    train_sentencepiece([one_line], 600, tmp_path / 'line.model')
    assert 'def' in load_tokenizer(tmp_path / 'line.model')._processor.IdToPiece(list(range(600)))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ['again.model', 'line.model']


def test_training_takes_an_even_sample_of_a_large_corpus():
    from llama_jax.data.tokenizer import _sample_lines

    lines = _sample_lines((f'{i:07d}\n' * 3 for i in range(50_000)), max_chars=7 * 10_000)
    numbers = np.array([int(line) for line in lines])
    assert 5_000 <= len(lines) <= 10_000
    assert numbers.max() > 49_000
    assert len(set(np.diff(numbers[::3]))) == 1


def test_errors_are_one_line(trained, tmp_path, shared_data):
    def error(call, *args):
        with pytest.raises(InputError) as caught:
            call(*args)
        assert '\n' not in str(caught.value)
        return str(caught.value)

    assert 'they give at most' in error(train_sentencepiece, ['a few words'], 5000, tmp_path / 'x.model')
    assert 'is too small' in error(train_sentencepiece, ['a few words'], 100, tmp_path / 'x.model')
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
