"""Seconds and peak memory of a command, and of this process and its devices."""

import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

# A process begins its peak memory with that of the one it was forked from, so a small one stands between.
_LAUNCHER = """
import resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(time.perf_counter() - start, peak)
sys.exit(status)
"""


def run_measured(command: Sequence[Any]) -> tuple[float, int]:
    """Seconds, and peak resident bytes of the process."""
    launched = subprocess.run(
        [sys.executable, '-S', '-c', _LAUNCHER, *command], stdout=subprocess.PIPE, text=True
    )
    if launched.returncode:
        raise RuntimeError(f'{" ".join(map(str, command))} ended with status {launched.returncode}')
    seconds, peak = launched.stdout.split()
    return float(seconds), int(peak)


def peak_memory_bytes() -> int:
    """Peak of the fullest device, or of this process where the devices do not say."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [found['peak_bytes_in_use'] for found in stats if found and 'peak_bytes_in_use' in found]
    return max(peaks, default=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
