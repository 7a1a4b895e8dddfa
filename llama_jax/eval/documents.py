"""Where a benchmark's documents come from: its publisher's files, the Hugging Face hub or TFDS; checked one by one.

A data directory holds one folder a benchmark. In its place, 'hf://' reads every benchmark with the `datasets` library
and 'tfds://' with TensorFlow Datasets, where they have it; 'hf://DIR' from copies of the hub's repositories at
DIR/ORGANISATION/NAME, 'tfds://DIR' from what TFDS prepared in DIR. Neither of the two needs a network then.
"""

import csv
import dataclasses
import functools
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from llama_jax.errors import InputError, error_line
from llama_jax.eval.task import Document
from llama_jax.json_file import MAX_BYTES, parse_json, read_at_most

Fields = Mapping[str, type | tuple[type, ...]]
MALFORMED = (KeyError, ValueError, IndexError, TypeError, AttributeError, ArithmeticError, RecursionError)


def is_online(data_dir: str) -> bool:
    """Whether it names a library that reads the benchmarks, and no folder of the publishers' files."""
    return data_dir.startswith(('hf://', 'tfds://'))


@dataclasses.dataclass(frozen=True)
class Online:
    """The same documents elsewhere.

    Attributes:
      dataset: name for `datasets.load_dataset` or `tfds.data_source`.
      split: its split.
      configs: of that dataset, one after another; '' for the only one.
      row: (row, config) -> document with the publisher's fields; None where they are the same.
    """

    dataset: str
    split: str
    configs: tuple[str, ...] = ('',)
    row: Callable[[dict[str, Any], str], Document] | None = None


@dataclasses.dataclass(frozen=True)
class DocumentSource:
    """One split of a benchmark.

    Attributes:
      folder: in the data directory.
      files: names in that folder, the first that exists is read; .jsonl, .json, .csv or .tsv, also with .gz.
      fields: that every row has, and their types; what else it has is kept.
      check: raises for a row that makes no sense, such as a label without its choice.
      document: publisher's row -> document; None keeps the row.
      huggingface: the split on the Hugging Face hub.
      tfds: the split in TFDS.
      optional: there may be no such file: no documents then.
    """

    folder: str
    files: tuple[str, ...]
    fields: Fields
    check: Callable[[Document], Any] | None = None
    document: Callable[[Document], Document] | None = None
    huggingface: Online | None = None
    tfds: Online | None = None
    optional: bool = False

    def __call__(self, data_dir: str) -> list[Document]:
        """All documents, in the publisher's order.

        Raises:
          InputError: nothing is there, or a row is malformed; names the file and the line.
        """
        documents = [self.checked(place, row) for place, row in self._rows(data_dir)]
        if not documents and not self.optional:
            raise InputError(f'no items of {self.folder} in {data_dir}; expected {self._expected()}')
        return documents

    def _rows(self, data_dir: str) -> Iterator[tuple[str, Any]]:
        for scheme, online, read in (
            ('hf://', self.huggingface, _from_huggingface),
            ('tfds://', self.tfds, _from_tfds),
        ):
            if data_dir.startswith(scheme):
                if online is None and not self.optional:
                    raise InputError(
                        f'{self.folder} is not read from {scheme}; give a data directory with {self._expected()}'
                    )
                return iter(()) if online is None else read(online, data_dir.removeprefix(scheme))
        for name in self.files:
            path = epath.Path(data_dir) / self.folder / name
            if path.exists():
                return read_rows(path)
        if self.optional:
            return iter(())
        raise InputError(f'no items of {self.folder} in {data_dir}; expected {self._expected()}')

    def _expected(self) -> str:
        return f'{self.folder}/{" or ".join(self.files)} with {", ".join(self.fields)}'

    def checked(self, place: str, row: Any) -> Document:
        """The document of one row; InputError with its place where a field is missing, of the wrong type or absurd."""
        if not isinstance(row, dict):
            raise InputError(f'{place}: an item is a JSON object, got {type(row).__name__}')
        for field, kinds in self.fields.items():
            if field not in row:
                raise InputError(f'{place}: item without {field!r}; it needs {", ".join(self.fields)}')
            if not isinstance(row[field], kinds):
                names = ' or '.join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
                raise InputError(f'{place}: {field} is {str(row[field])[:40]!r}; it must be {names}')
        try:
            document = self.document(row) if self.document else row
            if self.check:
                self.check(document)
        except MALFORMED as error:
            reason = error_line(error) + ' is missing or not allowed' * isinstance(error, KeyError)
            raise InputError(f'{place}: malformed item: {reason}') from error
        return document


def read_rows(path: epath.Path) -> Iterator[tuple[str, Any]]:
    """('FILE:LINE', row) of a JSON Lines, JSON, CSV or TSV file; the kind is told from the name.

    Raises:
      InputError: the file is not what its name says, with the line.
    """
    kind = path.name.removesuffix('.gz').rpartition('.')[2]
    if kind == 'jsonl':
        for line, content in enumerate(io.BytesIO(_read(path)), 1):
            if content.strip():
                yield f'{path}:{line}', parse_json(content, f'{path}:{line}')
        return
    text = read_text(path)
    if kind == 'json':
        rows = parse_json(text, str(path))
        for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
            yield f'{path}: item {index}', row
    else:
        # TSV files of the publishers hold quotes as plain characters.
        style: dict[str, Any] = (
            dict(delimiter='\t', quoting=csv.QUOTE_NONE) if kind == 'tsv' else dict(strict=True)
        )
        lines = csv.DictReader(io.StringIO(text, newline=''), **style)
        try:
            for row in lines:
                yield f'{path}:{lines.line_num}', row
        except csv.Error as error:
            raise InputError(f'{path}:{lines.line_num}: not {kind.upper()}: {error}') from error


def read_csv_lines(path: epath.Path) -> Iterator[tuple[str, list[str]]]:
    """('FILE:LINE', cells) of a CSV file without a header."""
    lines = csv.reader(io.StringIO(read_text(path), newline=''), strict=True)
    try:
        for row in lines:
            yield f'{path}:{lines.line_num}', row
    except csv.Error as error:
        raise InputError(f'{path}:{lines.line_num}: not CSV: {error}') from error


def read_text(path: epath.Path) -> str:
    """A UTF-8 file, unpacked where its name ends in .gz; InputError where it cannot be read."""
    try:
        return _read(path).decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise InputError(f'{path} cannot be read as UTF-8 text: {error_line(error)}') from error


def _read(path: epath.Path) -> bytes:
    try:
        with path.open('rb') as raw:
            file = gzip.GzipFile(fileobj=raw) if path.name.endswith('.gz') else raw
            data = read_at_most(file, MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise InputError(f'no file {path}') from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f'{path} cannot be read: {error_line(error)}') from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES >> 20} MiB; no benchmark's file is that large")
    return data


def _from_huggingface(online: Online, rest: str) -> Iterator[tuple[str, Document]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            'hf:// needs the datasets library: pip install datasets, or give a data directory'
        ) from error
    name = os.path.join(rest, online.dataset) if rest else online.dataset
    if rest and not os.path.isdir(name):
        raise InputError(f'no folder {name}; hf://DIR has copies of the hub as DIR/{online.dataset}')
    for config in online.configs:
        try:
            rows: Any = datasets.load_dataset(name, config or None, split=online.split)
        except Exception as error:  # of many kinds: no network, no such dataset or split, damaged files
            raise InputError(
                f'hf:// has no {name}{config and "/" + config} ({online.split}): {error_line(error)}'
            ) from error
        yield from _renamed(online, rows, config)


def _from_tfds(online: Online, rest: str) -> Iterator[tuple[str, Document]]:
    import tensorflow_datasets as tfds

    for config in online.configs:
        name = f'{online.dataset}/{config}' if config else online.dataset
        try:
            builder: Any = tfds.builder(name, data_dir=rest or None, file_format='array_record')
            # Nothing is prepared here: that may take hours, and some builders need TensorFlow for it.
            rows = builder.as_data_source(online.split) if builder.info.splits else None
        except Exception as error:  # of many kinds: not found, no such split, no bucket, another file format
            raise InputError(
                f'TFDS has no {name} ({online.split}) in {rest or "its default folder"}: {error_line(error)}'
            ) from error
        if rows is None:
            raise InputError(
                f'{name} is not prepared in {builder.data_dir}; run '
                f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
            )
        yield from _renamed(online, map(_plain, rows), config)


def _renamed(online: Online, rows: Iterable[Any], config: str) -> Iterator[tuple[str, Document]]:
    for index, row in enumerate(rows):
        place = f'{online.dataset}{config and "/" + config} {online.split}[{index}]'
        try:
            yield place, online.row(dict(row), config) if online.row else dict(row)
        except MALFORMED as error:
            raise InputError(f'{place}: malformed item: {error!r}') from error


@functools.singledispatch
def _plain(value: Any) -> Any:
    """TFDS's value in plain Python: text for bytes, numbers and lists for arrays."""
    return _plain(value.tolist()) if hasattr(value, 'tolist') else value


_plain.register(bytes, lambda value: value.decode())
_plain.register(list, lambda value: [_plain(item) for item in value])
_plain.register(dict, lambda value: {key: _plain(item) for key, item in value.items()})
