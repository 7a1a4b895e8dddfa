"""Perplexity of a text file, against sums made by hand."""

import json
import math

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.task import Likelihood, Rolling
from llama_jax.eval.tasks import find_task


def test_sums_first_then_one_division(tmp_path):
    (tmp_path / 'a.txt').write_text('one two<|endoftext|>drei vier fünf')
    task = find_task(f'perplexity:{tmp_path}/a.txt')
    documents = task.documents('')
    assert [task.requests(document) for document in documents] == [
        [Rolling('one two')],
        [Rolling('drei vier fünf')],
    ]
    results = [Likelihood(-4.0, num_tokens=2), Likelihood(-10.0, num_tokens=8)]
    metrics = task.aggregate(documents, [task.grade(d, [r]) for d, r in zip(documents, results, strict=True)])
    assert metrics == pytest.approx(
        {
            'word_perplexity': math.exp(14 / 5),
            'byte_perplexity': math.exp(14 / (7 + 15)),
            'bits_per_byte': 14 / 22 / math.log(2),
            'token_perplexity': math.exp(1.4),
        }
    )


def test_uniform_bytes_have_eight_bits_each(shared_data):
    task = find_task(f'perplexity:{shared_data}/text/c4_demo.jsonl')
    documents = task.documents('')
    assert len(documents) == 300
    scores = [task.grade(d, [Likelihood(-len(d['text'].encode()) * math.log(256))]) for d in documents]
    metrics = task.aggregate(documents, scores)
    assert metrics['bits_per_byte'] == pytest.approx(8) and metrics['byte_perplexity'] == pytest.approx(256)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match='no file'):
        find_task(f'perplexity:{tmp_path}/none.txt').documents('')
    (tmp_path / 'empty.txt').write_text(' \n')
    with pytest.raises(InputError, match='no text in'):
        find_task(f'perplexity:{tmp_path}/empty.txt').documents('')
    (tmp_path / 'a.jsonl').write_text(json.dumps({'body': 'x'}))
    with pytest.raises(InputError, match=r"a.jsonl:1: item without 'text'"):
        find_task(f'perplexity:{tmp_path}/a.jsonl').documents('')
