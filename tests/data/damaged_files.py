"""Sound files of text in every container, and prepared rows: what `tests.convert.fuzz --only=data` damages."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator

from etils import epath

from llama_jax.data import prepared, provenance
from llama_jax.data.bad_records import BadRecords
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.provenance import document_lengths
from llama_jax.data.shards import write_prepared
from llama_jax.data.sources import Reading, read_documents
from llama_jax.data.units import scan_file
from tests.convert.samples import Sample
from tests.convert.sound_files import Found
from tests.data.containers_test import texts, write_all
from tests.data.packing_test import Letters


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """A file in each container, and each file of a folder of prepared rows."""
    made = folder / 'made'
    made.mkdir()
    for name in write_all(made, texts(60)):
        yield _sample(f'data {name}', {name: (made / name).read_bytes()}, name, _read_text(name))
    write_prepared(texts(60), Letters(), 16, folder / 'prepared', unit_bytes=700)
    files = {file.name: file.read_bytes() for file in (folder / 'prepared').iterdir()}
    for name in ('manifest.json', 'rows-00000.array_record', 'documents-00000.npy.zst'):
        yield _sample(f'data prepared {name}', files, name, _read_rows)


def _sample(reader: str, files: dict[str, bytes], target: str, read: Callable[[epath.Path], Found]) -> Sample:
    # Whatever comes out is text, or rows: nothing says which.
    return Sample(reader, files, target, read, says=lambda data, found: True)


def _read_text(name: str) -> Callable[[epath.Path], Found]:
    def read(folder: epath.Path) -> Found:
        file = os.fspath(folder / name)
        bad, digest = BadRecords('skip'), hashlib.sha256()
        for text in read_documents(file, separator='<|end|>', bad=bad):
            digest.update(text.encode('utf-8', 'surrogatepass') + b'\0')
        scan = scan_file(file, 0, Reading(separator='<|end|>'), 500, BadRecords('skip'))
        return {'texts': digest.hexdigest(), 'bad': bad.count, 'pieces': len(scan.pieces)}

    return read


def _read_rows(folder: epath.Path) -> Found:
    for kept in (prepared._open_shard, provenance._read_once):
        kept.cache_clear()
    rows, digest = PreparedRows(folder), hashlib.sha256()
    for number in range(len(rows)):
        digest.update(rows[number]['tokens'].tobytes())
    return {'rows': digest.hexdigest(), 'lengths': document_lengths(rows).tolist()}
