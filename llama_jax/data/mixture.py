"""Sources mixed by weight, for ever, so that a row is a pure function of its index.

Each source is shuffled and repeated before it is mixed. The other way round, shuffling the mix would draw
with replacement and drift from the weights.
"""

import fractions
import hashlib
import math
import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain

from llama_jax.types import InputError


def mix(sources: Sequence[Any], weights: Sequence[float | int] | None, seed: int) -> grain.MapDataset:
    """An endless data set whose row `i` depends on (sources, weights, seed, i) only.

    Among the first n rows source j has n * weights[j] / sum(weights), to within two rows, however large n
    is. Every source is reshuffled each time it is used up.

    Args:
      sources: random access to rows, none empty.
      weights: how often each is drawn, in any unit; None: by the number of its rows.
      seed: any integer.

    Raises:
      InputError: no source, an empty one, or weights that do not fit.
    """
    if not sources:
        raise InputError('no data source: name at least one')
    sizes = [len(source) for source in sources]
    if 0 in sizes:
        raise InputError(f'data source {sizes.index(0)} has no rows: give it text or leave it out')
    weights = sizes if weights is None else list(weights)
    if len(weights) != len(sources):
        raise InputError(
            f'{len(weights)} weights for {len(sources)} data sources; give one each, or none for all'
        )
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(
                f'a data weight is {weight}; each must be a positive number (leave out an unused source)'
            )
    endless = [
        grain.MapDataset.source(_Shuffled(source, _source_seed(seed, i))) for i, source in enumerate(sources)
    ]
    return grain.MapDataset.select_from_datasets(endless, _Proportions(weights))


# Last indices for which grain's cipher has a bit too few: 4^k; below k = 8 it has 16 all the same.
_MISCOUNTED = frozenset(4**k for k in range(8, 32))


class _Shuffled:
    """A source for ever: row `i` is of pass `i // len(source)`, and every pass has an order of its own.

    The order is that of `grain.MapDataset.shuffle`, but where that is none: of 65,537 rows, for one, it never draws the
    last, and another one twice.
    """

    def __init__(self, rows: Any, seed: int):
        self._rows, self._seed = rows, seed
        self._last = len(rows) - 1
        # One index more has the bit; it stands for no row, and whoever lands there goes on to where it leads.
        self._max_index = self._last + (self._last in _MISCOUNTED)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Any:
        number, place = divmod(index.__index__(), self._last + 1)
        seed = (self._seed + number) % 2**32
        while True:
            place = grain.experimental.index_shuffle(place, max_index=self._max_index, seed=seed, rounds=4)
            if place <= self._last:
                return self._rows[place]


class _Proportions(grain.transforms.DatasetSelectionMap):
    """Index in the mix -> (source, index in it), exactly by weight.

    Each source in turn takes its share of what the sources before it left. `grain.MapDataset.mix` does the
    same, but rounds weights to 1 % of the smallest: for 0.7 and 0.3 it is a whole row off after 3,000.
    """

    def __init__(self, weights: Sequence[float | int]):
        parts = [fractions.Fraction(weight).limit_denominator(10**6) for weight in weights]
        if 0 in parts:  # below 1e-6: keep the float's exact value
            parts = [fractions.Fraction(weight) for weight in weights]
        unit = math.lcm(*(part.denominator for part in parts))
        self._shares = [int(part * unit) for part in parts]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        remaining = sum(self._shares)
        before, after = index, index + 1  # rows of the mix, then of what earlier sources left of it
        for source, share in enumerate(self._shares[:-1]):
            left_before = before * (remaining - share) // remaining
            left_after = after * (remaining - share) // remaining
            if left_after == left_before:  # row `index` is this source's
                return source, before - left_before
            before, after = left_before, left_after
            remaining -= share
        return len(self._shares) - 1, before


def _source_seed(seed: int, source: int) -> int:
    """Seeds far apart: a pass adds its number to them, so neighbours would repeat each other's order."""
    return int.from_bytes(hashlib.sha256(f'{seed} {source}'.encode()).digest()[:4], 'big')
