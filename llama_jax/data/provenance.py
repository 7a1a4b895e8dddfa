"""Where the tokens of prepared rows came from: which record of which file, and from which of its tokens on."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

import numpy as np
from etils import epath
from jaxtyping import Int64, Integer

from llama_jax.data.containers import Place
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.shards import read_origins
from llama_jax.data.sources import Reading, read_file
from llama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Passage:
    """What a row has of one document.

    Attributes:
      file: that the document is from, as it was named when it was prepared.
      record: its number there, from 0; of JSON lines, lines.
      first_token: of the document that stands at `begin`; its BOS is 0.
      begin: in the row.
      end: behind the last one, in the row.
      is_whole: whether the document ends here, with EOS.
    """

    file: str
    record: int
    first_token: int
    begin: int
    end: int
    is_whole: bool


def passages_of(rows: PreparedRows, number: int) -> list[Passage]:
    """The documents of a row, in order.

    Args:
      rows: of format 2; they may be cut into parts.
      number: of the row.

    Raises:
      InputError: the folder does not tell, or its table of documents is damaged.
    """
    shard, row = rows.find(range(len(rows))[number])
    files = files_of(rows)
    origins = _origins(rows, shard)
    num_tokens = rows.manifest['shards'][shard]['tokens']
    start = row * rows.seq_len
    end = min(start + rows.seq_len + 1, num_tokens)
    firsts = origins[:, 2]
    place = int(np.searchsorted(firsts, start, side='right')) - 1
    found = []
    while place < len(firsts) and firsts[place] < end:
        behind = int(firsts[place + 1]) if place + 1 < len(firsts) else num_tokens
        begin = max(int(firsts[place]), start)
        found.append(
            Passage(
                files[origins[place, 0]], int(origins[place, 1]), begin - int(firsts[place]), begin - start,
                min(behind, end) - start, behind <= end,
            )
        )  # fmt: skip
        place += 1
    return found


def files_of(rows: PreparedRows) -> list[str]:
    """The files that documents are from, by the numbers that tables of documents have.

    Raises:
      InputError: the folder does not tell.
    """
    files = rows.manifest.get('files')
    if not rows.in_units or not files:
        raise InputError(
            f'{rows.folder} does not tell which files its documents are from; prepare it again, from files'
        )
    return [file['name'] for file in files]


def reading_of(rows: PreparedRows) -> Reading:
    """How the texts of a folder were taken out of its files."""
    return Reading(**rows.manifest['source']['reading'])


def read_text(file: str, reading: Reading, record: int) -> str:
    """The text of one record, as it was tokenised.

    Raises:
      InputError: the file cannot be read, or has no such record.
    """
    for found in read_file(file, reading, Place(0)):
        if found.place.number == record:
            if isinstance(found.content, InputError):
                raise found.content
            return found.content
    raise InputError(f'{file} has no record {record} any more; it is not the file that was prepared')


def _origins(rows: PreparedRows, shard: int) -> Int64[np.ndarray, 'documents 3']:
    entry = rows.manifest['shards'][shard]
    return _read_once(str(rows.folder), entry['file'], entry.get('documents_sha256'))


@functools.lru_cache(64)
def _read_once(folder: str, file: str, sha256: str | None) -> Int64[np.ndarray, 'documents 3']:
    return read_origins(epath.Path(folder), {'file': file} | ({'documents_sha256': sha256} if sha256 else {}))


def read_stream(rows: PreparedRows, shard: int) -> Integer[np.ndarray, ' tokens']:
    """All tokens of a shard, put together from its rows."""
    first, end = (rows.ends[shard - 1] if shard else 0), rows.ends[shard]
    tokens = [rows[number]['tokens'][number > first :] for number in range(first, end)]
    return np.concatenate(tokens)[: rows.manifest['shards'][shard]['tokens']]


@dataclasses.dataclass(frozen=True)
class Copies:
    """Documents with the same tokens.

    Attributes:
      places: (file, record) of each.
      num_tokens: of one.
    """

    places: tuple[tuple[str, int], ...]
    num_tokens: int


def find_copies(rows: PreparedRows, max_rows: int) -> tuple[int, list[Copies]]:
    """(documents looked at, those that are there more than once, most copies first) of the first shards.

    Args:
      rows: of format 2.
      max_rows: no further shard is begun once so many were read.
    """
    files, seen, count = files_of(rows), {}, 0
    for digest, file, record, length in _documents(rows, max_rows):
        count += 1
        seen.setdefault((digest, length), []).append((files[file], record))
    groups = [Copies(tuple(places), length) for (_, length), places in seen.items() if len(places) > 1]
    return count, sorted(groups, key=lambda group: -len(group.places))


def _documents(rows: PreparedRows, max_rows: int) -> Iterator[tuple[bytes, int, int, int]]:
    for number in range(len(rows.manifest['shards'])):
        if number and rows.ends[number - 1] >= max_rows:
            return
        tokens = read_stream(rows, number)
        origins = _origins(rows, number).tolist()
        ends = [*(first for _, _, first in origins[1:]), len(tokens)]
        for (file, record, first), end in zip(origins, ends, strict=True):
            digest = hashlib.blake2b(tokens[first:end].tobytes(), digest_size=16).digest()
            yield digest, file, record, end - first


def document_lengths(rows: PreparedRows) -> Int64[np.ndarray, ' documents']:
    """Tokens of every document, BOS and EOS included."""
    lengths = []
    for number, shard in enumerate(rows.manifest['shards']):
        starts = _origins(rows, number)[:, 2]
        lengths.append(np.diff(np.append(starts, shard['tokens'])))
    return np.concatenate(lengths)
