"""Damaged files of every kind: a few of weights here, thousands of all kinds through the command, and what it found."""

import subprocess
import sys

import pytest
from etils import epath

from tests.convert.fuzz import REPOSITORY, SOUND, Bench
from tests.convert.samples import weights


def test_damaged_weights_are_refused_in_one_line_or_read(tmp_path):
    bench = Bench(tmp_path, weights(epath.Path(tmp_path)))
    found = [(number, *bench.outcome(*bench.choose(0, number))) for number in range(5 * len(bench.readers))]
    assert not [entry for entry in found if entry[1] not in SOUND]
    assert {outcome for _, outcome, _ in found} == set(SOUND)


@pytest.mark.parametrize(
    ('count', 'only'),
    [
        pytest.param(2_000, '', marks=pytest.mark.slow),
        pytest.param(30_000, '', marks=pytest.mark.long),
        pytest.param(20_000, 'data', marks=pytest.mark.long),
    ],
)
def test_thousands_of_damaged_files_of_every_kind(count, only):
    command = [sys.executable, '-m', 'tests.convert.fuzz', f'--mutations={count}', f'--only={only}']
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
