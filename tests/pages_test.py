"""Pages: their examples and blocks of Python run as they stand, their links lead to what is there."""

import doctest
import pathlib
import re
import shutil

import jax.numpy as jnp
import pytest

import llama_jax
from experiments.run import config_file
from tests.serve.serving import Script, scripted, serving

ROOT = pathlib.Path(__file__).resolve().parents[1]
_HEADING = re.compile(r'^### (\w+)\n(.*?)(?=^##|\Z)', re.MULTILINE | re.DOTALL)
PAGES = [ROOT / f'{name}.md' for name in ('README', 'CONTRIBUTING', 'CHANGELOG')] + sorted(
    ROOT.glob('docs/*.md')
)
BLOCKS = {page.name: re.findall(r'^```python\n(.*?)^```', page.read_text(), re.M | re.S) for page in PAGES}
SECTIONS = dict(_HEADING.findall((ROOT / 'docs/face.md').read_text()))


@pytest.fixture(scope='module')
def place(shared_data, tmp_path_factory):
    """A folder with the small Llama of the examples, and the names that they share."""
    folder = tmp_path_factory.mktemp('pages')
    for name in ('stories260K.pt', 'tok512.model'):
        shutil.copy(shared_data / 'weights/stories260K' / name, folder)
    return folder, {}


def test_each_name_of_the_face_has_its_example():
    assert sorted(SECTIONS) == sorted({*dir(llama_jax)} - {'jaxtyping'})  # which the checks of shapes bring
    for name, text in SECTIONS.items():
        assert f'llama_jax.{name}' in ''.join(re.findall(r'^(?:>>>|\.\.\.) .*', text, re.MULTILINE)), name
        assert re.search(rf'^\.\. auto\w+:: llama_jax\.{name}', text, re.MULTILINE) or name == 'PRESETS', name


# In the order of the page, as later examples use what earlier ones made.
@pytest.mark.parametrize(
    'names',
    [
        [name for name in SECTIONS if name != 'preflight'],
        pytest.param(['preflight'], marks=pytest.mark.slow),  # compiles, in a process of its own
    ],
    ids=['quick', 'preflight'],
)
def test_the_examples_of_the_face(place, monkeypatch, names):
    folder, shared = place
    monkeypatch.chdir(folder)
    shared.update(llama_jax=llama_jax)
    told = []
    for name in names:
        example = doctest.DocTestParser().get_doctest(
            SECTIONS[name].replace('```\n', '\n'), shared, name, 'docs/face.md', 0
        )
        runner = doctest.DocTestRunner(
            verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        )
        runner.run(example, out=told.append, clear_globs=False)
        shared.update(example.globs)
    assert not told, '\n'.join(told)


# Links.


def anchors_of(text):
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r'^#+ (.*)', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S), re.M)
    return {re.sub(r'[^\w\s-]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


def dead_links(page, text):
    """Relative links of a page whose file is not there, or has no such heading."""
    for target in re.findall(r'\]\((?!https?:|mailto:)([^)\s]+)\)', text):
        path, _, anchor = target.partition('#')
        file = (page.parent / path).resolve() if path else page
        known = text if file == page else file.read_text() if file.suffix == '.md' and file.exists() else ''
        made = path.startswith('reference/')  # of the code
        if anchor and anchor not in anchors_of(known) or not (made or file.exists()):
            yield target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_what_is_there(page):
    assert not list(dead_links(page, page.read_text()))


def test_every_page_is_on_the_site():
    index = (ROOT / 'docs/index.md').read_text()
    for page in {page.stem for page in ROOT.glob('docs/*.md')} - {'index'}:
        assert f'\n{page}\n' in index, f'docs/index.md leads to {page}'


def test_a_dead_link_is_found():
    text = '# One\n[a](#one) [b](#two) [c](data.md#nothing) [d](data.md#several-sources) [e](none.md)\n'
    assert list(dead_links(ROOT / 'docs/index.md', text)) == ['#two', 'data.md#nothing', 'none.md']


# Blocks of Python.


def test_every_block_of_python_is_run():
    """Here, those of three pages where their subject is tested."""
    elsewhere = {
        'finetuning.md': 'sft_test.py',
        'generation.md': 'api_test.py',
        'notebooks.md': 'face_test.py',
    }
    for page, test in elsewhere.items():
        assert f"'docs/{page}'" in (ROOT / 'tests' / test).read_text() and BLOCKS[page]
    counts = {name: len(blocks) for name, blocks in BLOCKS.items() if blocks and name not in elsewhere}
    assert counts == {'README.md': 1, 'data.md': 2, 'serving.md': 2}


def test_the_recipe_of_the_page_on_data_is_one(tmp_path, monkeypatch):
    (tmp_path / 'recipe.py').write_text(BLOCKS['data.md'][0])
    known = config_file.flatten(config_file._load(str(tmp_path / 'recipe.py')))
    assert known['sources.code.input'] == 'code/*.parquet' and known['sources.web.text_key'] == 'text'


@pytest.mark.slow
def test_the_python_of_the_readme_and_of_the_rules_runs(place, monkeypatch):
    folder, _ = place
    monkeypatch.chdir(folder)
    load = llama_jax.load
    monkeypatch.setattr(llama_jax, 'load', lambda path: load('stories260K.pt', tokenizer='tok512.model'))
    known = {'tokens': jnp.ones((1, 4), jnp.int32)}
    exec(BLOCKS['README.md'][0], known)
    assert known['logits'].shape == (1, 4, 512) and len(known['texts']) == 1
    known['prompts'] = ['Once', 'Then']
    exec(BLOCKS['serving.md'][1], known)
    assert all(text in set('0123456789') for text in known['texts'])


@pytest.mark.slow
def test_the_client_of_the_page_on_serving_is_answered(capsys, monkeypatch):
    openai = pytest.importorskip('openai')
    client = openai.OpenAI
    with serving(lambda: scripted(Script('It was Goethe.'))) as (server, _):
        monkeypatch.setattr(
            openai,
            'OpenAI',
            lambda base_url, api_key: client(
                base_url='http://testserver/v1', api_key=api_key, http_client=server
            ),
        )
        exec(BLOCKS['serving.md'][0], known := {})
    assert known['answer'].choices[0].message.content == 'It was Goethe.'
    assert capsys.readouterr().out == 'It was Goethe.'
