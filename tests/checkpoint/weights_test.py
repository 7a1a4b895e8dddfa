import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llama_jax import placement
from llama_jax.checkpoint import weights
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.checkpoint.weights import check_step, latest_step, open_params, save_params
from llama_jax.errors import InputError
from tests.convert.in_memory import InMemory


@pytest.fixture
def leaves():
    rng = np.random.default_rng(0)
    shapes = {'embed': (24, 8), 'blocks/q': (3, 8, 4, 2), 'blocks/norm': (3, 8), 'final_norm': (8,)}
    return {path: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for path, shape in shapes.items()}


def nested(leaves):
    return {
        'embed': leaves['embed'],
        'final_norm': leaves['final_norm'],
        'blocks': {'q': leaves['blocks/q'], 'norm': leaves['blocks/norm']},
    }


def on_mesh(leaf):
    devices = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('x',))
    spec = jax.sharding.PartitionSpec(*[None] * (leaf.ndim - 1), 'x')
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=jax.sharding.NamedSharding(devices, spec))


def test_streamed_weights_are_restored_by_orbax_and_read_back_in_blocks(tmp_path, leaves, monkeypatch):
    monkeypatch.setattr(weights, 'CHUNK_BYTES', 64)  # so that every leaf is cut
    written = []
    save_params(tmp_path, {path: InMemory(values) for path, values in leaves.items()}, written.append)
    assert sum(written) == sum(values.nbytes for values in leaves.values()) and len(written) > 2 * len(leaves)
    stored = open_params(latest_step(tmp_path))
    for path, values in leaves.items():
        restored = placement.place(path, stored[path], on_mesh(values))
        assert restored.sharding.num_devices == 2
        np.testing.assert_array_equal(np.asarray(restored), values.astype(np.float32))
    assert set(stored) == set(leaves)
    for path, values in leaves.items():
        assert stored[path].dtype == values.dtype
        index = tuple(slice(1, size - 1) for size in values.shape)
        np.testing.assert_array_equal(stored[path].read(index), values[index])


def test_a_training_checkpoint_is_read_in_blocks_and_its_large_leaves_are_stored_in_layers(
    tmp_path, leaves, monkeypatch
):
    monkeypatch.setattr('llama_jax.checkpoint.training.CHUNK_BYTES', 64)
    state = jax.tree.map(jnp.asarray, {'step': np.int32(5), 'params': nested(leaves)})
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(5, state, {})
    checkpointer.wait()
    step, restored, _ = checkpointer.restore_latest(jax.eval_shape(lambda: state))
    checkpointer.close()
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    stored = open_params(latest_step(tmp_path))
    assert stored['blocks/q'].store.chunk_layout.read_chunk.shape[0] == 1
    np.testing.assert_array_equal(
        stored['blocks/q'].read((slice(1, 2), *[slice(None)] * 3)), leaves['blocks/q'][1:2]
    )


def test_a_block_lost_from_streamed_weights_is_damage_not_zeros(tmp_path, leaves):
    zeros = {path: InMemory(np.zeros_like(values)) for path, values in leaves.items()}
    save_params(tmp_path, zeros)
    (tmp_path / '0/state/params.blocks.q/1.0.0.0').unlink()
    for find, place in ((latest_step, tmp_path), (check_step, tmp_path / '0')):
        with pytest.raises(InputError, match=r'damaged.*blocks\.q/1\.0\.0\.0 has no bytes, .* were written'):
            find(place)
    with pytest.raises(InputError, match=r'no checkpoint .*7; the steps there are \[0\]'):
        check_step(tmp_path / '7')


def test_a_weight_that_cannot_be_read_is_named(tmp_path, leaves):
    save_params(tmp_path, {path: InMemory(values) for path, values in leaves.items()})
    metadata = tmp_path / '0/state/params.embed/.zarray'
    good = json.loads(metadata.read_text())
    for text in ('', '{', json.dumps({**good, 'dtype': '<q9'}), json.dumps({**good, 'shape': [-1, 8]})):
        metadata.write_text(text)
        with pytest.raises(InputError, match=r'weight params\.embed cannot be read'):
            open_params(tmp_path / '0')
    metadata.write_text(json.dumps(good))
    block = tmp_path / '0/state/params.embed/0.0'
    block.write_bytes(block.read_bytes()[:-1])
    stored = open_params(tmp_path / '0')
    with pytest.raises(InputError, match=r'weight params\.embed cannot be read'):
        stored['embed'].read((slice(None), slice(None)))
    with pytest.raises(InputError, match='holds no weights that Orbax wrote'):
        open_params(tmp_path / 'none')


def test_chunks_are_layers_or_rows_of_at_most_32_mib():
    bf16 = np.dtype(ml_dtypes.bfloat16)
    assert weights.chunk_shape((32, 4096, 32, 128), bf16) == (1, 4096, 32, 128)  # 32 MiB
    assert weights.chunk_shape((32, 4096, 11008), bf16) == (
        1,
        1366,
        11008,
    )  # three, the last with two rows of padding
    assert weights.chunk_shape((32000, 4096), bf16) == (4000, 4096)
    assert weights.chunk_shape((32, 4096), bf16) == (32, 4096)
    assert weights.chunk_shape((4096,), bf16) == (4096,)
