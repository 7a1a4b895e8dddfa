import inspect
import time

import grain
import numpy as np
import pytest

from llama_jax.data.mixture import Skip, Stage, _Shuffled, mix
from llama_jax.errors import InputError


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


SLOW = pytest.mark.slow
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


@pytest.mark.parametrize(
    'size',
    [
        1,
        2,
        3,
        255,
        256,
        257,
        258,
        65_537,
        *(pytest.param(n, marks=SLOW) for n in (65_535, 65_536, 65_538, 262_145)),
    ],
)
def test_every_pass_is_a_permutation(size):
    shuffled = _Shuffled(range(size), seed=2**32 - 1)
    draw = inspect.unwrap(_Shuffled.find)  # without the checks of its signature, which take longer
    for number in (0, 1):
        drawn = np.array([draw(shuffled, i) for i in range(number * size, (number + 1) * size)])
        np.testing.assert_array_equal(np.sort(drawn), np.arange(size))
        if size > 1000:
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
        ((3, 3), [1, -1], 'a data weight is -1'),
        ((3, 3), [0, 0], 'all data weights are 0'),
        ((3, 3), [1, float('nan')], 'a data weight is nan'),
    ],
)
def test_what_cannot_be_mixed_is_refused(sizes, weights, message):
    with pytest.raises(InputError, match=message):
        mix(sources(*sizes), weights, seed=0)


@pytest.mark.parametrize('first', [7, 100_000, 10**9])
def test_every_prefix_of_every_stage_has_its_weights(first):
    stages = [
        Stage(first, (0.001, 0.999, 0)),
        Stage(first + 100_000, (1, 1, 1)),
        Stage(first + 10**9, (0, 0, 3)),
    ]
    mixed = mix(sources(5, 70, 900), [67, 15, 4.5], seed=0, stages=stages)
    starts, weights = (
        [0, first, first + 100_000, first + 10**9],
        [[67, 15, 4.5], *(stage.weights for stage in stages)],
    )
    for start, end, given in zip(starts, [*starts[1:], 10**12], weights, strict=True):
        share, before = np.array(given) / sum(given), np.array(mixed.seen(start))
        lengths = {*range(1, min(end - start, 300)), end - start, (end - start) // 3, (end - start) // 7 * 5}
        for length in lengths:
            drift = np.array(mixed.seen(start + length)) - before - length * share
            assert np.abs(drift).max() < 2, (start, length)
    # What is counted is what is drawn: every source in its order, none of its rows twice in a pass.
    drawn = [mixed.find(i) for i in range(max(0, first - 200), first + 200)]
    counts = mixed.seen(max(0, first - 200))
    for source, place in drawn:
        assert place == counts[source]
        counts[source] += 1
    assert counts == mixed.seen(first + 200)
    assert all(mixed.find(first + 10**9 + i)[0] == 2 for i in range(100))


def test_a_million_rows_of_llamas_mixture():
    mixed = mix(sources(*range(1000, 8000, 1000)), LLAMA, seed=0)
    counts = np.array([mixed.seen(n) for n in range(1, 1_000_001, 97)])
    drift = np.abs(counts - np.arange(1, 1_000_001, 97)[:, None] * (np.array(LLAMA) / sum(LLAMA)))
    assert drift.max() < 2


def test_rows_that_are_left_out_are_those_of_the_steps():
    stages = [Stage(50, (1, 3))]
    whole = mix(sources(40, 70), [2, 1], seed=3, stages=stages)
    without = mix(sources(40, 70), [2, 1], seed=3, stages=stages, skips=[Skip(20, 6), Skip(70, 30)])
    begin = [without[i] for i in range(20)]
    assert begin == [whole[i] for i in range(20)]
    # Behind what is left out the stage begins at the same step, six rows of the stream later.
    assert [without.find(i)[0] for i in range(50, 54)] == [whole.find(i)[0] for i in range(50, 54)]
    plain = mix(sources(40, 70), [2, 1], seed=3)
    left_out = mix(sources(40, 70), [2, 1], seed=3, skips=[Skip(20, 6), Skip(70, 30)])
    assert [left_out[i] for i in range(20, 70)] == [plain[i] for i in range(26, 76)]
    assert [left_out[i] for i in range(70, 90)] == [plain[i] for i in range(106, 126)]
    for count in (0, 1, 19, 20, 21, 69, 70, 71, 200):
        drawn = [left_out.find(i)[0] for i in range(count)]
        assert left_out.seen(count) == [drawn.count(0), drawn.count(1)]
        drawn = [without.find(i)[0] for i in range(count)]
        assert without.seen(count) == [drawn.count(0), drawn.count(1)]


def test_the_papers_epochs():
    """LLaMA paper, Table 1: the epochs of 1.4T tokens; unique tokens are what it says by them, to two digits."""
    unique = np.array([853, 198, 98, 26, 28, 33, 27]) * 10**9
    mixed = mix(sources(*(unique // 2048).tolist()), LLAMA, seed=0)
    published = [1.10, 1.06, 0.64, 2.45, 2.23, 1.06, 1.03]
    np.testing.assert_allclose(mixed.epochs(1_400_000_000_000 // 2048), published, rtol=0.025)


def test_a_large_source_and_a_far_row_take_no_longer():
    mixed = mix(sources(7_300_000_000, 3), [5, 1], seed=0)
    seconds = []
    for i in range(200):
        begin = time.process_time()
        mixed.find_row(10**12 + i)
        seconds.append(time.process_time() - begin)
    assert (
        np.median(seconds) < 1e-3
    )  # 20 us without the checks of signatures; a loop over rows would take hours
    assert 0 <= mixed.find_row(10**12)[1] < 7_300_000_000
