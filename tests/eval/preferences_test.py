import jax
import numpy as np
import pytest

from llama_jax.data.preferences import Answer, EncodedPair, PreferenceRows
from llama_jax.eval.preferences import (
    answer_figures,
    bag_of_words,
    calibration_error,
    judge,
    judged_report,
    preference_report,
)
from llama_jax.eval.preferences_shown import describe_judged, describe_preferences, plot_preferences
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.types import PreferenceBatch
from tests.data.preferences_test import random_pairs

RNG = np.random.default_rng()  # other numbers each time


def answer(tokens) -> Answer:
    return Answer(np.array(tokens, np.int32), np.ones(len(tokens), bool))


def pair(better, worse, margin=0.0) -> EncodedPair:
    return EncodedPair(np.array([1, 2], np.int32), (answer(better), answer(worse)), float(margin))


def test_figures_come_back_to_their_pairs_however_rows_hold_them():
    pairs = random_pairs(13, seed=4)
    rows = PreferenceRows(pairs, 30)
    alone = Partitioner(make_mesh({}, jax.devices()[:1])).sharding()
    target = PreferenceBatch.abstract(4, 30, rows.num_pairs, alone, alone)
    # The figure of an answer is its last token.
    found = answer_figures(
        lambda batch: np.take_along_axis(
            np.asarray(batch.tokens)[:, None], np.asarray(batch.ends).reshape(4, 1, -1), axis=2
        ).reshape(batch.ends.shape),
        rows,
        target,
    )
    assert rows.too_long or np.all(np.isfinite(found))
    for number, one in enumerate(pairs):
        if number in rows.too_long:
            assert np.all(np.isnan(found[number]))
        else:
            np.testing.assert_array_equal(found[number], [a.tokens[-1] for a in one.answers if a])


def test_a_report_counts_by_hand():
    pairs = [pair([3] * 4, [4] * 2, 3), pair([3] * 2, [4] * 5, 3), pair([3], [4, 4], 1), pair([3], [4], 1)]
    figures = np.array([[2.0, 1], [0, 1], [1, 0], [1, 1]])  # right, wrong, right, equal
    report = preference_report(judge(pairs, figures))
    assert report['pairs'] == 4 and report['accuracy'] == 2.5 / 4
    assert report['accuracy_by_margin'] == {'1': 0.75, '3': 0.5}
    assert report['gap_by_margin'] == {'1': 0.5, '3': 0.0}
    assert report['longer_is_better'] == (1 + 0 + 0 + 0.5) / 4
    assert report['mean'] == figures.mean() and report['std'] == figures.std()
    figures[1] = np.nan  # no row held it
    assert preference_report(judge(pairs, figures))['pairs'] == 3


def test_answers_that_were_judged_alone_are_counted_by_hand():
    def alone(tokens, good):
        return EncodedPair(
            np.array([1], np.int32), (answer(tokens), None) if good else (None, answer(tokens))
        )

    pairs = [
        alone([3] * 4, True),
        alone([3], True),
        alone([4] * 2, False),
        alone([4], False),
        alone([4], False),
    ]
    figures = np.array([[2.0, 9], [0.5, 9], [9, 0.5], [9, 1.0], [9, np.nan]])
    report = judged_report(pairs, figures)
    assert report['answers'] == 4 and report['good'] == 2
    assert report['above'] == (1 + 1 + 0.5 + 0) / 4 and report['longer_is_better'] == (1 + 1 + 0 + 0.5) / 4
    assert report['mean_good'] == 1.25 and report['mean_others'] == 0.75
    assert '0.625  of 4 held-out answers, 2 of them good' in describe_judged(report)[0]


def test_losers_that_are_longer_by_construction_are_told_by_their_length():
    pairs = [pair([3] * n, [3] * (n + 1 + int(RNG.integers(4)))) for n in range(1, 20)]
    assert preference_report(judge(pairs, np.zeros((19, 2))))['longer_is_better'] == 0.0


def test_scores_that_are_what_they_say_are_calibrated():
    """Answers preferred as Bradley and Terry's model draws them."""
    gaps = RNG.normal(0, 2, size=20_000)
    preferred = RNG.random(20_000) < 1 / (1 + np.exp(-gaps))
    differences = np.where(preferred, gaps, -gaps)
    assert calibration_error(differences) < 0.02  # ten bins of some thousands: errors of 0.01
    assert calibration_error(3 * differences) > 0.05


def test_a_bag_of_words_tells_words_and_nothing_else():
    def some(words, number=400):
        return [pair(RNG.choice(words, 6), RNG.choice([5, 6, 7], 6)) for _ in range(number)]

    assert bag_of_words(some([2, 3, 5]), some([2, 3, 5], 100)) > 0.9
    assert bag_of_words(some([5, 6, 7]), some([5, 6, 7])) == pytest.approx(0.5, abs=0.13)  # 5 deviations


def test_a_report_is_shown_beside_the_papers(tmp_path):
    pairs = [
        pair([3] * int(RNG.integers(1, 9)), [4] * int(RNG.integers(1, 9)), float(i % 3)) for i in range(30)
    ]
    found = judge(pairs, RNG.normal(size=(30, 2)))
    lines = describe_preferences(preference_report(found, pairs, pairs))
    assert any('a bag of words' in line for line in lines) and any('71.0  74.7' in line for line in lines)
    plot_preferences(tmp_path / 'plot.png', found, 'score')
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
