"""A base as it is kept: quantised while it is read, the same as in memory, and what it then stands for."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.convert.mapping import Leaf, native_source, weights_of
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, param_axes
from llama_jax.ops import linear
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.placement import place_all
from llama_jax.quantize.base import BASE_DTYPES, base_leaves, base_target, kept_leaves
from llama_jax.quantize.forms import name_of
from llama_jax.quantize.params import quantize
from tests import toy
from tests.convert.in_memory import InMemory

# Two blocks of nf4 and more in a column; of `down`, blocks of 48.
CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=128, mlp_dim=96, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=16, max_seq_len=64
)  # fmt: skip


@pytest.fixture(scope='module')
def params():
    return toy.make_params(LlamaForCausalLM(CONFIG))


@pytest.fixture(scope='module')
def leaves(params):
    found = jax.tree_util.tree_leaves_with_path(params)
    source = native_source(
        CONFIG, {name_of(keys): InMemory(np.asarray(leaf)) for keys, leaf in found}, 'memory'
    )
    return {w.path: Leaf(source, w) for w in weights_of(CONFIG)}


@pytest.mark.parametrize(
    'dtype', [name if name == 'nf4' else pytest.param(name, marks=pytest.mark.slow) for name in BASE_DTYPES]
)
def test_a_base_is_what_is_made_in_memory_and_stands_for_what_is_kept(dtype, params, leaves):
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4]))
    model = LlamaForCausalLM(CONFIG)
    shardings = partitioner.tree_shardings(params, param_axes(model))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    wanted, structure = jax.tree_util.tree_flatten_with_path(base_target(target, dtype))
    found = base_leaves(leaves, dtype)
    assert {name_of(keys) for keys, _ in wanted} == set(found)
    placed = jax.tree.unflatten(
        structure, place_all([(name_of(keys), found[name_of(keys)], leaf) for keys, leaf in wanted])
    )
    assert all(
        made.sharding == leaf.sharding
        for made, (_, leaf) in zip(jax.tree.leaves(placed), wanted, strict=True)
    )
    if dtype not in ('float32', 'bfloat16'):
        in_memory = quantize(params, dtype)['blocks']
        # XLA multiplies by inverses: the last bit of a scale may be another, and a code that lies half way
        for ours, theirs in zip(jax.tree.leaves(placed['blocks']), jax.tree.leaves(in_memory), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            near = np.isclose(np.float32(ours), np.float32(theirs), rtol=1e-5)
            assert near.mean() > 0.99
    representation = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, linear.Representation))
    whole = jax.jit(functools.partial(representation, linear.materialize))(placed)
    kept = kept_leaves(leaves, dtype)
    assert whole['final_norm'].dtype == jnp.float32
    for keys, leaf in jax.tree_util.tree_leaves_with_path(whole):
        array = kept[name_of(keys)]
        read = array.read(tuple(slice(0, size) for size in array.shape))
        np.testing.assert_allclose(np.float32(leaf), np.float32(read), rtol=1e-6)
        part = tuple(slice(size // 2, size) for size in array.shape)  # not at the edges of blocks
        np.testing.assert_array_equal(array.read(part), read[part])
    error = np.abs(np.float32(whole['blocks']['mlp']['up']) - params['blocks']['mlp']['up']).max()
    assert error <= {'float32': 0, 'bfloat16': 5e-3, 'int8': 6e-3, 'int4': 0.2, 'nf4': 0.12}[dtype] * float(
        jnp.abs(params['blocks']['mlp']['up']).max()
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Chunked(InMemory):
    """In pieces of two layers, and of a half of every other axis, as a checkpoint of training may lie on disk."""

    rows_axis = None

    def blocks(self):
        sizes = [2 if axis == 0 and len(self.shape) > 2 else -(-n // 2) for axis, n in enumerate(self.shape)]
        starts = (range(0, n, size) for n, size in zip(self.shape, sizes, strict=True))
        for begins in itertools.product(*starts):
            yield tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


@pytest.mark.parametrize('dtype', ['int8', 'int4', 'nf4'])
def test_a_base_is_the_same_however_its_pieces_lie(dtype, params, leaves):
    """Nothing of a scale is read from a part of its weights alone, and no layer is left out."""
    chunked = {
        path: Chunked(np.asarray(leaf.read((slice(None),) * len(leaf.shape))))
        for path, leaf in leaves.items()
    }
    expected, found = (base_leaves(some, dtype) for some in (leaves, chunked))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        for index in array.blocks():
            np.testing.assert_array_equal(array.read(index), expected[path].read(index), path)


def test_no_other_type_is_kept(leaves):
    with pytest.raises(
        InputError, match="a base is not kept as 'fp8'; there are float32, bfloat16, int8, int4, nf4"
    ):
        base_leaves(leaves, 'fp8')
