"""How well something orders pairs of answers as people did, beside rules that know nothing of what they say."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from llama_jax.data.loader import PaddedRows, batches
from llama_jax.data.preferences import EncodedPair, PreferenceRows, collate_preferences
from llama_jax.types import PreferenceBatch

_MAX_WORDS, _MAX_PAIRS = 2000, 20_000


def answer_figures(
    step: Callable[[PreferenceBatch], Any],
    rows: PreferenceRows,
    target: PreferenceBatch,
    pause: Callable[[], None] = lambda: None,
) -> Float[np.ndarray, 'pairs 2']:
    """A figure of each answer, such as its score; NaN of pairs that no row holds.

    Args:
      step: batch -> [B, P, 2], the same on all processes.
      rows: of the pairs.
      target: the abstract batch with its shardings.
      pause: called after each batch; may raise.
    """
    batch_size, found = target.tokens.shape[0], np.full((len(rows.pairs), 2), np.nan)
    padded = PaddedRows(rows, batch_size)
    for number, batch in enumerate(batches(padded, target, collate=collate_preferences)):
        figures = np.asarray(step(batch), np.float64)
        for place in range(batch_size):
            row = number * batch_size + place
            if row < len(rows):
                pairs = rows.numbers(row)
                found[pairs] = figures[place, : len(pairs)]
        pause()
    return found


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Pairs and the figures that their answers were given; those without are left out.

    Attributes:
      figures: of the preferred answer and of the other.
      margins: of the data.
      lengths: tokens of both answers.
      safe: of both: 1, 0, or -1 where that is not known.
    """

    figures: Float[np.ndarray, 'pairs 2']
    margins: Float[np.ndarray, ' pairs']
    lengths: Integer[np.ndarray, 'pairs 2']
    safe: Integer[np.ndarray, 'pairs 2']


def judge(pairs: Sequence[EncodedPair], figures: Float[np.ndarray, 'pairs 2']) -> Judgement:
    """Pairs with their figures, those without an answer or a figure left out."""
    kept = [i for i, pair in enumerate(pairs) if None not in pair.answers and np.all(np.isfinite(figures[i]))]
    answers: list[Any] = [pairs[i].answers for i in kept]
    return Judgement(
        figures[kept],
        np.array([pairs[i].margin for i in kept], float),
        np.array([[len(a.tokens) for a in both] for both in answers], int).reshape(-1, 2),
        np.array([[a.safe for a in both] for both in answers], int).reshape(-1, 2),
    )


def preference_report(
    found: Judgement, train: Sequence[EncodedPair] = (), held_out: Sequence[EncodedPair] = ()
) -> dict:
    """Accuracy in all, by the data's margin and by the difference of lengths; calibration; rules beside it.

    Args:
      found: what is judged.
      train: pairs that a bag of words is fitted to.
      held_out: pairs that it is to order.
    """
    right = _right(found.figures)
    longer = found.lengths[:, 0] - found.lengths[:, 1]
    report: dict[str, Any] = {
        'pairs': len(right),
        'accuracy': _mean(right),
        'standard_error': math.sqrt(0.25 / max(1, len(right))),
        'accuracy_by_margin': {
            f'{m:g}': _mean(right[found.margins == m]) for m in sorted(set(found.margins))[:20]
        },
        'gap_by_margin': {
            f'{m:g}': _mean((found.figures[:, 0] - found.figures[:, 1])[found.margins == m])
            for m in sorted(set(found.margins))[:20]
        },
        'accuracy_by_length_difference': _by_quarter(longer, right),
        'calibration_error': calibration_error(found.figures[:, 0] - found.figures[:, 1]),
        'mean': _mean(found.figures.ravel()),
        'std': float(np.std(found.figures)) if len(right) else math.nan,
        'longer_is_better': _mean(0.5 * (1 + np.sign(longer))),
    }
    unsafe = found.figures[found.safe == 0]
    if len(unsafe):
        report['recall_of_unsafe'] = _mean(unsafe < 0)
    if train and held_out:
        report['bag_of_words'] = bag_of_words(train, held_out)
    return report


def judged_report(pairs: Sequence[EncodedPair], figures: Float[np.ndarray, 'pairs 2']) -> dict[str, Any]:
    """How figures of answers that were judged alone part the good from the others.

    Args:
      pairs: of one answer each, at its side.
      figures: NaN where no row held the answer.

    Returns:
      'above': how often a good answer has the larger figure, of all good with all others (the area under ROC);
      'longer_is_better': the same of lengths; the number and the mean figure of both kinds. NaN where one is missing.
    """
    by_side: list[np.ndarray] = []
    for side in range(2):
        numbers = [i for i, pair in enumerate(pairs) if pair.answers[side] is not None]
        lengths = [len(answer.tokens) for i in numbers if (answer := pairs[i].answers[side])]
        found = np.stack([figures[numbers, side], np.array(lengths, float)], axis=-1)
        by_side.append(found[np.isfinite(found[:, 0])])
    good, others = by_side
    return {
        'answers': len(good) + len(others),
        'good': len(good),
        'above': _share_above(good[:, 0], others[:, 0]),
        'longer_is_better': _share_above(good[:, 1], others[:, 1]),
        'mean_good': _mean(good[:, 0]),
        'mean_others': _mean(others[:, 0]),
    }


def _share_above(first: np.ndarray, second: np.ndarray) -> float:
    """How often one of the first is larger than one of the second; half for ties."""
    ordered = np.sort(second)
    below, not_above = (np.searchsorted(ordered, first, side) for side in ('left', 'right'))
    return _mean(0.5 * (below + not_above) / len(second)) if len(second) else math.nan


def calibration_error(differences: Float[np.ndarray, ' pairs'], num_bins: int = 10) -> float:
    """Mean distance of sigmoid(difference), taken as the probability that the answer is the better one, from the share.

    Each pair counts in both orders, so that half of all answers are the better ones.
    """
    both = np.concatenate([differences, -differences])
    probability = 0.5 * (1 + np.tanh(both / 2))
    better = np.repeat([1.0, 0.0], len(differences))
    bins = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    error = 0.0
    for number in np.unique(bins):
        chosen = bins == number
        error += np.mean(chosen) * abs(np.mean(probability[chosen]) - np.mean(better[chosen]))
    return float(error)


def bag_of_words(train: Sequence[EncodedPair], held_out: Sequence[EncodedPair]) -> float:
    """Accuracy of a logistic regression on the counts of tokens, which knows neither order nor prompt."""
    train = [pair for pair in train if None not in pair.answers][:_MAX_PAIRS]
    held_out = [pair for pair in held_out if None not in pair.answers]
    tokens, counts = np.unique(
        np.concatenate([a.tokens for p in train for a in p.answers if a]), return_counts=True
    )
    words = {
        int(token): place
        for place, token in enumerate(tokens[np.argsort(-counts, kind='stable')][:_MAX_WORDS])
    }

    def features(pairs: Sequence[EncodedPair]) -> np.ndarray:
        made = np.zeros((len(pairs), len(words)), np.float32)
        for row, pair in enumerate(pairs):
            for answer, sign in zip(pair.answers, (1, -1), strict=True):
                for token in answer.tokens if answer else ():
                    if (place := words.get(int(token))) is not None:
                        made[row, place] += sign
        return np.sign(made) * np.log1p(np.abs(made))

    x, weights = features(train), np.zeros(len(words), np.float32)
    rate = 4.0 / max(1.0, float(np.linalg.norm(x, 2)) ** 2 / len(x) + 0.04)
    for _ in range(300):  # of -log sigmoid(w x) with a small penalty, whose curvature bounds the rate
        miss = 0.5 * (1 - np.tanh(x @ weights / 2))
        weights += rate * (x.T @ miss / len(x) - 0.01 * weights)
    return _mean(0.5 * (1 + np.sign(features(held_out) @ weights)))


def folded_bag_of_words(pairs: Sequence[EncodedPair], num_folds: int = 5) -> dict[str, float]:
    """{'bag_of_words': accuracy}, of each fifth of the prompts by a fit to the others; {} where there are too few."""
    folds: list[list[EncodedPair]] = [[] for _ in range(num_folds)]
    for pair in pairs:
        if None not in pair.answers:
            folds[hashlib.sha256(pair.prompt.tobytes()).digest()[0] % num_folds].append(pair)
    if sum(map(bool, folds)) < 2:
        return {}
    right = 0.0
    for number, held_out in enumerate(folds):
        others = [pair for other, fold in enumerate(folds) if other != number for pair in fold]
        right += len(held_out) * bag_of_words(others, held_out) if held_out else 0.0
    return {'bag_of_words': right / sum(map(len, folds))}


def _right(figures: Float[np.ndarray, 'pairs 2']) -> Float[np.ndarray, ' pairs']:
    return 0.5 * (1 + np.sign(figures[:, 0] - figures[:, 1]))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _by_quarter(longer: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Accuracy by how many tokens the preferred answer is longer, in four parts of like size."""
    if not len(right):
        return {}
    edges = np.unique(np.quantile(longer, [0, 0.25, 0.5, 0.75, 1]).round().astype(int))
    parts = {}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        is_last = high == edges[-1]
        chosen = (longer >= low) & ((longer <= high) if is_last else (longer < high))
        parts[f'{low} to {high if is_last else high - 1}'] = _mean(right[chosen])
    return parts or {f'{edges[0]}': _mean(right)}
