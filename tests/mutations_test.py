"""The list of planted faults stays honest as code and tests move; `python -m tests.mutations` plants them."""

import ast
import functools
import importlib.machinery
import sys

import pytest

from tests import mutations
from tests.planted_faults import FAULTS
from tests.planted_faults.fault import Fault


@functools.cache
def functions_of(file: str) -> dict[str, list[str]]:
    """The tests of a file with their decorators."""
    functions = ast.parse((mutations.REPOSITORY / file).read_text()).body
    return {
        f.name: list(map(ast.unparse, f.decorator_list)) for f in functions if isinstance(f, ast.FunctionDef)
    }


def test_every_fault_can_be_planted_and_has_a_test_that_runs_by_default():
    assert len(FAULTS) >= 45
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        text = (mutations.REPOSITORY / fault.file).read_text()
        ast.parse(fault.applied_to(text))  # what is no Python would turn every test red
        file, _, name = fault.test.partition('::')
        decorators = functions_of(file).get(name.partition('[')[0])
        assert decorators is not None, f'{fault.test} of {fault.what!r} is not there'
        assert not [d for d in decorators if d.endswith(('.slow', '.long'))], fault.test


def test_a_fault_is_planted_and_taken_out(tmp_path):
    (tmp_path / 'code.py').write_text('a = 1\nb = 2\n')
    with mutations.planted(tmp_path, Fault('', 'code.py', 'b = 2', 'b = 3', '')):
        assert (tmp_path / 'code.py').read_text() == 'a = 1\nb = 3\n'
    assert (tmp_path / 'code.py').read_text() == 'a = 1\nb = 2\n'
    for old in (' = ', 'c'):
        with (
            pytest.raises(ValueError, match='code.py'),
            mutations.planted(tmp_path, Fault('', 'code.py', old, 'x', '')),
        ):
            pass


def test_each_text_of_a_file_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'dont_write_bytecode', False)
    (tmp_path / 'code.py').write_text('b = 1\n')

    def found():
        loader = importlib.machinery.SourceFileLoader('code', str(tmp_path / 'code.py'))
        exec(loader.get_code('code'), names := {})
        return names['b']

    seen = [found()]
    for new in '23':
        with mutations.planted(tmp_path, Fault('', 'code.py', '1', new, '')):
            seen += [found()]
        seen += [found()]
    assert seen == [1, 2, 1, 3, 1]


CODE = 'def double(x):\n    return 2 * x\n'
TESTS = """
import sys
import pytest
sys.path.insert(0, '.')
from code_at_hand import double

@pytest.mark.parametrize('x', [0, 1])
def test_double(x):
    assert double(x) == 2 * x

@pytest.mark.skip
def test_elsewhere():
    pass

def test_wrong():
    assert double(2) == 5
"""


def test_what_passes_without_a_fault_and_fails_with_it_is_red(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTEST_DISABLE_PLUGIN_AUTOLOAD', '1')  # they take longer to load than all else here
    monkeypatch.setenv('PYTEST_PLUGINS', 'xdist.plugin')
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'pytest.ini').write_text('[pytest]\n')
    (tmp_path / 'code_at_hand.py').write_text(CODE)
    (tmp_path / 'tests/code_test.py').write_text(TESTS)
    double, elsewhere, wrong = (
        f'tests/code_test.py::test_{name}' for name in ('double', 'elsewhere', 'wrong')
    )
    found = mutations.outcomes(tmp_path, [double, elsewhere, wrong])
    assert found == {double: 'passed', elsewhere: 'skipped', wrong: 'failed'}
    for new, verdict in ('3 * x', 'red'), ('2 *', 'NOTHING TESTED (status 4)'):
        assert mutations.try_fault(tmp_path, Fault('', 'code_at_hand.py', '2 * x', new, double))[0] == verdict


@pytest.mark.long
def test_every_fault_turns_its_test_red():
    assert mutations.main([]) == 0
