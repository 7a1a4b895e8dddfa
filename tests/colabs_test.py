"""The notebooks: whole, in their one committed form, and executed. `python -m tests.colabs_test` writes that form."""

import ast
import base64
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import llama_jax

nbformat = pytest.importorskip('nbformat')

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLABS = ROOT / 'colabs'
NAMES = sorted(file.stem for file in COLABS.glob('*.ipynb'))
MAX_CELLS, MAX_LINES, MAX_BYTES = 60, 15, 200_000
# That are promised, as PNG of more than one colour.
FIGURES = {'quickstart': 1, 'pretrain': 2, 'inside': 4, 'pods': 4, 'formats': 2, 'evaluate': 3}


def normal(book) -> str:
    """The committed form: no outputs, no counts, no metadata but tags."""
    cells = []
    for cell in book['cells']:
        tags = {'tags': cell['metadata']['tags']} if cell['metadata'].get('tags') else {}
        kept = {'cell_type': cell['cell_type'], 'id': cell['id'], 'metadata': tags}
        if cell['cell_type'] == 'code':
            kept |= {'execution_count': None, 'outputs': []}
        cells.append(kept | {'source': ''.join(cell['source']).rstrip().splitlines(keepends=True)})
    kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
    whole = {'cells': cells, 'metadata': {'kernelspec': kernel}, 'nbformat': 4, 'nbformat_minor': 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + '\n'


def read(name):
    return nbformat.read(COLABS / f'{name}.ipynb', as_version=4)


def code_of(book):
    """The code cells, with what only a notebook runs left out."""
    for cell in book.cells:
        if cell.cell_type == 'code':
            yield cell, re.sub(r'^(\s*)[%!].*', r'\1pass', cell.source, flags=re.MULTILINE)


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_is_whole(name):
    file = COLABS / f'{name}.ipynb'
    book = read(name)
    nbformat.validate(book)
    assert file.read_text() == normal(book), 'python -m tests.colabs_test writes the committed form'
    assert len(file.read_bytes()) < MAX_BYTES
    assert f'/colabs/{name}.ipynb)' in book.cells[0].source and 'colab-badge.svg' in book.cells[0].source
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r'[a-z-]+', id) for id in ids)
    cells = list(code_of(book))
    assert len(cells) <= MAX_CELLS and cells[0][0].id == 'install' and 'except ImportError' in cells[0][1]
    assert [cell.id for cell in book.cells if 'parameters' in cell.metadata.get('tags', ())] == ['parameters']
    assert any('assert ' in source for _, source in cells)
    for cell, source in cells:
        assert len(source.splitlines()) <= MAX_LINES, cell.id
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                check_name(ast.unparse(node))


def check_name(dotted):
    """Every name of ours exists."""
    parts = dotted.split('.')
    if parts[0] != 'llama_jax':
        return
    value = llama_jax
    for part in parts[1:3] if parts[1] == 'figures' else parts[1:2]:
        value = getattr(value, part)


def test_a_name_that_is_not_there_is_found():
    with pytest.raises(AttributeError):
        check_name('llama_jax.figures.next_token')
    with pytest.raises(AttributeError):
        check_name('llama_jax.loda')


@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_is_in_the_style_of_the_house(name):
    pytest.importorskip('ruff')
    # In a notebook every name is one that Python knows, so that a slip in any cell is found.
    for command in ('check', 'format --check', 'check --isolated --select F821'):
        subprocess.run(
            [sys.executable, '-m', 'ruff', *command.split(), str(COLABS / f'{name}.ipynb')], check=True
        )


def test_a_slip_in_any_cell_is_found(tmp_path):
    pytest.importorskip('ruff')
    command = [sys.executable, '-m', 'ruff', 'check', '-q', '--isolated', '--select', 'F821', str(tmp_path)]
    count = 0
    for name in NAMES:
        for number, cell in enumerate(read(name).cells):
            if cell.cell_type == 'code':
                book = read(name)
                book.cells[number].source += '\nlaod'
                (tmp_path / f'{name}-{number}.ipynb').write_text(normal(book))
                count += 1
    found = subprocess.run(command, capture_output=True, text=True).stdout
    assert found.count('F821') == count


def parameters_for(name, shared_data):
    """Small ones, of what is on this machine."""
    weights = shared_data / 'weights/stories260K'
    model = {'CKPT': str(weights / 'stories260K.pt'), 'TOKENIZER': str(weights / 'tok512.model')}
    return {
        'quickstart': model | {'NEW_TOKENS': 12},
        'inside': model,
        'formats': model,
        'evaluate': model | {'DATA_DIR': str(shared_data / 'eval'), 'LIMIT': 40},
        'pods': {'CKPT': model['CKPT']},
        'pretrain': {
            'TEXT': str(shared_data / 'text/tinyshakespeare.txt'), 'TOKENIZER': model['TOKENIZER'],
            'SEQ_LEN': 64, 'BATCH_SIZE': 8, 'STEPS': 40, 'SAMPLE_EVERY': 20, 'PROMPT': 'O Romeo', 'RUN_STEPS': 9,
        },
    }[name]  # fmt: skip


def execute(book, parameters, folder, kernel_name='python3'):
    """The notebook as it stands after it was run in a folder."""
    from nbclient import NotebookClient

    place = next(i for i, cell in enumerate(book.cells) if cell.id == 'parameters')
    known = {target.id for node in ast.parse(book.cells[place].source).body for target in node.targets}
    assert set(parameters) <= known, 'the notebook has these parameters'
    source = '\n'.join(f'{key} = {value!r}' for key, value in parameters.items())
    book.cells.insert(place + 1, nbformat.v4.new_code_cell(source, id='injected'))
    NotebookClient(
        book, timeout=1200, kernel_name=kernel_name, resources={'metadata': {'path': str(folder)}}
    ).execute()
    return book


def outputs_of(book):
    """(the texts, the figures as pixels, what was warned of)."""
    from PIL import Image

    texts, figures, warned = [], [], []
    for output in (output for cell in book.cells for output in cell.get('outputs', ())):
        if output.output_type == 'stream':  # in pieces, as the kernel happened to send them
            (warned if output.name == 'stderr' else texts).append(output.text)
        elif png := output.get('data', {}).get('image/png'):
            image = Image.open(io.BytesIO(base64.b64decode(png)))
            figures.append((image.tobytes(), len(image.convert('RGB').getcolors(1 << 24))))
        else:
            texts.append(output['data'].get('text/html') or output['data']['text/plain'])
    return texts, figures, warned


# Nothing beyond this machine can be reached, from the kernel or from a command that it starts.
NO_NETWORK = """
import socket

_connect = socket.socket.connect


def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):
        raise OSError(f'{address}: a test has no network')
    return _connect(self, address)


socket.socket.connect = connect
"""


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A folder of what the wheel holds, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    shutil.copytree(
        ROOT, source, ignore=lambda place, names: [
            n for n in names if n.startswith('.') or n in ('tests', 'docs', 'colabs', 'build', 'runs', '__pycache__')
        ],
    )  # fmt: skip
    options = ['--no-deps', '--no-build-isolation', '--quiet', '--wheel-dir', str(folder)]
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', *options, str(source)], check=True)
    shutil.rmtree(source)
    [wheel] = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(folder / 'installed')
    (folder / 'installed' / 'sitecustomize.py').write_text(NO_NETWORK)
    return folder / 'installed'


def check_executed(name, shared_data, folder, monkeypatch, package=ROOT):
    pytest.importorskip('ipykernel')
    monkeypatch.setenv('PYTHONPATH', str(package))
    monkeypatch.setenv('PYTHONWARNINGS', 'default::UserWarning,default::RuntimeWarning')
    monkeypatch.setenv('XLA_FLAGS', '')
    monkeypatch.setenv('JUPYTER_PLATFORM_DIRS', '1')
    book = read(name)
    if package != ROOT:
        source = f'assert llama_jax.__file__.startswith({str(package)!r})'
        book.cells.append(nbformat.v4.new_code_cell(source, id='whence'))
    book = execute(book, parameters_for(name, shared_data), folder)
    texts, figures, warned = outputs_of(book)
    assert not warned
    assert len(figures) == FIGURES[name] and all(colours > 2 for _, colours in figures)
    return texts, figures


def test_quickstart_runs(shared_data, tmp_path, monkeypatch):
    texts, _ = check_executed('quickstart', shared_data, tmp_path, monkeypatch)
    assert any('girl named Lily' in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_notebook_runs_from_the_wheel_in_an_empty_folder(
    name, shared_data, tmp_path, monkeypatch, installed
):
    texts, figures = check_executed(name, shared_data, tmp_path, monkeypatch, installed)
    if name in ('inside', 'formats', 'evaluate'):  # run twice, the same numbers
        again, figures_again = check_executed(name, shared_data, tmp_path, monkeypatch, installed)
        assert ''.join(texts) == ''.join(again) and figures == figures_again


@pytest.mark.slow
def test_a_cell_that_fails_fails_the_notebook(shared_data, tmp_path, monkeypatch):
    from nbclient.exceptions import CellExecutionError

    monkeypatch.setenv('PYTHONPATH', str(COLABS.parent))
    book = read('inside')
    next(cell for cell in book.cells if cell.id == 'inspect').source += '\nseen.nothing()'
    with pytest.raises(CellExecutionError, match='nothing'):
        execute(book, parameters_for('inside', shared_data), tmp_path)


if __name__ == '__main__':
    for stem in NAMES:
        (COLABS / f'{stem}.ipynb').write_text(normal(read(stem)))
