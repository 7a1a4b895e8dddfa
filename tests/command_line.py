"""Runs the commands as a user does: each in a process of its own, of which only the outside is seen.

Starting Python and importing JAX takes longer than most of these runs. So one process imports what all commands import,
and forks (before JAX has a device or a thread) for each run, which then is `python -m experiments.NAME`.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

_SERVER = """
import functools, gc, json, os, runpy, sys
import jax
import experiments.training, llama_jax.eval.tasks, llama_jax.export, llama_jax.preflight.compile
import llama_jax.train.validation, matplotlib.pyplot, tensorboardX
from array_record.python import array_record_module
from tests.command_line import add_nano, end
add_nano()
gc.freeze()
gc.set_threshold(100_000, 20, 100)
ended = set()
# A machine that stops all of a job for minutes must not make its processes take each other for gone.
initialize = jax.distributed.initialize
jax.distributed.initialize = functools.partial(initialize, heartbeat_timeout_seconds=1000)
for line in sys.stdin:
    pids = []
    requests = json.loads(line)
    for request in requests:
        pids.append(os.fork())
        if not pids[-1]:
            for descriptor, file in enumerate((os.devnull, request['stdout'], request['stderr'])):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
            os.environ.update(request['environment'])
            sys.argv = request['argv']
            exec(request['before'], {})
            try:
                runpy.run_module(f'experiments.{sys.argv[0]}', run_name='__main__', alter_sys=True)
                sys.exit()
            except SystemExit as leaving:
                if (request['argv'][0], leaving.code or 0) in ended:
                    end(leaving.code or 0)
                raise
    print(json.dumps(pids), flush=True)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    ended.update((request['argv'][0], status) for request, status in zip(requests, statuses))
    print(json.dumps(statuses), flush=True)
"""


# What a command does before: no file of its process may have more than 20,000 bytes, as by `ulimit -f`.
SMALL_FILES = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))'


def end(status: int) -> NoReturn:
    """Ends as Python does, but for taking down its modules and those of C++, which lasts longer than most refusals.

    That is seen once a command and status.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@dataclasses.dataclass
class Finished:
    """How a command ended: its exit status (minus the signal that killed it) and what it printed."""

    status: int
    stdout: str
    stderr: str

    def succeeded(self) -> 'Finished':
        assert self.status == 0, self.stderr
        assert 'Traceback' not in self.stderr, self.stderr
        return self

    def error(self, status: int = 2) -> str:
        """The one line of a refusal; above it there may be lines of the log, and nothing else: no bar, no warning."""
        *above, last = self.stderr.splitlines()
        assert self.status == status, self.stderr
        assert last.startswith('error: '), self.stderr
        assert all(re.match(r'\d\d:\d\d:\d\d |$', line) for line in above), self.stderr
        assert not self.stdout
        return last


class _Server:
    """The process that forks the runs, one run or job at a time."""

    def __init__(self, preload: str):
        environment = os.environ | ({'LD_PRELOAD': preload} if preload else {})
        self._process = subprocess.Popen(
            [sys.executable, '-c', _SERVER], cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._running: list[int] = []
        atexit.register(self._close)

    def start(self, requests: list[dict[str, Any]]) -> list[int]:
        """Process ids of what now runs."""
        if self._running:  # nobody waited for its end: the test that started it has failed
            for pid in self._running:
                _kill(pid)
            self.wait()
        self._process.stdin.write(json.dumps(requests) + '\n')
        self._process.stdin.flush()
        self._running = json.loads(self._process.stdout.readline())
        return self._running

    def wait(self) -> list[int]:
        """How they ended."""
        statuses = json.loads(self._process.stdout.readline())
        self._running = []
        return statuses

    def _close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


_server = functools.cache(_Server)  # importing takes long: one serves all files that a process tests


class CommandLine:
    """Runs one command at a time, or one job of several processes that join over loopback.

    With `num_devices` emulated devices where the run does not say otherwise.
    """

    def __init__(self, folder: pathlib.Path, num_devices: int = 1, preload: str = '', **environment: str):
        self._folder, self._num_devices, self._environment = folder, num_devices, environment
        self._server = _server(preload)

    def start(self, name: str, *arguments: str, num_devices: int = 0, before: str = '') -> int:
        """Starts `python -m experiments.NAME ARGUMENTS` and returns its process id; `wait` must follow.

        Args:
          name: of the command.
          arguments: its flags.
          num_devices: where not those that all runs have.
          before: Python that the process runs first.
        """
        return self._start(name, {0: arguments}, num_devices or self._num_devices, before)[0]

    def wait(self) -> Finished:
        return self._wait()[0]

    def run(self, name: str, *arguments: str, **options: Any) -> Finished:
        self.start(name, *arguments, **options)
        return self.wait()

    def start_each(self, name: str, *each: Sequence[str]) -> list[int]:
        """Starts a command several times at once, with arguments of its own each; `wait_processes` must follow."""
        return self._start(name, dict(enumerate(each)), self._num_devices, '')

    def start_processes(
        self, name: str, *arguments: str, num_processes: int, num_devices: int = 1, before: str = '', **also
    ) -> list[int]:
        """Starts processes that join over loopback, with so many devices each; `wait_processes` must follow.

        Args:
          name: of the command.
          arguments: of all processes.
          num_processes: that there should be.
          num_devices: of each process.
          before: Python that each runs first; PROCESS stands for its number.
          also: `process_0=[...]`: more arguments of that process; None does not start it.
        """
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            port = listener.getsockname()[1]
        job = [f'--coordinator=127.0.0.1:{port}', f'--num_processes={num_processes}']
        more = {process: also.get(f'process_{process}', []) for process in range(num_processes)}
        started = {
            process: [*arguments, *job, f'--process_id={process}', *own]
            for process, own in more.items()
            if own is not None
        }
        return self._start(name, started, num_devices, before)

    def wait_processes(self, pids: Sequence[int], timeout: float = 300) -> list[Finished]:
        """How each ended; those that have not after so many seconds are killed, and so have failed."""
        timer = threading.Timer(timeout, lambda: [_kill(pid) for pid in pids])
        timer.start()
        try:
            return self._wait()
        finally:
            timer.cancel()

    def run_processes(self, name: str, *arguments: str, timeout: float = 300, **options) -> list[Finished]:
        return self.wait_processes(self.start_processes(name, *arguments, **options), timeout)

    def _start(
        self, name: str, processes: Mapping[int, Sequence], num_devices: int, before: str
    ) -> list[int]:
        self._outputs = [(self._folder / f'{i}.stdout', self._folder / f'{i}.stderr') for i in processes]
        requests = [
            {
                'argv': [name, *map(str, arguments)],
                'environment': self._environment | _devices(num_devices),
                'before': before.replace('PROCESS', str(process)),
                'stdout': str(stdout),
                'stderr': str(stderr),
            }
            for (process, arguments), (stdout, stderr) in zip(processes.items(), self._outputs, strict=True)
        ]
        return self._server.start(requests)

    def _wait(self) -> list[Finished]:
        statuses = self._server.wait()
        outputs = [[file.read_text(errors='replace') for file in files] for files in self._outputs]
        return [
            Finished(status, _without_gloo(stdout), stderr)
            for status, (stdout, stderr) in zip(statuses, outputs, strict=True)
        ]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that have not ended."""
    return [int(child) for child in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, others may not have
        os.kill(pid, signal.SIGKILL)


def _without_gloo(text: str) -> str:
    """Gloo, which joins processes on CPUs, writes on standard output, its threads into each other's lines.

    Where a thread was cut short, the end of its line may be left alone.
    """
    if '[Gloo]' not in text:
        return text
    lines = text.splitlines(keepends=True)
    return ''.join(
        line for line in lines if line.strip() and '[Gloo]' not in line and 'peer ranks' not in line
    )


def _devices(count: int) -> dict[str, str]:
    return {'XLA_FLAGS': ' '.join(xla_flags(count))}


def xla_flags(num_devices: int) -> list[str]:
    """What tests and the commands that they start compile with, on so many emulated devices."""
    jaxlib = tuple(map(int, importlib.metadata.version('jaxlib').split('.')[:2]))
    return [
        f'--xla_force_host_platform_device_count={num_devices}',
        # Eight devices on two busy cores: a device that waits 40 s for the others is slow, not stuck.
        '--xla_cpu_collective_call_terminate_timeout_seconds=300',
        # The programs of tests compile for longer than they run.
        '--xla_backend_optimization_level=0',
        '--xla_cpu_parallel_codegen_split_count=1',
        # Compiling with XLA's older emitters of loops takes a fourth of the time; newer releases have none.
        *(['--xla_cpu_use_fusion_emitters=false'] if jaxlib < (0, 11) else []),
    ]


def add_nano() -> None:
    """Makes `nano` a preset: a model whose programs, compiled without optimisation, take little time."""
    from llama_jax.models.presets import PRESETS

    PRESETS['nano'] = dataclasses.replace(
        PRESETS['tiny'], embed_dim=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, mlp_dim=128
    )


def run_python(name: str, *arguments: str) -> Finished:
    """`python -m experiments.NAME ARGUMENTS`, without the short cut."""
    done = subprocess.run(
        [sys.executable, '-m', f'experiments.{name}', *map(str, arguments)],
        cwd=REPOSITORY, env=os.environ | _devices(1), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


def write_corpus(file: pathlib.Path) -> pathlib.Path:
    """100 documents of made-up words, the same on every machine, divided by `<|endoftext|>`."""
    words = [f'{a}{b}{c}' for a in 'bdfgklm' for b in ('a', 'e', 'io', 'u') for c in ('', 'n', 'rst', 'lly')]
    number, documents = 1, []
    for _ in range(100):
        text = []
        for _ in range(40):
            number = number * 48271 % 0x7FFFFFFF
            text.append(words[number % len(words) * (number % 7) // 6])
        documents.append(' '.join(text) + '.')
    file.write_text('\n<|endoftext|>\n'.join(documents))
    return file


def tiny_run(workdir: pathlib.Path, corpus: pathlib.Path, **overrides) -> list[str]:
    """Arguments of a `pretrain` of `nano` that takes seconds; `overrides` are config keys with `__` for the dot."""
    config = {
        'data__train': corpus,
        'data__validation': '',
        'data__validation_fraction': 0.02,
        'data__separator': '<|endoftext|>',
        'data__vocab_size': 320,
        'model__preset': 'nano',
        'model__vocab_size': 320,
        'data__seq_len': 64,
        'train__batch_size': 8,
        'train__num_steps': 12,
        'optimizer__warmup_steps': 2,
        'checkpoint__every': 4,
        'eval__sample_tokens': 0,
        'log__every': 1,
        'log__tensorboard': False,
    } | overrides
    return [
        '--config=configs/pretrain.py:tiny', f'--workdir={workdir}',
        *(f'--config.{key.replace("__", ".")}={value}' for key, value in config.items()),
    ]  # fmt: skip


def figures(workdir: pathlib.Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged step."""
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    # Where lines were lost, a step may have those figures alone that were measured again.
    return [(item['step'], item.get('loss'), item.get('grad_norm')) for item in map(json.loads, lines)]


def saved_steps(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Returns when something has come about; fails where it does not, rather than wait for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it never came about'
        time.sleep(0.01)
