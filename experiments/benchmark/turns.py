"""Contenders that take turns, so that a machine whose speed drifts is equally unkind to all; medians and ratios."""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.benchmark.profile import show_kernels
from llama_jax.errors import error_line

Turn = Callable[[], Any]  # what a contender does in its turn; ends when the work has ended


@dataclasses.dataclass(frozen=True)
class Contender:
    """Who takes turns.

    Attributes:
      make: its turn.
      amount: of what is counted in a turn.
      is_peer: it is left out, and said so, where it cannot run.
    """

    make: Callable[[], Turn]
    amount: float
    is_peer: bool = False


@dataclasses.dataclass(frozen=True)
class Rate:
    """What was done in a second: of the clock, and of this process's CPU time."""

    clock: float
    cpu: float


def has_peer(name: str, *packages: str) -> bool:
    """Whether all packages that a peer needs are installed; where one is not, a line says that it is left out."""
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if missing:
        lacking = ' and '.join(missing)
        print(f"{name}: left out for want of {lacking}; pip install 'llama_jax[parity]'", flush=True)
    return not missing


def compare(
    part: str, unit: str, contenders: Mapping[str, Contender], rounds: int, profile: bool = False
) -> dict[str, list[Rate]]:
    """What each does in a second, by turn, in a table; a peer that cannot run here is left out and said so."""
    turns: dict[str, Turn] = {}
    for name, contender in contenders.items():
        start = time.perf_counter()
        try:
            turns[name] = contender.make()
            turns[name]()
            print(f'{name}: first turn after {time.perf_counter() - start:.1f} s', flush=True)
        except Exception as error:  # it must not hide our own figures
            if not contender.is_peer:
                raise
            turns.pop(name, None)
            print(f'{name}: left out, {type(error).__name__}: {error_line(error)}')
    rates: dict[str, list[Rate]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            turn()
            seconds = time.perf_counter() - start, time.process_time() - cpu_start
            rates[name].append(Rate(*(contenders[name].amount / each for each in seconds)))
    print(f'{part:16}{unit:>16}{"min":>10}{"max":>10}{"per CPU second":>16}')
    for name, found in rates.items():
        clock = [rate.clock for rate in found]
        print(
            f'{name:16}{statistics.median(clock):16,.2f}{min(clock):10,.2f}{max(clock):10,.2f}'
            f'{statistics.median(rate.cpu for rate in found):16,.2f}',
            flush=True,
        )
    if profile:
        last = [name for name in turns if not contenders[name].is_peer][-1]
        show_kernels(turns[last], contenders[last].amount / median(rates[last]))
    return rates


def of(part: str, rates: Mapping[str, Sequence[Rate]]) -> dict[str, float]:
    """The medians as figures."""
    return {f'{part}_{name}_per_second': median(found) for name, found in rates.items()}


def median(rates: Sequence[Rate]) -> float:
    """Of the clock."""
    return statistics.median(rate.clock for rate in rates)


def ratio(name: str, rates: Mapping[str, Sequence[Rate]], first: str, second: str) -> dict[str, float]:
    """The median of the ratios of turns, their spread, and the median of those of CPU seconds."""
    pairs = list(zip(rates[first], rates[second], strict=True))
    ratios = [a.clock / b.clock for a, b in pairs]
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
    print(f'{name}: {middle:.2f} ({least:.2f} to {most:.2f}), of CPU seconds {cpu:.2f}\n', flush=True)
    return {name: middle, f'{name}_min': least, f'{name}_max': most, f'{name}_of_cpu': cpu}
