"""From rows to global arrays: each host reads the rows that its own devices hold, and nothing else.

Which rows those are follows from the batch's sharding, not from the process's number, so it is right also when `tensor`
or `context` spans hosts. The state of the whole pipeline is one integer, the rows consumed.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import jax
import numpy as np

from llama_jax.data.lm_batch import lm_batch
from llama_jax.data.packing import Row
from llama_jax.partitioning import make_global_array
from llama_jax.types import LMBatch, PyTree


def collate_lm(rows: Sequence[Row]) -> LMBatch:
    """Packed rows as a batch of next-token prediction."""
    return lm_batch(*(np.stack([row[name] for row in rows]) for name in ('tokens', 'segment_ids')))


_ROWS_AT_A_TIME = 16  # are read: from a bucket each takes a while


class _HostBatches:
    """Batch i as this host's rows of it: a random-access source, so that grain's threads can read ahead."""

    def __init__(self, rows, collate, local_rows: list[int], batch_size: int, first_row: int):
        self._rows, self._collate, self._local_rows = rows, collate, local_rows
        self._batch_size, self._first_row = batch_size, first_row
        self._pool = ThreadPoolExecutor(min(_ROWS_AT_A_TIME, len(local_rows)))

    def __len__(self) -> int:
        return max(0, len(self._rows) - self._first_row) // self._batch_size

    def __getitem__(self, index: int) -> PyTree:
        start = self._first_row + int(index) * self._batch_size
        return self._collate(
            list(self._pool.map(self._rows.__getitem__, (start + row for row in self._local_rows)))
        )


def batches(
    rows,
    target: PyTree,
    *,
    collate: Callable[[Sequence[Any]], PyTree] = collate_lm,
    rows_consumed: int = 0,
    num_threads: int = 2,
) -> Iterator[PyTree]:
    """Global batches in order, from the row after those already consumed.

    Args:
      rows: random access by index: what `mixture.mix` gives, or a plain source.
      target: the abstract global batch, arrays [B, ...] with a sharding at each, such as `LMBatch.abstract`.
      collate: rows -> a batch like `target` of so many rows, in NumPy.
      rows_consumed: where to go on.
      num_threads: that read ahead.
    """
    leaves = jax.tree.leaves(target)
    batch_size = leaves[0].shape[0]
    indices: Any = [
        index
        for leaf in leaves
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    ]
    local_rows = sorted({row for index in indices for row in range(*index[0].indices(batch_size))})
    row_of = {row: place for place, row in enumerate(local_rows)}
    source = grain.MapDataset.source(_HostBatches(rows, collate, local_rows, batch_size, rows_consumed))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    for host_batch in source.to_iter_dataset(options):
        yield jax.tree.map(
            lambda x, leaf: make_global_array(x, row_of, batch_size, leaf.sharding), host_batch, target
        )


def read_ahead(rows: Any, count: int, num_threads: int = _ROWS_AT_A_TIME) -> Iterator[Row]:
    """The first rows in order, several of them read at a time."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=8 * num_threads)
    yield from grain.MapDataset.source(rows)[:count].to_iter_dataset(options)


class PaddedRows:
    """Rows followed by empty ones (segment 0 counts for nothing), so that the last batch is whole."""

    def __init__(self, rows, batch_size: int, max_rows: int = 0):
        """Args: rows: random access, at least one. batch_size: divides the length. max_rows: to use; 0: all."""
        self._rows = rows
        self._used = min(len(rows), max_rows or len(rows))
        self._length = -(-self._used // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if index < self._used:
            return self._rows[index]
        return {name: np.zeros_like(value) for name, value in self._rows[0].items()}
