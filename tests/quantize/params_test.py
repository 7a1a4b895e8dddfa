"""Params in integers: which weights, in which form, placed where, and what a model makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.models.llama import param_axes
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.quantize.forms import Form, choose_forms, parse_forms
from llama_jax.quantize.params import dequantize, quantize
from tests import toy


@pytest.fixture(scope='module')
def params():
    return toy.make_params(toy.make_model())


@functools.partial(jax.jit, static_argnames='model')
def logits(params, tokens, model):
    return model.apply({'params': params}, tokens)[0]


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'group'), [('int8', None), ('int4', 16)])
def test_the_same_codes_and_logits_on_a_mesh_by_layers_and_of_what_they_stand_for(params, dtype, group):
    model, tokens = toy.make_model(), toy.packed_batch(8, 16).tokens
    ours = quantize(params, dtype, group)
    # Sums of fp32 in another order; rounding one matrix to codes moves the logits, of size 10, by 0.1 to 1
    np.testing.assert_allclose(
        logits(ours, tokens, model), expected := logits(dequantize(ours), tokens, model), atol=1e-4
    )
    assert np.abs(logits(params, tokens, model) - expected).max() > 0.05
    by_layer = quantize(unstack(params, jnp.float32), dtype, group)
    jax.tree.map(np.testing.assert_array_equal, by_layer, unstack(ours))
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 4}))
    sharded = jax.device_put(params, partitioner.tree_shardings(params, param_axes(model)))
    on_mesh = quantize(sharded, dtype, group)
    jax.tree.map(np.testing.assert_array_equal, on_mesh, ours)
    q = on_mesh['blocks']['attention']['q']
    assert q.qvalue.sharding == sharded['blocks']['attention']['q'].sharding
    assert {shard.data.shape for shard in q.qvalue.addressable_shards} == {(3, 16, 2, 8)}  # of (3, 32, 8, 8)
    assert {shard.data.shape for shard in q.scale.addressable_shards} == {
        (3, 1, 2, 8)
    }  # of 1 or 2 along embed
    placed = toy.make_model(partitioner=partitioner)
    np.testing.assert_allclose(logits(on_mesh, tokens, placed), expected, atol=1e-4)


def test_tables_stay_int8_and_what_the_group_does_not_divide_falls_back_with_its_reason():
    shapes = {
        'embed': (64, 64),
        'blocks/norm': (2, 64),
        'blocks/mlp/down': (2, 172, 64),
        'blocks/mlp/up': (2, 64, 172),
    }
    forms, reasons = choose_forms(shapes, 'int4')
    assert forms == {
        'embed': Form('int8'), 'blocks/mlp/down': Form('int8'), 'blocks/mlp/up': Form('int4', 32)
    }  # fmt: skip
    assert list(reasons) == ['blocks/mlp/down']
    assert 'sums over 172 of its weights, which are not whole groups of 32' in reasons['blocks/mlp/down']
    assert set(choose_forms(shapes, 'int8')[0].values()) == {Form('int8')}
    assert choose_forms(shapes, 'int8', 4)[0]['blocks/mlp/down'] == Form('int8', 4)


def test_what_cannot_be_quantised_so_is_one_line(params):
    for arguments, message in {
        (
            'int4',
            64,
        ): r'group 64 does not divide weight blocks/attention/k: a product sums over 32 of its weights',
        ('int3', None): r"cannot be quantised to 'int3'; there are int8 and int4",
        ('int8', -1): r'group is -1; it must be 0',
    }.items():
        with pytest.raises(InputError, match=message):
            quantize(params, *arguments)
    with pytest.raises(InputError, match=r'quantised already: blocks/attention/k \(int8\)'):
        quantize(quantize(params, 'int8'), 'int4')
    shapes = {'embed': (64, 48), 'final_norm': (48,)}
    good = {'embed': {'dtype': 'int4', 'group': 16}}
    assert parse_forms(good, shapes) == {'embed': Form('int4', 16)}
    for bad in (
        [], {'embed': 8}, {'embed': {'dtype': 'int4'}}, {'embed': {'dtype': 'int4', 'group': 64}},
        {'embed': {'dtype': 'int4', 'group': -2}}, {'head': good['embed']}, {'final_norm': good['embed']},
    ):  # fmt: skip
        with pytest.raises(InputError, match='its quantization'):
            parse_forms(bad, shapes)
