"""Plants known faults in a copy of the repository, one at a time: at each the test that is there for it must turn red.

    python -m tests.mutations [--only=TEXT]

The faults are in `tests.planted_faults`. All their tests must pass on the clean copy first. Planted, one must fail as a
test fails: what can no longer be imported, or takes for ever, shows nothing. A test that is made cheaper must still
turn red; where a fault stays green, it has lost what it was there for.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

from tests.planted_faults import FAULTS
from tests.planted_faults.fault import Fault

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
_PROCESSES = 2  # at a time, each in a copy of its own
_SECONDS = 120  # until a test that hangs at a fault is given up
_STATUS = {0: 'GREEN', 1: 'red'}  # of pytest; any other says that nothing was tested
_PLANTED = itertools.count(1)
_SKIPPED = 'skipped without it'  # for want of data or a package; shows nothing either way


def copy_repository(target: pathlib.Path) -> pathlib.Path:
    """The files as they stand, changes that are not committed included."""
    listed = subprocess.run(
        ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard', '--deduplicate'],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split('\0')):
        if (REPOSITORY / name).is_file():  # one that was removed is listed still
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target / name)
    return target


@contextlib.contextmanager
def planted(copy: pathlib.Path, fault: Fault) -> Iterator[None]:
    """The copy with the fault in it.

    Raises:
      ValueError: the text to replace does not stand in the file exactly once.
    """
    file = copy / fault.file
    text, written = file.read_text(), file.stat().st_mtime
    file.write_text(fault.applied_to(text))
    # Python takes what it compiled of a file for that of any text of the same length and the same second.
    second = written + next(_PLANTED)
    os.utime(file, (second, second))
    try:
        yield
    finally:
        file.write_text(text)
        os.utime(file, (written, written))


def run_pytest(copy: pathlib.Path, *arguments: str, seconds: float) -> tuple[int, str]:
    """(exit status, output) of pytest in a copy; of what is given up after so many seconds the signal's number."""
    environment = os.environ | {'PYTHONPATH': str(copy), 'COLUMNS': '200'}
    environment.setdefault('LLAMA_JAX_SHARED_DATA', str(REPOSITORY.parent / 'shared' / 'data'))
    with tempfile.TemporaryFile('w+') as output:  # a pipe would wait for what a test leaves behind
        process = subprocess.Popen(
            [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *arguments],
            cwd=copy, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return process.returncode, output.read()


def outcomes(copy: pathlib.Path, tests: Iterable[str]) -> dict[str, str]:
    """'passed', 'skipped', 'failed' or 'not run' of each test on the clean copy."""
    report = copy / 'report.xml'
    wanted = sorted(set(tests))
    _, output = run_pytest(copy, f'--junitxml={report}', *wanted, seconds=_SECONDS * len(wanted))
    found: dict[str, set[str]] = {test: set() for test in wanted}
    for case in ElementTree.parse(report).iter('testcase') if report.exists() else ():
        name = f'{case.get("classname", "").replace(".", "/")}.py::{case.get("name")}'
        kinds = {child.tag for child in case}
        outcome = 'failed' if kinds & {'failure', 'error'} else 'skipped' if 'skipped' in kinds else 'passed'
        for test in wanted:
            if name == test or name.startswith(f'{test}['):
                found[test].add(outcome)
    worst = ('failed', 'passed', 'skipped')
    judged = {test: next((o for o in worst if o in seen), 'not run') for test, seen in found.items()}
    if not {'passed', 'skipped'} >= set(judged.values()):
        print(output)
    return judged


def try_fault(copy: pathlib.Path, fault: Fault) -> tuple[str, float, str]:
    """('red' or what else became of it, seconds, what the test said)."""
    start = time.monotonic()
    with planted(copy, fault):
        status, output = run_pytest(copy, '-n=0', '-x', fault.test, seconds=_SECONDS)
    said = [
        line.partition(' - ')[2] for line in output.splitlines() if line.startswith(('FAILED ', 'ERROR '))
    ]
    return (
        _STATUS.get(status, f'NOTHING TESTED (status {status})'),
        time.monotonic() - start,
        ''.join(said[:1]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m tests.mutations', description=__doc__.splitlines()[0])
    parser.add_argument(
        '--only', default='', help='faults of which the file, the name or the test holds this text'
    )
    only = parser.parse_args(arguments).only
    chosen = [fault for fault in FAULTS if only in f'{fault.file} {fault.what} {fault.test}']
    if not chosen:
        parser.error(f'no fault of {len(FAULTS)} has {only!r} in its file, name or test')
    start = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix='mutations-') as folder,
        ThreadPoolExecutor(_PROCESSES) as threads,
    ):
        copies: queue.SimpleQueue[pathlib.Path] = queue.SimpleQueue()
        for number in range(_PROCESSES):
            copies.put(clean := copy_repository(pathlib.Path(folder, str(number), 'llama_jax')))
        before = outcomes(clean, (fault.test for fault in chosen))

        def judge(fault: Fault) -> tuple[str, float, str]:
            if before[fault.test] != 'passed':
                return f'{before[fault.test]} without it', 0.0, ''
            copy = copies.get()
            try:
                return try_fault(copy, fault)
            finally:
                copies.put(copy)

        print(f'{len(before)} tests on the clean copy: {time.monotonic() - start:.0f} s', flush=True)
        wrong, skipped = [], 0
        try:
            for fault, (verdict, seconds, said) in zip(chosen, threads.map(judge, chosen), strict=True):
                skipped += verdict == _SKIPPED
                wrong += [fault.what] if verdict not in ('red', _SKIPPED) else []
                print(f'{verdict:5} {seconds:5.1f} s  {fault.what}  [{fault.test}]  {said[:90]}', flush=True)
        finally:
            threads.shutdown(cancel_futures=True)
    count = len(chosen) - len(wrong) - skipped
    print(f'{count} of {len(chosen)} red in {time.monotonic() - start:.0f} s, {skipped} not tried')
    if wrong:
        print(f'not red: {"; ".join(wrong)}')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
