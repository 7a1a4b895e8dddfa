"""Generated code that misbehaves is contained and reported; the benchmarks' own solutions pass."""

import os
import time

import pytest

from llama_jax.eval.task import Completions, Judges
from llama_jax.eval.tasks.human_eval import HUMAN_EVAL
from llama_jax.eval.tasks.mbpp import ALL, MBPP
from llama_jax.grading import sandbox
from llama_jax.grading.sandbox import CodeExecution, Limits
from llama_jax.types import InputError

BEHAVIOUR = {
    'passes': ('assert 1 + 1 == 2', 'passed'),
    'prints': ('print("x" * 1000)', 'passed'),
    'fails': ('assert 1 == 2', 'failed: AssertionError'),
    'raises': ('raise ValueError("no")', 'failed: ValueError: no'),
    'syntax': ('def', 'failed: SyntaxError'),
    'endless loop': ('while True: pass', 'timed out after 1 s'),
    'sleeps': ('import time; time.sleep(60)', 'timed out after 1 s'),
    'catches everything': (
        'while True:\n    try: import time; time.sleep(60)\n    except BaseException: pass',
        'timed',
    ),
    'fork bomb': ('import os\nwhile True: os.fork()', 'refuses os.fork'),
    'subprocess': ('import subprocess; subprocess.run(["true"])', 'refuses subprocess.Popen'),
    'network': ('import socket; socket.create_connection(("192.0.2.1", 80))', 'refuses socket.'),
    'url': ('import urllib.request; urllib.request.urlopen("http://example.com")', 'refuses urllib.Request'),
    'huge output': ('while True: print("x" * 1000)', 'failed: more than 65536 bytes of output'),
    'huge memory': ('x = [0] * 10**10', 'failed: out of memory'),
    'huge file': ('with open("f", "wb") as f:\n    while True: f.write(b"x" * 10**6)', 'File too large'),
    'leaves early': ('import sys; sys.exit(0)', 'failed: it left before its end'),
    'leaves rudely': ('import os; os._exit(0)', 'failed: it left before its end'),
    'kills itself': ('import os; os.abort()', 'failed'),
    'reads input': ('input()', 'failed: EOFError'),
}


@pytest.fixture(scope='module')
def run():
    return CodeExecution(allowed=True, limits=Limits(seconds=1.0))


@pytest.mark.parametrize('name', BEHAVIOUR)
def test_behaviour(run, name):
    program, expected = BEHAVIOUR[name]
    start = time.perf_counter()
    outcome = run(program)
    assert expected in outcome and '\n' not in outcome
    assert (outcome == 'passed') == (expected == 'passed')
    assert time.perf_counter() - start < 10  # ends, even on a busy machine


@pytest.mark.parametrize('name', ['passes', 'endless loop', 'fork bomb', 'network', 'huge output'])
def test_without_namespaces(run, monkeypatch, name):
    """As in containers, whose kernels often refuse them."""
    monkeypatch.setattr(code_execution, '_can_unshare', lambda: False)
    program, expected = BEHAVIOUR[name]
    assert expected in run(program)


def test_native_code_cannot_reach_the_network(run, monkeypatch):
    """By the kernel's part of the fence alone, without the hook; by the hook where there are no namespaces."""
    if isolated := sandbox._can_unshare():
        unhooked = sandbox._GUARD.replace('sys.addaudithook(hook)', '')
        monkeypatch.setattr(code_execution, '_GUARD', unhooked)
    outcome = run('import socket; socket.create_connection(("192.0.2.1", 80), timeout=0.5)')
    assert ('unreachable' if isolated else 'refuses socket.') in outcome


def test_no_process_outlives_its_program(run, monkeypatch, tmp_path):
    """One that left the session, which only the namespace holds on to; else the hook refuses it."""
    if isolated := sandbox._can_unshare():
        unhooked = sandbox._GUARD.replace('sys.addaudithook(hook)', '')
        unlimited = unhooked.replace('limit(resource.RLIMIT_NPROC, 1)', '')
        monkeypatch.setattr(code_execution, '_GUARD', unlimited)
    left = tmp_path / 'left'
    outcome = run(
        'import os, time\n'
        'if os.fork() == 0:\n'
        '    os.setsid(); os.closerange(0, 3); time.sleep(0.7)\n'
        f'    open({str(left)!r}, "w").write("x")\n'
    )
    assert ('passed' if isolated else 'refuses os.fork') in outcome
    time.sleep(1.2)
    assert not left.exists()


@pytest.fixture
def unshare(monkeypatch, tmp_path):
    """Puts a script in the place of `unshare`; returns a function that writes it and one that reads what it got."""
    script, arguments = tmp_path / 'unshare', tmp_path / 'arguments'

    def write(body):
        script.write_text(f'#!/bin/sh\necho "$@" > {arguments}\n{body}\n')
        script.chmod(0o755)

    monkeypatch.setattr(sandbox.shutil, 'which', lambda name: str(script) if script.exists() else None)
    sandbox._can_unshare.cache_clear()
    yield write, arguments.read_text
    sandbox._can_unshare.cache_clear()


def test_a_program_gets_namespaces_of_its_own_where_there_are_any(run, unshare):
    write, read = unshare
    write('while [ "$1" != -- ]; do shift; done; shift; exec "$@"')
    assert sandbox._can_unshare()
    assert run('assert __name__ == "__main__"') == 'passed'
    options, _, command = read().partition(' -- ')
    assert {'--user', '--net', '--pid', '--fork', '--kill-child'} == set(options.split())
    assert 'setrlimit' in command


@pytest.mark.parametrize('body', ['', 'echo operation not permitted >&2; exit 1'])
def test_without_namespaces_the_hook_contains_alone(run, unshare, body):
    """No such command, or a kernel that refuses it."""
    if body:
        unshare[0](body)
    assert not sandbox._can_unshare()
    assert 'refuses socket.' in run(BEHAVIOUR['network'][0])


def test_nothing_is_left_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
    assert run('open("left", "w").write("x")') == 'passed'
    assert not os.listdir(tmp_path)
    assert (
        run('import os; assert os.environ.get("HOME") == os.getcwd(); assert os.listdir() == ["program.py"]')
        == 'passed'
    )


def test_secrets_of_the_environment_stay_out(run, monkeypatch):
    monkeypatch.setenv('A_SECRET_TOKEN', 'x')
    assert run('import os; assert "A_SECRET_TOKEN" not in os.environ') == 'passed'


def test_off_unless_allowed():
    with pytest.raises(InputError, match='--allow_code_execution'):
        CodeExecution()


def _shares(task, documents, texts, run):
    judges = Judges(run_code=run)
    scores = [task.score(d, [Completions((text,))], judges) for d, text in zip(documents, texts, strict=True)]
    failed = [
        (d['task_id'], s['outcome'])
        for d, s in zip(documents, scores, strict=True)
        if s['outcome'] != 'passed'
    ]
    return task.aggregate(documents, scores)['pass@1'], failed


def _check_all(shared_data, stride, seconds):
    run = CodeExecution(allowed=True, limits=Limits(seconds=seconds))
    human_eval = HUMAN_EVAL.documents(str(shared_data / 'eval'))[::stride]
    mbpp = ALL(str(shared_data / 'eval'))[:: 5 * stride if stride > 1 else 1]
    for task, documents in ((HUMAN_EVAL, human_eval), (MBPP, mbpp)):
        share, failed = _shares(task, documents, [task.answer(document) for document in documents], run)
        assert share == 1.0, failed
        # The neighbour's solution, which defines another function or computes something else.
        others = [task.answer(documents[index - 1]) for index in range(len(documents))]
        share, failed = _shares(task, documents, others, run)
        assert share == 0.0 and len(failed) == len(documents)


def test_canonical_solutions_pass_and_others_do_not(shared_data):
    _check_all(shared_data, stride=16, seconds=20.0)


@pytest.mark.slow
def test_all_canonical_solutions_pass_and_others_do_not(shared_data):
    _check_all(shared_data, stride=1, seconds=60.0)


def test_pass_at_k_over_samples(run):
    document = {
        'task_id': 'x',
        'prompt': 'def f():\n',
        'entry_point': 'f',
        'test': 'def check(f):\n    assert f() == 1',
    }
    texts = ('    return 1', *['    return 2'] * 9)
    scores = HUMAN_EVAL.score(document, [Completions(texts)], Judges(run_code=run))
    assert scores['pass@1'] == pytest.approx(0.1) and scores['pass@10'] == 1.0 and 'pass@80' not in scores
