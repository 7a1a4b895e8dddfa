import functools
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llama_jax.data import prepared
from llama_jax.data.lm_batch import lm_batch
from llama_jax.data.packing import PackedRows, tokenize_documents, tokenize_units
from llama_jax.data.prepared import PreparedRows, is_prepared
from llama_jax.data.shards import write_prepared
from llama_jax.errors import InputError


class Letters:
    """Each byte is a token; BOS 0, EOS 1."""

    bos_id, eos_id, stop_ids, path = 0, 1, (1,), 'letters'

    def __init__(self, vocab_size=300, sha256='abc'):
        self.vocab_size, self.sha256 = vocab_size, sha256

    def encode(self, text, bos=False, eos=False):
        return [0] * bos + [2 + byte for byte in text.encode()] + [1] * eos

    def encode_batch(self, texts):
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids):
        return bytes(i - 2 for i in ids if i > 1).decode()


def documents(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [''.join(map(chr, rng.integers(97, 123, rng.integers(1, 40)))) for _ in range(count)]


def stack(rows):
    rows = list(rows)
    return [np.stack([row[name] for row in rows]) for name in ('tokens', 'segment_ids')]


def test_a_corpus_is_every_document_between_bos_and_eos():
    texts = ['ab', 'é', 'c']
    seen = []
    corpus = tokenize_documents(iter(texts), Letters(), lambda *totals: seen.append(totals))
    np.testing.assert_array_equal(corpus.tokens, sum((Letters().encode(t, True, True) for t in texts), []))
    assert corpus.starts.tolist() == [0, 4, 8]
    assert corpus.tokens.dtype == np.uint16
    assert (corpus.num_documents, corpus.num_tokens, corpus.num_bytes) == (3, 11, 5)
    assert seen == [(3, 5)]
    assert tokenize_documents(texts, Letters(70_000)).tokens.dtype == np.uint32
    assert tokenize_documents(['abé', 'c'], Letters()).fingerprint != corpus.fingerprint


@pytest.mark.parametrize('seq_len', [1, 2, 7, 16, 1000, 5000])
def test_every_token_but_bos_is_predicted_exactly_once(seq_len):
    corpus = tokenize_documents(documents(), Letters())
    tokens, segment_ids = stack(PackedRows(corpus, seq_len))
    assert tokens.shape[1] == seq_len + 1
    batch = lm_batch(tokens, segment_ids)
    is_bos = np.zeros(corpus.num_tokens, bool)
    is_bos[corpus.starts] = True
    # In stream order the unmasked targets are the stream without the first token of each document.
    np.testing.assert_array_equal(batch.targets[batch.loss_mask], corpus.tokens[~is_bos])
    np.testing.assert_array_equal(batch.tokens[batch.loss_mask], corpus.tokens[:-1][~is_bos[1:]])


def test_rows_share_one_token_and_segments_follow_documents():
    corpus = tokenize_documents(['ab', 'c', 'defgh'], Letters())  # 4 + 3 + 7 tokens
    rows = PackedRows(corpus, 6)
    assert len(rows) == 3
    assert [row['segment_ids'].tolist() for row in rows] == [
        [1, 1, 1, 1, 2, 2, 2],
        [1, 2, 2, 2, 2, 2, 2],
        [1, 1, 0, 0, 0, 0, 0],
    ]
    tokens, segment_ids = stack(rows)
    np.testing.assert_array_equal(tokens[:-1, -1], tokens[1:, 0])
    batch = lm_batch(tokens, segment_ids)
    assert batch.positions[:2].tolist() == [[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]]
    assert batch.positions[2, 0] == 0
    assert batch.loss_mask.astype(int).tolist() == [
        [1, 1, 1, 0, 1, 1],
        [0, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0],
    ]
    assert rows[-1]['tokens'].tolist() == rows[2]['tokens'].tolist()
    with pytest.raises(IndexError):
        rows[3]


def test_too_little_to_pack_is_refused():
    with pytest.raises(InputError, match='the corpus has 0 tokens'):
        PackedRows(tokenize_documents([], Letters()), 8)
    with pytest.raises(InputError, match='seq_len is 0'):
        PackedRows(tokenize_documents(['a'], Letters()), 0)


def in_units(texts, unit_bytes):
    """(unit, text) as `units.Cutter` cuts a single file; said again, in its own words."""
    unit = size = 0
    for text in texts:
        if unit_bytes and size >= unit_bytes:
            unit, size = unit + 1, 0
        size += len(text.encode())
        yield unit, text


@pytest.mark.parametrize(('vocab_size', 'unit_bytes'), [(300, 200), (70_000, 200), (300, 1), (300, 1 << 20)])
def test_prepared_rows_are_the_rows_in_memory(tmp_path, vocab_size, unit_bytes, monkeypatch):
    from llama_jax.data import packing

    tokenizer, texts = Letters(vocab_size), documents()
    in_memory = PackedRows(tokenize_units(in_units(texts, unit_bytes), tokenizer), 32)
    batches = packing._batches
    monkeypatch.setattr(packing, '_batches', lambda texts, max_chars: batches(texts, 50))  # many chunks
    manifest = write_prepared(iter(texts), tokenizer, 32, tmp_path / 'p', unit_bytes=unit_bytes)
    prepared = PreparedRows(tmp_path / 'p')
    assert len(manifest['shards']) == len(set(unit for unit, _ in in_units(texts, unit_bytes)))
    assert len(prepared) == len(in_memory) == manifest['num_rows']
    for name in ('seq_len', 'fingerprint', 'num_documents', 'num_tokens', 'num_bytes'):
        assert getattr(prepared, name) == getattr(in_memory, name), name
    for one, other in zip(stack(prepared), stack(in_memory), strict=True):
        np.testing.assert_array_equal(one, other)
    shorter = PackedRows(tokenize_units(in_units(texts, unit_bytes), tokenizer), 8)
    assert len(PreparedRows(tmp_path / 'p', 8)) == len(shorter)
    for one, other in zip(stack(PreparedRows(tmp_path / 'p', 8)), stack(shorter), strict=True):
        np.testing.assert_array_equal(one, other)
    prepared.verify()


def test_of_a_single_unit_the_fingerprint_is_that_of_one_stream():
    """Runs begun before there were units go on with what they have in memory."""
    texts = documents()
    whole = tokenize_documents(texts, Letters())
    assert tokenize_units(((3, text) for text in texts), Letters()).fingerprint == whole.fingerprint
    assert tokenize_units(in_units(texts, 200), Letters()).fingerprint != whole.fingerprint


def write_format_1(folder, texts, tokenizer, seq_len, rows_per_shard):
    """Rows of one stream, shard after shard, as they were once written."""
    from array_record.python import array_record_module

    corpus = tokenize_documents(texts, tokenizer)
    rows, shards = PackedRows(corpus, seq_len), []
    folder.mkdir()
    for first in range(0, len(rows), rows_per_shard):
        file = folder / f'rows-{len(shards):05d}.array_record'
        writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1,zstd:1')
        part = [rows[i] for i in range(first, min(first + rows_per_shard, len(rows)))]
        for row in part:
            writer.write(
                row['tokens'].astype(corpus.tokens.dtype).tobytes()
                + row['segment_ids'].astype('<u4').tobytes()
            )
        writer.close()
        data = file.read_bytes()
        shards.append({
            'file': file.name, 'rows': len(part), 'bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest(),
        })  # fmt: skip
    manifest = {
        'format': 'llama_jax packed rows 1', 'seq_len': seq_len, 'vocab_size': tokenizer.vocab_size,
        'dtype': corpus.tokens.dtype.name, 'num_rows': len(rows), 'num_documents': corpus.num_documents,
        'num_tokens': corpus.num_tokens, 'num_bytes': corpus.num_bytes, 'fingerprint': corpus.fingerprint,
        'tokenizer_sha256': tokenizer.sha256, 'shards': shards,
    }  # fmt: skip
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    return rows


@pytest.mark.parametrize('seq_len', [32, 8])
def test_format_1_still_opens(tmp_path, seq_len):
    write_format_1(tmp_path / 'p', documents(), Letters(), 32, rows_per_shard=10)
    in_memory, prepared = (
        PackedRows(tokenize_documents(documents(), Letters()), seq_len),
        PreparedRows(tmp_path / 'p', seq_len),
    )
    assert not prepared.in_units and len(prepared) == len(in_memory)
    assert prepared.fingerprint == in_memory.fingerprint
    for one, other in zip(stack(prepared), stack(in_memory), strict=True):
        np.testing.assert_array_equal(one, other)
    prepared.verify()


def test_bad_prepared_folders_are_named(tmp_path):
    folder = tmp_path / 'p'
    write_prepared(documents(), Letters(), 32, folder, unit_bytes=300)

    def error(call, *args):
        with pytest.raises(InputError) as caught:
            call(*args)
        assert '\n' not in str(caught.value)
        return str(caught.value)

    assert 'already holds prepared data' in error(write_prepared, documents(), Letters(), 32, folder)
    assert f'seq_len 64 is longer than the rows of {folder}, 32' in error(PreparedRows, folder, 64)
    assert 'seq_len 5 does not divide' in error(PreparedRows, folder, 5)
    shard = folder / 'rows-00001.array_record'
    data = shard.read_bytes()
    flipped = bytearray(data)
    flipped[100] ^= 1
    shard.write_bytes(flipped)
    assert f'{shard} differs from what was written' in error(PreparedRows(folder).verify)
    shard.write_bytes(bytes(len(data)))
    assert f'{shard} is damaged at row 15' in error(PreparedRows(folder).__getitem__, 15)
    shard.write_bytes(data[:-1])
    assert f'{shard} has {len(data) - 1} bytes where its manifest says {len(data)}' in error(
        PreparedRows, folder
    )
    shard.unlink()
    assert f'{shard} is missing' in error(PreparedRows, folder)
    manifest = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps(manifest | {'num_rows': 'many'}))
    assert 'num_rows' in error(PreparedRows, folder)
    (folder / 'manifest.json').write_text(json.dumps(manifest | {'num_rows': 3}))
    assert 'lacks or spoils num_rows' in error(PreparedRows, folder)
    manifest['shards'][0]['file'] = '../rows-00000.array_record'
    (folder / 'manifest.json').write_text(json.dumps(manifest))
    assert 'lacks or spoils shards' in error(PreparedRows, folder)
    for text in ('{', '[' * 100_000):
        (folder / 'manifest.json').write_text(text)
        assert 'is not JSON' in error(PreparedRows, folder)
    (folder / 'manifest.json').unlink()
    assert 'has no manifest.json' in error(PreparedRows, folder)
    assert '0 tokens' in error(write_prepared, [], Letters(), 32, tmp_path / 'q')
    assert not is_prepared(str(tmp_path / 'q'))


def test_many_shards_take_few_descriptors(tmp_path):
    write_prepared(documents(), Letters(), 8, tmp_path, unit_bytes=1)
    rows = PreparedRows(tmp_path)
    assert len(rows) > 60

    def count_open():
        return len(os.listdir('/proc/self/fd'))

    before = count_open()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    patched = functools.lru_cache(8)(prepared._open_shard.__wrapped__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, '_open_shard', patched)
        for row in rows:
            assert row['tokens'].shape == (9,)
        assert count_open() - before <= 9
        patched.cache_clear()
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            with pytest.raises(InputError, match='as many files open as it may have.*raise that limit'):
                rows[3]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert rows[3]['tokens'].shape == (9,)
        file = rows.manifest['shards'][rows.find(100)[0]]['file']
        (tmp_path / file).unlink()
        with pytest.raises(InputError, match=f'{file} cannot be read at row 100: .*No such file'):
            rows[100]


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    script = (
        'import itertools, sys; sys.path.insert(0, "."); from tests.data.packing_test import *;'
        'write_prepared(itertools.cycle(documents()), Letters(), 32, sys.argv[1], unit_bytes=3000)'
    )
    folder = tmp_path / 'rows'
    process = subprocess.Popen([sys.executable, '-c', script, str(folder)])
    deadline = time.time() + 60  # seconds; the imports alone take a few on a busy machine
    while not (written := list(tmp_path.glob('.rows.*/rows-00003.array_record'))) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert written and not folder.exists() and not is_prepared(str(folder))
    with pytest.raises(InputError, match='has no manifest.json'):
        PreparedRows(folder)
    manifest = write_prepared(documents(), Letters(), 32, folder)  # the same command again
    assert sorted(path.name for path in folder.iterdir()) == [
        'documents-00000.npy.zst', 'manifest.json', 'rows-00000.array_record',
    ]  # fmt: skip
    assert len(PreparedRows(folder)) == manifest['num_rows']
    with pytest.raises(InputError, match='already holds prepared data'):
        write_prepared(documents(), Letters(), 32, folder)
