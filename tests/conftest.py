"""What every test runs under: 8 emulated CPU devices, checked shapes, no silent broadcasting, a compilation cache.

JAX reads its environment when it is first imported, so that is set at the top, for the commands that tests start as
subprocesses too; these have the flags of XLA from `command_line.py`. What is set already is left alone:
`JAX_PLATFORMS=cuda pytest -n 0 -m accelerator` runs on a GPU.
"""

import contextlib
import gc
import hashlib
import os
import pathlib
import platform

import pytest

from tests.command_line import CommandLine, write_corpus, xla_flags


def _cache_dir() -> pathlib.Path:
    """One folder a user and kind of processor: compiled code may not run on another."""
    cpuinfo = pathlib.Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kind = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
    root = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
    return root / 'llama_jax' / f'tests-{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}'


_flags = os.environ.get('XLA_FLAGS', '').split()
for _flag in xla_flags(num_devices=8):
    if not any(flag.startswith(_flag.split('=')[0]) for flag in _flags):
        _flags.append(_flag)
os.environ['XLA_FLAGS'] = ' '.join(_flags)
for _name, _value in {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUMPY_RANK_PROMOTION': 'raise',
    'JAX_COMPILATION_CACHE_DIR': str(_cache_dir()),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
    # Of NumPy and of torch: threads that wait for products of such a size spin for twenty times what these take.
    'OPENBLAS_NUM_THREADS': '1',
    'OMP_NUM_THREADS': '1',
    'MPLBACKEND': 'agg',
    'HF_HUB_OFFLINE': '1',  # a test never reaches for the network
}.items():
    os.environ.setdefault(_name, _value)

import flax.struct  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402

_struct_dataclass = flax.struct.dataclass


def _unchecked_struct(cls=None, **kwargs):
    """A struct whose fields are not checked when it is made.

    Structs are pytrees: `jax.tree.map`, `eval_shape` and `scan` rebuild them with shardings, shapes or one more axis
    in their fields. Functions that take one are checked as all others are.
    """
    if cls is None:
        return lambda cls: _unchecked_struct(cls, **kwargs)
    struct = _struct_dataclass(cls, **kwargs)
    struct.__no_type_check__ = True
    return struct


flax.struct.dataclass = _unchecked_struct
jaxtyping.install_import_hook('llama_jax', 'beartype.beartype')


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keeps the cache below 1 GiB: JAX's own limit reads the whole folder, under a lock, for each program it adds."""
    if hasattr(session.config, 'workerinput'):
        return
    folder = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
    entries = []
    for file in folder.glob('*-cache'):
        with contextlib.suppress(FileNotFoundError):  # another run's limit may have removed it since
            status = file.stat()
            entries.append((status.st_mtime, status.st_size, file))
    size = sum(size for _, size, _ in entries)
    for _, entry_size, file in sorted(entries):
        if size <= 2**30:
            break
        file.unlink(missing_ok=True)
        size -= entry_size


def pytest_collection_finish() -> None:
    """Collections of garbage that go through all of JAX at every few hundred new objects take a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none."""
    marked = [item for item in items if item.get_closest_marker('accelerator')]
    if marked and jax.default_backend() == 'cpu':
        for item in marked:
            item.add_marker(pytest.mark.skip(reason='needs an accelerator (GPU or TPU)'))


class SharedData(type(pathlib.Path())):
    """A folder, of which `tests.fetch_data` brings what is public: a test that reads what is not there is skipped."""

    def __truediv__(self, name):
        path = super().__truediv__(name)
        if not path.exists():
            pytest.skip(f'no shared data at {path}; python -m tests.fetch_data brings what is public')
        return path


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
    """Folder of public data and small real weights: $LLAMA_JAX_SHARED_DATA, or ../shared/data beside the checkout."""
    beside = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
    path = pathlib.Path(os.environ.get('LLAMA_JAX_SHARED_DATA') or beside)
    if not path.is_dir():
        pytest.skip(f'no shared data at {path}; set LLAMA_JAX_SHARED_DATA to its folder')
    return SharedData(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
    """Where the commands that a file tests read and write."""
    return tmp_path_factory.mktemp('commands')


@pytest.fixture(scope='module')
def commands(folder) -> CommandLine:
    """Runs commands, on one device where a run does not say otherwise."""
    return CommandLine(folder)


@pytest.fixture(scope='module')
def corpus(folder) -> pathlib.Path:
    """A text file to train on."""
    return write_corpus(folder / 'corpus.txt')
