"""Units: a source cut into runs of whole documents that are packed each by itself, so that any number of workers may.

Where units begin is a function of the input alone. Within a file a unit ends after `unit_bytes` of text; between two
files where it has half of that, so that many small files share one and what a large file ends with is not alone.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from llama_jax.data.bad_records import BadRecords
from llama_jax.data.containers import Place, size_of
from llama_jax.data.sources import Reading, list_files, read_file, read_texts
from llama_jax.errors import InputError

UNIT_BYTES = 256 << 20  # of text, in UTF-8


class Cutter:
    """Says document after document of a source whether a unit begins with it."""

    def __init__(self, unit_bytes: int):
        """Args: unit_bytes: of text; 0: all is one unit."""
        self._limit = unit_bytes
        self._of_file = self._of_unit = 0

    def begins(self, num_bytes: int, first_of_file: bool) -> bool:
        """Args: num_bytes: of the document's text. first_of_file: none that is not empty comes before it there."""
        if first_of_file:
            self._of_file, begins = 0, self._of_unit and 2 * self._of_unit >= self._limit
        else:
            begins = self._of_file >= self._limit
        begins = bool(self._limit and begins)
        if begins:
            self._of_file = self._of_unit = 0
        self._of_file += num_bytes
        self._of_unit += num_bytes
        return begins


@dataclasses.dataclass(frozen=True)
class Piece:
    """What of a file is in one unit.

    Attributes:
      file: its number among those of the source.
      start: where the first document begins.
      end: number of the record behind the last one.
      num_documents: with text in them.
      num_bytes: of their text.
    """

    file: int
    start: Place
    end: int
    num_documents: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class FileScan:
    """What a file holds, found by reading it once; nothing is tokenised.

    Attributes:
      name: of the file.
      size: its bytes on the disk; 0 where it is no file.
      changed: when it was changed, in seconds; what tells in a moment that it is another one.
      text_sha256: of all its texts.
      num_empty: records with an empty text.
      num_bad: records without a text.
      bad: what is wrong with the first five of them.
      empty: where the first five empty ones are.
      pieces: a unit each, but that the first and the last may be joined with other files'.
    """

    name: str
    size: int
    changed: float
    text_sha256: str
    num_empty: int
    num_bad: int
    bad: tuple[str, ...]
    empty: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_documents(self) -> int:
        """Records with text."""
        return sum(piece.num_documents for piece in self.pieces)

    @property
    def num_bytes(self) -> int:
        """Of the texts."""
        return sum(piece.num_bytes for piece in self.pieces)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> 'FileScan':
        """What `dataclasses.asdict` gave, written as JSON and read again."""
        fields: dict[str, Any] = {**value, **{key: tuple(value[key]) for key in ('bad', 'empty')}}
        fields['pieces'] = tuple(
            Piece(**piece | {'start': Place(*piece['start'])}) for piece in value['pieces']
        )
        return cls(**fields)


def state_of(file: str) -> tuple[int, float]:
    """(bytes, time of the last change) of a file; (0, 0) of a source that is none.

    Raises:
      InputError: it is gone.
    """
    if file.startswith(('tfds:', 'python_stdlib')):
        return 0, 0.0
    try:
        if '://' not in file:
            found = os.stat(file)
            return found.st_size, found.st_mtime
        stored = epath.Path(file).stat()
    except FileNotFoundError as error:
        raise InputError(f'{file} is gone; put it back, or begin anew') from error
    return stored.length, float(stored.mtime)


def scan_file(file: str, number: int, reading: Reading, unit_bytes: int, bad: BadRecords) -> FileScan:
    """Reads a file once: what it holds, and where units begin in it.

    Args:
      file: one of `list_files`.
      number: of it in its source.
      reading: how texts are taken.
      unit_bytes: of text.
      bad: is told of records without a text.

    Raises:
      InputError: it cannot be read.
    """
    size, changed = state_of(file)
    digest, cutter, own = hashlib.sha256(), Cutter(unit_bytes), BadRecords('skip')
    num_empty, empty, end = 0, [], 0
    pieces: list[list[Any]] = []  # (start, documents, bytes)
    for record in read_file(file, reading):
        end = record.place.number + 1
        if isinstance(record.content, InputError):
            bad.add(record.content)
            own.add(record.content)
            continue
        text = record.content.encode('utf-8', 'surrogatepass')
        if not text:
            num_empty += 1
            empty += [record.where] * (num_empty <= 5)
            continue
        digest.update(len(text).to_bytes(8, 'little') + text)
        if cutter.begins(len(text), not pieces) or not pieces:
            pieces.append([record.place, 0, 0])
        pieces[-1][1] += 1
        pieces[-1][2] += len(text)
    ends = [start.number for start, _, _ in pieces[1:]] + [end]
    found = tuple(
        Piece(number, start, stop, documents, size)
        for (start, documents, size), stop in zip(pieces, ends, strict=bool(pieces))
    )
    return FileScan(
        file, size, changed, digest.hexdigest(), num_empty, own.count, tuple(own.named), tuple(empty), found
    )


def join_pieces(scans: Sequence[FileScan], unit_bytes: int) -> list[tuple[Piece, ...]]:
    """The units of a source, from what was found in its files."""
    units: list[list[Piece]] = []
    size = 0
    for scan in scans:
        for place, piece in enumerate(scan.pieces):
            if not units or place or 2 * size >= unit_bytes:
                units.append([])
                size = 0
            units[-1].append(piece)
            size += piece.num_bytes
    return [tuple(unit) for unit in units]


def read_piece(file: str, piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
    """(number of the record, text) of the documents of a piece; records without text are passed over.

    Raises:
      InputError: the file is not what it was when it was scanned.
    """
    documents = size = 0
    for record in read_file(file, reading, piece.start):
        if record.place.number >= piece.end:
            break
        if isinstance(record.content, str) and record.content:
            documents += 1
            size += size_of(record.content)
            yield record.place.number, record.content
    if (documents, size) != (piece.num_documents, piece.num_bytes):
        raise InputError(
            f'{file} has changed since it was scanned: from record {piece.start.number} on it had '
            f'{piece.num_documents} documents of {piece.num_bytes} bytes, now {documents} of {size}; begin anew'
        )


def read_units(
    source: str, reading: Reading, unit_bytes: int, bad: BadRecords | None = None
) -> Iterator[tuple[int, str]]:
    """(unit, text) of every document of a source, read once: what is packed in memory is cut as what is prepared.

    Raises:
      InputError: as `read_documents` does.
    """
    cutter, unit = Cutter(unit_bytes), 0
    empty = True
    for file in list_files(source):
        first = True
        for text in read_texts(file, reading, bad):
            unit += cutter.begins(size_of(text), first)
            first = empty = False
            yield unit, text
    if empty:
        raise InputError(f'source {source!r} holds no text: every document is empty')


def cut_texts(texts: Iterable[str], unit_bytes: int) -> Iterator[tuple[int, str]]:
    """(unit, text) of texts that are not empty, as if one file held them."""
    cutter, unit = Cutter(unit_bytes), 0
    for number, text in enumerate(texts):
        unit += cutter.begins(size_of(text), number == 0)
        yield unit, text


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document validates; its text alone decides, so a copy of it elsewhere does not train."""
    if not fraction:
        return False
    digest = hashlib.sha256(text.encode('utf-8', 'surrogatepass')).digest()
    return int.from_bytes(digest[:8], 'big') < fraction * 2**64


def place_of(file: str) -> str:
    """What tells a file from others, however its name is written, and whatever links to it."""
    return file if '://' in file or file.startswith('tfds:') else os.path.realpath(file)


def list_inputs(inputs: Iterable[str]) -> list[str]:
    """The files of several sources in order.

    Raises:
      InputError: one is not there, or a file is named twice.
    """
    found: dict[str, tuple[str, str]] = {}  # the same file may be written in two ways
    for source in inputs:
        for file in list_files(source):
            place = place_of(file)
            if place in found:
                raise InputError(
                    f'{file} is named twice, by {found[place][1]!r} and by {source!r}: its documents would count twice'
                )
            found[place] = file, source
    return [file for file, _ in found.values()]
