"""Faults injected into runs: each ends in one line or goes on, and the same command then ends as if nothing had been.

A shim in C, preloaded, lets the n-th change of a file under the workdir fail or stop the process, whether Python or a
library in C++ makes it; what is on disk is damaged between two launches; signals come while something long is done.
"""

import dataclasses
import errno
import json
import pathlib
import random
import shutil
import signal
import subprocess

import pytest

from llama_jax import storage
from tests.command_line import REPOSITORY, CommandLine, Finished, figures, tiny_run

AT_ONCE = 4  # launches that share the cores
STOPPED_AT = 10

# What each launch runs first: PROCESS is its number among those started together.
BEFORE = """
import ctypes, json, os
folder, number, failure, lasting, kill, reads, more = json.load(open('FAULTS'))[PROCESS]
shim = ctypes.CDLL(None)
shim.fault_arm(folder.encode(), ctypes.c_long(number), failure, lasting, kill, reads)
exec(more)
"""
# Writes down how many changes there were.
COUNT = """
import atexit
atexit.register(lambda: open('COUNT', 'w').write(str(shim.fault_count())))
"""
# A signal or a failure while something is done for the n-th time.
WHILE = """
import importlib
module, *names, last = 'PLACE'.split(':')[0], *'PLACE'.split(':')[1].split('.')
owner = importlib.import_module(module)
for name in names:
    owner = getattr(owner, name)
calls, original = [], getattr(owner, last)
def signalled(*args, **options):
    calls.append(1)
    if len(calls) == NTH:
        WHAT
    return original(*args, **options)
setattr(owner, last, signalled)
"""
PLACES = {
    'validation': 'llama_jax.train.validation:evaluate_rows',
    'benchmarks': 'experiments.training:evaluate',
    'saving': 'llama_jax.checkpoint.training:Checkpointer.save',
    'committing': 'llama_jax.checkpoint.training:record_files',
    'restoring': 'llama_jax.checkpoint.training:_restore',
    'checking': 'llama_jax.checkpoint.training:find_damage',
    'logging': 'llama_jax.train.metrics:JsonlWriter.write',
    'reporting': 'llama_jax.train.metrics:plot_loss',
}
# What threads of their own do, and how such a thread may end.
_FAILS = "raise OSError(5, 'Input/output error')"
HELPERS = {
    'TensorBoard dies': ('llama_jax.train.metrics:TensorBoardWriter.write', "raise RuntimeError('dead')"),
    'TensorBoard hangs': (
        'llama_jax.train.metrics:TensorBoardWriter.write',
        'import time; time.sleep(10 ** 6)',
    ),
    'reading ahead fails': ('llama_jax.data.loader:_HostBatches.__getitem__', _FAILS),
    'committing fails': ('llama_jax.checkpoint.training:record_files', _FAILS),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
      name: for the list of those that were not survived.
      number: of the change under the workdir at which it happens; 0: at none.
      failure: the error that the system gives then.
      lasting: and ever after.
      kill: the signal that the process gets then.
      reads: it is not changes that are counted, but reads.
      more: Python that runs first.
      resuming: it meets a run that goes on, from step 10, not a new one.
      damaged: file of the workdir of that run that is spoilt before.
      how: and how.
      arguments: more of the command's.
    """

    name: str
    number: int = 0
    failure: int = 0
    lasting: bool = False
    kill: int = 0
    reads: bool = False
    more: str = ''
    resuming: bool = False
    damaged: str = ''
    how: str = ''
    arguments: tuple[str, ...] = ()


class Runs:
    """A run left alone, and copies of it that faults are injected into."""

    def __init__(
        self,
        folder: pathlib.Path,
        commands: CommandLine,
        corpus: pathlib.Path,
        num_steps: int,
        evaluated: bool,
    ):
        self.folder, self.commands, self.corpus, self.num_steps = folder, commands, corpus, num_steps
        self.tasks = ''  # evaluated on the way
        if evaluated:
            (folder / 'evaluated.txt').write_text(corpus.read_text()[:200])
            self.tasks = f'perplexity:{folder}/evaluated.txt'
        self.whole = folder / 'whole'
        (whole,) = self.launch(
            [(self.whole, Fault('none', 10**9, more=COUNT.replace('COUNT', f'{folder}/fresh')))]
        )
        whole.succeeded()
        self.changes = int((folder / 'fresh').read_text())
        self.content = self._content()
        stopped = self.stopped(folder / 'resumed')
        self.launch([(stopped, Fault('none', 10**9, more=COUNT.replace('COUNT', f'{folder}/resumes')))])
        self.resumed_changes = int((folder / 'resumes').read_text())
        assert self.ended_as_if_left_alone(stopped) == ''
        reading = Fault('none', 10**9, reads=True, more=COUNT.replace('COUNT', f'{folder}/reads'))
        self.launch([(self.stopped(folder / 'read'), reading)])
        self.resumed_reads = int((folder / 'reads').read_text())

    def stopped(self, workdir: pathlib.Path) -> pathlib.Path:
        """Like that of a run that was killed some time after step 10."""
        shutil.copytree(self.whole, workdir)
        for later in range(STOPPED_AT + 5, self.num_steps + 1, 5):
            shutil.rmtree(workdir / f'checkpoints/{later}')
        for name in ('report.json', 'loss.png'):
            (workdir / name).unlink()
        return workdir

    def launch(self, launches: list[tuple[pathlib.Path, Fault]]) -> list[Finished]:
        """Runs the command in each of these workdirs at the same time; one that stands still is killed."""
        faults = self.folder / 'faults.json'
        faults.write_text(json.dumps([
            [f'{workdir}/', fault.number or -1, fault.failure, int(fault.lasting), int(fault.kill),
             int(fault.reads), fault.more]
            for workdir, fault in launches
        ]))  # fmt: skip
        arguments = {
            number: [
                *tiny_run(
                    workdir, self.corpus, data__seq_len=32, data__tokenizer=self.corpus.parent,
                    eval__every=10, eval__max_rows=8, eval__tasks=self.tasks, eval__tasks_every=10,
                    checkpoint__every=5, checkpoint__keep=0,
                    train__num_steps=self.num_steps,
                ),
                *fault.arguments,
            ]
            for number, (workdir, fault) in enumerate(launches)
        }  # fmt: skip
        before = BEFORE.replace('FAULTS', str(faults))
        pids = self.commands._start('pretrain', arguments, 1, before)
        return self.commands.wait_processes(pids, timeout=60 * max(len(launches), 2))

    def _content(self) -> dict[pathlib.Path, bytes]:
        return {path: path.read_bytes() for path in self.whole.rglob('*') if path.is_file()}

    def ended_as_if_left_alone(self, workdir: pathlib.Path, said: str = '') -> str:
        """What differs in a workdir from the run left alone, but for what was said to be lost; '' if nothing does."""
        wanted, found = figures(self.whole), figures(workdir)
        lost = 'are lost' in said or 'not those that were logged' in said
        if found != wanted and not (lost and found[-1] == wanted[-1]):
            return f'figures of {len(found)} steps, or others'
        if (workdir / 'report.json').read_bytes() != (self.whole / 'report.json').read_bytes():
            return 'another report'
        if self._content() != self.content:
            return "another run's files were touched"
        return ''

    def survive(self, faults: list[Fault]) -> list[str]:
        """The faults that were not survived, each with what happened."""
        failures = []
        for first in range(0, len(faults), AT_ONCE):
            group = faults[first : first + AT_ONCE]
            workdirs = [self.folder / f'run{number}' for number in range(len(group))]
            for workdir, fault in zip(workdirs, group, strict=True):
                shutil.rmtree(workdir, ignore_errors=True)
                if fault.resuming:
                    self.stopped(workdir)
                if fault.damaged:
                    damage(workdir / fault.damaged, fault.how)
            hit = self.launch(list(zip(workdirs, group, strict=True)))
            for workdir, fault, finished in zip(workdirs, group, hit, strict=True):
                # A refusal is an answer to damage: then somebody puts the file back.
                if fault.damaged and finished.status == 2:
                    shutil.copy(self.whole / fault.damaged, workdir / fault.damaged)
            again = self.launch([(workdir, Fault('none')) for workdir in workdirs])
            for workdir, fault, *finished in zip(workdirs, group, hit, again, strict=True):
                problem = what_is_wrong(fault, *finished)
                said = finished[0].stderr + finished[1].stderr
                problem = problem or self.ended_as_if_left_alone(workdir, said)
                print(f'{fault.name}: {problem or "survived"}', flush=True)
                if problem:
                    failures.append(f'{fault.name}: {problem}')
        return failures


def what_is_wrong(fault: Fault, hit: Finished, again: Finished) -> str:
    """With how the two launches ended; '' if nothing is."""
    if hit.status == -signal.SIGKILL and fault.kill != signal.SIGKILL:
        return 'stood still'
    try:
        if hit.status in (1, 2):
            hit.error(2 if fault.failure in storage.REMEDIES else hit.status)
        elif hit.status not in (0, -fault.kill):
            return f'status {hit.status}'
        again.succeeded()
    except AssertionError as error:
        return str(error)[-3000:]
    said = hit.stderr + again.stderr
    return said[-3000:] if 'Traceback' in said else ''


def damage(file: pathlib.Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    match how:
        case 'deleted':
            file.unlink()
            return
        case 'cut short':
            del content[len(content) // 2 :]
        case 'emptied':
            content.clear()
        case 'zeroed':
            content = bytearray(len(content))
        case 'a flipped bit':
            content[len(content) // 3] ^= 1 << len(content) % 8
    file.write_bytes(content)


@pytest.fixture(scope='module')
def commands(folder):
    """Launches with the shim preloaded, which does nothing until it is told to."""
    shim = folder / 'faults.so'
    source = REPOSITORY / 'tests/reference/faults.c'
    subprocess.run(['cc', '-shared', '-fPIC', '-O1', '-o', shim, source, '-ldl'], check=True)
    cache = {
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'), 'JAX_COMPILATION_CACHE_MAX_SIZE': '-1',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }  # fmt: skip
    return CommandLine(folder, preload=str(shim), **cache)


@pytest.fixture(scope='module')
def make_runs(folder, commands, corpus):
    """num_steps -> the runs of so many steps."""
    tokenizer = folder / 'tokenizer'
    commands.run('pretrain', *tiny_run(tokenizer, corpus, train__num_steps=1, data__seq_len=32)).succeeded()
    shutil.copy(tokenizer / 'tokenizer.model', corpus.parent / 'tokenizer.model')

    def make(num_steps, evaluated=False):
        made = folder / str(num_steps)
        made.mkdir()
        return Runs(made, commands, corpus, num_steps, evaluated)

    return make


def writes(runs: Runs, count: int, rng: random.Random) -> list[Fault]:
    """Changes that fail or are the last, spread over all that a run makes; a third of them while it resumes."""
    kinds = [
        ('kill -9', {'kill': signal.SIGKILL}),
        ('full disk', {'failure': errno.ENOSPC, 'lasting': True}),
        ('one write fails', {'failure': errno.EIO}),
        ('SIGTERM', {'kill': signal.SIGTERM}),
        ('quota', {'failure': errno.EDQUOT, 'lasting': True}),
        ('read-only', {'failure': errno.EROFS, 'lasting': True}),
    ]
    faults = []
    for number in range(count):
        kind, what = kinds[number % len(kinds)]
        resuming = number % 3 == 2
        total = runs.resumed_changes if resuming else runs.changes
        nth = min(int((number + rng.random()) / count * total) + 1, total)
        where = 'of a resumed run' if resuming else 'of a new run'
        faults.append(Fault(f'{kind} at change {nth} {where}', nth, **what, resuming=resuming))
    return faults


def damages(runs: Runs, hows: tuple[str, ...]) -> list[Fault]:
    """Every kind of file of a workdir, spoilt in each of these ways."""
    step = runs.whole / f'checkpoints/{STOPPED_AT}'
    by_kind = {'config.json': '', 'model.json': '', 'metrics.jsonl': '', 'tokenizer.model': ''}
    for path in sorted(path for path in step.rglob('*') if path.is_file()):
        kind = '/'.join('*' if part == path.name and 'd' in path.parts else part for part in path.parts[-3:])
        by_kind[kind] = str(path.relative_to(runs.whole))
    return [
        Fault(f'{how}: {file or kind}', resuming=True, damaged=file or kind, how=how)
        for kind, file in by_kind.items()
        for how in hows
    ]


def while_in(address: str, nth: int, what: str) -> str:
    """Python that has something happen when a function is called for the n-th time."""
    return WHILE.replace('PLACE', address).replace('NTH', str(nth)).replace('WHAT', what)


def reads(runs: Runs, count: int) -> list[Fault]:
    """Reads of a run that goes on that fail, once or from then on."""
    numbers = [max(1, runs.resumed_reads * number // count) for number in range(count)]
    return [
        Fault(
            f'read {nth} fails{" and all after it" if lasting else ""}',
            nth,
            errno.EIO,
            lasting,
            reads=True,
            resuming=True,
        )
        for nth, lasting in zip(numbers, [False, True] * count, strict=False)
    ]


def dead_helpers() -> list[Fault]:
    """Threads that stand beside a run and die or hang."""
    return [
        Fault(name, more=while_in(*address, what), arguments=('--config.log.tensorboard=True',))
        for name, (place, what) in HELPERS.items()
        for address in ((place, 1), (place, 7))
    ]


def signals(kills: tuple[int, ...], nths: tuple[int, ...]) -> list[Fault]:
    """Each signal, while each of these things is done for the n-th time."""
    faults = []
    for place, address in PLACES.items():
        for kill in kills:
            for nth in nths:
                more = while_in(address, nth, f'os.kill(os.getpid(), {int(kill)})')
                name = f'{signal.Signals(kill).name} while {place} ({nth})'
                faults.append(Fault(name, kill=kill, more=more, resuming=place in ('restoring', 'checking')))
    return faults


@pytest.fixture(scope='module')
def short(make_runs):
    return make_runs(20)


@pytest.mark.slow
def test_two_that_start_together(short):
    """One of them trains; the other is told so, and touches nothing."""
    workdir = short.folder / 'shared'
    for _ in range(2):  # a new run, and one that goes on
        ended = short.launch([(workdir, Fault('none')), (workdir, Fault('none'))])
        refused, trained = sorted(ended, key=lambda finished: finished.status, reverse=True)
        trained.succeeded()
        assert 'is in use by another run (host ' in refused.error()
        assert short.ended_as_if_left_alone(workdir) == ''
        shutil.rmtree(workdir)
        short.stopped(workdir)


@pytest.mark.slow
def test_thirty_faults(short):
    rng = random.Random(0)
    faults = writes(short, 15, rng)
    faults += rng.sample(damages(short, ('a flipped bit', 'cut short', 'deleted')), 9)
    faults += rng.sample(
        [f for f in signals((signal.SIGTERM,), (1, 2)) if 'benchmarks' not in f.name], 3
    ) + rng.sample(reads(short, 10) + dead_helpers(), 3)
    failures = short.survive(faults)
    assert not failures, '\n\n'.join(failures)


@pytest.mark.long
def test_two_hundred_faults(make_runs):
    runs, rng = make_runs(60, evaluated=True), random.Random(1)
    faults = writes(runs, 80, rng)
    faults += damages(runs, ('a flipped bit', 'cut short', 'deleted', 'emptied', 'zeroed'))
    faults += (
        signals((signal.SIGTERM, signal.SIGINT, signal.SIGKILL), (1, 2)) + reads(runs, 20) + dead_helpers()
    )
    print(f'{len(faults)} faults')
    assert len(faults) >= 200
    failures = runs.survive(faults)
    assert not failures, '\n\n'.join(failures)
