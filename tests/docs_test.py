"""What pages, docstrings and comments name exists: files, modules, functions, commands with their flags, settings."""

import ast
import functools
import importlib.util
import pathlib
import re

import pytest

from configs import dpo, ppo, pretrain, reward_model, sft
from experiments.run import config_file
from llama_jax.models.presets import PRESETS

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
CODE = sorted(
    file for room in ('llama_jax', 'experiments', 'configs', 'tests') for file in (ROOT / room).rglob('*.py')
)
PLACES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)  # of docstrings
SETTINGS = frozenset(
    key for task in (dpo, ppo, pretrain, reward_model, sft) for key in config_file.flatten(task.get_config())
)

# Of others: pip, srun, xpk, gcloud, pytest, XLA's environment variables, other servers.
FOREIGN_FLAGS = {
    'worker',
    'command',
    'ntasks-per-node',
    'only_check_args',
    'help',
    'model_args',
    'model',
    'model-path',
    'tasks',
}
# Their names are a module's of ours, or of one that need not be installed.
FOREIGN_NAMES = {'datasets.load_dataset', 'tfds.data_source', 'signal.SIGTERM', 'lm_eval.api.model.LM'}
# What commands write, and what stands for a name.
FOREIGN_FILES = {'report.md', 'benchmark/SUITE.py'}
# Of transformers, of Meta's code, of files' headers and of mathematics.
FOREIGN_WORDS = {
    'FeedForward', 'ModelArgs', 'apply_scaling', 'chat_completion', 'initializer_range', 'num_x', 'trainer_spec',
    'x_dim', '_compile_jinja_template',
}  # fmt: skip


@functools.cache
def parts_of(file):
    """(docstrings and comments, code) of a Python file, each as one text."""
    source = file.read_text()
    lines, prose = source.splitlines(), []

    def collect(node):
        for field in ('body', 'orelse', 'finalbody', 'handlers'):
            body = getattr(node, field, [])
            match body if field == 'body' and isinstance(node, PLACES) else []:
                case [ast.Expr(value=ast.Constant(value=str(text))) as first, *_]:
                    prose.append(text)
                    lines[first.lineno - 1 : first.end_lineno] = [''] * (first.end_lineno - first.lineno + 1)
            for child in body:
                collect(child)

    collect(ast.parse(source))
    code = []
    for line in lines:
        found = re.match(r'(.*?)(?:^|\s)# (.*)', line)
        code.append(found[1] if found else line)
        prose += [found[2]] if found else []
    return '\n'.join(prose), '\n'.join(code)


@functools.cache
def modules():
    """Dotted name, without `llama_jax.`, of every module and package -> its file."""
    found = {}
    for file in CODE:
        parts = file.relative_to(ROOT).with_suffix('').parts
        parts = parts[:-1] if parts[-1] == '__init__' else parts
        found['.'.join(parts)] = file
    return found


@functools.cache
def names_in(file):
    """Every name that a file defines at its top or in a class there, as `name` or `Class.name`."""
    found = set()

    def collect(body, prefix):
        for node in body:
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(prefix + name)
                    if isinstance(node, ast.ClassDef):
                        collect(node.body, f'{prefix}{name}.')
                        for inner in ast.walk(node):
                            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                                found.add(f'{prefix}{name}.{inner.attr}')
                case ast.Assign() | ast.AnnAssign():
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        found.update(prefix + n.id for n in ast.walk(target) if isinstance(n, ast.Name))
                case ast.Import(names=names) | ast.ImportFrom(names=names):
                    found.update(prefix + (alias.asname or alias.name) for alias in names)
                case ast.If() | ast.Try():
                    collect(node.body, prefix)

    collect(ast.parse(file.read_text()).body, '')
    return found


def exists(dotted):
    """Whether a dotted name leads to a module of ours, or to what one defines."""
    parts = dotted.split('.')
    for end in range(len(parts), 0, -1):
        head, rest = '.'.join(parts[:end]), '.'.join(parts[end:])
        for name, file in modules().items():
            if name == head or name.endswith(f'.{head}'):
                face = name == 'llama_jax' and rest in file.read_text()
                if not rest or rest in names_in(file) or face:
                    return True
    return False


@functools.cache
def flags_of(command):
    """The flags of a command, and of the files of `experiments` that it is made of."""
    package = ROOT / 'experiments' / command
    files = sorted(package.glob('*.py')) if package.is_dir() else [package.with_suffix('.py')]
    shared = [ast.parse(file.read_text()) for file in (ROOT / 'experiments').rglob('*.py')]
    helpers = {node.name: node for tree in shared for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = {'coordinator', 'num_processes', 'process_id', 'initialization_timeout'}

    def collect(tree):
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr=attr) | ast.Name(id=attr), args=args):
                    literal = [arg.value for arg in args[:1] if isinstance(arg, ast.Constant)]
                    if attr.lower().lstrip('_').startswith('define_'):
                        found.update(name for name in literal if isinstance(name, str))
                        if attr in helpers and not literal:
                            collect(helpers[attr])

    for file in files:
        collect(ast.parse(file.read_text()))
    return found


@functools.cache
def commands():
    """Names of what `python -m experiments.NAME` runs."""
    folder = ROOT / 'experiments'
    files = [file.stem for file in folder.glob('*.py') if "if __name__ == '__main__'" in file.read_text()]
    return {*files, *(file.parent.name for file in folder.glob('*/__main__.py'))}


FILE = r'[\w./-]+\.(?:py|md|toml)|(?:llama_jax|tests|experiments|configs|docs)/[\w./-]*'
# What ends so is a file that some program writes.
WRITTEN = r'.*\.(?:py|md|toml|jsonl?|model|bin|pth?|txt|png|gz|ya?ml|safetensors|chk|jinja|lock)'


def wrong_names(text, file):
    """What `text` names and is not there."""
    quoted = set(re.findall(r'`([^`\s]+)`', text))
    for path in sorted(quoted | set(re.findall(r'\]\((?!http)([^)#]+)\)', text))):
        if path not in FOREIGN_FILES and re.fullmatch(FILE, path):
            folders = (ROOT, file.parent, *(ROOT / room for room in ('llama_jax', 'tests', 'experiments')))
            if not any((folder / path).exists() for folder in folders) and (
                '/' in path or not any(other.name == path for other in [*CODE, *PAGES])
            ):
                yield path
    rooms = {part for name in modules() for part in name.split('.')} - {'__main__'}
    for name in sorted(quoted):
        if re.fullmatch(r'[a-z_]\w*(?:\.\w+)+(?:\(\))?', name):
            name = name.removesuffix('()')
            first, _, rest = name.partition('.')
            ours = first in ('llama_jax', 'experiments', 'configs', 'tests')
            if first == 'config':
                known = rest in SETTINGS or any(key.startswith(f'{rest}.') for key in SETTINGS)
            elif ours or first in rooms:
                theirs = not ours and importlib.util.find_spec(first) is not None
                known = name in SETTINGS or name in FOREIGN_NAMES or theirs or exists(name)
            else:
                known = True
            if not known and not re.fullmatch(WRITTEN, name):
                yield name
    for key in re.findall(r'--config\.([a-z]+\.[a-z_0-9]+)', text):
        if key not in SETTINGS:
            yield f'--config.{key}'
    for command in re.findall(r'experiments\.(\w+)', text):
        if f'experiments.{command}' not in modules() and command != 'NAME':
            yield f'experiments.{command}'
    for model in re.findall(r'configs/pretrain\.py:(\w+)', text):
        if model not in PRESETS and model not in ('MODEL', 'NAME'):
            yield f'configs/pretrain.py:{model}'
    lines = re.sub(r'\\\n\s*', ' ', text)
    for command, options in re.findall(r'experiments\.(\w+) ([^`\n]*)', lines):
        if command in commands():
            for flag in re.findall(r'(?<![\w-])--(?:no)?([a-z_]+)(?==| |$|,|\))', options):
                if flag not in flags_of(command) and flag not in FOREIGN_FLAGS:
                    yield f'{command} --{flag}'
    all_flags = set().union(*map(flags_of, commands()))
    for flag in re.findall(r'`--([a-z_-]+)', text):
        if flag not in all_flags and flag.removeprefix('no') not in all_flags and flag not in FOREIGN_FLAGS:
            yield f'--{flag}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    assert not sorted(set(wrong_names(page.read_text(), page)))


def test_what_docstrings_and_comments_name_exists():
    wrong = {
        f'{file.relative_to(ROOT)}: {name}' for file in CODE for name in wrong_names(parts_of(file)[0], file)
    }
    assert not sorted(wrong)


def test_what_is_named_in_quotes_is_found_in_the_code():
    """A name alone in backquotes, of a class, a constant or what a file keeps to itself."""
    known = set()
    for file in CODE:
        known.update(re.findall(r'\w+', parts_of(file)[1]))
    wrong = set()
    for file in CODE:
        for name in re.findall(
            r'`(_?[A-Z]\w+[a-z_]\w*|_[a-z]\w+|[a-z]+_[a-z_0-9]+)(?:\(\))?`', parts_of(file)[0]
        ):
            if name not in known | FOREIGN_WORDS:
                wrong.add(f'{file.relative_to(ROOT)}: {name}')
    assert not sorted(wrong)
