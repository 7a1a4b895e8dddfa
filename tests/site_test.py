"""The site: built offline without a warning, every name of the face, setting and option on it."""

import html
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import llama_jax
from tests import docs_test
from tests.colabs_test import NAMES, parameters_for

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXECUTED = ('quickstart',)  # the others are executed, and looked at, by `colabs_test`


@pytest.fixture(scope='module')
def site(shared_data, tmp_path_factory):
    """The folder of the pages."""
    pytest.importorskip('furo')
    folder = tmp_path_factory.mktemp('site')
    (folder / 'parameters.json').write_text(
        json.dumps({name: parameters_for(name, shared_data) for name in EXECUTED})
    )
    environment = os.environ | {
        'LLAMA_JAX_NOTEBOOKS': str(folder / 'parameters.json'),
        'LLAMA_JAX_NOTEBOOK_CACHE': str(folder / 'cache'),
        'XLA_FLAGS': '',
    }
    command = [sys.executable, '-m', 'sphinx', '-W', '-n', '-q', '-c', 'docs', '.', str(folder / 'html')]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / 'html'


def text_of(file):
    """A page without its tags."""
    return html.unescape(re.sub(r'<[^>]+>', '', file.read_text()))


@pytest.mark.slow
def test_every_name_of_the_face_has_its_entry(site):
    page = (site / 'docs/face.html').read_text()
    shown = text_of(site / 'docs/face.html')
    for name in set(dir(llama_jax)) - {'jaxtyping'}:
        assert re.search(rf'<h3>{name}<', page), name
        assert name in ('PRESETS', 'figures', 'preflight') or f'llama_jax.{name}' in shown, name


@pytest.mark.slow
def test_every_room_has_its_page_and_public_names_their_entries(site):
    for module, _file in docs_test.modules().items():
        if module.startswith('llama_jax.'):
            page = (site / f'docs/reference/rooms/{module.split(".")[1]}.html').read_text()
            assert f'id="module-{module}"' in page, module
    for name in (
        'train.step.compile_train_step',
        'ops.attention.attention',
        'serve.service.Service',
    ):
        assert (
            f'id="llama_jax.{name}"' in (site / f'docs/reference/rooms/{name.split(".")[0]}.html').read_text()
        )


@pytest.mark.slow
def test_every_setting_is_there_with_what_it_means(site):
    rows = dict(
        re.findall(
            r'<tr.*?<td><p>(.*?)</p></td>\s*<td>(.*?)</td>',
            (site / 'docs/reference/settings.html').read_text(),
            re.S,
        )
    )
    meaning = {
        re.sub(r'<[^>]+>', '', key): re.sub(r'<[^>]+>', '', text).strip() for key, text in rows.items()
    }
    assert meaning.keys() >= docs_test.SETTINGS
    assert not [key for key, text in meaning.items() if not text]


@pytest.mark.slow
def test_every_option_of_every_command_is_there(site):
    sections = re.split(r'<section id="([\w-]+)">', (site / 'docs/reference/commands.html').read_text())
    shown = {
        name: re.sub(r'<[^>]+>', '', text) for name, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    of_jax = {'coordinator', 'num_processes', 'process_id', 'initialization_timeout'}
    for command in docs_test.commands() - {'__main__'}:
        text = shown[command.replace('_', '-')]
        for flag in docs_test.flags_of(command) - of_jax:
            assert f'--{flag}' in text, f'{command} --{flag}'


@pytest.mark.slow
def test_every_page_is_reached_from_the_index_and_notebooks_show_what_they_made(site):
    reached, todo = set(), {site / 'docs/index.html'}
    while todo:
        page = todo.pop()
        reached.add(page)
        for target in re.findall(r'href="([^"#:]+\.html)', page.read_text()):
            linked = (page.parent / target).resolve()
            assert linked.exists(), f'{page.name} -> {target}'
            todo |= {linked} - reached
    assert reached >= {file for file in site.rglob('*.html') if '_static' not in file.parts} - {
        site / 'py-modindex.html',
        site / 'index.html',
    }
    for name in NAMES:
        figures = (
            'data:image/png' in (page := (site / f'colabs/{name}.html').read_text())
            or 'class="output' in page
        )
        assert figures == (name in EXECUTED), name
    assert 'url=docs/index.html' in (site / 'index.html').read_text()
