import inspect

import grain
import numpy as np
import pytest

from llama_jax.data.mixture import _Shuffled, mix
from llama_jax.types import InputError


class Numbers:
    """Rows that say where they come from: (source, index)."""

    seq_len, fingerprint, num_documents, num_tokens, num_bytes = 1, '', 1, 1, 1

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.source, range(self.size)[index]


def sources(*sizes):
    return [Numbers(source, size) for source, size in enumerate(sizes)]


LLAMA = [67, 15, 4.5, 4.5, 4.5, 2.5, 2]  # percent of tokens in LLaMA's pretraining, table 1 of the paper


@pytest.mark.parametrize(('weights', 'slack'), [([0.7, 0.3], 1), ([1, 1.005], 1), (LLAMA, 2)])
def test_every_prefix_has_its_weights(weights, slack):
    count = 20_000
    mixed = mix(sources(*[5000] * len(weights)), weights, seed=0)
    drawn = np.array([mixed[i][0] for i in range(count)])
    share = np.array(weights) / sum(weights)
    counts = np.cumsum(drawn[:, None] == np.arange(len(weights)), axis=0)
    drift = np.abs(counts - np.arange(1, count + 1)[:, None] * share)
    assert drift.max() < slack  # two sources are within one row; a longer chain rounds down twice


def test_each_pass_over_a_source_is_a_new_order_of_all_of_it():
    mixed = mix(sources(8, 8), [1, 1], seed=0)
    drawn = [mixed[i] for i in range(64)]
    for source in (0, 1):
        order = [index for s, index in drawn if s == source]
        passes = [tuple(order[i : i + 8]) for i in range(0, 32, 8)]
        assert all(sorted(one) == list(range(8)) for one in passes)
        assert len(set(passes)) > 1
    assert [i for s, i in drawn if s == 0] != [i for s, i in drawn if s == 1]


def test_of_65537_rows_each_is_drawn_once():
    size = 4**8 + 1
    shuffled = _Shuffled(range(size), seed=2**32 - 1)
    draw = inspect.unwrap(_Shuffled.__getitem__)  # without the checks of its signature, which take longer
    for number in (0, 1):
        drawn = np.array([draw(shuffled, i) for i in range(number * size, (number + 1) * size)])
        np.testing.assert_array_equal(np.sort(drawn), np.arange(size))
        assert abs(np.corrcoef(drawn, np.arange(size))[0, 1]) < 0.02


def test_the_order_is_that_of_grain():
    """Runs that were begun before go on with the rows that they have not seen."""
    sizes = {4**k + difference for k in range(1, 12) for difference in (-2, -1, 0, 1, 2)}
    for size in sorted(sizes - {4**k + 1 for k in range(8, 12)}):
        shuffled = _Shuffled(range(size), seed=7)
        theirs = grain.MapDataset.source(range(size)).shuffle(seed=7).repeat()
        for index in (0, size - 1, size, 5 * size + size // 3):
            assert shuffled[index] == theirs[index]


def test_row_is_a_function_of_its_index():
    first = mix(sources(3000, 700), [3, 1], seed=5)
    rows = [first[i] for i in range(500)]
    resumed = mix(sources(3000, 700), [3, 1], seed=5)
    assert [resumed[i] for i in range(200, 500)] == rows[200:]
    assert [resumed[i] for i in range(499, 199, -1)] == rows[:199:-1]
    assert [mix(sources(3000, 700), [3, 1], seed=6)[i] for i in range(500)] != rows
    assert first[10**12] == resumed[10**12]


def test_weights_default_to_size_and_small_sources_work():
    mixed = mix(sources(1, 3), None, seed=-1)
    drawn = [mixed[i] for i in range(40)]
    assert sum(source == 0 for source, _ in drawn) == 10
    assert mix(sources(1), None, seed=2**40)[123] == (0, 0)
    assert {mix(sources(3), [5], seed=0)[i] for i in range(3)} == {(0, 0), (0, 1), (0, 2)}
    assert mix(sources(2, 2), [1e-9, 1], seed=0)[5][0] == 1


@pytest.mark.parametrize(
    ('sizes', 'weights', 'message'),
    [
        ((), None, 'no data source'),
        ((3, 0), None, 'data source 1 has no rows'),
        ((3, 3), [1], '1 weights for 2 data sources'),
        ((3, 3), [1, 0], 'a data weight is 0'),
        ((3, 3), [1, float('nan')], 'a data weight is nan'),
    ],
)
def test_what_cannot_be_mixed_is_refused(sizes, weights, message):
    with pytest.raises(InputError, match=message):
        mix(sources(*sizes), weights, seed=0)
