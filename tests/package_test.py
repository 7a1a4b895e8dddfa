"""What is installed: the command, the configurations, the metadata, the lock; built twice, the same bytes."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging import requirements, utils

import llama_jax
from experiments import __main__ as commands
from experiments.run import config_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['llama_jax', *arguments])
    commands.main()


@pytest.mark.parametrize('arguments', [(), ('--help',)])
def test_the_command_lists_the_verbs(monkeypatch, capsys, arguments):
    run_command(monkeypatch, *arguments)
    shown = capsys.readouterr().out
    for verb in ('pretrain', 'sft', 'generate', 'evaluate', 'convert', 'preflight', 'benchmark'):
        assert re.search(rf'^  {verb} +\w.*\.$', shown, re.MULTILINE), verb
    assert 'launch' not in shown and '__main__' not in shown


def test_a_verb_is_run_with_what_follows(monkeypatch):
    started = []
    monkeypatch.setattr('runpy.run_module', lambda name, **how: started.append((name, sys.argv[1:])))
    run_command(monkeypatch, 'pretrain', '--workdir=x', '--config=y')
    assert started == [('experiments.pretrain', ['--workdir=x', '--config=y'])]


def test_a_verb_that_is_none_is_told_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit, match='2'):
        run_command(monkeypatch, 'pretran')
    line = capsys.readouterr().err
    assert (
        line.startswith("error: there is no command 'pretran'; did you mean pretrain")
        and line.count('\n') == 1
    )


def test_a_configuration_is_looked_for_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file.find('configs/pretrain.py:tiny') == f'{ROOT}/configs/pretrain.py:tiny'
    assert config_file.find('configs/none.py:tiny') == 'configs/none.py:tiny'
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/pretrain.py').write_text('')
    assert config_file.find('configs/pretrain.py') == 'configs/pretrain.py'


def test_the_metadata_agree():
    assert PROJECT['version'] == llama_jax.__version__
    citation = (ROOT / 'CITATION.cff').read_text()
    assert f'version: {PROJECT["version"]}' in citation and PROJECT['urls']['Repository'] in citation
    assert f'## {PROJECT["version"]}' in (ROOT / 'CHANGELOG.md').read_text()
    repository = PROJECT['urls']['Repository'].removeprefix('https://github.com/')
    for book in (ROOT / 'colabs').glob('*.ipynb'):
        assert (
            f'colab.research.google.com/github/{repository}/blob/main/colabs/{book.name}' in book.read_text()
        )
    assert {'tpu', 'cuda', 'cuda12', 'test'} <= set(PROJECT['optional-dependencies'])


def test_the_lock_is_of_these_dependencies():
    """Without a network; `uv lock --check`, which needs one, is asked by .ci/run."""
    text = (ROOT / 'uv.lock').read_text()
    block = re.search(r'^\[\[package\]\]\nname = "llama-jax"\n(.*?)^\[\[package\]\]', text, re.M | re.S)
    locked = tomllib.loads(block[1])['package']['metadata']['requires-dist']
    groups = [PROJECT['dependencies'], *PROJECT['optional-dependencies'].values()]
    wanted = [requirements.Requirement(line) for group in groups for line in group]
    assert {(entry['name'], entry.get('specifier', '')) for entry in locked} >= {
        (utils.canonicalize_name(one.name), str(one.specifier)) for one in wanted if one.name != 'llama_jax'
    }
    assert set(re.findall(r'registry = "(.*?)"', text)) == {'https://pypi.org/simple'}
    assert set(re.findall(r'url = "https://(.*?)/', text)) == {'files.pythonhosted.org'}


def build(source, place):
    """The archive of the source and the wheel that are made of a copy of the project."""
    place.mkdir()
    calls = ''.join(f'build_meta.build_{kind}({str(place)!r});' for kind in ('sdist', 'wheel'))
    command = [sys.executable, '-c', f'from setuptools import build_meta; {calls}']
    environment = os.environ | {'SOURCE_DATE_EPOCH': '1700000000', 'PYTHONPATH': ''}
    subprocess.run(command, cwd=source, check=True, env=environment, capture_output=True)
    return sorted(place.iterdir())


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """[wheel, archive of the source], made twice of two copies with other times and other rights."""
    folder = tmp_path_factory.mktemp('built')
    ignored = [line.strip('/') for line in (ROOT / '.gitignore').read_text().split()]
    made = []
    for number in range(2):
        copy = folder / f'copy{number}'
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns('.git', *ignored), copy_function=shutil.copy
        )
        if number:
            for file in copy.rglob('*.py'):
                os.utime(file, (0, 2**30))
                file.chmod(0o600)
        made.append(build(copy, folder / f'made{number}'))
    for first, second in zip(*made, strict=True):
        assert first.name == second.name and first.read_bytes() == second.read_bytes()
    return made[0]


@pytest.mark.slow
def test_the_archive_of_the_source_has_all_that_its_tests_need(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter='data')
    [folder] = tmp_path.iterdir()
    for room in ('.ci', 'colabs', 'configs', 'docs', 'experiments', 'llama_jax', 'tests'):
        for file in (ROOT / room).rglob('*'):
            inside = folder / file.relative_to(ROOT)
            made = {'__pycache__'} & set(file.parts) or ROOT / 'docs/reference' in file.parents
            if file.is_file() and not made:
                assert inside.read_bytes() == file.read_bytes(), inside
                assert os.access(inside, os.X_OK) == os.access(file, os.X_OK), inside
    ignored = ['.git', *(ROOT / '.gitignore').read_text().split()]  # '.git' is a file in a work tree
    for file in ROOT.iterdir():
        if file.is_file() and not any(file.match(pattern) for pattern in ignored):
            assert (folder / file.name).read_bytes() == file.read_bytes(), file
    tests = [f'tests/{name}_test.py' for name in ('docs', 'launch_guide', 'package', 'pages', 'readme')]
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '0', *tests]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {'PYTHONPATH': str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize('tool', ['twine check --strict', 'check_wheel_contents'])
def test_what_is_built_is_well_formed(built, tool):
    pytest.importorskip(tool.split()[0])
    files = built if 'twine' in tool else built[:1]
    command = [sys.executable, '-m', *tool.split(), *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_folder(built, tmp_path):
    installed, empty = tmp_path / 'installed', tmp_path / 'empty'
    empty.mkdir()
    zipfile.ZipFile(built[0]).extractall(installed)
    [points] = installed.glob('*.dist-info/entry_points.txt')
    assert 'llama_jax = experiments.__main__:main' in points.read_text()
    environment = os.environ | {'PYTHONPATH': str(installed), 'XLA_FLAGS': ''}

    def run(*arguments):
        command = [sys.executable, '-P', '-m', 'experiments', *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    assert '  pretrain ' in run('--help').stdout
    options = ['--config=configs/pretrain.py:tiny', '--workdir=run', '--config.train.num_steps=20']
    options += ['--config.data.seq_len=32', '--config.train.batch_size=4', '--config.data.vocab_size=300']
    (empty / 'text.txt').write_text('\n'.join(f'The bear number {i} said {i * i}.' for i in range(3000)))
    shown = run('pretrain', *options, '--config.data.train=text.txt', '--config.eval.sample_tokens=4')
    assert shown.returncode == 0 and 'trained 20 steps' in shown.stdout, shown.stderr[-2000:]
