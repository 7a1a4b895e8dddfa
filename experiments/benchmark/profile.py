"""Where the time of a call goes: the kernels that take most of it."""

import collections
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

# Of a kernel's name: what tells one copy of it from another.
_COPY = re.compile(r'[._]\d+$')
# On a CPU kernels share their lines with the threads' own doings.
_THREADS = re.compile(r'::|^end: |^\$|^(while|call|conditional)\b')


def largest_kernels(call: Callable[[], Any], number: int = 12) -> dict[str, float]:
    """Share of each of the kernels with the longest times, in that of all; those that differ by number are one.

    Args:
      call: ends when the device has ended.
      number: of kernels that are named.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        planes = [
            plane
            for file in Path(folder).rglob('*.xplane.pb')
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        ]
        of_devices = [plane for plane in planes if plane.name.startswith('/device:')]
        times = _times(of_devices) or _times(planes)
    total = sum(times.values())
    return {name: time / total for name, time in times.most_common(number)}


def _times(planes: Iterable[Any]) -> collections.Counter[str]:
    times: collections.Counter[str] = collections.Counter()
    for line in (line for plane in planes for line in plane.lines):
        # A GPU's kernels are on its streams, a TPU's are its operations; other lines sum them up.
        if re.match('Stream|XLA Ops|tf_XLA', line.name or ''):
            for event in line.events:
                if not _THREADS.search(event.name):
                    times[_COPY.sub('', event.name)] += event.duration_ns
    return times


def show_kernels(call: Callable[[], Any]) -> dict[str, str]:
    """Prints the largest kernels; as figures, which are 'SHARE NAME' by rank."""
    shares = largest_kernels(call)
    for name, share in shares.items():
        print(f'{share:7.1%}  {name[:100]}')
    return {f'kernel_{rank}': f'{share:.1%} {name}' for rank, (name, share) in enumerate(shares.items(), 1)}
