import collections
import math
import tracemalloc

import numpy as np
import pytest

from llama_jax.data.packing import PackedRows, TokenizedCorpus
from llama_jax.eval import baselines
from llama_jax.eval.baselines import fit_baselines, in_time

VOCAB, LENGTH = 12, 8


def corpus(seed, num_documents=9):
    """Documents of a language that prefers x + 1 after x, with BOS 0 and EOS 1."""
    rng = np.random.default_rng(seed)
    documents = []
    for size in rng.integers(1, 12, size=num_documents):
        body = 2 + (rng.integers(10) + np.cumsum(rng.random(size) < 0.8)) % 10
        documents.append(np.concatenate([[0], body, [1]]).astype(np.uint16))
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    return documents, TokenizedCorpus(np.concatenate(documents), starts, num_bytes=500, fingerprint='')


def pairs(documents):
    return [(int(a), int(b)) for document in documents for a, b in zip(document, document[1:], strict=False)]


def test_count_models_by_hand():
    (train, train_tokens), (validation, validation_tokens) = corpus(2, 30), corpus(3)
    rows, held_out = PackedRows(train_tokens, LENGTH), PackedRows(validation_tokens, LENGTH)
    found = fit_baselines(
        (rows[i] for i in range(len(rows))), (held_out[i] for i in range(len(held_out))), VOCAB
    )

    seen = pairs(train)
    followers, contexts = collections.Counter(b for _, b in seen), collections.Counter(a for a, _ in seen)
    together = collections.Counter(seen)

    def unigram(b):
        return (followers[b] + 1) / (len(seen) + VOCAB)

    def bigram(a, b, share):
        if not contexts[a]:
            return unigram(b)
        return share * together[a, b] / contexts[a] + (1 - share) * unigram(b)

    scored = pairs(validation)
    loss = -np.mean([math.log(unigram(b)) for _, b in scored])
    assert found.unigram == pytest.approx(loss, rel=1e-9)
    shares = np.linspace(0.05, 0.95, 19)
    losses = [-np.mean([math.log(bigram(a, b, share)) for a, b in scored]) for share in shares]
    assert found.bigram == pytest.approx(min(losses), rel=1e-9)
    assert found.bigram < found.unigram - 0.3  # what x tells of the next token


def test_behind_a_token_never_seen_the_bigram_is_the_unigram():
    train, validation = (
        [{'tokens': np.array(tokens), 'segment_ids': np.ones(3, np.int32)}]
        for tokens in ([0, 2, 3], [5, 3, 3])
    )
    found = fit_baselines(train, validation, VOCAB)
    assert found.bigram == found.unigram == pytest.approx(-math.log(2 / (2 + VOCAB)), rel=1e-9)


def test_memory_does_not_grow_with_the_training_rows(monkeypatch):
    monkeypatch.setattr(baselines, '_CHUNK', 1 << 12)
    size, length = 50_000, 1023

    def row(seed):
        tokens = np.random.default_rng(seed).integers(size, size=length + 1, dtype=np.int32)
        return {'tokens': tokens, 'segment_ids': np.ones(length + 1, np.int32)}

    validation = [row(seed) for seed in range(3)]
    peaks, found = [], []
    for count in (50, 400):
        tracemalloc.start()
        found.append(fit_baselines((row(seed % 50) for seed in range(count)), iter(validation), size))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[0] < 10e6  # tables of the vocabulary and a chunk; its pairs alone are 50 times as many
    assert found[0].unigram > found[1].unigram  # the same tokens, eight times as often


def test_of_very_long_validation_the_first_part_is_scored(monkeypatch):
    train, held_out = (list(PackedRows(corpus(seed, 30)[1], LENGTH)) for seed in (2, 3))
    count = sum(np.sum(row['segment_ids'][1:] == row['segment_ids'][:-1]) for row in held_out[:5])
    monkeypatch.setattr(baselines, '_MAX_VALIDATION_TARGETS', int(count))
    assert fit_baselines(train, held_out, VOCAB) == fit_baselines(train, held_out[:5], VOCAB)


def test_rows_are_counted_as_long_as_there_is_time(monkeypatch, caplog):
    caplog.set_level('INFO', 'llama_jax.eval.baselines')
    clock = iter(range(100))
    monkeypatch.setattr(baselines.time, 'monotonic', lambda: 4.0 * next(clock))
    rows = [{'tokens': np.array([number])} for number in range(50)]
    found = list(in_time(iter(rows), 50, seconds=60))
    assert [int(row['tokens'][0]) for row in found] == list(range(15))
    assert 'unigram and bigram: 2 of 50 rows are counted' in caplog.text
    assert 'fitted on 15 of 50 rows: 60 s have passed' in caplog.text
