"""Damages a sound file of every kind that is read, thousands of times, and counts what comes of it.

    python -m tests.convert.fuzz [--mutations=30000] [--seed=0] [--only=TEXT]
    python -m tests.convert.fuzz --only=data                    of text and prepared rows instead of checkpoints

Each damaged file is read in a worker with limits of time and memory; one that dies is replaced. It must be refused in
one line, or be read: with the values that it had, or, where values were damaged, with others. Anything else is a fault
of the reader, and is listed with its number, by which it can be repeated alone with all that it prints.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import pathlib
import queue
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterable
from typing import IO

import numpy as np
from etils import epath

from llama_jax.errors import InputError
from tests.convert.damage import damaged_bytes
from tests.convert.samples import Sample, samples
from tests.convert.sound_files import Found

OUTCOMES = ('refused', 'same values', 'other values', 'wrong', 'traceback', 'hang', 'memory', 'abort')
SOUND = OUTCOMES[:3]
SECONDS = 5.0  # of processor time, for one file
MEMORY = 1 << 30  # bytes beyond what the worker has before
_IDLE_SECONDS = 30.0  # until a worker that waits for nothing is ended
_WORKERS = 2
_MOST_LINE = 1000  # characters of a refusal
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


class Bench:
    """Samples in a folder each, damaged one at a time."""

    def __init__(self, folder: pathlib.Path, chosen: Iterable[Sample]):
        self.samples = list(chosen)
        self.readers = list(dict.fromkeys(sample.reader for sample in self.samples))
        self._folders = []
        self._sound: list[Found] = []
        for number, sample in enumerate(self.samples):
            place = folder / f'sample{number}'
            for name, data in sample.files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(sample.made(data) if name == sample.target else data)
            self._folders.append(place)
            self._sound.append(self._read(number))
            assert sample.says is None or sample.says(sample.files[sample.target], self._sound[-1]), (
                sample.reader
            )

    def choose(self, seed: int, number: int) -> tuple[int, bytes]:
        """Which sample, and what its damaged file holds before it is made up."""
        rng = np.random.default_rng([seed, number])
        reader = self.readers[number % len(self.readers)]
        which = int(rng.choice([i for i, sample in enumerate(self.samples) if sample.reader == reader]))
        sample = self.samples[which]
        data = sample.files[sample.target]
        if sample.damage and rng.random() < 0.6:
            return which, sample.damage(data, rng)
        return which, damaged_bytes(data, rng, _between(sample.values, len(data)))

    def outcome(self, which: int, data: bytes) -> tuple[str, str]:
        """What comes of the damaged file, and of a fault its description."""
        sample = self.samples[which]
        original = sample.files[sample.target]
        try:
            self._write(which, sample.made(data))
            found = self._read(which)
            if found == self._sound[which]:
                return 'same values', ''
            if sample.says:
                try:
                    says_so = sample.says(data, found)
                except ValueError as error:
                    return 'wrong', f'read what is none: {error}'
                return ('other values', '') if says_so else ('wrong', 'not what it says')
            values = _values_alone(original, data, sample.values)
            if values is not None:
                self._write(which, sample.made(values))
                if self._read(which) == found:
                    return 'other values', ''
            differ = [key for key in found if found[key] != self._sound[which].get(key)]
            return 'wrong', f'{differ[:5]} changed with the structure'
        except InputError as error:
            return self._judged(which, str(error), error)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            if _out_of_memory(error):
                return 'memory', repr(error)[:300]
            frames = traceback.extract_tb(error.__traceback__)
            places = [f'{pathlib.Path(f.filename).name}:{f.lineno}' for f in frames[-3:]]
            return 'traceback', f'{type(error).__name__}: {str(error)[:200]!r} at {" ".join(places)}'
        finally:
            self._write(which, sample.made(original))

    def _judged(self, which: int, message: str, error: InputError) -> tuple[str, str]:
        if _out_of_memory(error):
            return 'memory', message
        if not message or '\n' in message or len(message) > _MOST_LINE or not message.isprintable():
            return 'traceback', f'no line: {message[:300]!r}'
        if str(self._folders[which]) not in message:
            return 'traceback', f'names no file: {message[:300]!r}'
        return 'refused', ''

    def _read(self, which: int) -> Found:
        return self.samples[which].read(epath.Path(self._folders[which]))

    def _write(self, which: int, data: bytes) -> None:
        file = self._folders[which] / self.samples[which].target
        file.unlink(missing_ok=True)  # cheaper than to overwrite: ext4 then waits for the disk
        file.write_bytes(data)


def _between(spans: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What lies outside of spans; nothing where there are none."""
    edges = [0, *(edge for span in sorted(spans) for edge in span), size]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b] if spans else []


def _values_alone(original: bytes, data: bytes, spans: list[tuple[int, int]]) -> bytes | None:
    """The original file with only those changes that are in values; None where places have shifted."""
    if len(data) != len(original):
        return None
    copy = bytearray(original)
    for start, stop in spans:
        copy[start:stop] = data[start:stop]
    return bytes(copy)


def _out_of_memory(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _chosen(folder: pathlib.Path, only: str) -> Iterable[Sample]:
    """Those whose reader's name holds `only`; text and prepared rows are apart."""
    from tests.data import damaged_files

    made = damaged_files.samples(folder) if only.startswith('data') else samples(folder)
    return (sample for sample in made if only in sample.reader)


# Workers.


def work(folder: pathlib.Path, seed: int, only: str) -> None:
    """Answers numbers on standard input, a line each, until it ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    logging.getLogger('llama_jax').setLevel(logging.CRITICAL)  # what it logs on purpose is no noise
    bench = Bench(folder, _chosen(folder, only))
    printed = tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(printed.fileno(), 1)
    os.dup2(printed.fileno(), 2)
    size = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is at
    print(json.dumps(bench.readers), file=answers, flush=True)
    for line in sys.stdin:
        which, data = bench.choose(seed, int(line))
        _taken(printed)
        before = _peak(reset=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        start = time.process_time()
        outcome, what = bench.outcome(which, data)
        seconds = time.process_time() - start
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = _peak() - before
        if (noise := _taken(printed)) and outcome in SOUND:
            outcome, what = 'traceback', f'prints {noise[:200]!r}'
        if grown > MEMORY:
            outcome, what = 'memory', f'{grown >> 20} MiB; {what}'
        answer = bench.samples[which].reader, outcome, what, seconds, grown
        print(json.dumps(answer), file=answers, flush=True)


def _taken(file: IO[bytes]) -> bytes:
    """What a file holds, which is empty then."""
    sys.stderr.flush()
    file.seek(0)
    data = file.read()
    file.seek(0)
    file.truncate()
    return data


def _peak(reset: bool = False) -> int:
    """The most memory that this process has had, in bytes, since it was last reset."""
    if reset:
        pathlib.Path('/proc/self/clear_refs').write_text('5')
    status = pathlib.Path('/proc/self/status').read_text()
    return int(status.partition('VmHWM:')[2].split()[0]) << 10


class Worker:
    """A process that reads damaged files, made anew where it ends."""

    def __init__(self, seed: int, only: str):
        self._arguments = f'--seed={seed}', f'--only={only}'
        self._process: subprocess.Popen[str] | None = None
        self._folder = ''

    def answer(self, number: int) -> tuple[str, str, str, float, int]:
        """Reader, outcome, what happened, seconds, bytes."""
        if self._process is None:
            self._start()
        process = self._process
        assert process and process.stdin and process.stdout
        process.stdin.write(f'{number}\n')
        process.stdin.flush()
        while not (is_done := bool(select.select([process.stdout], [], [], _IDLE_SECONDS)[0])):
            if not _has_turn_to_come(process.pid):
                break
        if is_done and (line := process.stdout.readline()):
            return tuple(json.loads(line))
        process.kill()
        status = process.wait()
        self.close()
        ended = signal.Signals(-status).name if status < 0 else f'status {status}'
        is_hang = ended in ('SIGPROF', 'SIGKILL')
        reader = self.readers[number % len(self.readers)]
        return reader, 'hang' if is_hang else 'abort', ended, SECONDS, 0

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix='fuzz-')
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'tests.convert.fuzz', f'--worker={self._folder}', *self._arguments],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'},
        )  # fmt: skip
        assert self._process.stdout
        self.readers = json.loads(self._process.stdout.readline() or '[]')
        assert self.readers, 'the worker does not start; see --number'

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None
            shutil.rmtree(self._folder, ignore_errors=True)


def _has_turn_to_come(process: int) -> bool:
    """Whether a thread of it runs, waits for a processor or a disk, or is stopped; its own time has a limit."""
    threads = pathlib.Path(f'/proc/{process}/task').glob('*/stat')
    return any(file.read_text().rpartition(')')[2].split()[0] in 'RDT' for file in threads)


def run(mutations: int, seed: int, only: str = '') -> tuple[dict[str, collections.Counter[str]], list[str]]:
    """Counts of outcomes by reader, and a line for each fault."""
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(mutations):
        numbers.put(number)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults: list[str] = []
    failures: list[BaseException] = []

    def go() -> None:
        try:
            with contextlib.closing(Worker(seed, only)) as worker, contextlib.suppress(queue.Empty):
                while not failures:
                    number = numbers.get_nowait()
                    reader, outcome, what, seconds, grown = worker.answer(number)
                    counts[reader][outcome] += 1
                    counts[reader]['files'] += 1
                    counts[reader]['most ms'] = max(counts[reader]['most ms'], round(seconds * 1000))
                    counts[reader]['most MiB'] = max(counts[reader]['most MiB'], grown >> 20)
                    if outcome not in SOUND:
                        faults.append(f'{number}: {reader}: {outcome}: {what}')
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=go) for _ in range(_WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return dict(counts), sorted(faults, key=lambda line: int(line.partition(':')[0]))


def table(counts: dict[str, collections.Counter[str]]) -> str:
    """In Markdown."""
    columns = ('files', *OUTCOMES, 'most ms', 'most MiB')
    lines = ['| reader | ' + ' | '.join(columns) + ' |', '|---' * (len(columns) + 1) + '|']
    total: collections.Counter[str] = collections.Counter()
    for reader, count in sorted(counts.items()):
        lines.append(f'| {reader} | ' + ' | '.join(str(count[column]) for column in columns) + ' |')
        for column in columns:
            most = max(total[column], count[column])
            total[column] = most if column.startswith('most') else total[column] + count[column]
    lines.append('| all | ' + ' | '.join(str(total[column]) for column in columns) + ' |')
    return '\n'.join(lines)


def repeat(number: int, seed: int, only: str) -> None:
    """One damaged file, read here with no limits; what it raises is shown whole."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pathlib.Path(folder), _chosen(pathlib.Path(folder), only))
        which, data = bench.choose(seed, number)
        sample = bench.samples[which]
        print(f'{sample.reader}: {sample.target}', bench.outcome(which, data))
        kept = pathlib.Path(tempfile.mkdtemp(prefix='damaged-'))
        for name, content in sample.files.items():
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (kept / name).write_bytes(sample.made(data) if name == sample.target else content)
        print(f'kept in {kept}')
        try:
            print({key: str(value)[:200] for key, value in sample.read(epath.Path(kept)).items()})
        except BaseException:
            traceback.print_exc()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--mutations', type=int, default=30_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default='', help='readers whose name holds this')
    parser.add_argument('--number', type=int, help='repeats this one alone')
    parser.add_argument('--worker', type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker or flags.number is not None:
        warnings.simplefilter('error')
        for name in ('ml_dtypes', 'orbax', 'etils'):
            warnings.filterwarnings('ignore', module=name)
    if flags.worker:
        work(flags.worker, flags.seed, flags.only)
        return 0
    if flags.number is not None:
        repeat(flags.number, flags.seed, flags.only)
        return 0
    start = time.perf_counter()
    counts, faults = run(flags.mutations, flags.seed, flags.only)
    print(table(counts))
    print(*faults, sep='\n')
    seconds = time.perf_counter() - start
    print(f'{flags.mutations} files, seed {flags.seed}, {seconds / 60:.1f} minutes, {len(faults)} faults')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main())
