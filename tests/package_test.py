"""What is installed: the command, the configurations, the metadata; built twice, the same bytes."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

import llama_jax
from experiments import __main__ as commands
from experiments import config_file

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


@pytest.mark.slow
def test_the_wheel_is_the_same_each_time_and_runs_in_an_empty_folder(tmp_path):
    files = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True).stdout.split(
        b'\0'
    )
    wheels = []
    for number in range(2):
        copy = tmp_path / f'copy{number}'
        for name in map(os.fsdecode, filter(None, files)):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
        place = tmp_path / f'wheel{number}'
        command = [
            sys.executable,
            '-m',
            'pip',
            'wheel',
            '-q',
            '--no-deps',
            '--no-build-isolation',
            '-w',
            place,
            copy,
        ]
        subprocess.run(command, check=True, env=os.environ | {'SOURCE_DATE_EPOCH': '1700000000'})
        wheels += place.glob('*.whl')
    first, second = (wheel.read_bytes() for wheel in wheels)
    assert first == second
    installed, empty = tmp_path / 'installed', tmp_path / 'empty'
    empty.mkdir()
    zipfile.ZipFile(wheels[0]).extractall(installed)
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
