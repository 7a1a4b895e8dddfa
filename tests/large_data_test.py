"""Folders of thousands of shards: what requests and descriptors they take, and what is said when something breaks."""

import json
import subprocess
import sys

import numpy as np
import pytest

from llama_jax.data import prepared
from llama_jax.data.prepared import MANIFEST, PreparedRows, origins_file
from llama_jax.data.shards import write_prepared
from llama_jax.errors import InputError
from llama_jax.storage import enable_bucket
from tests.command_line import REPOSITORY, tiny_run
from tests.data.packing_test import Letters, documents
from tests.reference import fake_gcs
from tests.reference.fake_gcs import FakeGCS


@pytest.fixture(scope='module')
def gcs():
    with FakeGCS() as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment().items():
            environment.setenv(name, value)
        yield server


@pytest.mark.slow
def test_ten_thousand_shards_open_with_few_requests(gcs, tmp_path, monkeypatch):
    monkeypatch.setattr(fake_gcs, '_PAGE', 1000)  # as many as the real one lists at a time
    write_prepared(documents(3), Letters(), 8, tmp_path / 'rows')
    manifest = json.loads((tmp_path / 'rows' / MANIFEST).read_text())
    (shard,), shards = manifest['shards'], []
    for number in range(10_000):
        name = f'rows-{number:05d}.array_record'
        shards.append(shard | {'file': name})
        for source, target in ((shard['file'], name), (origins_file(shard['file']), origins_file(name))):
            gcs.insert(('large', f'rows/{target}'), (tmp_path / 'rows' / source).read_bytes(), {})
    counts = {key: 10_000 * manifest[key] for key in ('num_rows', 'num_documents', 'num_tokens', 'num_bytes')}
    gcs.insert(('large', f'rows/{MANIFEST}'), json.dumps(manifest | counts | {'shards': shards}).encode(), {})
    enable_bucket('gs://large/rows')
    gcs.counts.clear()
    rows = PreparedRows('gs://large/rows')
    assert len(rows) == 10_000 * shard['rows']
    assert sum(gcs.counts.values()) <= 25, gcs.counts
    gcs.counts.clear()
    assert rows[len(rows) // 2]['tokens'].any()
    assert sum(gcs.counts.values()) <= 8, gcs.counts


def flipped(content):
    """With one bit changed of a byte that is in use: much of a small file is empty."""
    used = np.flatnonzero(np.frombuffer(content, np.uint8))
    place = int(used[len(used) // 2])
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def read_all(place):
    prepared._open_shard.cache_clear()
    rows = PreparedRows(place)
    for number in range(len(rows)):
        rows[number]


def test_what_is_damaged_and_what_cannot_be_read_are_told_apart(tmp_path, monkeypatch):
    folder = tmp_path / 'rows'
    write_prepared(documents(2000), Letters(), 256, folder)
    file = folder / 'rows-00000.array_record'
    content = file.read_bytes()
    file.write_bytes(flipped(content))
    with pytest.raises(InputError, match=r'is damaged at row \d+ .*; copy or prepare it again'):
        read_all(folder)
    file.write_bytes(content)
    rows = PreparedRows(folder)
    prepared._open_shard.cache_clear()
    file.unlink()
    file.symlink_to(file)  # as root may read what nobody may, a place that cannot be opened
    with pytest.raises(InputError, match='cannot be read at row 0: ') as caught:
        rows[0]
    assert ' is damaged' not in str(caught.value)

    def out_of_reach(file, sha256):
        raise RuntimeError('Retry policy exhausted, with a last message of PerformWork() - CURL error [52]')

    out_of_reach.cache_clear = lambda: None
    monkeypatch.setattr(prepared, '_open_shard', out_of_reach)  # what it says after a quarter of an hour
    with pytest.raises(InputError, match='cannot be read at row 0: Retry policy exhausted'):
        rows[0]


@pytest.mark.slow
def test_in_a_bucket_a_flipped_byte_and_a_shard_that_is_gone_are_two_lines(gcs, tmp_path):
    write_prepared(documents(2000), Letters(), 256, 'gs://breaks/rows')
    key = ('breaks', 'rows/rows-00000.array_record')
    whole, said = gcs.objects[key], []
    read_all('gs://breaks/rows')
    gcs.insert(key, flipped(whole), {})
    with pytest.raises(InputError) as caught:
        read_all('gs://breaks/rows')
    said.append(str(caught.value))
    gcs.insert(key, whole, {})
    rows = PreparedRows('gs://breaks/rows')
    prepared._open_shard.cache_clear()
    del gcs.objects[key]
    with pytest.raises(InputError) as caught:
        rows[0]
    said.append(str(caught.value))
    assert 'is damaged at row' in said[0]
    assert 'cannot be read at row 0' in said[1] and ' is damaged' not in said[1]
    assert not any('\n' in line for line in said)


@pytest.mark.slow
def test_a_run_reads_a_thousand_shards_with_256_descriptors(commands, corpus, folder, tmp_path):
    from llama_jax.data.datasets import train_tokenizer

    tokenizer = train_tokenizer([str(corpus)], 320, folder / 'tokenizer.model')
    texts = corpus.read_text().split('\n<|endoftext|>\n')
    write_prepared([texts[i % 100] for i in range(1000)], tokenizer, 64, tmp_path / 'rows', unit_bytes=1)
    assert len(list((tmp_path / 'rows').glob('rows-*'))) == 1000
    limit = """
import functools, resource
from llama_jax.data import prepared
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # `ulimit -n 256`, before the module is imported
prepared._open_shard = functools.lru_cache(prepared._max_open_shards())(prepared._open_shard.__wrapped__)
"""
    arguments = tiny_run(
        tmp_path / 'run', '', data__train=tmp_path / 'rows', data__tokenizer=folder / 'tokenizer.model',
        data__validation_fraction=0.0, train__num_steps=50, train__batch_size=32, checkpoint__every=100, log__every=50,
    )  # fmt: skip
    commands.run('pretrain', *arguments, before=limit).succeeded()
    lines = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['step'] == 50


# Reads a source as preparing does, and prints what came of it and by how many MiB its peak grew.
SCAN = """
import pathlib, re, sys
from llama_jax.data.bad_records import BadRecords
from llama_jax.data.sources import Reading, read_file
from llama_jax.data.units import UNIT_BYTES, read_piece, scan_file
from llama_jax.errors import InputError
import pyarrow.parquet, zstandard

def peak():
    status = pathlib.Path('/proc/self/status').read_text()  # getrusage would count what forked this process
    return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024

before, bad = peak(), BadRecords('skip')
scan = scan_file(sys.argv[1], 0, Reading(), UNIT_BYTES, bad)
last = scan.pieces[-1]
for number, text in read_piece(sys.argv[1], last, Reading()):
    pass
print(scan.num_documents, scan.num_bytes, bad.count, len(scan.pieces), round(peak() - before), *bad.named, sep='|')
"""


def scan(file):
    done = subprocess.run(
        [sys.executable, '-c', SCAN, file],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    print(done.stdout)
    documents, size, bad, pieces, grown, *named = done.stdout.strip().split('|')
    return int(documents), int(size), int(bad), int(pieces), int(grown), named


@pytest.mark.long
def test_a_row_group_of_a_gigabyte_takes_little_memory(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rng, text = np.random.default_rng(0), tmp_path / 'a.parquet'
    letters = rng.integers(97, 123, 1 << 24, np.uint8).tobytes().decode()
    schema = pyarrow.schema([('text', pyarrow.large_string()), ('id', pyarrow.int64())])
    places = rng.integers(0, (1 << 24) - 50_000, 20_000)
    with parquet.ParquetWriter(text, schema, compression='none', use_dictionary=False) as writer:
        texts = [letters[place : place + 50_000] for place in places]
        writer.write_table(pyarrow.table({'text': texts, 'id': range(20_000)}, schema), row_group_size=20_000)
    del texts
    file = parquet.ParquetFile(text)
    assert file.num_row_groups == 1 and text.stat().st_size > 1_000_000_000
    documents, size, bad, pieces, grown, _ = scan(text)
    assert (documents, size, bad, pieces) == (20_000, 1_000_000_000, 0, 4)
    assert grown < 300  # MiB; of row groups of 250 and 500 MB it is 200 too


@pytest.mark.long
def test_a_line_of_300_megabytes_is_passed_over_and_one_of_64_is_read(tmp_path):
    file = tmp_path / 'a.jsonl'
    with open(file, 'w') as written:
        for text in ('first', 'a b' * 100_000_000, 'second', 'a é ' * 13_000_000, 'third'):
            written.write(json.dumps({'text': text}) + '\n')
    assert file.stat().st_size > 360_000_000
    documents, size, bad, _, grown, named = scan(file)
    assert (documents, size, bad) == (4, 65_000_016, 1)
    assert named == [f'{file} line 2 has more than 128 MiB; cut it into several']
    assert grown < 700  # MiB: the line, its text as JSON gives it in two bytes a letter, and in UTF-8
