"""Real processes that join over loopback: what a pod's hosts do, on one machine."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

# Reads batches on a mesh of four devices, trains three steps, and one of them again from a checkpoint.
WORKER = '''
import functools
import json
import sys

import jax
import numpy as np

from llama_jax import runtime
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.data.loader import batches
from llama_jax.losses.language_model import language_model_loss
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import abstract_state, init_state, shardings_of
from llama_jax.train.step import compile_train_step
from tests import toy

port, count, process, folder, out = sys.argv[1:]
if int(count) > 1:
    runtime.initialize_distributed(f'127.0.0.1:{port}', int(count), int(process))
assert (jax.process_count(), jax.process_index(), jax.device_count()) == (int(count), int(process), 4)
assert runtime.is_main_process() == (process == '0')


class Rows:
    """Packed rows that remember which of them were read."""

    def __init__(self):
        self.tokens, self.segment_ids = toy.packed_rows(64, 16)
        self.read = set()

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.read.add(int(index))
        return {'tokens': self.tokens[index], 'segment_ids': self.segment_ids[index]}


found = {'read': {}}
for name, sizes in (('data', {'data': 4}), ('tensor', {'data': 2, 'tensor': 2}), ('spanning', {'tensor': 4})):
    rows = Rows()
    first = next(batches(rows, batch_size=8, seq_len=16, partitioner=Partitioner(make_mesh(sizes)), num_threads=1))
    for shard in first.tokens.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows.tokens[:8, :-1][shard.index])
    found['read'][name] = sorted(row for row in rows.read if row < 8)

partitioner = Partitioner(make_mesh({'data': 2, 'tensor': 2}))
model = toy.make_model(partitioner=partitioner)
tx = make_optimizer(OptimizerConfig(), 1e-2)
target = abstract_state(model, tx, partitioner)
state = jax.jit(functools.partial(init_state, model, tx), out_shardings=shardings_of(target))(jax.random.key(0))
checkpointer = Checkpointer(folder)
losses = []
with jax.set_mesh(partitioner.mesh):
    step = compile_train_step(target, loss_fn=language_model_loss(model), tx=tx)
    for index, batch in zip(range(3), batches(Rows(), batch_size=8, seq_len=16, partitioner=partitioner)):
        if index == 2:
            checkpointer.save(2, state, {'rows_consumed': 16})
            checkpointer.wait()
        state, metrics = step(state, {}, batch, jax.random.key(0))
        losses.append(float(metrics['loss']))
    saved_step, state, metadata = checkpointer.restore_latest(target)
    consumed = metadata['rows_consumed']
    again = next(batches(Rows(), batch_size=8, seq_len=16, partitioner=partitioner, rows_consumed=consumed))
    state, metrics = step(state, {}, again, jax.random.key(0))
    found |= {'losses': losses, 'restored_step': saved_step, 'again': float(metrics['loss'])}
checkpointer.close()
runtime.sync_processes('end')
with open(out, 'w') as file:
    json.dump(found, file)
'''


def run(count, folder):
    """What each of `count` processes found, four devices among them."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    flags = re.sub(r'(device_count)=\d+', rf'\1={4 // count}', os.environ['XLA_FLAGS'])
    flags += ' --xla_backend_optimization_level=0'  # compiles in half the time
    folder.mkdir()
    outputs = [folder / f'{process}.json' for process in range(count)]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(port), str(count), str(process), str(folder / 'checkpoints'), str(out)],
            cwd=pathlib.Path(__file__).resolve().parents[1], env=os.environ | {'XLA_FLAGS': flags},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for process, out in enumerate(outputs)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, '\n'.join(logs)
    return [json.loads(out.read_text()) for out in outputs]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('multiprocess')
    return {count: run(count, folder / str(count)) for count in (1, 2)}


def test_a_process_reads_the_rows_of_its_own_devices_alone(runs):
    (alone,), (first, second) = runs[1], runs[2]
    every = list(range(8))
    assert alone['read'] == dict.fromkeys(('data', 'tensor', 'spanning'), every)
    for name in ('data', 'tensor'):
        assert len(first['read'][name]) == len(second['read'][name]) == 4
        assert sorted(first['read'][name] + second['read'][name]) == every
    # One row of devices spans both processes: each device has a part of every row.
    assert first['read']['spanning'] == second['read']['spanning'] == every


def test_two_processes_train_as_one(runs):
    (alone,), (first, second) = runs[1], runs[2]
    assert first['losses'] == second['losses']
    np.testing.assert_allclose(
        first['losses'], alone['losses'], rtol=1e-6
    )  # the sums may round in another order
    assert alone['losses'][2] < alone['losses'][0]


def test_two_processes_save_and_restore_one_checkpoint(runs):
    for found in (*runs[1], *runs[2]):
        assert found['restored_step'] == 2
        assert found['again'] == found['losses'][2]  # bit for bit
