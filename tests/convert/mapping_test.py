import dataclasses
import itertools

import jax
import numpy as np
import pytest

from llama_jax.convert import mapping
from llama_jax.convert.tensors import (
    Concatenated,
    HalfSplit,
    row_blocks,
    tie,
    to_half_split,
    to_interleaved,
)
from llama_jax.errors import InputError
from llama_jax.models.llama import LlamaForCausalLM, abstract_params
from llama_jax.placement import cast
from tests import toy
from tests.convert.in_memory import InMemory, matrices, random_source


def random_leaves(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        weight.path: InMemory(rng.normal(size=mapping.leaf_shape(weight, config)).astype(np.float32))
        for weight in mapping.weights_of(config)
    }


@pytest.mark.parametrize('tied', [False, True])
def test_table_has_every_leaf_of_the_model_and_its_shape(tied):
    config = dataclasses.replace(toy.CONFIG, tie_embeddings=tied)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(LlamaForCausalLM(config)))
    expected = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape for path, leaf in leaves}
    assert {w.path: mapping.leaf_shape(w, config) for w in mapping.weights_of(config)} == expected


def test_any_block_of_matrix_and_leaf_equals_the_whole_cut():
    """Leaf -> matrices -> leaf, by random blocks, against slicing the whole arrays."""
    config = toy.CONFIG
    leaves = random_leaves(config)
    source = mapping.native_source(config, leaves, 'here')
    rng = np.random.default_rng(1)

    def span(size):
        start = int(rng.integers(size))
        return slice(start, int(rng.integers(start, size + 1)))

    for weight in mapping.weights_of(config):
        values = leaves[weight.path].values
        for layer, tensor in enumerate(source.tensors[weight.path]):
            one = values[layer] if weight.stacked else values
            whole = one.reshape(int(np.prod(one.shape[: weight.num_in])), -1).T if weight.num_in else one
            np.testing.assert_array_equal(tensor.read(), whole)
            index = tuple(span(size) for size in tensor.shape)
            np.testing.assert_array_equal(tensor.read(*index), whole[index])
        leaf = mapping.Leaf(source, weight)
        for _ in range(5):
            index = tuple(span(size) for size in leaf.shape)
            np.testing.assert_array_equal(leaf.read(index), values[index])


def test_interleaved_rows_follow_the_published_permutation():
    """Meta's row 2j + p of a head is Hugging Face's row p * H/2 + j."""
    head_dim, heads = 6, 3
    meta = np.arange(heads * head_dim)[:, None] * np.ones(2, int)
    half = to_half_split(meta, head_dim)
    for head, pair, part in itertools.product(range(heads), range(head_dim // 2), range(2)):
        assert half[head * head_dim + part * head_dim // 2 + pair, 0] == head * head_dim + 2 * pair + part
    np.testing.assert_array_equal(to_interleaved(half, head_dim), meta)
    lazily = HalfSplit(InMemory(meta), head_dim)
    for start, stop in itertools.combinations(range(heads * head_dim + 1), 2):
        np.testing.assert_array_equal(lazily.read(slice(start, stop)), half[start:stop])


@pytest.mark.parametrize('axis', [0, 1])
def test_parts_read_as_one_tensor(axis):
    whole = np.arange(48).reshape(8, 6)
    tensor = Concatenated([InMemory(part) for part in np.split(whole, 2, axis)], axis)
    assert tensor.shape == whole.shape
    for start, stop in itertools.combinations_with_replacement(range(7), 2):
        np.testing.assert_array_equal(tensor.read(slice(start, stop)), whole[start:stop])
        np.testing.assert_array_equal(tensor.read(slice(1, 5), slice(start, stop)), whole[1:5, start:stop])


def test_two_copies_of_a_weight_are_compared_as_they_are_read():
    values = np.arange(60, dtype=np.float32).reshape(30, 2)
    other = values.copy()
    other[3] += 1  # none of the few rows that are compared at once
    tied = tie(InMemory(values), InMemory(other), 'they differ')
    np.testing.assert_array_equal(tied.read(slice(4, 30)), values[4:])
    with pytest.raises(InputError, match='they differ'):
        tied.read(slice(0, 30))
    other[0] += 1
    assert tie(InMemory(values), InMemory(other), 'they differ') is None


@pytest.mark.parametrize('naming', ['meta', 'huggingface', 'gguf'])
def test_strict_both_ways(naming):
    matrices_by_name = matrices(random_source(toy.CONFIG), naming)
    found = {name: InMemory(values) for name, values in matrices_by_name.items()}
    source = mapping.assemble(
        {**found, 'rope.freqs': InMemory(np.ones(4))}, naming, toy.CONFIG, origin='x', ignored=['rope.*']
    )
    assert sum(map(len, source.tensors.values())) == len(found)
    name = mapping.WEIGHTS[2].name(naming, 1)
    with pytest.raises(InputError, match=f'x has no tensor {name}'):
        mapping.assemble({k: v for k, v in found.items() if k != name}, naming, toy.CONFIG, origin='x')
    with pytest.raises(InputError, match=rf'{name} has shape \(3, 3\), the model \(64, 32\)'):
        mapping.assemble({**found, name: InMemory(np.ones((3, 3)))}, naming, toy.CONFIG, origin='x')
    with pytest.raises(InputError, match='holds 1 tensors without a place .*, the first one extra'):
        mapping.assemble({**found, 'extra': InMemory(np.ones(3))}, naming, toy.CONFIG, origin='x')


def test_blocks_cover_in_whole_heads():
    blocks = row_blocks((1000, 1 << 20), np.dtype(np.float32), multiple=6)
    rows = [row for block in blocks for row in range(1000)[block]]
    assert rows == list(range(1000)) and all(block.start % 6 == 0 for block in blocks) and len(blocks) > 100


def test_a_value_beyond_float16_is_refused_not_made_infinite():
    with pytest.raises(InputError, match='w holds 70000.0, which float16 cannot'):
        cast(np.array([1.0, 7e4], np.float32), np.dtype(np.float16), 'w')
    assert np.isinf(cast(np.array([np.inf], np.float32), np.dtype(np.float16), 'w'))
