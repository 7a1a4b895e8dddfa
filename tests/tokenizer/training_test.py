import inspect
import json
import pickle
import tokenize

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.training import _sample_lines, train_sentencepiece


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('trained') / 'tokenizer.model'
    train_sentencepiece(_python_sources(), 1024, path)
    return load_tokenizer(path.parent)


def _python_sources():
    return [inspect.getsource(module) for module in (inspect, json, pickle, tokenize)] + [
        '\tx = "é", 2024\r\n' * 50
    ]


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
    with pytest.raises(InputError, match='vocab_size is 1000000000000; it must be at most 16777216'):
        train_sentencepiece([one_line], 10**12, tmp_path / 'large.model')
    assert [path.name for path in sorted(tmp_path.iterdir())] == ['again.model', 'line.model']


def test_training_takes_an_even_sample_of_a_large_corpus():
    lines = _sample_lines((f'{i:07d}\n' * 3 for i in range(50_000)), max_chars=7 * 10_000)
    numbers = np.array([int(line) for line in lines])
    assert 5_000 <= len(lines) <= 10_000
    assert numbers.max() > 49_000
    assert len(set(np.diff(numbers[::3]))) == 1


def test_errors_are_one_line(tmp_path):
    for texts, size, message in (
        (['a few words'], 5000, 'they give at most'),
        (['a few words'], 100, 'is too small'),
    ):
        with pytest.raises(InputError, match=message) as caught:
            train_sentencepiece(texts, size, tmp_path / 'x.model')
        assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())
