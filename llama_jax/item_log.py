"""A file of finished items, a line each, from which a killed command goes on.

The first line says what they depend on; then come items as they were finished, each with its `index`.
"""

import io
import json
import logging
import time
from typing import Any

from etils import epath

from llama_jax.errors import InputError, error_line
from llama_jax.json_file import parse_json, read_lines, show_json
from llama_jax.storage import AppendedFile, write_atomically

logger = logging.getLogger(__name__)

# A bucket cannot append: there the whole log is written again, so often at most.
_SECONDS_BETWEEN_WRITES = 60.0


class ItemLog:
    """The items of one task that are finished.

    Attributes:
      items: by index, as they were added.
    """

    def __init__(self, path: epath.PathLike, header: dict[str, Any]):
        """Opens a log; nothing is written before the first item is added.

        Args:
          path: the file, local or `gs://...`.
          header: what the items depend on; a log with another header is refused.

        Raises:
          InputError: the log is of another run, or is none.
        """
        self._path = epath.Path(path)
        self.items: dict[int, dict[str, Any]] = {}
        self._lines = [json.dumps({'header': header})]
        self._read(header)
        self._appends = '://' not in str(path)
        self._file: AppendedFile | None = None
        self._begun = False
        self._written, self._write_time = len(self._lines), time.monotonic()

    def _begin(self) -> None:
        self._write()  # whole, without what a kill left of a last line
        self._file = AppendedFile(self._path) if self._appends else None
        self._begun = True

    def _read(self, header: dict[str, Any]) -> None:
        if not self._path.exists():
            return
        before, damaged = header, 0
        try:
            with self._path.open('rb') as raw, io.BufferedReader(raw) as file:
                for number, line in enumerate(read_lines(file, str(self._path)), 1):
                    if not line.endswith(b'\n'):  # what a kill left of a last line is dropped
                        break
                    if number == 1:
                        before = dict(parse_json(line, f'{self._path} line {number}')['header'])
                    elif not self._take(line):
                        damaged += 1
        except InputError as error:
            raise InputError(f'{error}; it is no log of items: move it away') from None
        except (ValueError, TypeError, KeyError, ArithmeticError) as error:
            raise InputError(f'{self._path} is no log of items; move it away') from error
        except OSError as error:
            raise InputError(f'{self._path} cannot be read: {error.strerror or error_line(error)}') from error
        for key in sorted({*before, *header}):
            if before.get(key) != header.get(key):
                raise InputError(
                    f'{self._path} is of another run: {key} was {show_json(before.get(key))} '
                    f'and is {show_json(header.get(key))}; write to another place, or remove the file'
                )
        if damaged:
            logger.warning('%s: %d damaged lines dropped; their items are done again', self._path, damaged)
        self._lines += [json.dumps(item) for item in self.items.values()]

    def _take(self, line: bytes) -> bool:
        """Whether the line holds an item, which is kept then."""
        try:
            item = parse_json(line, str(self._path))
            self.items[int(item['index'])] = item
        except (ValueError, TypeError, KeyError, ArithmeticError):
            return False
        return True

    def _write(self) -> None:
        write_atomically(self._path, ''.join(f'{line}\n' for line in self._lines))

    def add(self, item: dict[str, Any]) -> None:
        """Keeps a finished item: JSON values, with its `index`."""
        line = json.dumps(item)
        if not self._begun:
            self._begin()
        self.items[item['index']] = item
        self._lines.append(line)
        if self._file is not None:
            self._file.append(f'{line}\n'.encode())
        elif time.monotonic() - self._write_time > _SECONDS_BETWEEN_WRITES:
            self._write()
            self._written, self._write_time = len(self._lines), time.monotonic()

    def close(self) -> None:
        """Returns when everything is where a killed process cannot lose it."""
        if self._file is not None:
            self._file.close()
        elif self._written < len(self._lines):
            self._write()
