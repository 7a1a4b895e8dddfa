"""The site: `python -m sphinx -W -n -c docs . OUT` from the folder above, offline, with what the extra `docs` brings.

All pages are Markdown that reads as well in the repository. Their links to files of the code lead there; the reference
is made of the code's own words by `docs/generated_pages.py`. Notebooks are shown as they are committed, without
outputs; with $LLAMA_JAX_NOTEBOOKS, a JSON file of {notebook: {parameter: value}}, those that it names are executed with
these values, and the outputs are kept in $LLAMA_JAX_NOTEBOOK_CACHE for the next time.
"""

import json
import os
import pathlib
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]
os.environ['PYTHONPATH'] = str(ROOT)  # of the notebooks' own processes
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

_PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']

project, author, version = 'llama_jax', _PROJECT['authors'][0]['name'], _PROJECT['version']
repository = _PROJECT['urls']['Repository']
extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinxcontrib.mermaid',
    'generated_pages',
]
root_doc = 'docs/index'
include_patterns = [
    'README.md',
    'CHANGELOG.md',
    'CONTRIBUTING.md',
    'docs/*.md',
    'docs/reference/**',
    'colabs/*.ipynb',
]

html_theme = 'furo'
html_title = f'llama_jax {version}'
html_theme_options = {'source_repository': repository, 'source_branch': 'main', 'source_directory': './'}
templates_path = ['templates']
html_additional_pages = {'index': 'redirect.html'}  # the root of the site
html_copy_source = False

myst_heading_anchors = 4
myst_fence_as_directive = ['mermaid']
myst_enable_extensions = ['attrs_inline']

NOTEBOOKS = os.environ.get('LLAMA_JAX_NOTEBOOKS', '')
_executed = set(json.loads(pathlib.Path(NOTEBOOKS).read_text())) if NOTEBOOKS else set()
nb_execution_mode = 'cache'
nb_execution_cache_path = os.environ.get('LLAMA_JAX_NOTEBOOK_CACHE', '')
nb_execution_excludepatterns = [
    f'colabs/{file.name}' for file in (ROOT / 'colabs').glob('*.ipynb') if file.stem not in _executed
]
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_custom_formats = {'.ipynb': ['generated_pages.read_notebook', {'parameters': NOTEBOOKS}]}
nb_merge_streams = True

# Of shell scripts that Pygments reads in part; `tests/readme_test.py` has bash read them.
suppress_warnings = ['misc.highlighting_failure']
default_role = 'code'  # docstrings quote names as Markdown does
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_typehints_format = 'short'
python_display_short_literal_types = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # shapes such as `*L` are no markup
# References of ours must lead somewhere; the documentation of others is not there without a network.
nitpick_ignore_regex = [
    (r'py:.*', r'(?!llama_jax\.).*'),
    (r'py:class', r'.*\.(_\w+|[A-Z]|Kind)'),  # private, or a variable of types
]
