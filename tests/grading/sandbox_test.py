"""Generated code that misbehaves is contained, code that cheats fails; the benchmarks' own solutions pass."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.eval.task import Completions, Graders
from llama_jax.eval.tasks.human_eval import HUMAN_EVAL
from llama_jax.eval.tasks.mbpp import ALL, MBPP
from llama_jax.grading import keeper, sandbox
from llama_jax.grading.program_tests import ProgramTest
from llama_jax.grading.sandbox import CodeExecution, Limits
from tests.grading.cheating_programs import CHEATS

BEHAVIOUR = {
    'passes': ('assert 1 + 1 == 2', 'passed'),
    'prints': ('print("x" * 1000)', 'passed'),
    'prints megabytes': ('for _ in range(100): print("x" * 100_000)', 'passed'),
    'closes its output': ('import os, sys; sys.stdout.close(); os.close(1); os.closerange(0, 3)', 'passed'),
    'prints late': (
        'import atexit, threading; atexit.register(print, "late"); threading.Timer(60, print).start()',
        'passed',
    ),
    'leaves threads': (
        'import threading, time\nfor _ in range(8): threading.Thread(target=time.sleep, args=(60,)).start()',
        'passed',
    ),
    'fails': ('assert 1 == 2', 'failed: AssertionError'),
    'raises': ('raise ValueError("no")', 'failed: ValueError: no'),
    'raises its own': ('class E(Exception): pass\nraise E("no")', 'failed: E: no'),
    'syntax': ('def', 'failed: SyntaxError'),
    'endless loop': (
        'while True:\n    try: import time; time.sleep(60)\n    except BaseException: pass',
        'timed out after 1 s',
    ),
    'fork bomb': ('import os\nwhile True: os.fork()', 'refuses os.fork'),
    'subprocess': ('import subprocess; subprocess.run(["true"])', 'refuses subprocess.Popen'),
    'network': ('import socket; socket.create_connection(("192.0.2.1", 80))', 'refuses socket.'),
    'url': ('import urllib.request; urllib.request.urlopen("http://example.com")', 'refuses urllib.Request'),
    'huge memory': ('x = [0] * 10**10', 'failed: out of memory'),
    'huge file': ('with open("f", "wb") as f:\n    while True: f.write(b"x" * 10**6)', 'File too large'),
    'leaves early': ('import sys; sys.exit(0)', 'failed: it left before its end'),
    'leaves rudely': ('import os; os._exit(0)', 'failed: it left before its end'),
    'kills itself': ('import os; os.abort()', 'failed: killed by SIG'),
    'reads input': ('input()', 'failed: EOFError'),
    'nested folders': (
        'import os\nfor _ in range(400): os.mkdir("d"); os.chdir("d")\nos.chmod(".", 0)',
        'passed',
    ),
}


def _without_namespaces(monkeypatch):
    start = sandbox._Keeper._start
    monkeypatch.setattr(
        sandbox._Keeper, '_start', lambda self, isolated: 'refused' if isolated else start(self, False)
    )


# On a busy machine a program that passes may wait for its turn; for the end of one that does not, no test waits long.
LONG, BRIEF = Limits(seconds=20.0), Limits(seconds=1.0)


@pytest.fixture(scope='module')
def run():
    return CodeExecution(allowed=True, limits=LONG)


@pytest.fixture(scope='module')
def brief():
    return CodeExecution(allowed=True, limits=BRIEF)


@pytest.fixture(scope='module')
def kept_bare():
    return CodeExecution(allowed=True, limits=LONG)


@pytest.fixture
def bare(monkeypatch, kept_bare):
    """As in containers, whose kernels often refuse namespaces."""
    _without_namespaces(monkeypatch)
    return kept_bare


@pytest.mark.parametrize('name', BEHAVIOUR)
def test_behaviour(run, brief, name):
    program, expected = BEHAVIOUR[name]
    start = time.perf_counter()
    outcome = (brief if 'timed out' in expected else run)(ProgramTest(program, ''))
    assert expected in outcome and '\n' not in outcome
    assert (outcome == 'passed') == (expected == 'passed')
    assert time.perf_counter() - start < 60  # ends, even on a busy machine


@pytest.mark.parametrize(
    ('program', 'signal_number'),
    [('os.abort()', signal.SIGABRT), ('os._exit(0)', 0), ('print(flush=True); time.sleep(60)', 0)],
)
def test_a_program_on_its_way_out_ends_by_its_own_signal(monkeypatch, program, signal_number):
    child = subprocess.Popen([sys.executable, '-c', f'import os, time; {program}'], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.read(1)  # it has begun to sleep, or its connections are closed
    if 'sleep' not in program:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    wait = os.waitpid
    monkeypatch.setattr(  # as the kernel answers until the last of a process's end
        os, 'waitpid', lambda pid, flags: (0, 0) if flags & os.WNOHANG else wait(pid, flags)
    )
    assert keeper._end(child.pid) == signal_number
    child.returncode = 0  # it has been waited for


@pytest.mark.parametrize(
    'name',
    [
        'passes',
        'leaves threads',
        'endless loop',
        'fork bomb',
        'network',
        'nested folders',
        'closes its output',
    ],
)
def test_without_namespaces(bare, name):
    program, expected = BEHAVIOUR[name]
    run = dataclasses.replace(bare, limits=BRIEF) if 'timed out' in expected else bare
    assert expected in run(ProgramTest(program, ''))


def test_without_namespaces_it_is_said_once(monkeypatch, caplog):
    _without_namespaces(monkeypatch)
    runtime._LOGGED.clear()
    run = CodeExecution(allowed=True)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(2) as threads:
        assert set(threads.map(run, [ProgramTest('import time; time.sleep(0.2)', '')] * 2)) == {'passed'}
    assert [record.message for record in caplog.records if 'use a container' in record.message][1:] == []
    assert 'refused' in caplog.text


def _wrong_documents(name):
    """One function, asked for in the form of either benchmark."""
    numbers = {'[1, 2, 3]': 14, '[]': 0, '[2, 2, 2]': 12}
    prompt = f'def {name}(numbers: list) -> int:\n    """The sum of their squares."""\n'
    check = '\n'.join(f'    assert candidate({given}) == {result}' for given, result in numbers.items())
    tests = [f'assert {name}({given}) == {result}' for given, result in numbers.items()]
    human_eval = {'prompt': prompt, 'entry_point': name, 'test': f'def check(candidate):\n{check}\n'}
    reference = f'import math\ndef {name}(numbers):\n    return sum(n * n for n in numbers)'
    mbpp = {'text': '', 'code': reference, 'test_list': tests, 'test_setup_code': ''}
    return (HUMAN_EVAL, human_eval, '    return 0\n'), (MBPP, mbpp, '')


def _passes(run, name, program):
    outcomes = [
        task.grade(document, [Completions((before + program.replace('NAME', name),))], Graders(run_code=run))
        for task, document, before in _wrong_documents(name)
    ]
    return [scores['outcome'] for scores in outcomes]


def _cheat(run):
    assert len(CHEATS) >= 60
    right = 'def NAME(numbers): return sum(n * n for n in numbers)'
    assert _passes(run, 'squares', right) == ['passed', 'passed']
    with ThreadPoolExecutor(4) as threads:
        found = dict(
            zip(CHEATS, threads.map(lambda p: _passes(run, 'squares', p), CHEATS.values()), strict=True)
        )
    assert {cheat: outcomes for cheat, outcomes in found.items() if 'passed' in outcomes} == {}
    assert _passes(run, 'squares', right) == ['passed', 'passed']  # and nothing was left for others to meet


def test_cheats_fail(brief):
    _cheat(brief)


@pytest.mark.slow
def test_cheats_fail_without_namespaces(bare):
    _cheat(dataclasses.replace(bare, limits=BRIEF))


@pytest.mark.slow
def test_one_constant_body_passes_no_item_of_the_benchmarks(shared_data, run):
    """Results that equal everything, on items of every kind."""
    same, other = CHEATS['equals everything'], CHEATS['an int that equals everything']
    documents = [
        (HUMAN_EVAL, d, d['entry_point']) for d in HUMAN_EVAL.documents(str(shared_data / 'eval'))[::4]
    ]
    for document in ALL(str(shared_data / 'eval'))[::20]:
        name = document['test_list'][0].split('assert ', 1)[1].partition('(')[0].strip()
        documents.append((MBPP, document, name))

    def score(item):
        task, document, name = item
        texts = tuple(f'    pass\n{cheat.replace("NAME", name)}' if task is HUMAN_EVAL else cheat.replace('NAME', name)
                      for cheat in (same, other))  # fmt: skip
        return task.grade(document, [Completions(texts)], Graders(run_code=run))['outcome']

    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(score, documents))
    assert len(outcomes) > 80 and not [outcome for outcome in outcomes if 'passed' in outcome]


PLAIN = {
    'numbers': '1, -2.5, True, None, 10**6000, 1j, float("inf"), 2**70, -0.0',
    'containers': '[1, (2, [3])], {1: {"a": (1,)}, (1, 2): "b"}, {1, 2}, frozenset({3}), b"x", range(3)',
    'text': '"\\ud800 \\x00 é", ""',
    'made of plain ones': 'collections.Counter("aab"), collections.OrderedDict(a=1), collections.deque([1])',
    'exact numbers': 'fractions.Fraction(1, 3), decimal.Decimal("0.10")',
}


@pytest.mark.parametrize('kind', PLAIN)
def test_plain_values_come_back_as_they_went(run, kind):
    imports = 'import collections, decimal, fractions'
    tests = (
        f'values = [{PLAIN[kind]}]\n'
        'for there, back in zip(values, same(values), strict=True):\n'
        '    assert there == back, (there, back)\n'
        '    assert isinstance(there, type(back)), (there, back)\n'
    )
    assert run(ProgramTest('def same(x): return x', tests, ('same',), imports)) == 'passed'


def test_views_iterators_classes_and_exceptions(run):
    program = (
        'import enum\n'
        'class Stack:\n'
        '    size = 0\n'
        '    def push(self, x): self.size += 1; return self.size\n'
        'class Color(enum.IntEnum): RED = 1\n'
        'def generate(n): yield from range(n)\n'
        'def views(d): return d.keys(), d.values(), d.items()\n'
        'def fail(kind): raise kind("why")\n'
        'def size(stack): return stack.size\n'
        'def red(): return Color.RED\n'
        'tree = Stack(); tree.left = 3\n'
    )
    tests = (
        'assert list(generate(3)) == [0, 1, 2] and generate(3) != [0, 1, 2]\n'
        'assert views({1: 2})[0] == {1: 2}.keys() and views({1: 2})[2] == {1: 2}.items()\n'
        'assert list(views({1: 2})[1]) == [2] and len(views({1: 2})[1]) == 1\n'
        's = Stack(); s.push(1); assert s.push(2) == 2 and size(s) == 2 and s.size == 2\n'
        'assert red() == 1 and tree.left == 3 and size(stack=tree) == 0\n'
        'try: fail(ValueError)\n'
        'except ValueError as error: assert str(error) == "why"\n'
        'else: raise AssertionError\n'
    )
    names = ('generate', 'views', 'Stack', 'size', 'fail', 'red', 'tree')
    assert run(ProgramTest(program, tests, names)) == 'passed'
    assert 'no plain value' in run(ProgramTest(program, 'assert Stack() != 1', ('Stack',)))
    assert 'no plain value' in run(ProgramTest(program, 'assert Stack()', ('Stack',)))
    assert 'no plain value' in run(ProgramTest(program, 'assert Stack() == Stack()', ('Stack',)))


@pytest.mark.parametrize(
    'program', ['def f(): raise SystemExit', 'import os\ndef f(): os._exit(0)', 'def f(): return f']
)
def test_tests_that_catch_everything_do_not_catch_the_end_of_a_program(run, program):
    tests = 'try: assert f() == 1\nexcept BaseException: pass'
    assert run(ProgramTest(program, tests, ('f',))).startswith('failed: ')


HOSTILE_VALUES = {
    'deep': 'def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x',
    'within itself': 'def f():\n    x = []; x.append(x); return x',
    'huge': 'def f(): return "x" * 10**7',
    'colliding keys': 'def f(): return {i * (2**61 - 1) for i in range(8000)}',
    'huge power': 'import decimal\ndef f(): return decimal.Decimal("1e999999999")',
}


@pytest.mark.parametrize('kind', HOSTILE_VALUES)
def test_values_that_would_harm_their_reader(run, kind):
    start = time.perf_counter()
    outcome = run(ProgramTest(HOSTILE_VALUES[kind], 'assert f() == 1', ('f',)))
    assert outcome != 'passed' and time.perf_counter() - start < 60


def _reach(folder):
    """A program that writes and reads where it should not, by every path there is; it reports what it could."""
    return (
        'import os, shutil\n'
        'done = []\n'
        'def attempt(what, action):\n'
        '    try: action()\n'
        '    except (OSError, shutil.Error): return\n'
        '    done.append(what)\n'
        f'folder = {str(folder)!r}\n'
        'places = [folder, "/dev/shm", "/tmp", "/var/tmp", os.path.expanduser("~root"), os.path.dirname(os.__file__)]\n'
        'for path in places:\n'
        '    attempt("write " + path, lambda: open(path + "/llama_jax_left", "w").write("x"))\n'
        '    attempt("os.open " + path, lambda: os.open(path + "/llama_jax_left", os.O_CREAT | os.O_WRONLY))\n'
        '    attempt("mkdir " + path, lambda: os.mkdir(path + "/llama_jax_left_folder"))\n'
        '    attempt("rename " + path, lambda: os.rename("a", path + "/llama_jax_left"))\n'
        'attempt("up", lambda: open("../../../../../../.." + folder + "/llama_jax_left", "w"))\n'
        'attempt("link", lambda: (os.symlink(folder, "l"), open("l/llama_jax_left", "w")))\n'
        'attempt("remove", lambda: os.remove(folder + "/kept"))\n'
        'attempt("chmod", lambda: os.chmod(folder + "/kept", 0))\n'
        'attempt("truncate", lambda: os.truncate(folder + "/kept", 0))\n'
        'attempt("cut", lambda: open(folder + "/kept", "r+"))\n'
        'attempt("read", lambda: open(folder + "/kept").read())\n'
        'at = os.O_CREAT | os.O_RDWR\n'
        'attempt("fd", lambda: os.open("llama_jax_left", at, dir_fd=os.open(folder, os.O_RDONLY)))\n'
        'open("inside", "w").write("x"); os.mkdir("d"); os.rename("inside", "d/inside"); shutil.rmtree("d")\n'
        'def able(): return done\n'
    )


@pytest.mark.parametrize('kind', ['run', 'bare'])
def test_files_outside_stay_as_they_are(request, tmp_path, kind):
    (tmp_path / 'kept').write_text('kept')
    run = request.getfixturevalue(kind)
    # In /tmp and /dev/shm there is the program's own folder, where it has namespaces.
    tests = f'found = [x for x in able() if {str(tmp_path)!r} in x or " " not in x]\nassert not found, found'
    outcome = run(ProgramTest(_reach(tmp_path), tests, ('able',)))
    assert outcome == 'passed'
    assert os.listdir(tmp_path) == ['kept'] and (tmp_path / 'kept').read_text() == 'kept'
    for place in ('/dev/shm', '/tmp', '/var/tmp', os.path.expanduser('~'), os.path.dirname(os.__file__)):
        assert not list(pathlib.Path(place).glob('llama_jax_left*'))


def test_programs_do_not_meet(run):
    """The folder, the modules and the memory of one are gone before the next begins."""
    assert run(ProgramTest('import os, math; open("left", "w"); math.left = os.left = 1', '')) == 'passed'
    tests = 'assert state() == ([], False, False)'
    program = 'import os, math\ndef state(): return os.listdir(), hasattr(math, "left"), hasattr(os, "left")'
    assert run(ProgramTest(program, tests, ('state',))) == 'passed'


def test_secrets_of_the_environment_stay_out(monkeypatch):
    monkeypatch.setenv('A_SECRET_TOKEN', 'x')
    program = 'import os; assert "A_SECRET_TOKEN" not in os.environ and os.environ["HOME"] == os.getcwd()'
    assert CodeExecution(allowed=True)(ProgramTest(program, '')) == 'passed'


def _processes(mark):
    """Command lines that hold a text; the keeper's has its limits in it, and its children keep it."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().decode('utf-8', 'replace'):
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('kind', ['run', 'bare'])
def test_no_process_and_no_folder_outlives_its_program(monkeypatch, tmp_path, kind):
    """Not even one that got around the hook, and left the session."""
    mark = f'6{os.getpid()}.{kind == "run":d}7'
    program = (
        'import _posixsubprocess, os\n'
        'read, write = os.pipe()\n'
        f'_posixsubprocess.fork_exec([b"sleep", b"{mark}"], [b"/usr/bin/sleep"], True, (), None, None, -1, -1, -1, -1, '
        '-1, -1, read, write, True, True, -1, None, None, None, -1, None, True)\n'
        'import time; time.sleep(0.3)\n'
    )
    monkeypatch.setattr(sandbox, '_ENVIRONMENT', sandbox._ENVIRONMENT | {'TMPDIR': str(tmp_path)})
    if kind == 'bare':
        _without_namespaces(monkeypatch)
    run = CodeExecution(allowed=True, limits=Limits(seconds=5.0))
    outcome = run(ProgramTest(program, ''))
    assert outcome == 'passed' or 'fork_exec' in outcome  # whose arguments are another Python's
    assert _processes(f'sleep\0{mark}') == []
    run._idle.get().close()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_all_ends_with_the_process_that_started_it():
    """However it ends: by SIGKILL, while a program runs."""
    seconds = f'300.{os.getpid()}5'
    script = (
        'from llama_jax.grading.sandbox import CodeExecution, Limits\n'
        'from llama_jax.grading.program_tests import ProgramTest\n'
        f'CodeExecution(allowed=True, limits=Limits(seconds={seconds}))(ProgramTest("while True: pass", ""))\n'
    )
    process = subprocess.Popen([sys.executable, '-c', script], cwd=pathlib.Path(__file__).parents[2])
    try:
        _wait(lambda: len(_processes(seconds)) >= 5)  # itself, the keeper, the tests, the warden, the program
    finally:
        process.kill()
        process.wait()
    _wait(lambda: _processes(seconds) == [])


def _wait(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_keeper_is_replaced(run):
    assert run(ProgramTest('', '')) == 'passed'
    keeper = run._idle.get()
    keeper.close()
    run._idle.put(keeper)
    assert run(ProgramTest('', '')) == 'passed'


def test_off_unless_allowed():
    with pytest.raises(InputError, match='off'):
        CodeExecution()


def _check_all(shared_data, stride, seconds):
    run = CodeExecution(allowed=True, limits=Limits(seconds=seconds))
    data, step = str(shared_data / 'eval'), stride if stride == 1 else 5 * stride
    odd = {596, 367, 601, 126, 533, 927} if stride > 1 else set()  # need more than values, see `mbpp`
    sources = (
        (HUMAN_EVAL, [d for i, d in enumerate(HUMAN_EVAL.documents(data)) if i % stride == 0]),
        (MBPP, [d for i, d in enumerate(ALL(data)) if i % step == 0 or d['task_id'] in odd]),
    )
    for task, documents in sources:
        # Its own solution; the neighbour's, which defines another function or computes something else.
        pairs = [(d, task.answer(d)) for d in documents]
        pairs += [(d, task.answer(documents[index - 1])) for index, d in enumerate(documents)]

        def outcome(pair, task=task):
            return task.grade(pair[0], [Completions((pair[1],))], Graders(run_code=run))['outcome']

        with ThreadPoolExecutor(2) as threads:
            outcomes = list(threads.map(outcome, pairs))
        own, others = outcomes[: len(documents)], outcomes[len(documents) :]
        assert [(d['task_id'], o) for d, o in zip(documents, own, strict=True) if o != 'passed'] == []
        assert 'passed' not in others


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
    scores = HUMAN_EVAL.grade(document, [Completions(texts)], Graders(run_code=run))
    assert scores['pass@1'] == pytest.approx(0.1) and scores['pass@10'] == 1.0 and 'pass@80' not in scores
