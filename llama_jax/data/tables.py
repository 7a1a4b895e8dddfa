"""Rows of Parquet and Arrow files, in order, some in memory at a time."""

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.data.containers import START, Place, Record, kind_of
from llama_jax.errors import InputError, error_line


def read_table(path: epath.Path, start: Place = START, column: str = '') -> Iterator[Record]:
    """The rows of a Parquet or an Arrow file, as mappings; some rows are in memory at a time.

    Args:
      path: of the file.
      start: the row to begin with.
      column: the only one that is wanted; where the file has no such column, all are read.

    Raises:
      InputError: it is damaged or no such file.
    """
    import pyarrow

    name, kind = os.fspath(path), 'a Parquet' if kind_of(path) == 'parquet' else 'an Arrow'
    number = start.number
    try:
        with path.open('rb') as file:
            read = _parquet_batches if kind == 'a Parquet' else _arrow_batches
            for batch in read(_AtMostWhatIsThere(file), number, column):
                for first in range(0, batch.num_rows, _ROWS):
                    for row in batch.slice(first, _ROWS).to_pylist():
                        yield Record(f'{name} record {number}', Place(number), row)
                        number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'{name} is cut short or not {kind} file ({error_line(error)}); copy it again'
        ) from error


class _AtMostWhatIsThere:
    """An open file of which no more can be asked than it has: a damaged length would take gigabytes."""

    def __init__(self, file: Any):
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        file.seek(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        return self._file.read(left if count < 0 else min(count, left))


_ROWS = 64  # made into Python's objects at a time


def _parquet_batches(file: Any, start: int, column: str) -> Iterator[Any]:
    from pyarrow import parquet

    # Without a buffer the whole chunk of a column is read at once, which may be a gigabyte.
    table = parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    columns = [column] if column in table.schema_arrow.names else None
    groups, left = [], start
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if groups or left < rows:
            groups.append(group)
        else:
            left -= rows
    for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns):
        if left < batch.num_rows:
            yield batch.slice(left)
        left = max(0, left - batch.num_rows)


def _arrow_batches(file: Any, start: int, column: str) -> Iterator[Any]:
    """A stream, as Hugging Face's library saves data sets, or a file, which knows where its batches are."""
    from pyarrow import ipc

    head = file.read(6)
    file.seek(0)
    if head == b'ARROW1':
        reader = ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        reader = batches = ipc.open_stream(file)
    for batch in batches:
        batch.validate(full=True)  # what it says of its bytes may lead out of them
        if start < batch.num_rows:
            yield batch.select([column]).slice(start) if column in batch.schema.names else batch.slice(start)
        start = max(0, start - batch.num_rows)
