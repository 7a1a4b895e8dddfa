"""The programs of generation: weights layer by layer, prompts in pieces, caches that grow."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax.errors import InputError
from llama_jax.inference import decoding
from llama_jax.inference.cache_blocks import reshaped
from llama_jax.inference.decode_weights import decode_weights
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler, SamplerRows
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import param_axes
from llama_jax.models.unstacked import unstack
from llama_jax.ops.linear import einsum, materialize
from llama_jax.ops.output_major import OutputMajorArray
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.quantize.params import quantize
from tests import toy

# Logits are of order 1. The same sums in another order differ by some roundings of fp32 (6e-8 each).
SAME = 1e-5


MESHES = [
    None,
    {'fsdp': 2, 'tensor': 4},
    pytest.param({'data': 2, 'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow),
]


@pytest.fixture(scope='module')
def rows():
    """Tokens of rows of any length, padded on the right, and how many each has."""
    lengths = np.array([21, 3, 16, 1], np.int32)
    tokens = np.random.default_rng(0).integers(3, 64, size=(4, 21)).astype(np.int32)
    return np.where(np.arange(21)[None, :] < lengths[:, None], tokens, 0), lengths


@pytest.fixture(scope='module')
def uncached(logits_of, rows):
    """Logits of each row's last token, from one pass without a cache."""
    return np.stack([logits_of(row[:length])[-1] for row, length in zip(*rows, strict=True)])


@pytest.fixture(scope='module')
def weights(params):
    """Layer by layer."""
    return unstack(params)


def read_prompts(model, weights, rows, width, num_slots=None, order=None):
    """Logits of each row's last token, and the cache, from pieces of some width.

    Args:
      num_slots: of the cache; None: one for each row, in order, else the rows are in the slots that `order` gives.
    """
    tokens, lengths = rows
    slots = None if num_slots is None else np.array(order, np.int32)
    cache = decoding.empty_cache(model, num_slots or len(lengths), 64)
    padded, hidden = np.pad(tokens, ((0, 0), (0, -tokens.shape[1] % width))), 0
    for start in range(0, padded.shape[1], width):
        counts = np.clip(lengths - start, 0, width)
        begin = np.minimum(lengths, start)
        piece = padded[:, start : start + width]
        cache, last = decoding.read(model, weights, cache, slots, begin, piece, counts, start == 0)
        hidden = jnp.where((counts > 0)[:, None], last, hidden)
    return einsum('bd,vd->bv', hidden, weights['head'], jnp.float32), cache


@pytest.mark.parametrize('width', [4, 16, 32])
def test_prompts_are_read_in_pieces_as_at_once(monkeypatch, model, weights, rows, uncached, width):
    monkeypatch.setattr(decoding, '_put', None)  # what fills a cache is not copied into it
    logits, cache = read_prompts(model, weights, rows, width)
    np.testing.assert_allclose(logits, uncached, atol=SAME)
    assert cache.length.tolist() == rows[1].tolist()


@pytest.mark.parametrize('mesh', MESHES)
def test_rows_are_read_into_any_slots(model, params, weights, rows, uncached, mesh):
    """The others keep what they have, and a row that only fills up the shape is nowhere."""
    _, alone = read_prompts(model, weights, rows, 16)
    if mesh is not None:
        partitioner = Partitioner(make_mesh(mesh))
        model = decoding.with_whole_rows(model.clone(partitioner=partitioner))
        weights = unstack(jax.device_put(params, partitioner.tree_shardings(params, param_axes(model))))
    logits, cache = read_prompts(model, weights, rows, 16, 8, [6, 8, 0, 3])
    np.testing.assert_allclose(np.delete(logits, 1, 0), np.delete(uncached, 1, 0), atol=SAME)
    assert cache.length.tolist() == [16, 0, 0, 1, 0, 0, 21, 0]
    for slot, row in ((6, 0), (0, 2), (3, 3)):
        length = rows[1][row]
        np.testing.assert_allclose(cache.keys[1][slot, :, :length], alone.keys[1][row, :, :length], atol=SAME)
    assert not np.any(cache.values[0][7])


def test_bfloat16_weights_give_the_logits_of_their_float32_selves(model, params, rows):
    half = unstack(params, jnp.bfloat16)
    whole = unstack(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params))
    want, _ = read_prompts(model, whole | {'final_norm': half['final_norm']}, rows, 32)
    found, _ = read_prompts(model, half, rows, 32)
    np.testing.assert_allclose(found, want, atol=SAME)  # a float32 computation of the same numbers
    found, _ = read_prompts(model.clone(dtype=jnp.bfloat16), half, rows, 32)
    # Activations of 8 bits: some twenty roundings of 2^-9 a layer on the way to logits of order 1.
    np.testing.assert_allclose(found, want, atol=0.1)
    assert np.sqrt(np.mean((found - want) ** 2)) < 0.02 * np.std(want)


def test_a_step_reads_the_room_that_its_rows_need_whatever_they_may_come_to(monkeypatch, model, params):
    rooms, empty = [], decoding.empty_rows
    monkeypatch.setattr(decoding, 'LEAST_ROOM', 16)
    monkeypatch.setattr(decoding, 'empty_rows', lambda *args: rooms.append(args[2]) or empty(*args))
    for number in (3, 30, 200):
        options = {'max_new_tokens': number, 'sampler': Sampler(), 'stop_ids': range(64)}
        generate_tokens(model, params, [[1] * 33], **options)
    assert rooms == [64, 64, 64]


def test_rows_that_outgrow_their_room_go_on_in_more(monkeypatch, model, params):
    prompts = [np.random.default_rng(n).integers(3, 64, size=n).tolist() for n in (3, 5)]

    def complete():
        return generate_tokens(model, params, prompts, max_new_tokens=20, sampler=Sampler(), stop_ids=())

    at_once = complete()
    assert [len(row) for row in at_once] == [20, 20]
    rooms = []
    decode, columns = decoding.decode, 8

    def record(model, params, rows, *args):
        rooms.append(rows.cache.max_len)
        return decode(model, params, rows, *args)

    monkeypatch.setattr(decoding, 'LEAST_ROOM', 4)
    monkeypatch.setattr(decoding, 'COLUMNS', columns)
    monkeypatch.setattr(decoding, 'decode', record)
    assert complete() == at_once
    assert sorted(set(rooms)) == [16, 32] and len(rooms) >= 20 / columns


@pytest.mark.parametrize('mesh', MESHES)
def test_unstacked_weights_are_the_same_model(model, params, rows, logits_of, mesh):
    """With a cache and without, alone and on a mesh, where they are placed as the stacked ones are."""
    tokens, want = rows[0], np.stack([logits_of(row) for row in rows[0]])
    if mesh is not None:
        partitioner = Partitioner(make_mesh(mesh))
        model = model.clone(partitioner=partitioner)
        shardings = partitioner.tree_shardings(params, param_axes(model))
        params = jax.device_put(params, shardings)
    apply = jax.jit(lambda params, tokens, cache: model.apply({'params': params}, tokens, cache=cache))
    weights = unstack(params, jnp.float32)
    for layer in weights['blocks']:
        for part, name in ('mlp', 'down'), ('attention', 'o'), ('attention', 'k'):
            assert isinstance(layer[part][name], OutputMajorArray) == (mesh is None)
        if mesh is not None:
            q = params['blocks']['attention']['q']
            assert layer['attention']['q'].sharding.spec == PartitionSpec(*q.sharding.spec[1:])
    assert np.std(want) > 0.5  # so that `SAME` means something
    np.testing.assert_allclose(apply(weights, tokens, None)[0], want, atol=SAME)
    cache = KVCache.create(toy.CONFIG, 4, 32, jnp.float32)
    first, cache = apply(weights, tokens[:, :18], cache)
    second, _ = apply(weights, tokens[:, 18:], cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), want, atol=SAME)
    first, _ = apply(params, tokens[:, :18], KVCache.create(toy.CONFIG, 4, 32, jnp.float32))
    np.testing.assert_allclose(first, want[:, :18], atol=SAME)


@pytest.mark.parametrize(
    ('mesh', 'cache_dtype'),
    [
        ({'fsdp': 2, 'tensor': 4}, 'auto'),
        pytest.param({'data': 4, 'tensor': 2}, 'auto', marks=pytest.mark.slow),
        pytest.param({'fsdp': 2, 'tensor': 4}, 'int8', marks=pytest.mark.slow),
    ],
)
def test_a_mesh_completes_as_one_device_does(model, params, mesh, cache_dtype):
    model = model.clone(cache_dtype=cache_dtype)
    prompts = [[1, 5, 9], [1, 7, 2, 8, 30, 11, 4], [1], [1, 2] * 10]
    partitioner = Partitioner(make_mesh(mesh))
    split = jax.device_put(params, partitioner.tree_shardings(params, param_axes(model)))
    options = {'max_new_tokens': 9, 'sampler': Sampler(), 'stop_ids': (7,)}
    found = generate_tokens(model.clone(partitioner=partitioner), split, prompts, **options)
    assert found == generate_tokens(model, params, prompts, **options)


def test_a_cache_of_int8_is_split_and_grows_as_any(model):
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 4}))
    model = model.clone(partitioner=partitioner, cache_dtype='int8')
    settings = SamplerRows.create([Sampler()] * 4, range(4), [()] * 4, toy.CONFIG.vocab_size)
    rows = reshaped(decoding.empty_rows(model, 4, 16, settings), 4, 32)
    for layer in rows.cache.keys + rows.cache.values:
        assert layer.qvalue.dtype == jnp.int8 and layer.qvalue.shape == (4, 4, 32, 8)
        assert layer.scale.shape == (4, 4, 32, 1)
        assert layer.qvalue.sharding.shard_shape(layer.qvalue.shape) == (2, 1, 32, 8)
        assert layer.scale.sharding.shard_shape(layer.scale.shape) == (2, 1, 32, 1)


def test_an_unknown_type_of_the_cache_is_refused(model, params):
    with pytest.raises(InputError, match="unknown type of the cache 'int4'; choose from auto, int8"):
        generate_tokens(
            model.clone(cache_dtype='int4'), params, [[1]], max_new_tokens=1, sampler=Sampler(), stop_ids=()
        )


def test_weights_are_unstacked_once_for_as_long_as_they_live(params):
    params = jax.tree.map(jnp.copy, params)
    weights = decode_weights(params, jnp.float32)
    assert decode_weights(dict(params), jnp.float32) is weights
    assert decode_weights(weights, jnp.float32) is weights
    assert weights['embed'] is params['embed']  # what is no layer's is not copied
    half = decode_weights(params, jnp.bfloat16)
    assert half['blocks'][0]['attention']['q'].values.dtype == half['embed'].dtype == jnp.bfloat16
    assert half['blocks'][0]['mlp_norm'].dtype == half['final_norm'].dtype == jnp.float32
    large = [array.unsafe_buffer_pointer() for array in jax.tree.leaves(weights['blocks'])]
    del params, weights, half
    gc.collect()
    alive = {array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.size}
    assert not alive & set(large)


def test_on_a_cpu_matrices_lie_by_outputs(params):
    integers = quantize(params, 'int8')
    for weights in params, integers:
        down = unstack(weights, jnp.float32)['blocks'][0]['mlp']['down']
        assert isinstance(down, OutputMajorArray)
        want = materialize(weights['blocks']['mlp']['down'])[0]
        np.testing.assert_array_equal(materialize(down), want)
    with pytest.raises(InputError, match='quantised already'):
        quantize(unstack(integers, jnp.float32), 'int4')


def test_unstacking_leaves_no_second_copy_where_it_may_delete(params):
    given = jax.tree.map(jnp.copy, params)
    weights = unstack(given, jnp.bfloat16, delete=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given['blocks'])) and given['embed'].is_deleted()
    np.testing.assert_array_equal(weights['final_norm'], params['final_norm'])
    for layer, tree in enumerate(weights['blocks']):
        want = params['blocks']['mlp']['down'][layer].astype(jnp.bfloat16)
        np.testing.assert_array_equal(
            tree['mlp']['down'].materialize(), want
        )  # of 16 bits, it lies by outputs
    assert unstack(weights) is weights
