"""Runs that train adapters beside a frozen base: what changes, what is saved, and what is opened again."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from configs import sections
from experiments.run.adapters import check_base
from experiments.run.objective import compile_step, objective_of
from experiments.run.settings import make_lora_config
from llama_jax import export, pretrained
from llama_jax.checkpoint.model_file import save_config
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.convert.mapping import native_source
from llama_jax.errors import InputError
from llama_jax.lora import merge
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS
from llama_jax.ops import linear
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.preflight.costs import program_costs
from llama_jax.preflight.hlo import Program
from llama_jax.preflight.report import device_bytes
from llama_jax.quantize.base import BASE_DTYPES
from llama_jax.quantize.forms import name_of
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import new_state, shardings_of
from tests import toy
from tests.convert.in_memory import InMemory

CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=64, mlp_dim=128, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, max_seq_len=64
)  # fmt: skip
TX = make_optimizer(OptimizerConfig(weight_decay=0.0), 1e-2)


def source_of(params, config=CONFIG):
    found = jax.tree_util.tree_leaves_with_path(params)
    return native_source(
        config, {name_of(keys): InMemory(np.asarray(leaf)) for keys, leaf in found}, 'memory'
    )


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('base') / 'model'
    params = toy.make_params(LlamaForCausalLM(CONFIG))
    export.save(folder, source_of(params), None, to='orbax')
    return folder


def config_of(weights='float32', **lora):
    config = sections.all_of('tiny')
    sections.add_adapters(config)
    config.lora.update({'rank': 4, 'alpha': 8.0} | lora)
    config.model.weights = weights
    config.train.batch_size, config.train.loss_chunks, config.data.seq_len = 8, 2, 16
    return config


def begin(config, base, axes=None, remat='none', unroll=1, llama=CONFIG):
    """(objective, state, step, batch) of a run on a mesh of these axes; None: on one device."""
    devices = jax.devices() if axes else jax.devices()[:1]
    partitioner = Partitioner(make_mesh(axes or {}, devices))
    model = LlamaForCausalLM(llama, dtype=jnp.float32, partitioner=partitioner, remat=remat, unroll=unroll)
    opened = pretrained.open(base)
    objective = objective_of(config, model, partitioner, opened)
    target, step = compile_step(objective, TX, partitioner, 1, {})
    start = jax.jit(lambda params: new_state(params, TX), out_shardings=shardings_of(target))
    batch = jax.device_put(toy.packed_batch(8, 16), partitioner.batch_sharding(8, 16))
    return objective, start(objective.first_params(target.params)), step, batch


def losses_of(run, number=3):
    objective, state, step, batch = run
    losses = []
    with jax.set_mesh(objective.batch.tokens.sharding.mesh):
        for _ in range(number):
            state, metrics = step(state, objective.frozen, batch, jax.random.key(0))
            losses.append(float(metrics['loss']))
    return losses, state


def bytes_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    'weights', [name if name == 'nf4' else pytest.param(name, marks=pytest.mark.slow) for name in BASE_DTYPES]
)
def test_what_is_trained_saved_and_opened_again_are_adapters(weights, base, tmp_path):
    config = config_of(weights, train_whole='norms', dropout=0.1)
    run = objective, _, _, _ = begin(config, base)
    before = bytes_of(objective.frozen)
    losses, state = losses_of(run, 50)
    assert losses[:3] == sorted(losses[:3], reverse=True) and losses[-1] < 0.8 * losses[0]
    assert bytes_of(objective.frozen) == before
    names = {name_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert names == {
        *(f'blocks/attention/{name}/{part}' for name in 'qkvo' for part in 'ab'),
        *(f'blocks/mlp/{name}/{part}' for name in ('gate', 'up', 'down') for part in 'ab'),
        *('final_norm', 'blocks/attention_norm', 'blocks/mlp_norm'),
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) <= 8 * size + 16
    with contextlib.closing(Checkpointer(tmp_path / 'checkpoints')) as checkpointer:
        checkpointer.save(3, state, {})
    save_config(epath.Path(tmp_path), CONFIG, base_checkpoint=str(base), **objective.provenance)
    files = (tmp_path / 'checkpoints').rglob('*')
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 12 * size + 200_000
    whole = merge(state.params, objective.frozen, make_lora_config(config).scale)
    opened = pretrained.open(tmp_path)
    _, found, _ = pretrained.load(opened)
    for (keys, leaf), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(whole), strict=True
    ):
        if weights == 'bfloat16' and wanted.dtype == jnp.bfloat16:  # cast again, where the file is not
            leaf = leaf.astype(jnp.bfloat16)
        np.testing.assert_allclose(
            np.float32(leaf), np.float32(wanted), atol=1e-6, rtol=1e-6, err_msg=name_of(keys)
        )
    # A model as any other: another run's base, and written in any format.
    assert pretrained.open(tmp_path).source.tensors['blocks/attention/q'][0].shape == (64, 64)
    again, _, _, _ = begin(config_of(weights), tmp_path)
    assert again.provenance['adapters']['base'] == str(tmp_path)
    # What is frozen, a reference too, sees all activations: the first adapters drop none any more.
    first, x = again.frozen['blocks']['mlp']['up'], jnp.ones((1, 1, CONFIG.embed_dim))
    products = [
        linear.einsum('btd,df->btf', x, jax.tree.map(lambda leaf: leaf[0], weight))
        for weight in (first, whole['blocks']['mlp']['up'].astype(jnp.float32))
    ]
    # The sum of 64 products, rounded as bfloat16 or as floats are.
    np.testing.assert_allclose(*products, atol=1e-2 if weights == 'bfloat16' else 1e-5)
    # The base is looked at again.
    other = jax.tree.map(lambda w: w * 1.01, toy.make_params(LlamaForCausalLM(CONFIG)))
    export.save(tmp_path / 'other', source_of(other), None, to='orbax')
    moved = dict(objective.provenance['adapters'], base=str(tmp_path / 'other'))
    save_config(epath.Path(tmp_path), CONFIG, base_checkpoint=str(base), adapters=moved)
    with pytest.raises(
        InputError, match='holds adapters of another model than is now in .*other: its fingerprint is'
    ):
        pretrained.load(tmp_path)
    with pytest.raises(InputError, match='holds adapters of another model'):
        check_base(epath.Path(tmp_path), begin(config, tmp_path / 'other')[0].provenance)
    save_config(epath.Path(tmp_path), CONFIG, adapters=dict(moved, base=str(tmp_path / 'gone')))
    with pytest.raises(
        InputError, match='holds adapters of .*gone, which cannot be opened: no checkpoint at'
    ):
        pretrained.load(tmp_path)


@pytest.mark.slow
def test_adapters_beside_adapters_leave_the_base_as_it_was(base, tmp_path, caplog):
    """The first ones are not merged into it; both are merged as the checkpoint is read."""
    first_run = first, _, _, _ = begin(config_of('nf4'), base)
    _, state = losses_of(first_run, 5)
    with contextlib.closing(Checkpointer(tmp_path / 'first/checkpoints')) as checkpointer:
        checkpointer.save(1, state, {})
    save_config(epath.Path(tmp_path / 'first'), CONFIG, base_checkpoint=str(base), **first.provenance)

    config = config_of('nf4', rank=2, targets='q,down')
    second_run = second, start, _, _ = begin(config, tmp_path / 'first')
    wanted = merge(state.params, first.frozen, make_lora_config(config_of('nf4')).scale)
    for tree in (second.frozen, second.weights(start)):
        whole = jax.tree.map(linear.materialize, tree, is_leaf=lambda x: isinstance(x, linear.Representation))
        for (keys, leaf), want in zip(
            jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(wanted), strict=True
        ):
            np.testing.assert_allclose(np.float32(leaf), np.float32(want), atol=1e-6, err_msg=name_of(keys))
    codes = second.frozen['blocks']['attention']['q'].base.codes
    np.testing.assert_array_equal(codes, first.frozen['blocks']['attention']['q'].codes)
    losses, trained = losses_of(second_run, 5)
    assert losses[-1] < losses[0]
    with contextlib.closing(Checkpointer(tmp_path / 'second/checkpoints')) as checkpointer:
        checkpointer.save(1, trained, {})
    save_config(epath.Path(tmp_path / 'second'), CONFIG, **second.provenance)
    _, found, _ = pretrained.load(tmp_path / 'second')
    both = merge(trained.params, second.frozen, make_lora_config(config).scale)
    for (keys, leaf), want in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(both), strict=True
    ):
        np.testing.assert_allclose(np.float32(leaf), np.float32(want), atol=1e-6, err_msg=name_of(keys))

    # Another base may be given to merge into, which is said.
    other = jax.tree.map(lambda w: w * 1.01, toy.make_params(LlamaForCausalLM(CONFIG)))
    export.save(tmp_path / 'other', source_of(other), None, to='orbax')
    for given, is_said in ((base, False), (tmp_path / 'other', True)):
        caplog.clear()
        assert pretrained.open(tmp_path / 'first', base=given).source.config == CONFIG
        assert ('is not the model that the adapters of' in caplog.text) == is_said


@pytest.mark.slow
@pytest.mark.parametrize(
    ('weights', 'remat', 'unroll'),
    [
        ('nf4', 'attention', 1),
        ('float32', 'none', 2),
        ('int8', 'full', 1),
        ('int4', 'projections', 2),
        ('bfloat16', 'none', 1),
    ],
)
def test_eight_devices_train_as_one(weights, remat, unroll, base):
    config = config_of(weights, targets='all,head', dropout=0.1, train_whole='embed')
    meshes = (None, {'data': 2, 'fsdp': 2, 'tensor': 2})
    alone, on_mesh = (losses_of(begin(config, base, axes, remat, unroll))[0] for axes in meshes)
    np.testing.assert_allclose(on_mesh, alone, rtol=1e-5)


@pytest.mark.parametrize('axes', [{'fsdp': 4}, {'fsdp': 2, 'tensor': 2}, {'fsdp': 2, 'context': 2}])
def test_70b_beside_nf4_takes_little_more_than_half_a_byte_a_weight(axes):
    """Of codes 0.5, of the blocks' scales, tables in bfloat16, adapters and their optimiser's state the rest."""
    config = config_of('nf4', rank=8, targets='all')
    partitioner = Partitioner(make_mesh(axes, jax.devices()[:4]))
    llama = PRESETS['llama2_70b']
    objective = objective_of(config, LlamaForCausalLM(llama, partitioner=partitioner), partitioner)
    target, _ = compile_step(objective, TX, partitioner, 1, {})
    on_a_device = sum(device_bytes(tree) for tree in (target.params, target.opt_state, objective.frozen))
    assert 0.5 < 4 * on_a_device / llama.num_params <= 0.57


def test_a_larger_vocabulary_grows_the_base(base):
    grown = dataclasses.replace(CONFIG, vocab_size=72)
    objective, state, _, _ = begin(config_of('nf4', train_whole='embed'), base, llama=grown)
    rows = state.params['embed']
    assert rows.shape == (72, 64) and objective.frozen['head'].shape == (72, 64)
    np.testing.assert_allclose(rows[70], rows[:64].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'line'),
    [
        (
            {'rank': 4, 'targets': 'qq'},
            r"--config.lora.targets has 'qq', which is no such weight; did you mean q",
        ),
        ({'layers': '0-x'}, r"--config.lora.layers is '0-x'; write numbers of layers, or spans"),
        ({'layers': '0-7'}, r'--config.lora.layers has 2; the model has the layers 0 to 1'),
        ({'train_whole': 'score'}, r"--config.lora.train_whole has 'score', which the model does not have"),
    ],
)
def test_a_wrong_setting_is_named(settings, line, base):
    with pytest.raises(InputError, match=line):
        begin(config_of(**settings), base)


def test_a_type_that_no_base_has_is_named(base):
    with pytest.raises(
        InputError, match=r"a base is not kept as 'fp8'; .* \(set by --config.model.weights\)"
    ):
        begin(config_of('fp8'), base)


@pytest.mark.slow
@pytest.mark.parametrize(('remat', 'most'), [('none', 0.75), ('full', 0.82)])
def test_frozen_weights_have_no_gradients(remat, most):
    """Of Llama 2 7B's proportions: 0.67 and 0.75 of the weights' FLOPs, attention and adapters beside them."""
    llama = dataclasses.replace(
        CONFIG, vocab_size=512, embed_dim=256, mlp_dim=688, head_dim=32, num_kv_heads=8
    )
    partitioner = Partitioner(make_mesh({}, jax.devices()[:1]))
    model = LlamaForCausalLM(llama, dtype=jnp.bfloat16, partitioner=partitioner, remat=remat)

    def lowered(config):
        config.train.batch_size, config.data.seq_len = 4, 128
        objective = objective_of(config, model, partitioner)
        target, step = compile_step(objective, TX, partitioner, 1, {})
        return step.lower(
            target, objective.frozen, objective.batch, jax.eval_shape(lambda: jax.random.key(0))
        )

    beside, full = lowered(config_of('bfloat16', rank=1)), lowered(config_of(rank=0))
    costs = [program_costs(Program(step.compile().as_text())) for step in (beside, full)]
    assert costs[0].flops <= most * costs[1].flops
    for shape in ('256x8x32', '8x32x256', '256x688', '688x256', '512x256', '256x512'):
        for stacked in (shape, f'2x{shape}'):
            assert f'tensor<{stacked}xf32>' not in beside.as_text(), stacked
    assert 'tensor<2x256x688xf32>' in full.as_text()
