import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_jax.errors import InputError
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import (
    DEFAULT_RULES,
    MESH_AXES,
    Partitioner,
    make_global_array,
    make_mesh,
    parse_rules,
)
from tests import toy


def partitioner(rules: str = '', **sizes: int) -> Partitioner:
    return Partitioner(make_mesh(sizes), parse_rules(rules))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_mesh_has_all_auto_axes_and_fills_in_the_rest():
    mesh = make_mesh({'fsdp': -1, 'tensor': 2})
    assert dict(mesh.shape) == {'dcn_data': 1, 'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 2}
    assert mesh.axis_types == (AxisType.Auto,) * len(MESH_AXES)
    assert dict(make_mesh({}, jax.devices()[:1]).shape) == dict.fromkeys(MESH_AXES, 1)


@pytest.mark.parametrize(
    ('sizes', 'words'),
    [
        ({'data': 8, 'model': 1}, ['unknown mesh axes', "'model'", 'tensor']),
        ({'data': -1, 'fsdp': -1}, ['data=-1', 'at most one']),
        ({'data': 0}, ['data=0', 'positive']),
        ({'data': -2}, ['data=-2', 'positive']),
        ({'data': 3}, ['data=3', '8 devices', 'multiply to that']),
        ({'data': 3, 'fsdp': -1}, ['data=3', 'fsdp=-1', '8 devices']),
        ({'data': 16, 'fsdp': -1}, ['data=16', '8 devices']),
    ],
)
def test_an_impossible_mesh_is_refused_in_one_line(sizes, words):
    with pytest.raises(InputError) as error:
        make_mesh(sizes)
    assert all(word in one_line(error) for word in words)


def test_rules_are_replaced_by_name():
    rules = dict(parse_rules('kv_heads=, embed=fsdp+data'))
    assert rules == dict(DEFAULT_RULES) | {'kv_heads': (), 'embed': ('fsdp', 'data')}
    assert parse_rules('') == DEFAULT_RULES


@pytest.mark.parametrize(
    ('overrides', 'words'),
    [
        ('kvheads=', ["'kvheads'", 'unknown logical axis', 'kv_heads']),
        ('embed=fdsp', ["'embed=fdsp'", 'unknown mesh axes', 'fdsp', 'fsdp']),
        ('embed=fsdp+model', ['unknown mesh axes', 'model']),
        ('embed', ["'embed'", 'embed=']),
    ],
)
def test_a_wrong_rule_is_refused_in_one_line(overrides, words):
    with pytest.raises(InputError) as error:
        parse_rules(overrides)
    assert all(word in one_line(error) for word in words)


def test_an_axis_may_be_split_as_two():
    both = partitioner(fsdp=4, tensor=2)
    assert both.spec((None, 'mlp+embed'), (4, 16)) == P(None, ('tensor', 'fsdp'))
    with pytest.raises(
        InputError, match=r"'mlp\+embed' of size 12 does not divide over mesh axes tensor=2 x fsdp=4"
    ):
        both.spec(('mlp+embed',), (12,))
    with pytest.raises(InputError, match=r"unknown logical axes \['mpl'\]"):
        both.spec(('mpl+embed',))
    axes = ('layers', None, 'kv_heads', 'head_dim')
    assert both.split_also(axes, (8, 8, 8, 6), 'embed') == ('layers', None, 'kv_heads+embed', 'head_dim')
    assert both.split_also(axes, (8, 8, 2, 8), 'embed') == ('layers', None, 'kv_heads', 'head_dim+embed')
    assert both.split_also(axes, (8, 8, 2, 6), 'embed') == axes
    assert both.split_also(('layers', 'embed', None), (8, 8, 8), 'embed') == ('layers', 'embed', None)
    assert partitioner(data=8).split_also(axes, (8, 8, 8, 8), 'embed') == axes


# What Flax silently replicates.
@pytest.mark.parametrize(
    ('axes', 'shape', 'rules', 'words'),
    [
        (('batch', 'lenght'), None, '', ['blocks/mlp/up', 'unknown logical axes', "'lenght'", "'length'"]),
        (('heads', 'mlp'), None, '', ["'heads'", "'mlp'", "'tensor'", "axis rule 'mlp='"]),
        (('embed', 'mlp'), (32,), '', ['blocks/mlp/up', '(32,)', '1 dimensions', '2']),
        (('embed', 'mlp'), (32, 7), '', ['blocks/mlp/up', "'mlp'", '7', 'tensor=2', "axis rule 'mlp='"]),
        (
            ('embed', 'mlp'),
            (6, 64),
            'embed=data+fsdp',
            ['6', 'data=2 x fsdp=2', 'change the size of data', "'embed='"],
        ),
    ],
)
def test_a_spec_that_cannot_be_is_refused_in_one_line(axes, shape, rules, words):
    with pytest.raises(InputError) as error:
        partitioner(rules, data=2, fsdp=2, tensor=2).spec(axes, shape, 'blocks/mlp/up')
    assert all(word in one_line(error) for word in words)


def test_the_advice_of_an_error_helps():
    shape, axes = (32, 7), ('embed', 'mlp')
    with pytest.raises(InputError, match="the axis rule 'mlp='"):
        partitioner(fsdp=4, tensor=2).spec(axes, shape)
    assert partitioner('mlp=', fsdp=4, tensor=2).spec(axes, shape) == P('fsdp', None)
    # A mesh axis of one device splits nothing, so nothing is amiss.
    assert partitioner(fsdp=8).spec(('heads', 'mlp')) == P(None, None)


def test_specs_of_every_weight():
    model = toy.make_model()
    shardings = partitioner(data=2, fsdp=2, tensor=2).tree_shardings(*abstract_params_and_axes(model))
    inward, outward = P(None, 'fsdp', 'tensor'), P(None, 'tensor', 'fsdp')
    heads = P(None, 'fsdp', 'tensor', None)
    assert jax.tree.map(lambda sharding: sharding.spec, shardings) == {
        'embed': P('tensor', 'fsdp'),
        'head': P('tensor', 'fsdp'),
        'final_norm': P(None),
        'blocks': {
            'attention_norm': P(None, None),
            'mlp_norm': P(None, None),
            'attention': {'q': heads, 'k': heads, 'v': heads, 'o': P(None, 'tensor', None, 'fsdp')},
            'mlp': {'gate': inward, 'up': inward, 'down': outward},
        },
    }


def test_a_weight_that_does_not_divide_is_named_by_its_path():
    model = toy.make_model().clone(config=PRESETS['llama_33b'])  # 52 heads
    with pytest.raises(InputError) as error:
        partitioner(tensor=8).tree_shardings(*abstract_params_and_axes(model))
    message = one_line(error)
    assert 'blocks/attention/' in message and 'size 52 does not divide over mesh axes tensor=8' in message


def test_the_batch_must_divide():
    two_by_two = partitioner(data=2, fsdp=2, context=2)
    assert two_by_two.batch_sharding(8, 16).spec == P(('data', 'fsdp'), 'context')
    with pytest.raises(InputError) as error:
        two_by_two.batch_sharding(6)
    assert all(word in one_line(error) for word in ['batch size 6', '4 devices', 'multiple of 4'])
    with pytest.raises(InputError) as error:
        two_by_two.batch_sharding(8, 15)
    assert all(word in one_line(error) for word in ["'length'", '15', 'context=2'])


def test_an_activation_that_does_not_divide_is_refused_where_jax_leaves_it_whole():
    shard = partitioner(data=8).shard
    with pytest.raises(InputError, match=r"logits: axis 'batch' of size 6 does not divide"):
        jax.eval_shape(functools.partial(shard, axes=('batch', None), name='logits'), np.zeros((6, 2)))


@pytest.mark.parametrize(
    'sizes', [{'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'context': 2, 'tensor': 4}]
)
def test_a_global_array_is_made_of_the_rows_that_the_host_read(sizes):
    want = np.arange(8 * 4 * 3).reshape(8, 4, 3)
    order = np.random.default_rng(0).permutation(8)  # of the host's rows in its memory
    sharding = partitioner(**sizes).sharding(('batch', 'length', None), want.shape)
    row_of = {int(row): place for place, row in enumerate(order)}
    array = make_global_array(want[order], row_of, 8, sharding)
    np.testing.assert_array_equal(array, want)
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])
