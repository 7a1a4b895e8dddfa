"""The house rules that a program can check: floors, fences, file sizes, what an import costs and loads.

A room is a module or package directly under `llama_jax`. It imports from lower floors only. Files inside a package
import each other one way only. The third-party column is cumulative; a name covers its submodules.
"""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from configs import pretrain
from experiments.run import config_file

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
MAX_LINES = 400
MAX_EQUAL_LINES = 7  # of code, one after the other, in two files of commands or configurations
WEB, WEB_ROOM = {'starlette', 'uvicorn', 'sse_starlette', 'pydantic', 'prometheus_client', 'bm25s'}, 'serve'
FLOORS: list[tuple[set[str], set[str]]] = [
    ({'errors'}, set()),
    ({'types', 'table'}, {'jax', 'numpy', 'flax.struct', 'jaxtyping'}),  # the words that all others speak
    (
        {
            'partitioning',
            'runtime',
            'signals',
            'storage',
            'json_file',
            'lock',
            'chips',
            'xla_options',
        },
        {'etils', 'fsspec'},
    ),
    ({'ops', 'placement', 'item_log'}, set()),
    ({'models', 'tokenizer', 'grading'}, {'flax.linen', 'sentencepiece', 'tiktoken', 'tokenizers', 'jinja2'}),
    (
        {'lora', 'quantize', 'checkpoint', 'convert', 'data', 'losses'},
        {
            *('optax', 'orbax', 'tensorstore', 'google_crc32c', 'ml_dtypes', 'flax.traverse_util'),
            *('grain', 'tensorflow_datasets', 'pyarrow', 'array_record', 'zstandard'),
            *('gguf', 'regex'),
        },
    ),
    ({'pretrained', 'export'}, {'huggingface_hub', 'tqdm'}),
    ({'train', 'inference', 'figures'}, {'tensorboardX', 'wandb', 'matplotlib', 'llguidance'}),
    (
        {'rl', 'eval', 'preflight', 'serve'},
        {
            *('lm_eval', 'datasets'),
            *WEB,
        },
    ),
]
FLOOR_OF = {room: floor for floor, (rooms, _) in enumerate(FLOORS) for room in rooms}
LINEN_ROOM = 'models'


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every file of the library by its dotted name; a package's name stands for its `__init__.py`."""
    files = sorted((root / 'llama_jax').rglob('*.py'))
    return {
        '.'.join(file.relative_to(root).with_suffix('').parts).removesuffix('.__init__'): file
        for file in files
    }


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported, inside functions too; `from a import b` gives `a.b`."""
    parents = module.split('.') if is_package else module.split('.')[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = (
                    '.'.join([*parents[: len(parents) + 1 - level], *filter(None, [source])])
                    if level
                    else source
                )
                yield from ((node.lineno, f'{base}.{alias.name}') for alias in names)
            case ast.Call(
                func=ast.Attribute(attr='import_module') | ast.Name(id='import_module' | '__import__'),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _covers(names: set[str], imported: str) -> bool:
    return any(f'{imported}.'.startswith(f'{name}.') for name in names)


def _import_violation(module: str, imported: str, files: dict[str, pathlib.Path]) -> str | None:
    """What is wrong with this import in a file of this name, or None."""
    room = '.'.join(module.split('.')[1:2])  # '' is `llama_jax/__init__.py`, the face: above all floors
    floor = FLOOR_OF[room] if room else len(FLOORS) - 1
    top, _, rest = imported.partition('.')
    if top in sys.stdlib_module_names:
        return None
    if top == 'llama_jax':
        target = rest.split('.')[0]
        if f'llama_jax.{target}' not in files:
            return f'imports {imported}, a name of the face; import it from its own file'
        if target != room and room and FLOOR_OF.get(target, floor) >= floor:
            return f'imports {target}, which is not on a lower floor'
        return None
    if _covers({'flax.linen'}, imported) and room != LINEN_ROOM:
        return f'imports {imported}; flax.linen stays in models'
    if _covers(WEB, imported) and room != WEB_ROOM:
        return f'imports {imported}; the web stays in serve'
    if imported == 'matplotlib' or _covers({'matplotlib.pyplot'}, imported):
        return f"imports {imported}, whose state is the caller's; make a matplotlib.figure.Figure"
    if not _covers(set().union(*(allowed for _, allowed in FLOORS[: floor + 1])), imported):
        return f'imports {imported}, which {room or "the face"} may not'
    return None


def _fence_violations(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id='print')) | ast.Attribute(value=ast.Name(id='sys'), attr='stdout'):
                yield node.lineno, 'prints; return the text or log it'
            case ast.Name(id='ConfigDict') | ast.Attribute(attr='ConfigDict'):
                yield node.lineno, 'uses ConfigDict; take a frozen dataclass'


def violations(root: pathlib.Path) -> list[str]:
    """Every breach of the house rules by the library under `root`, as `file:line: what`."""
    found = []
    files = modules(root)
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, file in files.items():
        name = file.relative_to(root)
        room = '.'.join(module.split('.')[1:2])
        if room and room not in FLOOR_OF:
            found.append(f'{name}:1: room {room} is on no floor; give it one in FLOORS and in the design')
            continue
        source = file.read_text()
        if (count := len(source.splitlines())) > MAX_LINES:
            found.append(f'{name}:{count}: longer than {MAX_LINES} lines; split it by meaning')
        tree = ast.parse(source)
        found += [f'{name}:{line}: {what}' for line, what in _fence_violations(tree)]
        for line, imported in imports(tree, module, file.name == '__init__.py'):
            if what := _import_violation(module, imported, files):
                found.append(f'{name}:{line}: {what}')
            # `from package import x` leads to the file x where there is one, else to the package's own file.
            target = next((m for m in (imported, imported.rpartition('.')[0]) if m in files), None)
            if target and target != module:
                graph[module].add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f'import cycle: {" -> ".join(error.args[1])}')
    return found


def test_library_keeps_the_house_rules():
    assert modules(REPOSITORY), f'no library under {REPOSITORY}'
    assert not violations(REPOSITORY)


@pytest.mark.parametrize(
    ('file', 'source', 'message'),
    [
        (
            'ops/rope.py',
            'from llama_jax.models.llama import Block',
            'imports models, which is not on a lower floor',
        ),
        ('ops/rope.py', 'from llama_jax import models', 'imports models, which is not on a lower floor'),
        ('ops/rope.py', 'from ..models import llama', 'imports models, which is not on a lower floor'),
        (
            'ops/rope.py',
            'def f():\n    import llama_jax.models',
            'imports models, which is not on a lower floor',
        ),
        (
            'ops/rope.py',
            'import importlib\nimportlib.import_module("llama_jax.models")',
            'not on a lower floor',
        ),
        (
            'runtime.py',
            'from llama_jax import partitioning',
            'imports partitioning, which is not on a lower floor',
        ),
        ('ops/rope.py', 'from llama_jax import load', 'a name of the face'),
        ('ops/rope.py', 'import optax', 'imports optax, which ops may not'),
        ('ops/rope.py', 'from flax import traverse_util', 'which ops may not'),
        ('train/step.py', 'import torch', 'imports torch, which train may not'),
        ('train/step.py', 'from absl import flags', 'imports absl.flags, which train may not'),
        ('train/step.py', 'import ml_collections', 'imports ml_collections, which train may not'),
        ('train/step.py', 'import experiments.launch', 'imports experiments.launch, which train may not'),
        ('train/step.py', 'from flax import linen as nn', 'flax.linen stays in models'),
        ('train/step.py', 'import flax.linen as nn', 'flax.linen stays in models'),
        ('eval/task.py', 'import starlette', 'the web stays in serve'),
        ('eval/report.py', 'from matplotlib import pyplot', "whose state is the caller's"),
        ('eval/report.py', 'import matplotlib', "whose state is the caller's"),
        ('train/step.py', 'def f():\n    print(1)', 'prints'),
        ('train/step.py', 'import sys\nsys.stdout.write("x")', 'prints'),
        ('train/step.py', 'def f(c: "x", d=ConfigDict): ...', 'uses ConfigDict'),
        ('train/step.py', '\n' * 401, 'longer than 400 lines'),
        ('helpers.py', '', 'room helpers is on no floor'),
        ('__init__.py', 'import torch', 'imports torch, which the face may not'),
        ('models/llama.py', 'from llama_jax.models import config', 'import cycle'),
    ],
)
def test_planted_violation_is_found(tmp_path, file, source, message):
    sound = {
        '__init__.py': 'from llama_jax.train.step import train_step',
        'types.py': 'import flax.struct\nimport jax.numpy as jnp',
        'partitioning.py': 'from llama_jax.types import InputError',
        'ops/__init__.py': '',
        'ops/rope.py': 'from llama_jax.types import Array',
        'models/__init__.py': '',
        'models/config.py': 'from llama_jax.models.llama import Block',
        'models/llama.py': 'import flax.linen as nn\nfrom llama_jax.ops import rope',
        'train/__init__.py': '',
        'train/step.py': 'import optax\nfrom llama_jax.models import llama\nfrom llama_jax import ops',
    }

    def write(file, source):
        path = tmp_path / 'llama_jax' / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)

    for name, text in sound.items():
        write(name, text)
    assert not violations(tmp_path)
    write(file, source)
    assert [
        line
        for line in violations(tmp_path)
        if message in line and line.startswith((f'llama_jax/{file}:', 'import'))
    ]


def _reads_of_flags(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Where a function but `main` reads the command line; values are passed on instead."""
    holders = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and re.search(r'(?i)\bdefine', ast.unparse(node.value))
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == 'main']
    main = {id(node) for top in mains for node in ast.walk(top)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if id(node) not in main and name in holders:
                yield node.lineno, f'{name} is read or passed on outside of main'
            case ast.Name(id='FLAGS') | ast.Attribute(attr='FLAGS') if id(node) not in main:
                yield node.lineno, 'FLAGS is read outside of main'
            case ast.Attribute(attr='FlagHolder') | ast.Name(id='FlagHolder'):
                yield node.lineno, 'takes a flag; take its value'


def command_violations(root: pathlib.Path) -> list[str]:
    """Every breach of the house rules by commands and configurations under `root`, as `file:line: what`."""
    found, places = [], {}
    for file in sorted([*(root / 'experiments').rglob('*.py'), *(root / 'configs').rglob('*.py')]):
        name, source = file.relative_to(root), file.read_text()
        if (count := len(source.splitlines())) > MAX_LINES:
            found.append(f'{name}:{count}: longer than {MAX_LINES} lines; split it by meaning')
        if file.name != 'launch.py':  # which is the command line
            found += [f'{name}:{line}: {what}' for line, what in _reads_of_flags(ast.parse(source))]
        for_others = re.search(r'^ .*\b(DEFINE_\w+|define_path)\(', source, re.MULTILINE)
        if for_others and 'flags.disclaim_key_flags()' not in source:
            found.append(
                f'{name}: defines flags for commands whose --help would not show them; disclaim them'
            )
        code = [(i, line.strip()) for i, line in enumerate(source.splitlines(), 1)]
        code = [(i, line) for i, line in code if line and not line.startswith('#')]
        for start in range(len(code) - MAX_EQUAL_LINES):
            text = tuple(line for _, line in code[start : start + MAX_EQUAL_LINES + 1])
            other = places.setdefault(text, name)
            if other != name:
                found.append(f'{name}:{code[start][0]}: as in {other}; write it once')
    return found


def test_commands_keep_the_house_rules():
    assert not command_violations(REPOSITORY)


@pytest.mark.parametrize(
    ('file', 'source', 'message'),
    [
        ('experiments/sft.py', '\n' * 401, 'longer than 400 lines'),
        ('configs/sft.py', '\n' * 401, 'longer than 400 lines'),
        ('experiments/sft.py', 'def f():\n    return _CONFIG.value', '_CONFIG is read or passed on'),
        ('experiments/sft.py', 'def f():\n    return _SEED.value', '_SEED is read or passed on'),
        ('experiments/sft.py', 'def f(read=lambda: _SEED):\n    pass', '_SEED is read or passed on'),
        (
            'experiments/sft.py',
            'class A:\n    def main(self):\n        _SEED.value',
            '_SEED is read or passed on',
        ),
        ('experiments/sft.py', 'def f():\n    return flags.FLAGS.seed', 'FLAGS is read'),
        ('experiments/sft.py', 'def f(seed: flags.FlagHolder):\n    return seed.value', 'takes a flag'),
        ('experiments/run/sft.py', "def f():\n    flags.DEFINE_bool('fast', True, '')", 'disclaim them'),
        ('experiments/benchmark/sft.py', 'def run():\n    return _SEED.value', '_SEED is read or passed on'),
        ('configs/sft.py', '\n# why\n'.join(f'x = {i}' for i in range(9)), 'as in configs/dpo.py'),
    ],
)
def test_planted_violation_of_a_command_is_found(tmp_path, file, source, message):
    flagged = "_CONFIG = launch.define_config()\n_SEED = flags.DEFINE_integer('seed', 0, 'of the draws')\n"
    sound = {
        'experiments/dpo.py': f'{flagged}def main():\n    return _CONFIG.value, flags.FLAGS, _SEED.name\n',
        'experiments/launch.py': 'def run():\n    return flags.FLAGS\n',
        'configs/dpo.py': 'if True:\n' + '\n'.join(f'    x = {i}' for i in range(9)),
        'configs/shorter.py': '\n'.join(f'x = {i}' for i in range(7)),
    }
    for name, text in [*sound.items(), (file, flagged * file.startswith('experiments') + source)]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == file:
            assert not command_violations(tmp_path)
        path.write_text(text)
    assert [line for line in command_violations(tmp_path) if message in line and line.startswith(f'{file}:')]


def commands_imported(root: pathlib.Path) -> set[str]:
    """The commands whose modules tests under `root` import."""
    found = set()
    for file in (root / 'tests').rglob('*.py'):
        for node in ast.parse(file.read_text()).body:
            match node:
                case ast.ImportFrom(module=str(module), names=names):
                    found |= {module} | {f'{module}.{alias.name}' for alias in names}
                case ast.Import(names=names):
                    found |= {alias.name for alias in names}
    places = {
        name: root / f'{name.replace(".", "/")}.py' for name in found if name.startswith('experiments.')
    }
    return {
        name
        for name, place in places.items()
        if place.exists() and '__main__' in (source := place.read_text()) and 'DEFINE_' in source
    }


def test_tests_start_commands_and_import_none():
    """Commands define the same flags, and tests share a process: a second one there, and none of them is collected."""
    no_flag_in_common = {
        'experiments.recipes.chat_table', 'experiments.recipes.small_data', 'experiments.preflight_table',
    }  # fmt: skip
    assert commands_imported(REPOSITORY) <= no_flag_in_common


def _flag_names() -> set[str]:
    """Of all commands, and the keys of their configurations."""
    commands = '\n'.join(file.read_text() for file in (REPOSITORY / 'experiments').rglob('*.py'))
    flags = re.findall(r"(?:DEFINE_\w+|define_path)\(\s*'(\w+)'", commands)
    keys = config_file.flatten(pretrain.get_config())
    return {'--config', *(f'--{flag}' for flag in flags), *(key for key in keys if '.' in key)}


def test_the_library_names_no_flag_of_a_command():
    """Its callers may have none, or others; who knows them adds them (`launch.flags_named`)."""
    names = _flag_names()
    assert {'--checkpoint', '--workdir', '--xla_options', 'optimizer.learning_rate'} <= names
    pattern = re.compile(
        r'(?<![\w.-])(' + '|'.join(map(re.escape, sorted(names, key=len)[::-1])) + r')(?![\w-])'
    )
    found = []
    for file in modules(REPOSITORY).values():
        tree = ast.parse(file.read_text())
        texts = [
            node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        documented = [
            node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        ]
        docstrings = {id(node.body[0].value) for node in documented if ast.get_docstring(node)}
        for node in texts:
            if id(node) not in docstrings and (match := pattern.search(node.value)):
                found.append(f'{file.relative_to(REPOSITORY)}:{node.lineno}: {match[1]}')
    assert not found


def _python(code: str) -> str:
    """Standard output of a fresh interpreter in the checkout."""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_fast():
    """Under 2 s of work; on a slow machine, where JAX alone takes longer than 1 s, within 1 s of that."""
    seconds = {'jax': [], 'llama_jax': []}
    for _ in range(3):
        for name, timings in seconds.items():
            code = (
                f'import time; start = time.process_time(); import {name}; print(time.process_time() - start)'
            )
            timings.append(float(_python(code)))
    jax, ours = (min(timings) for timings in seconds.values())  # other load only ever adds
    assert ours < max(2.0, jax + 1.0), f'import llama_jax takes {ours:.2f} s, import jax alone {jax:.2f} s'


def test_workers_that_prepare_text_load_no_jax():
    """Which takes three times as long as all else that they import."""
    loaded = _python(
        'import sys, llama_jax.data.unit_tasks, llama_jax.data.workers\n'
        'print(*{"jax", "flax"} & set(sys.modules))'
    )
    assert not loaded.split()


def test_no_module_loads_torch_or_tensorflow():
    """Of use where they are installed, as on CI (torch); elsewhere it still proves that every module imports."""
    loaded = _python(
        'import importlib, pkgutil, sys, llama_jax\n'
        'for module in pkgutil.walk_packages(llama_jax.__path__, "llama_jax."):\n'
        '    importlib.import_module(module.name)\n'
        'print(*{"torch", "tensorflow"} & set(sys.modules))'
    )
    assert not loaded.split()
