"""What the pages tell people to run does so: the README's two commands, the launch guides."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_two_commands_of_the_readme_are_there():
    text = (ROOT / 'README.md').read_text()
    blocks = re.findall(r'```bash\n(.+)\n```', text)
    assert len(blocks) == 2 and all(block.startswith('python3 -m venv .venv && ') for block in blocks)
    assert text.index('<!-- test command -->') < text.index(blocks[1])
    assert len(text.splitlines()) < 80, 'the README is one screen and a table'


BLOCKS = re.findall(r'```(bash|yaml)\n(.*?)```', (ROOT / 'docs' / 'launch.md').read_text(), re.DOTALL)


def launch_commands():
    """(command, its options) of all that the launch guides start; `pretrain.sh OPTIONS` adds its own to them."""
    text = '\n'.join(block for _, block in BLOCKS).replace('\\\n', ' ').replace('$process', '0')
    text = re.sub(r'[\'"]', '', re.sub(r'[\[\]]|,(?= )', ' ', text))
    found = re.findall(r'(?:experiments\.(\w+)|pretrain\.sh) +((?:(?:--[a-z]\S*|\$@) *)+)', text)
    [its_own] = [options.split()[1:] for _, options in found if '$@' in options]
    return [
        (name or 'pretrain', options.split() + ([] if name else its_own))
        for name, options in found
        if '$@' not in options
    ]


@pytest.mark.slow
def test_every_command_of_the_launch_guides_would_start(commands):
    found = launch_commands()
    assert [name for name, _ in found].count('pretrain') >= 10
    for name, *options in sorted({(name, *options) for name, options in found}):
        commands.run(name, *options, '--only_check_args').succeeded()


def test_every_launch_guide_says_where_the_data_are():
    places = {'--workdir=$WORKDIR', '--config.data.train=$DATA', '--config.data.tokenizer=$TOKENIZER'}
    for name, options in launch_commands():
        own_data = '--config=configs/pretrain.py:tiny' in options
        if name == 'pretrain' and not own_data:
            assert places | {'--config.data.weights='} <= set(options), options


@pytest.mark.parametrize('kind', ['bash', 'yaml'])
def test_the_blocks_of_the_launch_guides_are_well_formed(kind):
    yaml = pytest.importorskip('yaml') if kind == 'yaml' else None
    blocks = [block for language, block in BLOCKS if language == kind]
    assert blocks
    for block in blocks:
        if yaml:
            job = yaml.safe_load(block)['spec']['replicatedJobs'][0]['template']['spec']
            [container] = job['template']['spec']['containers']
            assert {variable['name'] for variable in container['env']} == {'WORKDIR', 'DATA', 'TOKENIZER'}
            assert all(isinstance(word, str) for word in container['command'])
        else:
            subprocess.run(['bash', '-n'], input=block, text=True, check=True)


# Stands for Python: a run that saves and ends when it is told to, or ends as it likes; all else is Python.
STAND_IN = """#!/bin/bash
[ "$1" = -m ] || exec PYTHON "$@"
echo "$@"
case $RUN in
  finishes) touch $WORKDIR/report.json ;;
  refuses) exit 2 ;;
  is_stopped) trap 'exit 0' TERM; echo; while :; do sleep 0.05; done ;;
esac
"""


@pytest.mark.parametrize(('run', 'status'), [('finishes', 0), ('refuses', 42), ('is_stopped', 42)])
def test_the_script_of_the_image_fails_until_the_run_has_finished(tmp_path, run, status):
    text = ''.join(block for _, block in BLOCKS)
    [script] = re.findall(r"cat > pretrain\.sh <<'END'\n(.*?)END\n", text, re.DOTALL)
    python = tmp_path / 'python'
    python.write_text(STAND_IN.replace('PYTHON', sys.executable))
    python.chmod(0o755)
    variables = {'RUN': run, 'WORKDIR': str(tmp_path), 'DATA': 'rows', 'TOKENIZER': 'file'}
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}'} | variables
    command = ['bash', '-c', script, 'pretrain.sh', '--config=X']
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    options = f'--config=X --workdir={tmp_path} --config.data.train=rows '
    assert process.stdout.readline().startswith(f'-m experiments.pretrain {options}')
    if run == 'is_stopped':
        process.stdout.readline()  # it listens
        process.send_signal(signal.SIGTERM)
    with process.stdout:
        assert process.wait(30) == status
