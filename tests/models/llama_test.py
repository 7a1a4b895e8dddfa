"""Properties of the architecture; its numbers are compared with independent models in `parity_test.py`."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import abstract_params, abstract_params_and_axes, head_weight
from llama_jax.models.remat import REMAT_POLICIES
from llama_jax.partitioning import DEFAULT_RULES, Partitioner, make_mesh
from tests import toy

# Logits are of order 1. The same sums in another order differ by some roundings of fp32 (6e-8 each).
SAME = 1e-5


@pytest.fixture(scope='module')
def model():
    return toy.make_model()


@pytest.fixture(scope='module')
def params(model):
    return toy.make_params(model)


@pytest.fixture(scope='module')
def apply(model):
    return jax.jit(lambda params, *args, **kwargs: model.apply({'params': params}, *args, **kwargs))


def test_prefill_and_decoding_give_the_logits_of_one_pass(apply, params):
    tokens = jnp.asarray(toy.packed_rows(2, 11)[0])
    want, none = apply(params, tokens)
    assert none is None
    cache = KVCache.create(toy.CONFIG, 2, 16, jnp.float32)
    found, cache = apply(params, tokens[:, :5], cache=cache)
    pieces = [found]
    for start, stop in ((5, 6), (6, 7), (7, 12)):
        found, cache = apply(params, tokens[:, start:stop], cache=cache)
        pieces.append(found)
    assert cache.length.tolist() == [12, 12]
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=SAME)
    assert np.std(want) > 0.5  # so that `SAME` means something


def test_a_cache_of_int8_gives_the_same_logits_in_any_pieces(apply, params):
    """Logits are of order 1. Each key and value is rounded by a hundredth of its length at most, of which sums over
    channels, tokens and layers leave less; whole runs differ by where 1e-6 falls on the other side of a half."""
    tokens = jnp.asarray(toy.packed_rows(2, 11)[0])
    want, _ = apply(params, tokens)

    def read(*pieces, is_empty):
        cache, found = KVCache.create(toy.CONFIG, 2, 16, jnp.int8).replace(is_empty=is_empty), []
        for start, stop in itertools.pairwise(pieces):
            logits, cache = apply(params, tokens[:, start:stop], cache=cache)
            found.append(logits)
        return jnp.concatenate(found, axis=1)

    at_once = read(0, 12, is_empty=True)
    error = np.abs(at_once - want).max()
    assert 1e-4 < error < 0.05
    assert np.abs(read(0, 6, 12, is_empty=False) - at_once).max() < error / 10


def test_rows_of_unequal_length_decode_as_each_alone(apply, params):
    tokens, lengths = jnp.asarray(toy.packed_rows(2, 11)[0]), np.array([7, 3])
    want, _ = apply(params, tokens)
    cache = KVCache.create(toy.CONFIG, 2, 16, jnp.float32)
    # The shorter row's last four tokens are padding; then each row goes on from its own length.
    _, cache = apply(params, tokens[:, :7], cache=cache)
    cache = cache.replace(length=jnp.array(lengths))
    for step in range(4):
        new = tokens[np.arange(2), lengths + step][:, None]
        found, cache = apply(params, new, cache=cache)
        np.testing.assert_allclose(found[:, 0], want[np.arange(2), lengths + step], atol=SAME)


def test_packed_documents_do_not_see_each_other(apply, params):
    rng = np.random.default_rng(0)
    documents = [jnp.asarray(rng.integers(64, size=(1, size))) for size in (5, 5, 2)]
    alone = [apply(params, document)[0] for document in documents]
    sizes = [document.shape[1] for document in documents]
    row = jnp.concatenate(documents, axis=1)
    positions = jnp.concatenate([jnp.arange(size) for size in sizes])[None, :]
    segment_ids = jnp.asarray(np.repeat([1, 2, 3], sizes))[None, :]
    packed, _ = apply(params, row, positions, segment_ids)
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=SAME)
    blind, _ = apply(params, row, positions)
    assert np.abs(blind - packed).max() > 0.1  # without segments they do


def test_no_logit_depends_on_a_later_token_or_another_document(model, params):
    tokens, segment_ids = map(jnp.asarray, toy.packed_rows(1, 11, seed=1))
    split = int(np.sum(segment_ids == 1))
    assert 2 <= split <= 9
    embedded = model.apply({'params': params}, tokens, method='embed_tokens')

    class FromEmbeddings(type(model)):
        def embed_tokens(self, tokens):
            return embedded + self.get_variable('shift', 'shift')

    direction = jax.random.normal(jax.random.key(0), (toy.CONFIG.vocab_size,))

    def influence(segments):  # of embedding s on logits t in a random direction, largest entry, [t, s]
        def logits(shift, t):
            variables = {'params': params, 'shift': {'shift': shift}}
            found, _ = FromEmbeddings(toy.CONFIG, jnp.float32).apply(variables, tokens, None, segments)
            return jnp.dot(found[0, t], direction)

        # One after the other: the pullback of the scanned layers under vmap (so jax.jacobian too) is wrong in
        # XLA for CPUs (jaxlib 0.10.2) at 768 cotangents.
        gradient = jax.jit(jax.grad(logits))
        zero = jnp.zeros_like(embedded)
        return np.stack([np.abs(gradient(zero, t)[0]).max(axis=-1) for t in range(12)])

    later = np.triu(np.ones((12, 12), bool), 1)
    whole = influence(None)
    assert np.all(whole[later] == 0.0) and np.all(whole[~later] > 0.0)
    apart = influence(segment_ids)
    same = segment_ids[0][:, None] == segment_ids[0][None, :]
    assert np.all(apart[later | ~same] == 0.0) and np.all(apart[~later & same] > 0.0)


def loss_and_gradients(model, params, batch):
    loss_fn = language_model_loss(model)
    gradient_fn = jax.value_and_grad(lambda p: loss_fn(p, None, batch, jax.random.key(0))[0])
    return jax.jit(gradient_fn)(params)


def assert_same_gradients(found, want, tolerance):
    """Relative to the largest entry of each weight's gradient."""
    np.testing.assert_allclose(found[0], want[0], rtol=tolerance)

    def compare(path, x, y):
        scale = np.abs(y).max()
        assert scale > 0
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, found[1], want[1])


@pytest.mark.parametrize(
    'knobs',
    [
        *({'remat': 'attention'}, {'unroll': 2, 'remat': 'projections_offload'}),
        *(
            pytest.param({'remat': name}, marks=pytest.mark.slow)
            for name in REMAT_POLICIES
            if name not in ('none', 'attention')
        ),
        *(pytest.param({'unroll': number}, marks=pytest.mark.slow) for number in (3, 100)),
    ],
    ids=str,
)
def test_remat_and_unrolling_change_neither_results_nor_weights(model, params, knobs):
    batch = toy.packed_batch(2, 12)
    want = loss_and_gradients(model, params, batch)
    other = toy.make_model(**knobs)
    assert jax.tree.structure(abstract_params(other)) == jax.tree.structure(params)
    fresh = toy.make_params(other)
    jax.tree.map(np.testing.assert_array_equal, fresh, params)
    # The same products, recomputed or fused otherwise: some roundings of fp32.
    assert_same_gradients(loss_and_gradients(other, params, batch), want, 1e-6)


@pytest.mark.parametrize(
    'split', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['one device', 'split rows']
)
def test_policies_save_and_offload_what_they_say(split):
    """Told from the program: how often it multiplies, and what it sends to the host's memory."""
    mesh = make_mesh({'data': 2, 'context': 2, 'tensor': 2})
    batch = toy.packed_batch(2, 16)
    products, sent = {}, {}
    for name in REMAT_POLICIES:
        model = toy.make_model(remat=name, partitioner=Partitioner(mesh) if split else None)
        total = functools.partial(language_model_loss(model), frozen={}, batch=batch, rng=jax.random.key(0))
        gradient = jax.grad(lambda params, total=total: total(params)[0])
        program = str(jax.make_jaxpr(gradient)(abstract_params(model)))
        products[name], sent[name] = program.count('dot_general'), program.count('Host')
    # Forward: seven products with weights, two in attention; saved, they are not computed again.
    assert products['full'] - products['attention'] == 2
    assert (
        products['attention'] - products['projections'] == 6
    )  # the last one's result only the next layer reads
    assert products['projections'] == products['none']
    for name in ('full', 'attention', 'projections'):
        assert products[f'{name}_offload'] == products[name]
        assert sent[name] == 0
    assert 0 < sent['full_offload'] < sent['attention_offload'] < sent['projections_offload']


def test_bf16_stays_near_fp32(apply, params):
    batch = toy.packed_batch(2, 12)
    want, _ = apply(params, batch.tokens, batch.positions, batch.segment_ids)
    low = jax.jit(toy.make_model(dtype=jnp.bfloat16).apply)
    found, _ = low({'params': params}, batch.tokens, batch.positions, batch.segment_ids)
    assert found.dtype == jnp.float32
    # bf16 rounds by 2^-9 = 0.002; three layers add up to about 1 % of the logits' deviation. Equal they are not.
    difference = np.std(found - want) / np.std(want)
    assert 1e-4 < difference < 0.03


def test_weights_stay_fp32_whatever_the_computation():
    shapes = abstract_params(toy.make_model(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_every_weight_names_its_axes():
    model = toy.make_model()
    shapes, axes = abstract_params_and_axes(model)
    c = toy.CONFIG
    sizes = {
        'vocab': c.vocab_size, 'embed': c.embed_dim, 'mlp': c.mlp_dim, 'heads': c.num_heads,
        'kv_heads': c.num_kv_heads, 'head_dim': c.head_dim, 'norm': c.embed_dim, 'layers': c.num_layers,
    }  # fmt: skip
    assert set(sizes) <= set(dict(DEFAULT_RULES))
    named = jax.tree.map(lambda leaf, names: tuple(sizes[name] for name in names), shapes, axes)
    assert named == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert all(names[0] == 'layers' for names in _tuples(axes['blocks']))


def _tuples(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))


def test_a_tied_head_is_the_embedding():
    tied = toy.make_model().clone(config=dataclasses.replace(toy.CONFIG, tie_embeddings=True))
    params = toy.make_params(tied)
    assert 'head' not in params and head_weight(params) is params['embed']
    tokens = jnp.arange(4)[None, :]
    untied, _ = jax.jit(toy.make_model().apply)({'params': params | {'head': params['embed']}}, tokens)
    np.testing.assert_array_equal(jax.jit(tied.apply)({'params': params}, tokens)[0], untied)


def test_init_is_normal_and_scaled_down_where_it_writes_to_the_residual_stream():
    params = jax.tree.map(lambda w: w / 8, toy.make_params(toy.make_model()))  # make_params multiplies by 8
    layers = params['blocks']
    inward = [params['embed'], params['head'], layers['attention']['q'], layers['mlp']['up']]
    outward = [layers['attention']['o'], layers['mlp']['down']]
    # Thousands of draws each: their deviation is known to some 2 %.
    for weight in inward:
        assert np.std(weight) == pytest.approx(0.02, rel=0.08)
    for weight in outward:
        assert np.std(weight) == pytest.approx(0.02 / 6**0.5, rel=0.08)


def test_unknown_names_are_refused_in_one_line():
    for knobs, name in (({'remat': 'some'}, 'some'), ({'attention_implementation': 'flash9'}, 'flash9')):
        with pytest.raises(InputError) as error:
            abstract_params(toy.make_model(**knobs))
        assert repr(name) in str(error.value) and 'choose from' in str(error.value)
        assert '\n' not in str(error.value)


def test_an_activation_that_does_not_divide_is_named():
    model = toy.make_model(partitioner=Partitioner(make_mesh({'data': 8})))
    with pytest.raises(InputError, match=r"activation: axis 'batch' of size 3"):
        jax.eval_shape(
            lambda p: model.apply({'params': p}, jnp.zeros((3, 4), jnp.int32)), abstract_params(model)
        )
