"""What the pages tell people to run exists: commands, their flags, settings, presets, files."""

import pathlib
import re

import pytest

from configs import pretrain
from experiments import launch
from llama_jax.models.presets import PRESETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for command in re.findall(r'experiments\.(\w+)', text):
        assert (ROOT / 'experiments' / f'{command}.py').exists(), command
    for key in re.findall(r'--config\.([a-z]+\.[a-z_]+)', text):
        assert key in launch.flatten(pretrain.get_config()), key
    for model in re.findall(r'configs/pretrain\.py:(\w+)', text):
        assert model in PRESETS, model
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', text):
        assert (page.parent / link).exists(), link
    launch_source = (ROOT / 'experiments' / 'launch.py').read_text()
    for command, options in re.findall(r'experiments\.(\w+) ([^`\n]*)', text):
        files = (ROOT / 'experiments').glob(f'{command}*.py')  # a suite of the benchmark is a file of its own
        source = ''.join(file.read_text() for file in files) + launch_source
        for flag in re.findall(r'--([a-z_]+)(?==| |$)', options):
            assert f"'{flag}'" in source, f'{command} --{flag}'


def test_the_two_commands_of_the_readme_are_there():
    text = (ROOT / 'README.md').read_text()
    blocks = re.findall(r'```bash\n(.+)\n```', text)
    assert len(blocks) == 2 and all(block.startswith('python3 -m venv .venv && ') for block in blocks)
    assert text.index('<!-- test command -->') < text.index(blocks[1])
    assert len(text.splitlines()) < 80, 'the README is one screen and a table'
