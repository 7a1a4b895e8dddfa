"""Sources mixed by weight, for ever, so that a row is a pure function of its index.

Each source is shuffled and repeated before it is mixed. The other way round, shuffling the mix would draw
with replacement and drift from the weights.
"""

import bisect
import dataclasses
import fractions
import hashlib
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain

from llama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Stage:
    """Weights from a row on.

    Attributes:
      first_row: the row that is the first drawn by them; more than 0.
      weights: one for each source, in any unit.
    """

    first_row: int
    weights: tuple[float | int, ...]


@dataclasses.dataclass(frozen=True)
class Skip:
    """Rows that are left out.

    Attributes:
      first_row: in whose place the row behind them comes.
      num_rows: how many.
    """

    first_row: int
    num_rows: int


def mix(
    sources: Sequence[Any],
    weights: Sequence[float | int] | None,
    seed: int,
    *,
    stages: Sequence[Stage] = (),
    skips: Sequence[Skip] = (),
) -> 'Mixture':
    """An endless data set whose row `i` depends on (sources, weights, stages, skips, seed, i) only.

    Among the first n rows of a stage source j has n * weights[j] / sum(weights), to within two rows, however large n
    is. Every source is reshuffled each time it is used up. Its order depends on the seed and on its place in the list;
    where it is prepared in units, on its fingerprint in place of that.

    Args:
      sources: random access to rows, none empty.
      weights: how often each is drawn, in any unit, 0 is never; None: by the number of its rows.
      seed: any integer.
      stages: other weights from a row on.
      skips: rows that are left out. Both are counted in rows that are drawn.

    Raises:
      InputError: no source, an empty one, or weights that do not fit.
    """
    if not sources:
        raise InputError('no data source: name at least one')
    sizes = [len(source) for source in sources]
    if 0 in sizes:
        raise InputError(f'data source {sizes.index(0)} has no rows: give it text or leave it out')
    weights = sizes if weights is None else list(weights)
    for given in (weights, *(stage.weights for stage in stages)):
        _check_weights(given, len(sources))
    starts = [0, *(stage.first_row for stage in stages)]
    if any(first >= second for first, second in itertools.pairwise(starts)):
        raise InputError(f'weights begin at rows {starts}; each must be behind the one before')
    endless = []
    for place, source in enumerate(sources):
        own = source.fingerprint if getattr(source, 'in_units', False) else place
        endless.append(_Shuffled(source, _source_seed(seed, own)))
    jumps = _Jumps(skips)
    stream = _Stages([jumps(start) for start in starts], [weights, *(stage.weights for stage in stages)])
    return Mixture(endless, sizes, stream, jumps)


def _check_weights(weights: Sequence[float | int], count: int) -> None:
    if len(weights) != count:
        raise InputError(f'{len(weights)} weights for {count} data sources; give one each, or none for all')
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise InputError(f'a data weight is {weight}; each must be a positive number, or 0 for never')
    if not any(weights):
        raise InputError('all data weights are 0; one must be positive')


class Mixture:
    """What `mix` gives: random access, for ever."""

    def __init__(
        self, endless: Sequence['_Shuffled'], sizes: Sequence[int], stream: '_Stages', jumps: '_Jumps'
    ):
        self._endless, self._sizes, self._stream, self._jumps = endless, sizes, stream, jumps

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Any:
        source, place = self.find(index.__index__())
        return self._endless[source][place]

    def find(self, index: int) -> tuple[int, int]:
        """(source, how many rows of it come before) of row `index`."""
        return self._stream[self._jumps(index)]

    def find_row(self, index: int) -> tuple[int, int]:
        """(source, row of it) of row `index`."""
        source, place = self.find(index)
        return source, self._endless[source].find(place)

    def seen(self, num_rows: int) -> list[int]:
        """Rows of each source among the first so many."""
        total = [0] * len(self._sizes)
        for begin, end in self._jumps.spans(num_rows):
            before, after = self._stream.counts(begin), self._stream.counts(end)
            total = [one + b - a for one, a, b in zip(total, before, after, strict=True)]
        return total

    def epochs(self, num_rows: int) -> list[float]:
        """How often each source is seen in the first so many rows."""
        return [seen / size for seen, size in zip(self.seen(num_rows), self._sizes, strict=True)]


class _Jumps:
    """Row that is drawn -> row of the stream in which none is left out."""

    def __init__(self, skips: Sequence[Skip]):
        self._firsts = [skip.first_row for skip in skips]
        if any(first >= second for first, second in itertools.pairwise(self._firsts)):
            raise InputError(f'rows are left out at {self._firsts}; each must be behind the one before')
        self._jumps = [0, *itertools.accumulate(skip.num_rows for skip in skips)]

    def __call__(self, row: int) -> int:
        return row + self._jumps[bisect.bisect_right(self._firsts, row)]

    def spans(self, num_rows: int) -> list[tuple[int, int]]:
        """[begin, end) of the stream that the first so many rows are."""
        cuts = [0, *(first for first in self._firsts if 0 < first < num_rows), num_rows]
        return [(self(a), self(a) + b - a) for a, b in itertools.pairwise(cuts)]


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
        return self._rows[self.find(index.__index__())]

    def find(self, index: int) -> int:
        """The row that is drawn."""
        number, place = divmod(index, self._last + 1)
        seed = (self._seed + number) % 2**32
        while True:
            place = grain.experimental.index_shuffle(place, max_index=self._max_index, seed=seed, rounds=4)
            if place <= self._last:
                return place


class _Stages:
    """Row of the stream -> (source, index in it), by the weights of the stage that it is in."""

    def __init__(self, starts: Sequence[int], weights: Sequence[Sequence[float | int]]):
        self._starts = starts
        self._proportions = [_Proportions(given) for given in weights]
        self._before = [[0] * len(weights[0])]  # rows of each source in the stages before
        for number, (start, end) in enumerate(itertools.pairwise(starts)):
            drawn = self._proportions[number].counts(end - start)
            self._before.append([a + b for a, b in zip(self._before[-1], drawn, strict=True)])

    def __getitem__(self, row: int) -> tuple[int, int]:
        stage = bisect.bisect_right(self._starts, row) - 1
        source, place = self._proportions[stage][row - self._starts[stage]]
        return source, self._before[stage][source] + place

    def counts(self, num_rows: int) -> list[int]:
        """Rows of each source among the first so many."""
        stage = bisect.bisect_right(self._starts, num_rows) - 1
        drawn = self._proportions[stage].counts(num_rows - self._starts[stage])
        return [a + b for a, b in zip(self._before[stage], drawn, strict=True)]


class _Proportions:
    """Index in the mix -> (source, index in it), exactly by weight.

    Each source in turn takes its share of what the sources before it left. `grain.MapDataset.mix` does the
    same, but rounds weights to 1 % of the smallest: for 0.7 and 0.3 it is a whole row off after 3,000.
    """

    def __init__(self, weights: Sequence[float | int]):
        parts = [fractions.Fraction(weight).limit_denominator(10**6) for weight in weights]
        if any(weight and not part for weight, part in zip(weights, parts, strict=True)):
            # Below 1e-6: keep the float's exact value.
            parts = [fractions.Fraction(weight) for weight in weights]
        unit = math.lcm(*(part.denominator for part in parts))
        self._shares = [int(part * unit) for part in parts]

    def counts(self, num_rows: int) -> list[int]:
        """Rows of each source among the first so many."""
        remaining, left, found = sum(self._shares), num_rows, []
        for share in self._shares[:-1]:
            rest = left * (remaining - share) // remaining if remaining else 0
            found.append(left - rest)
            left, remaining = rest, remaining - share
        return [*found, left]

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


def _source_seed(seed: int, source: int | str) -> int:
    """Of a source, by its place or its fingerprint.

    Seeds are far apart: a pass adds its number to them, so neighbours would repeat each other's order.
    """
    return int.from_bytes(hashlib.sha256(f'{seed} {source}'.encode()).digest()[:4], 'big')
