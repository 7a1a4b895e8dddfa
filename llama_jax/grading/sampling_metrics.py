"""Metrics over several samples of one question: pass@k and the majority vote."""

import math
from collections import Counter
from collections.abc import Callable, Sequence


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (Codex), equation 1.

    Args:
      num_samples: n.
      num_right: c.
      k: at most n.
    """
    if not 0 <= num_right <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f'pass@{k} needs 0 <= right <= samples and k <= samples, got {num_right} of {num_samples}'
        )
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(answers: Sequence[str], invalid: str) -> str:
    """The most frequent answer; among equals the one given first; `invalid` ones do not vote (maj1@k, Minerva)."""
    votes = Counter(answer for answer in answers if answer != invalid)
    return votes.most_common(1)[0][0] if votes else invalid


def exact_match_scores(
    answers: Sequence[str], is_right: Callable[[str], bool], invalid: str, suffix: str = ''
) -> dict[str, float | str]:
    """How many answers to one question are right, whether their vote is (maj1@k of several), and what they voted for.

    Args:
      answers: extracted, one a sample.
      is_right: judges one.
      invalid: see `majority`.
      suffix: of the names of the scores: another way to extract answers.
    """
    vote = majority(answers, invalid)
    scores: dict[str, float | str] = {f'exact_match{suffix}': sum(map(is_right, answers)) / len(answers)}
    if len(answers) > 1:
        scores[f'maj1@{len(answers)}{suffix}'] = float(is_right(vote))
    return scores | {f'extracted{suffix}': vote}
