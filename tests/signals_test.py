"""How commands end on signals, wherever the main thread is; the training loop's way is in `train/loop_test.py`."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_jax.signals import PreemptionSignal
from tests.command_line import REPOSITORY

# Forks a process for each case (importing JAX takes longer than all of them), which does what `place` says until it is
# stopped; says which they are, and then how they ended.
SERVER = """
import hashlib, json, os, sys, time
from llama_jax import signals
def run(folder, place, seconds=1.0, resumable=False, training=False):
    signals._PATIENCE, signals._CLEARING_UP = seconds, 1.0
    os.dup2(os.open(folder + '/stderr', os.O_WRONLY | os.O_CREAT), 2)
    interrupts = signals.Interrupts(resumable)
    interrupts.install()
    preemption = signals.PreemptionSignal()
    if training:
        preemption.listen()
    open(folder + '/ready', 'w').close()
    def outside_python():
        hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
    try:
        exec(place)
    except signals.Interrupted as interrupted:
        interrupts.end(interrupted)
pids = []
for case in json.loads(sys.argv[1]):
    pids.append(os.fork())
    if not pids[-1]:
        run(**case)
        os._exit(0)
print(json.dumps(pids), flush=True)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
"""
OUTSIDE = 'outside_python()'
POOL = """
pid = os.fork()
time.sleep(0.2 if pid else 60)
os.kill(pid, 15)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -15
time.sleep(1.5)
"""
# What is raised in a finaliser, Python prints and drops.
FINALISER = """
 class Slow:
  def __del__(self):
   time.sleep(60)
 Slow()
 time.sleep(60)
"""
CASES = {
    # what happens: (signals sent, where the process is, its status, what it says)
    'in Python': ([signal.SIGTERM], {'place': 'time.sleep(60)'}, 143, 'error: stopped by SIGTERM\n'),
    'compiling': ([signal.SIGINT], {'place': OUTSIDE}, 130, 'error: stopped by SIGINT\n'),
    'resumable': (
        [signal.SIGUSR1], {'place': 'time.sleep(60)', 'resumable': True}, 0,
        'stopped by SIGUSR1; the same command goes on\n',
    ),
    'resumable and compiling': (
        [signal.SIGTERM], {'place': OUTSIDE, 'resumable': True}, 0, 'stopped by SIGTERM; the same command goes on\n'
    ),
    'clearing up for too long': (
        [signal.SIGTERM], {'place': 'try: time.sleep(60)\nfinally: outside_python()'}, 143,
        'error: stopped by SIGTERM\n',
    ),
    'a second signal': ([signal.SIGINT] * 2, {'place': OUTSIDE, 'seconds': 60.0}, 130, ''),
    'a second signal while training': ([signal.SIGTERM] * 2, {'place': OUTSIDE, 'training': True}, 143, ''),
    'a second signal of another kind': (
        [signal.SIGTERM, signal.SIGINT], {'place': OUTSIDE}, 143, 'error: stopped by SIGTERM\n'
    ),
    'in a finaliser': ([signal.SIGTERM], {'place': f'if True:{FINALISER}'}, 143, 'error: stopped by SIGTERM\n'),
    'in a finaliser while training': (
        [signal.SIGTERM],
        {'place': f'with preemption.interruptible():{FINALISER}', 'training': True}, 143, 'error: stopped by SIGTERM\n',
    ),
    # A computation that was cut off may still run, and must not find the interpreter gone.
    'while something runs': (
        [signal.SIGINT],
        {'place': "sys.kept = type('', (), {'__del__': lambda self, end=os._exit: end(7)})()\ntime.sleep(60)"}, 130,
        'error: stopped by SIGINT\n',
    ),
    'one of a pool is ended': ([], {'place': POOL}, 0, ''),
}  # fmt: skip


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
    """Each case's status and what it said."""
    folders = {case: tmp_path_factory.mktemp('signals') for case in CASES}
    cases = [settings | {'folder': str(folders[case])} for case, (_, settings, *_) in CASES.items()]
    server = subprocess.Popen(
        [sys.executable, '-W', 'ignore:This process:DeprecationWarning', '-c', SERVER, json.dumps(cases)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = json.loads(server.stdout.readline())
    try:
        end = time.monotonic() + 60
        while not all((folder / 'ready').exists() for folder in folders.values()):
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.3)
        for (signals, *_), pid in zip(CASES.values(), pids, strict=True):
            for signum in signals:
                os.kill(pid, signum)
                time.sleep(0.1)
        output, _ = server.communicate(timeout=60)
    finally:
        if server.poll() is None:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            server.communicate()
    said = [(folder / 'stderr').read_text() for folder in folders.values()]
    return dict(zip(CASES, zip(json.loads(output), said, strict=True), strict=True))


@pytest.mark.parametrize('case', CASES)
def test_a_command_ends_in_one_line(ended, case):
    assert ended[case] == CASES[case][2:]


def test_elsewhere_than_in_the_main_thread_nothing_is_taken():
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        preemption = PreemptionSignal()
        pool.submit(preemption.listen).result()
        assert signal.getsignal(signal.SIGTERM) is before and not preemption.received()
        preemption.close()


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM'])
def test_a_command_that_is_still_imported_ends_in_a_line(name):
    program = (
        "import os, signal, sys, time; sys.argv = ['-m']; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import experiments; assert open('/dev/null').fileno() > 2 and not sys.stdout.isatty(); print('lost'); "
        f'os.kill(os.getpid(), signal.{name}); time.sleep(60)'
    )
    command = [
        'sh',
        '-c',
        'exec "$0" "$@" 0<&- 1>&-',
        sys.executable,
        '-c',
        program,
    ]  # those streams are closed
    ended = subprocess.run(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (128 + signal.Signals[name], f'error: stopped by {name}\n')
