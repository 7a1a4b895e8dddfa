"""Pages that are made of the code: rooms with what they define, settings with their comments, commands with flags.

They are written to `docs/reference/` before Sphinx looks for its pages. It is an extension of Sphinx, which also turns
links to the code's files into links to the repository, and gives notebooks the parameters that they are shown with.
"""

import ast
import importlib
import json
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import Any

import nbformat
from absl import flags
from docutils import nodes
from ml_collections import ConfigDict
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from experiments import __main__ as commands
from experiments.run import config_file

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASKS = ('pretrain', 'sft', 'reward_model', 'dpo', 'ppo', 'grpo', 'prepare_data')


# Settings.


def comments_of(file: pathlib.Path) -> dict[int, str]:
    """Line -> the comment that ends it or, behind a value of several lines, stands in these."""
    with file.open('rb') as source:
        return {
            token.start[0]: token.string.lstrip('# ')
            for token in tokenize.tokenize(source.readline)
            if token.type == tokenize.COMMENT
        }


def meanings() -> dict[str, str]:
    """Dotted key -> the comment beside it in `configs`."""
    owners, found = {'source': 'sources.documents', 'algorithm': 'algorithm'}, []
    for file in sorted((ROOT / 'configs').glob('*.py')):
        comments = comments_of(file)
        for function in ast.walk(ast.parse(file.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                match node:
                    case ast.Assign(targets=[ast.Attribute() as target]):
                        root, _, key = ast.unparse(target).partition('.')
                        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                        text = ' '.join(comments[line] for line in lines if line in comments)
                        found.append((function.name, root, key, text))
                        if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
                            owners.setdefault(node.value.func.id, key)
                    case ast.Call(
                        func=ast.Attribute(attr='update', value=place), args=[ast.Call(func=maker)]
                    ):
                        owners.setdefault(ast.unparse(maker), ast.unparse(place).partition('.')[2])
    texts: dict[str, str] = {}
    for function, root, key, text in found:
        name = f'{owners.get(function, function)}.{key}' if root == 'section' else key
        if text and root in ('section', 'config'):
            texts.setdefault(name, text)
    return texts


def settings() -> dict[str, dict[str, Any]]:
    """Dotted key -> {task: its default there}."""
    found: dict[str, dict[str, Any]] = {}
    for task in TASKS:
        config = importlib.import_module(f'configs.{task}').get_config()
        for key, value in config_file.flatten(config).items():
            if not isinstance(value, ConfigDict):
                found.setdefault(key, {})[task] = value
    return found


def cell(text: Any) -> str:
    """For a table of Markdown."""
    return ' '.join(str(text).split()).replace('|', '\\|').replace('*', '\\*').replace('<', '&lt;')


def code(value: Any) -> str:
    """A value in quotes, also where it has some."""
    text = ' '.join(str(value).split()).replace('|', '\\|')
    return f'`{text}`' if text else "`''`"


def settings_page() -> str:
    """A table for each section."""
    texts, sections = meanings(), {}
    for key, defaults in settings().items():
        sections.setdefault(key.partition('.')[0] if '.' in key else '', []).append((key, defaults))
    lines = [
        '# Settings',
        '',
        'Each is `--config.SECTION.KEY=VALUE` behind `--config=configs/TASK.py:MODEL`.',
    ]
    lines += [
        'The defaults are those of the tasks that have the key, without a model or recipe behind the colon.'
    ]
    for section, rows in sections.items():
        lines += [
            '',
            f'## {section or "Of the whole run"}',
            '',
            '| key | what it is | default |',
            '|---|---|---|',
        ]
        for key, defaults in rows:
            groups: dict[str, list[str]] = {}
            for task, value in defaults.items():
                groups.setdefault(code(value), []).append(task)
            shown = '; '.join(f'{value} ({", ".join(tasks)})' for value, tasks in groups.items())
            lines.append(f'| `{key}` | {cell(texts.get(key, ""))} | {shown} |')
    return '\n'.join([*lines, ''])


# Commands.


def flags_of(verb: str) -> Iterator[tuple[str, str, str, str]]:
    """(name, values, default, help) of a command's own flags."""
    known = set(flags.FLAGS)
    place = importlib.import_module(
        f'experiments.{verb}.__main__' if verb == 'benchmark' else f'experiments.{verb}'
    )
    names = [name for name in flags.FLAGS if name not in known]
    for name in names:
        flag: Any = flags.FLAGS[name]
        values = '\\|'.join(getattr(flag.parser, 'enum_values', None) or [flag.flag_type()])
        yield name, values, '' if flag.default is None else code(flag.default), cell(flag.help)
    for name in names:
        delattr(flags.FLAGS, name)
    assert place.__doc__


def commands_page() -> str:
    """What each says of itself, with a table of its flags."""
    lines = ['# Commands', '', '`python -m experiments.VERB --option=value ...`, or `llama_jax VERB ...`.']
    for verb in commands.verbs():
        file = ROOT / 'experiments' / (f'{verb}.py' if verb != 'benchmark' else 'benchmark/__main__.py')
        says = ast.get_docstring(ast.parse(file.read_text())) or ''
        lines += [
            '',
            f'## {verb}',
            '',
            says,
            '',
            '| option | values | default | what it is |',
            '|---|---|---|---|',
        ]
        lines += [f'| `--{name}` | {" | ".join(rest)} |' for name, *rest in flags_of(verb)]
    return '\n'.join([*lines, ''])


# Rooms.


def rooms() -> dict[str, list[str]]:
    """Room -> its modules by their dotted names."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / 'llama_jax').rglob('*.py')):
        parts = file.relative_to(ROOT).with_suffix('').parts
        parts = parts[:-1] if parts[-1] == '__init__' else parts
        if len(parts) > 1:
            found.setdefault(parts[1], []).append('.'.join(parts))
    return found


def room_page(room: str, names: list[str]) -> str:
    """All public names of a room, module by module."""
    lines = [room, '=' * len(room), '']
    for name in names:
        short = name.removeprefix('llama_jax.')
        lines += [short, '-' * len(short), '', f'.. automodule:: {name}', '   :members:', '']
    return '\n'.join(lines)


def write_pages(app: Sphinx) -> None:
    """Only what has changed, so that the next build reads that alone."""
    pages = {'settings.md': settings_page(), 'commands.md': commands_page()}
    tree = [
        '# Rooms',
        '',
        'A room is a file or package of the library; [architecture](../architecture.md) has the picture.',
    ]
    tree += ['', '```{toctree}', *(f'rooms/{room}' for room in rooms()), '```', '']
    pages['rooms.md'] = '\n'.join(tree)
    pages |= {f'rooms/{room}.rst': room_page(room, names) for room, names in rooms().items()}
    folder = ROOT / 'docs' / 'reference'
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def as_restructured_text(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """A docstring of ours: quotes as in Markdown, code by its indentation, other characters as they are."""
    del app, what, name, value, options
    text = re.sub(r'\n\n(?= {4}\S)((?: {4}.*\n|\n)+)', r'\n\n::\n\n\1\n', '\n'.join([*lines, '']))
    text = re.sub(
        r'(?m)^(?!- |  |$)(.+)\n(?=- )|^((?:- |  ).+)\n(?=[^\s-])', r'\1\2\n\n', text
    )  # around lists
    parts = re.split(r'(`[^`]+`|\n::\n(?:\n| {4}.*)+)', text)
    for number, part in enumerate(parts):
        if number % 2 == 0:
            parts[number] = re.sub(r'([|*])', r'\\\1', part)
        elif part.startswith('`'):
            parts[number] = f'``{part[1:-1].strip()}``'
    lines[:] = ''.join(parts).splitlines()


def is_of_others(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """What a class has from a package of others, whose documentation is elsewhere."""
    del app, what, name, skip, options
    return True if not (getattr(value, '__module__', None) or 'llama_jax').startswith('llama_jax') else None


# Links and notebooks.


class LinksToCode(SphinxTransform):
    """A link to a file or folder of the repository that is no page leads to the repository."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """In place."""
        found = [
            *self.document.findall(addnodes.download_reference),
            *self.document.findall(addnodes.pending_xref),
        ]
        for node in found:
            target = node['reftarget']
            path = (ROOT / self.env.doc2path(self.env.docname)).parent / target
            folder = (
                isinstance(node, addnodes.pending_xref) and node.get('reftype') == 'myst' and path.is_dir()
            )
            if folder or isinstance(node, addnodes.download_reference):
                place = path.resolve().relative_to(ROOT)
                kind = 'tree' if folder else 'blob'
                uri = f'{self.config.repository}/{kind}/main/{place}'
                node.replace_self(nodes.reference('', '', *node.children, refuri=uri))


def read_notebook(text: str, parameters: str = '') -> nbformat.NotebookNode:
    """A notebook whose cell of parameters has those of a JSON file of {notebook: {name: value}}."""
    book = nbformat.reads(text, as_version=4)
    [name] = re.findall(r'/colabs/(\w+)\.ipynb\)', book.cells[0].source)
    values = json.loads(pathlib.Path(parameters).read_text()).get(name, {}) if parameters else {}
    for one in book.cells:
        if 'parameters' in one.metadata.get('tags', ()):
            for key, value in values.items():
                one.source = re.sub(
                    rf'(?m)^{key} = .*', lambda _, line=f'{key} = {value!r}': line, one.source
                )
    return book


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx asks of an extension."""
    app.add_config_value('repository', '', 'env')
    app.add_transform(LinksToCode)
    app.connect('builder-inited', write_pages)
    app.connect('autodoc-process-docstring', as_restructured_text, priority=100)  # before napoleon
    app.connect('autodoc-skip-member', is_of_others)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
