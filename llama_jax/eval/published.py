"""What the Llama papers and model cards report, by preset, task and metric; and ours set beside it.

Scores are fractions, as ours are. The name of a preset means the pre-trained model; `_chat` (Llama 2) and `_instruct`
are the tuned ones. Numbers of one model differ between harnesses by more than between models, so a score whose prompt
or metric was another than ours is marked, and where sources differ all are listed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError, did_you_mean
from llama_jax.eval.published_tables import MMLU_MODELS, MMLU_SUBJECTS, TABLES


@dataclasses.dataclass(frozen=True)
class PublishedScore:
    """One number of a paper.

    Attributes:
      model: preset, or preset with `_chat` or `_instruct`.
      task: our name, also of tasks that are not here (squad, ...).
      metric: our name.
      num_fewshot: examples in the prompt.
      value: as a fraction of 1.
      source: document and table.
      same_protocol: False where prompt or metric were other than ours.
    """

    model: str
    task: str
    metric: str
    num_fewshot: int
    value: float
    source: str
    same_protocol: bool = True


def _read_tables() -> tuple[PublishedScore, ...]:
    scores = []
    for source, columns, body in TABLES:
        keys = [re.fullmatch(r'([^/]+)/(.+)/(\d+)(\*?)', column) for column in columns.split()]
        for line in body.strip().split('\n'):
            model, *values = line.split()
            for key, value in zip(keys, values, strict=True):
                assert key, columns
                task, metric, shots, star = key.groups()
                if value != '-':
                    fraction = round(float(value) / 100, 6)
                    scores.append(PublishedScore(model, task, metric, int(shots), fraction, source, not star))
    for line in MMLU_SUBJECTS.strip().split('\n'):
        subject, *values = line.split()
        for model, value in zip(MMLU_MODELS, values, strict=True):
            scores.append(
                PublishedScore(
                    model, 'mmlu', f'acc/{subject}', 5, round(float(value) / 100, 6), 'LLaMA paper, Table 16'
                )
            )
    return tuple(scores)


PUBLISHED: tuple[PublishedScore, ...] = _read_tables()


def published_scores(model: str) -> list[PublishedScore]:
    """All scores of a model, in the order of the papers.

    Raises:
      InputError: nothing was published for this name; offers the nearest.
    """
    if scores := [score for score in PUBLISHED if score.model == model]:
        return scores
    models = sorted({score.model for score in PUBLISHED})
    raise InputError(f'no published scores of {model!r}; {did_you_mean(model, models)}')


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One of our scores beside a published one.

    Attributes:
      published: theirs.
      ours: our score.
      num_items: it was measured on.
      interval: where the true score lies with a confidence of 95 %, for scores that are shares of items; else None.
      num_fewshot: ours; None where the results do not say.
    """

    published: PublishedScore
    ours: float
    num_items: int
    interval: tuple[float, float] | None
    num_fewshot: int | None

    @property
    def difference(self) -> float:
        """Ours less theirs."""
        return self.ours - self.published.value

    @property
    def same_protocol(self) -> bool:
        """Whether prompt, metric and number of examples agree, as far as known."""
        return self.published.same_protocol and self.num_fewshot in (None, self.published.num_fewshot)


def binomial_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` items; holds its confidence also near 0 and 1."""
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def compare(model: str, results: Mapping[str, Mapping[str, Any]]) -> list[Comparison]:
    """Our results beside what was published.

    Args:
      model: whose scores, such as 'llama2_7b'.
      results: {task: {metric: value, 'n': items, 'num_fewshot': examples, 'num_samples': texts
        generated for an item (both optional)}}, as in `results.json`.

    Returns:
      Every pair of the same task and metric; where some of a metric have our number of examples, only those.

    Raises:
      InputError: nothing was published for the model.
    """
    rows = []
    for task, metrics in results.items():
        shots = metrics.get('num_fewshot')
        pairs = [s for s in published_scores(model) if s.task == task and s.metric in metrics]
        matching = {s.metric for s in pairs if s.num_fewshot == shots}
        for score in pairs:
            if score.metric in matching and score.num_fewshot != shots:
                continue
            value, count = float(metrics[score.metric]), int(metrics['n'])
            share = is_share(score.metric, int(metrics.get('num_samples', 1)))
            interval = binomial_interval(value, count) if share and count else None
            rows.append(Comparison(score, value, count, interval, shots))
    return rows


def is_share(metric: str, num_samples: int = 1) -> bool:
    """Whether a metric is a mean of zeros and ones over all n items: only then n says how sure it is.

    Not over a group of them, not a mean of groups (acc_macro), not of what several samples of an item give each.

    Args:
      metric: our name.
      num_samples: texts generated for an item.
    """
    once = (
        r'acc|acc_norm|acc_bytes|acc_answer|exact_match(_flexible|_boxed)?|em_paper|pct_stereotype|pass@1|mc1'
        r'|rouge1_acc|rougeL_acc|toxic'
    )
    return bool(re.fullmatch(r'maj1@\d+' if num_samples > 1 else once, metric))


def to_markdown(rows: Sequence[Comparison]) -> str:
    """A table of percentages, one comparison a line; '*' where the protocols differ."""
    lines = [
        '| task | metric | shots | n | ours (95 % interval) | published | difference | source |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        theirs = row.published
        shots = str(theirs.num_fewshot)
        if row.num_fewshot not in (None, theirs.num_fewshot):
            shots = f'{row.num_fewshot} (published: {theirs.num_fewshot})'
        interval = (
            ' ({:.1f} to {:.1f})'.format(*(100 * bound for bound in row.interval)) if row.interval else ''
        )
        lines.append(
            f'| {theirs.task} | {theirs.metric} | {shots} | {row.num_items} | {100 * row.ours:.1f}{interval} '
            f'| {100 * theirs.value:.1f} | {100 * row.difference:+.1f}{"" if row.same_protocol else "*"} '
            f'| {theirs.source} |'
        )
    if not all(row.same_protocol for row in rows):
        lines += ['', '\\* Prompt, metric or number of examples differ; the difference says little.']
    return '\n'.join(lines) + '\n'
