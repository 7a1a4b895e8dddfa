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


def show_kernels(call: Callable[[], Any], seconds: float, number: int = 12) -> dict[str, str]:
    """Prints the kernels that take longest; those that differ by a number are one.

    Args:
      call: ends when the device has ended.
      seconds: that it takes by itself, as a profile takes time of its own.
      number: of kernels that are named.

    Returns:
      Figures: 'SHARE NAME' by rank, in the time of all kernels, and the share of the call in which one runs.
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
    busy = f'{1e-9 * total / jax.local_device_count() / seconds:.1%}'
    print(f'{busy:>7}  of the time a kernel runs; of that')
    figures = {'kernels': busy}
    for rank, (name, time) in enumerate(times.most_common(number), 1):
        print(f'{time / total:7.1%}  {name[:100]}')
        figures[f'kernel_{rank}'] = f'{time / total:.1%} {name}'
    return figures


def _times(planes: Iterable[Any]) -> collections.Counter[str]:
    times: collections.Counter[str] = collections.Counter()
    for line in (line for plane in planes for line in plane.lines):
        # A GPU's kernels are on its streams, a TPU's are its operations; other lines sum them up.
        if re.match('Stream|XLA Ops|tf_XLA', line.name or ''):
            for event in line.events:
                if not _THREADS.search(event.name):
                    times[_COPY.sub('', event.name)] += event.duration_ns
    return times
