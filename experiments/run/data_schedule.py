"""What a run reads at which step: weights that change on the way, steps whose rows are left out.

data.weights   67,15,4.5,4.5,4.5,2.5,2; 200000: 50,25,17,8,0,0,0     from step 200,000 on the second
data.skip      11000-11200,15000                                      the rows that these steps would read
"""

import dataclasses
import math
import re

from ml_collections import ConfigDict

from experiments.run.config_file import split_list
from llama_jax.data.datasets import PretrainData
from llama_jax.data.mixture import Skip, Stage
from llama_jax.errors import InputError

Weights = tuple[float, ...] | None  # None: by size


@dataclasses.dataclass(frozen=True)
class DataSchedule:
    """Steps count from 1, as they are logged.

    Attributes:
      weights: of the first step on.
      stages: (step, weights from it on).
      skips: (first, last) step whose rows are left out.
    """

    weights: Weights
    stages: tuple[tuple[int, tuple[float, ...]], ...] = ()
    skips: tuple[tuple[int, int], ...] = ()

    def in_rows(self, batch_size: int) -> tuple[list[Stage], list[Skip]]:
        """The same counted in rows."""
        stages = [Stage((step - 1) * batch_size, weights) for step, weights in self.stages]
        skips = [
            Skip((first - 1) * batch_size, (last - first + 1) * batch_size) for first, last in self.skips
        ]
        return stages, skips

    def weights_at(self, step: int) -> Weights:
        """Those that a step's rows are drawn by."""
        return next((weights for first, weights in reversed(self.stages) if first <= step), self.weights)

    def first_difference(self, other: 'DataSchedule') -> float:
        """The first step that reads other rows by `other`; infinity where none does."""
        begins = sorted({1, *(step for step, _ in (*self.stages, *other.stages))})
        changed = [step for step in begins if self.weights_at(step) != other.weights_at(step)]
        skipped = {first for first, _ in set(self.skips) ^ set(other.skips)}
        return min([*changed, *skipped], default=math.inf)


def parse_schedule(weights: str, skip: str, num_sources: int = 0) -> DataSchedule:
    """What `data.weights` and `data.skip` say.

    Args:
      weights: of that key.
      skip: of that key.
      num_sources: that each stage has a weight for; 0: not checked.

    Raises:
      InputError: they are not written so.
    """
    first, *later = weights.split(';')
    stages = []
    for part in later:
        step, colon, text = part.partition(':')
        if not (colon and step.strip().isdecimal() and int(step) > (stages[-1][0] if stages else 1)):
            raise InputError(
                f'--config.data.weights={weights!r}: {part.strip()!r} is no later stage; write STEP: WEIGHTS behind a '
                'semicolon, each step above the one before, the first above 1'
            )
        stages.append((int(step), _parse_weights(text, weights, num_sources)))
    if stages and not split_list(first):
        raise InputError(
            f'--config.data.weights={weights!r} has later stages and no weights to begin with; give them'
        )
    begin = _parse_weights(first, weights, num_sources) if split_list(first) else None
    return DataSchedule(begin, tuple(stages), _parse_skip(skip))


def _parse_weights(text: str, whole: str, num_sources: int) -> tuple[float, ...]:
    given = f'--config.data.weights={whole!r}'
    try:
        weights = tuple(float(weight) for weight in split_list(text))
    except ValueError as error:
        raise InputError(f'{given}: {error}; give numbers or none') from error
    if num_sources and len(weights) != num_sources:
        raise InputError(
            f'{given} are {len(weights)} weights for {num_sources} data sources; give one each, or none for all '
            'by --config.data.weights='
        )
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise InputError(f'{given}: each must be a positive number, or 0 for never, and one not 0')
    return weights


def _parse_skip(text: str) -> tuple[tuple[int, int], ...]:
    skips: list[tuple[int, int]] = []
    for part in split_list(text):
        found = re.fullmatch(r'(\d+)(?:-(\d+))?', part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 < first <= last or (skips and first <= skips[-1][1]):
            raise InputError(
                f'--config.data.skip={text!r}: {part!r} are no steps; write FIRST-LAST by commas, each behind the one '
                'before'
            )
        skips.append((first, last))
    return tuple(skips)


def schedule_of(config: ConfigDict) -> DataSchedule:
    """That of a configuration.

    Raises:
      InputError: its keys are not written so, or do not fit its sources.
    """
    num_sources = len(split_list(config.data.train))
    return parse_schedule(config.data.get('weights', ''), config.data.get('skip', ''), num_sources)


def constant_weights(config: ConfigDict) -> Weights:
    """Weights that do not change on the way.

    Raises:
      InputError: they do.
    """
    schedule = schedule_of(config)
    if schedule.stages:
        raise InputError(
            f'--config.data.weights={config.data.weights!r} has later stages, which pretraining alone takes; give one'
        )
    return schedule.weights


def describe_mixture(data: PretrainData, num_rows: int) -> str:
    """How often so many rows go through each source."""
    parts = zip(data.names, data.train.seen(num_rows), data.train.epochs(num_rows), strict=True)
    return 'to be read: ' + ', '.join(
        f'{name} {seen / num_rows:.1%} of the rows, {epochs:.2f} epochs' for name, seen, epochs in parts
    )


def seen(data: PretrainData, num_rows: int) -> dict[str, float]:
    """The same as metrics, {'rows/SOURCE': ..., 'epochs/SOURCE': ...}; {} where there is one source."""
    if len(data.names) == 1:
        return {}
    counts = zip(data.names, data.train.seen(num_rows), data.train.epochs(num_rows), strict=True)
    return {
        f'{what}/{name}': float(value)
        for name, rows, epochs in counts
        for what, value in (('rows', rows), ('epochs', epochs))
    }
