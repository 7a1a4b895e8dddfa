"""A bucket in the place of a folder: objects are written whole, and nothing is appended or renamed."""

import base64
import json
import os
import signal

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax import lock, pretrained
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.checkpoint.weights import latest_step, open_params
from llama_jax.data.prepared import PreparedRows, is_prepared
from llama_jax.data.shards import write_prepared
from llama_jax.data.sources import read_documents
from llama_jax.errors import InputError
from llama_jax.lock import Locked
from llama_jax.placement import place
from llama_jax.storage import enable_bucket
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests.command_line import CommandLine, tiny_run
from tests.reference.fake_gcs import FakeGCS

RUN = 'gs://bucket/run'
SMALL = {'train__num_steps': 6, 'checkpoint__every': 2, 'checkpoint__keep': 2, 'log__tensorboard': True}
RATES = {'tokens_per_second', 'tokens_per_second_per_device', 'mfu_causal', 'mfu_full', 'data_wait'}


@pytest.fixture(scope='module', autouse=True)
def gcs():
    with FakeGCS() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        enable_bucket('gs://bucket')
        yield server


@pytest.fixture(scope='module')
def commands(folder, gcs):
    """What forks them may have been started before the server."""
    return CommandLine(folder, **gcs.environment())


@pytest.fixture(scope='module')
def local_run(commands, corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('local') / 'run'
    commands.run('pretrain', *tiny_run(workdir, corpus, **SMALL)).succeeded()
    return workdir


@pytest.fixture(scope='module')
def run(gcs, commands, corpus):
    """The same from bucket to bucket; killed when all of step 4 but its commit is written, and started again."""
    epath.Path('gs://bucket/data/corpus.txt').write_bytes(corpus.read_bytes())
    arguments = tiny_run(RUN, 'gs://bucket/data/corpus.txt', **SMALL)
    gcs.counts.clear()
    pid = commands.start('pretrain', *arguments)

    def kill_at_commit(kind: str, name: str) -> None:
        if kind == 'insert' and name == 'run/checkpoints/4/commit_success.txt':
            os.kill(pid, signal.SIGKILL)
            raise ConnectionError

    gcs.before = kill_at_commit
    try:
        assert commands.wait().status == -9
    finally:
        gcs.before = lambda kind, name: None
    killed = gcs.names('bucket/run/')
    shape = (pretrained.open(RUN).config.embed_dim,)
    norm = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on_one_device())
    step = latest_step(f'{RUN}/checkpoints')
    place('final_norm', open_params(step)['final_norm'], norm)
    newest = int(step.name)
    resumed = commands.run('pretrain', *arguments).succeeded()
    return killed, newest, resumed.stderr


def on_one_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def figures(text: str) -> list[dict]:
    """Of metrics.jsonl, those that are the same on every day."""
    return [{key: v for key, v in json.loads(line).items() if key not in RATES} for line in text.splitlines()]


@pytest.mark.slow
def test_a_step_without_its_commit_is_not_restored(run):
    killed, newest, log = run
    assert 'bucket/run/checkpoints/2/commit_success.txt' in killed
    assert 'bucket/run/checkpoints/4/files.json' in killed  # all is there, but
    assert 'bucket/run/checkpoints/4/commit_success.txt' not in killed
    assert newest == 2
    assert 'resuming at step 2 of 6' in log


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_equals_one_on_disk(run, local_run):
    here, there = epath.Path(local_run), epath.Path(RUN)
    for name in ('model.json', 'report.json', 'tokenizer.model'):
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
    assert figures((there / 'metrics.jsonl').read_text()) == figures((here / 'metrics.jsonl').read_text())
    assert len(figures((there / 'metrics.jsonl').read_text())) == 6


@pytest.mark.slow
def test_what_a_bucket_holds(run, gcs):
    names = [name.removeprefix('bucket/run/') for name in gcs.names('bucket/run/')]
    assert {name.split('/')[0] for name in names} == {
        'checkpoints', 'config.json', 'loss.png', 'metrics.jsonl', 'model.json', 'report.json', 'tensorboard',
        'tokenizer.model',
    }  # fmt: skip
    assert {name.split('/')[1] for name in names if name.startswith('checkpoints/')} == {'4', '6'}
    assert len([name for name in names if name.startswith('tensorboard/')]) == 2  # one a launch
    for step in ('4', '6'):
        sizes = json.loads(gcs.objects['bucket', f'run/checkpoints/{step}/files.json'])
        for name, entry in sizes.items():
            content = gcs.objects['bucket', f'run/checkpoints/{step}/{name}']
            assert len(content) == entry['bytes']
            assert google_crc32c.value(content) == int.from_bytes(base64.b64decode(entry['crc32c']))
        data = [name for name in names if name.startswith(f'checkpoints/{step}/state/') and '/d/' in name]
        assert len(data) == sum('/d/' in name for name in sizes)
    assert gcs.refused == []
    assert gcs.counts['copy'] == 0


@pytest.mark.slow
def test_generate_reads_a_bucket(run, commands, local_run):
    options = ('--prompt=ba do', '--prompt=ga', '--max_new_tokens=8', '--format=jsonl')
    from_bucket = commands.run('generate', f'--checkpoint={RUN}', *options).succeeded()
    assert from_bucket.stdout == commands.run('generate', f'--checkpoint={local_run}', *options).stdout
    assert len(from_bucket.stdout.splitlines()) == 2


def test_a_damaged_step_is_passed_over(gcs):
    folder = 'gs://bucket/damaged'
    state = {'w': jnp.arange(4.0)}
    checkpointer = Checkpointer(folder)
    for step in (1, 2):
        checkpointer.save(step, {'w': state['w'] + step}, {'rows_consumed': step})
    checkpointer.close()
    data = max(name for name in gcs.names('bucket/damaged/2/state/d/')).partition('/')[2]
    flipped = bytearray(gcs.objects['bucket', data])
    flipped[len(flipped) // 2] ^= 1
    gcs.objects['bucket', data] = bytes(flipped)
    gcs.counts.clear()
    assert (
        latest_step(folder).name == '1' and gcs.counts['read'] < 8
    )  # the records: the bucket knows the checksums
    checkpointer = Checkpointer(folder)
    target = {'w': jax.ShapeDtypeStruct((4,), jnp.float32, sharding=on_one_device())}
    step, restored, metadata = checkpointer.restore_latest(target)
    checkpointer.close()
    assert (step, metadata) == (1, {'rows_consumed': 1})
    np.testing.assert_array_equal(restored['w'], state['w'] + 1)
    assert gcs.names('bucket/damaged/2/') == []
    assert 'bucket/damaged/2.damaged/files.json' in gcs.names()
    del gcs.objects['bucket', 'damaged/1/commit_success.txt']  # what was written last
    with pytest.raises(InputError, match='no checkpoint under'):
        latest_step(folder)


def test_one_run_at_a_time_holds_a_folder_of_a_bucket(gcs, monkeypatch):
    monkeypatch.setattr(lock, '_BEAT_SECONDS', 0.1)
    monkeypatch.setattr(lock, '_DEAD_SECONDS', 1.0)
    gcs.refused.clear()
    folder, name = epath.Path('gs://bucket/held'), ('bucket', f'held/{lock.FILE}')
    release = lock.hold(folder)
    owner = json.loads(gcs.objects[name])
    with pytest.raises(Locked, match=f'bucket/held is in use by another run .*process {os.getpid()}, since'):
        lock.hold(folder)
    release()
    assert name not in gcs.objects
    # Of a process of another host, which writes it no more.
    gcs.objects[name], gcs.generations[name] = json.dumps(owner | {'boot': 'another'}).encode(), 5
    release = lock.hold(folder)
    assert json.loads(gcs.objects[name])['boot'] == owner['boot'] and gcs.refused == []
    release()


@pytest.mark.slow
def test_prepared_rows_in_a_bucket(run, gcs, corpus, tmp_path):
    tokenizer = load_tokenizer(RUN)
    documents = list(read_documents('gs://bucket/data/*.txt', separator='<|endoftext|>'))
    assert documents == list(read_documents(str(corpus), separator='<|endoftext|>'))
    here = write_prepared(documents[:40], tokenizer, 64, tmp_path / 'rows', unit_bytes=3000)
    assert not is_prepared('gs://bucket/rows')
    assert write_prepared(documents[:40], tokenizer, 64, 'gs://bucket/rows', unit_bytes=3000) == here
    assert is_prepared('gs://bucket/rows')
    wanted, found = PreparedRows(tmp_path / 'rows'), PreparedRows('gs://bucket/rows')
    assert len(found) == len(wanted) > 20
    for index in (0, 19, 20, len(wanted) - 1):
        np.testing.assert_array_equal(found[index]['tokens'], wanted[index]['tokens'])
    found.verify()


@pytest.mark.parametrize(
    'use',
    [pretrained.load, load_tokenizer, Checkpointer, PreparedRows, lambda path: next(read_documents(path))],
    ids=['load', 'load_tokenizer', 'Checkpointer', 'PreparedRows', 'read_documents'],
)
def test_without_gcsfs_one_line_says_what_to_install(monkeypatch, use):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(
        InputError, match=r"^gs://bucket/x needs the package gcsfs: pip install 'llama_jax\[gcs\]'$"
    ):
        use('gs://bucket/x')
