"""The weights alone: restored onto a mesh, and read and written in blocks where they are larger than memory."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import traverse_util

from llama_jax.checkpoint.failures import told_once
from llama_jax.checkpoint.integrity import absolute, find_damage, record_files
from llama_jax.errors import InputError, error_line
from llama_jax.json_file import read_object
from llama_jax.models.reward import VALUE
from llama_jax.placement import BlockArray, copy_tiles
from llama_jax.storage import enable_bucket, prefetch, system_failures
from llama_jax.types import LazyArray

CHUNK_BYTES = 32 << 20  # of an array on disk: what is read and written at once


def latest_step(directory: epath.PathLike) -> epath.Path:
    """The folder of the newest undamaged step.

    Raises:
      InputError: the directory holds no step, or all of them are damaged.
    """
    folder = absolute(directory)
    steps = _steps(folder)
    if not steps:
        raise InputError(f'no checkpoint under {folder}: it should hold folders named by step')
    damage = ''
    for step in reversed(steps):
        if not (damage := _find_damage(folder / str(step))):
            return folder / str(step)
    raise InputError(
        f'all checkpoints under {folder} are damaged (steps {steps}); of step {steps[0]}, {damage}'
    )


def check_step(step_folder: epath.PathLike) -> epath.Path:
    """The folder of a step that was asked for by name.

    Raises:
      InputError: it is not there, or damaged.
    """
    folder = absolute(step_folder)
    steps = _steps(folder.parent)
    if folder.name not in map(str, steps):
        raise InputError(f'no checkpoint {folder}; the steps there are {steps}')
    if damage := _find_damage(folder):
        raise InputError(f'checkpoint {folder} is damaged: {damage}; take another of the steps {steps}')
    return folder


def _find_damage(folder: epath.Path) -> str:
    """What of a step differs from what was written; of its content, each process looks at a share.

    Raises:
      InputError: several processes share it, and content of this one's part is damaged; the others do not see that.
    """
    share = (jax.process_index(), jax.process_count())
    damage = find_damage(folder, hashes=False)
    if not damage and (damage := find_damage(folder, share=share)) and jax.process_count() > 1:
        raise InputError(f'checkpoint {folder} is damaged: {damage}; name another step')
    return damage


def _steps(folder: epath.Path) -> list[int]:
    """The steps that were committed, oldest first."""
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
    return sorted(int(path.name) for path in found if ocp.utils.is_checkpoint_finalized(path))


# Weights that are larger than memory: written and read block by block, through TensorStore, in Orbax's own layout.


def save_params(
    directory: epath.PathLike,
    leaves: Mapping[str, LazyArray],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes weights as step 0 of `directory`; Orbax reads them as any others.

    One file a block (a layer, or a part of one that is large), uncompressed; a few blocks are in memory at a time.

    Args:
      directory: a workdir's folder of checkpoints, local or `gs://...`.
      leaves: by path in our params.
      progress: called with the number of bytes of each block written.

    Raises:
      SystemFailure: the disk is full, or broken.
    """
    enable_bucket(directory)
    folder = absolute(directory)
    registry = ocp.type_handlers.create_type_handler_registry((_Streamed, _StreamHandler()))
    tree = {path: _Streamed(leaf, progress) for path, leaf in leaves.items()}

    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        item = {'params': traverse_util.unflatten_dict(tree, sep='/')}
        with told_once(), system_failures(f'{folder} cannot be written'):
            checkpointer.save(folder / '0/state', args=ocp.args.PyTreeSave(item))
    with system_failures(f'{folder} cannot be written'):
        record_files(folder, 0)
        if '://' in os.fspath(folder):  # where a folder cannot be renamed, this file is what makes it whole
            (folder / '0/commit_success.txt').write_text('')


def open_params(step_folder: epath.PathLike) -> dict[str, BlockArray]:
    """The weights of a step by path, to read in blocks.

    Raises:
      InputError: the folder is no step of ours.
    """
    state = absolute(step_folder) / 'state'
    try:
        metadata = read_object(state / '_METADATA')
        keys = [
            [entry['key'] for entry in value['key_metadata']] for value in metadata['tree_metadata'].values()
        ]
        driver = 'zarr3' if metadata.get('use_zarr3') else 'zarr'
        is_database = (state / 'manifest.ocdbt').exists()
    except InputError as error:
        raise InputError(f'{state} holds no weights that Orbax wrote: {error}') from None
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{state} holds no weights that Orbax wrote: {type(error).__name__}') from error
    # Blocks of rows of one stored chunk are read one after another; the cache keeps the chunk between them.
    # Mapped files and NumPy's arrays (of large pages) spare the system more than half of its time.
    context = ts.Context(
        {'cache_pool': {'total_bytes_limit': 4 * CHUNK_BYTES}, 'file_io_mode': {'mode': 'memmap'}}
    )
    leaves = {}
    for key in keys:
        if key[:1] != ['params'] or key[1:2] == [
            VALUE
        ]:  # what expects a policy's reward is none of its weights
            continue
        name = '.'.join(map(str, key))
        kvstore = (
            {'driver': 'ocdbt', 'base': _kvstore(state), 'path': f'{name}/'}
            if is_database
            else _kvstore(state / name)
        )
        try:
            store = ts.open({'driver': driver, 'kvstore': kvstore}, context=context, open=True).result()
        except (ValueError, OSError) as error:
            raise InputError(f'{state}: weight {name} cannot be read: {error_line(error)}') from error
        leaves['/'.join(map(str, key[1:]))] = _Stored(store, f'{state}: weight {name}')
    if not leaves:
        raise InputError(f'{state} holds no weights under params')
    return leaves


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A leaf on disk."""

    store: Any
    origin: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.store.dtype.numpy_dtype)

    @property
    def rows_axis(self) -> None:
        return None

    def blocks(self) -> Iterator[tuple[slice, ...]]:
        """What is stored as one piece."""
        chunk = self.store.chunk_layout.read_chunk.shape
        return _chunk_indices(self.shape, chunk if chunk and all(chunk) else self.shape)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            stored = self.store[index]
            block = np.empty(stored.shape, self.dtype)
            ts.array(block).write(stored).result()
            return block
        except (ValueError, OSError) as error:
            raise InputError(f'{self.origin} cannot be read: {error_line(error)}') from error


@dataclasses.dataclass(frozen=True)
class _Streamed:
    """A leaf as Orbax is given it to save."""

    leaf: LazyArray
    progress: Callable[[int], None]


class _StreamHandler(ocp.type_handlers.TypeHandler):
    """Writes `_Streamed` leaves where Orbax says, as the uncompressed zarr arrays that it reads back as any others."""

    def typestr(self) -> str:
        return 'jax.Array'

    async def metadata(self, infos):
        raise NotImplementedError('for saving only')

    async def deserialize(self, infos, args=None):
        raise NotImplementedError('for saving only')

    async def serialize(self, values: Sequence[_Streamed], infos: Sequence[Any], args=None):
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            leaf = value.leaf
            chunks = chunk_shape(leaf.shape, leaf.dtype)
            store = await ts.open(
                {
                    'driver': 'zarr',
                    'kvstore': _kvstore(info.path),
                    'metadata': {
                        'shape': leaf.shape,
                        'chunks': chunks,
                        'compressor': None,
                        'dtype': leaf.dtype.name if leaf.dtype.kind == 'V' else leaf.dtype.str,
                    },
                    'store_data_equal_to_fill_value': True,  # so that a missing file is damage, never zeros
                },
                create=True,
            )
            indices = list(_chunk_indices(leaf.shape, chunks))
            blocks = prefetch(functools.partial(_read, leaf, index) for index in indices)
            writing: list[tuple[Any, int]] = []
            try:
                for index, block in zip(indices, blocks, strict=True):
                    writing.append((store[index].write(block), block.nbytes))
                    if len(writing) > 1:
                        await _finish(*writing.pop(0), value.progress)
                while writing:
                    await _finish(*writing.pop(0), value.progress)
            finally:  # a write still under way would make anew the folder that is cleared away after a failure
                for write, _ in writing:
                    with contextlib.suppress(ValueError):
                        await write
        return []


def _read(leaf: LazyArray, index: tuple[slice, ...]) -> np.ndarray:
    """The block in row-major order, as it is written."""
    values = leaf.read(index)
    if values.flags.c_contiguous:
        return values
    block = np.empty(values.shape, values.dtype)
    copy_tiles(block, values)
    return block


async def _finish(write: Any, num_bytes: int, progress: Callable[[int], None]) -> None:
    await write
    progress(num_bytes)


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """Of what is stored as one piece: a layer of a stacked leaf, some rows of a table, cut where still too large."""
    first = 1 if len(shape) > 2 else 0  # the axis to cut along; stacked layers before it are apart anyway
    row_bytes = math.prod(shape[first + 1 :]) * dtype.itemsize
    num_chunks = -(-shape[first] // max(CHUNK_BYTES // row_bytes, 1))
    return (
        *[1] * first,
        -(-shape[first] // num_chunks),
        *shape[first + 1 :],
    )  # alike, as the last one is padded


def _chunk_indices(shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices of every chunk of an array, in row-major order."""
    ranges = [range(0, size, step) for size, step in zip(shape, chunks, strict=True)]
    for start in itertools.product(*ranges):
        yield tuple(
            slice(begin, min(begin + step, size))
            for begin, step, size in zip(start, chunks, shape, strict=True)
        )


def _kvstore(path: epath.Path) -> dict[str, str]:
    """Where TensorStore finds a folder; an address would have it read % and # as more than themselves."""
    text = os.fspath(path)
    if '://' not in text:
        return {'driver': 'file', 'path': f'{text}/'}
    bucket, _, name = text.removeprefix('gs://').partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': f'{name}/'}
