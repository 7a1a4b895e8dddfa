"""Text that is prepared from a bucket into a bucket which fails now and then, or is closed."""

import asyncio
import gzip
import itertools
import json
import types

import gcsfs.retry
import pytest

from experiments.run.failures import describe_failure
from llama_jax.data import prepared
from llama_jax.data.preparation import Preparation, TextSource
from llama_jax.data.prepare import prepare
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.shards import write_prepared
from llama_jax.data.sources import Reading, read_file
from llama_jax.errors import InputError
from llama_jax.storage import enable_bucket
from tests.command_line import CommandLine
from tests.data.packing_test import Letters, documents
from tests.reference.fake_gcs import Answered, FakeGCS


@pytest.fixture
def gcs(monkeypatch):
    async def nap(seconds):
        await asyncio.sleep(0)

    monkeypatch.setattr(
        gcsfs.retry, 'asyncio', types.SimpleNamespace(sleep=nap)
    )  # it waits a second and more
    with FakeGCS() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        enable_bucket('gs://bucket')
        for number in range(3):
            lines = '\n'.join(json.dumps({'text': text}) for text in documents(200, seed=number))
            server.insert(('bucket', f'raw/{number}.jsonl.gz'), gzip.compress(lines.encode()), {})
        yield server


def everything(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob('*') if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize('failure', [ConnectionError(), Answered(503)], ids=['dropped', '503'])
def test_a_bucket_that_fails_every_tenth_request_gets_the_bytes_of_a_disk(gcs, tmp_path, failure):
    sources, options = (
        (TextSource('s', ('gs://bucket/raw/*.gz',)),),
        {'unit_bytes': 1500, 'validation_fraction': 0.1},
    )
    prepare(Preparation(str(tmp_path / 'out'), sources, 32, **options), Letters())
    count = itertools.count(1)

    def fail(kind, name):
        if next(count) % 10 == 0:
            raise failure

    gcs.before = fail
    prepare(Preparation('gs://bucket/out', sources, 32, **options), Letters())
    assert next(count) > 300
    wanted = everything(tmp_path / 'out')
    assert len(wanted) > 20
    assert {name.removeprefix('bucket/out/') for name in gcs.names('bucket/out/')} == set(wanted)
    assert all(gcs.objects['bucket', f'out/{name}'] == content for name, content in wanted.items())


@pytest.mark.long
@pytest.mark.parametrize('failure', [ConnectionError(), Answered(503)], ids=['dropped', '503'])
def test_workers_write_the_bytes_of_a_disk_to_a_bucket_that_fails_every_tenth_request(
    folder, corpus, tmp_path, failure
):
    """By the command, which waits as long as it does before it asks again."""
    from llama_jax.data.datasets import train_tokenizer

    train_tokenizer([str(corpus)], 320, tmp_path / 'tokenizer.model')
    count = itertools.count(1)

    def fail(kind, name):
        if next(count) % 10 == 0:
            raise failure

    with FakeGCS() as server:
        for number in range(3):
            lines = '\n'.join(json.dumps({'text': text}) for text in documents(200, seed=number))
            server.insert(('bucket', f'raw/{number}.jsonl.gz'), gzip.compress(lines.encode()), {})
        commands = CommandLine(folder, **server.environment())
        given = [
            '--input=gs://bucket/raw/*.gz', f'--tokenizer={tmp_path}/tokenizer.model', '--seq_len=32',
            '--num_workers=2', '--unit_bytes=1000',
        ]  # fmt: skip
        commands.run('prepare_data', *given, f'--output={tmp_path}/out').succeeded()
        server.before = fail
        commands.run('prepare_data', *given, '--output=gs://bucket/out').succeeded()
        wanted = everything(tmp_path / 'out')
        assert {name.removeprefix('bucket/out/') for name in server.names('bucket/out/')} == set(wanted)
        assert all(server.objects['bucket', f'out/{name}'] == wanted[name] for name in wanted)
    print(f'{next(count)} requests, {len(wanted)} files')
    assert len(wanted) > 20


@pytest.mark.slow
@pytest.mark.parametrize('status', [401, 403])
def test_a_closed_bucket_is_no_damage(gcs, status):
    write_prepared(documents(50), Letters(), 256, 'gs://bucket/rows')
    rows = PreparedRows('gs://bucket/rows')
    prepared._open_shard.cache_clear()

    def refuse(kind, name):
        raise Answered(status)

    gcs.before = refuse
    with pytest.raises(InputError, match=f'cannot be read at row 0: .*{status}') as caught:
        rows[0]
    assert 'damaged' not in str(caught.value)
    with pytest.raises(
        InputError, match='cannot read gs://bucket/raw/0.jsonl.gz: .*(Forbidden|Unauthorized)'
    ):
        list(read_file('gs://bucket/raw/0.jsonl.gz', Reading()))
    for use in (
        lambda: prepare(
            Preparation('gs://bucket/out', (TextSource('s', ('gs://bucket/raw/*.gz',)),), 32), Letters()
        ),
        lambda: prepare(Preparation('gs://bucket/out', (TextSource('s', (__file__,)),), 32), Letters()),
        lambda: PreparedRows('gs://bucket/rows'),
    ):
        with pytest.raises(Exception, match='Forbidden|Unauthorized') as caught:
            use()
        line, exit_status = describe_failure(caught.value, [])
        assert '\n' not in line and ('Forbidden' in line or 'Unauthorized' in line) and exit_status == 2
