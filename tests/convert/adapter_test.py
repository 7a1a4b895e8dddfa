"""A run's adapters as others read them."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from llama_jax import export, pretrained
from llama_jax.checkpoint.model_file import save_config
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.convert.tensors import BFLOAT16
from llama_jax.errors import InputError
from llama_jax.lora import LoraConfig, init_adapters, only_layers
from llama_jax.ops import linear
from llama_jax.quantize.params import quantize
from tests import toy
from tests.convert.in_memory import random_source

CONFIG = dataclasses.replace(toy.CONFIG, num_layers=2)
KINDS = {
    'all linear': LoraConfig(rank=2, alpha=3.0),
    'rslora of some layers': LoraConfig(rank=4, rslora=True, targets=('q', 'down'), layers=(1,)),
    'tables and norms': LoraConfig(rank=2, targets=('embed', 'head', 'k', 'o'), train_whole=('norms',)),
}


def run_of(folder, base, lora, weights='float32'):
    """What training adapters of random values leaves."""
    _, params, _ = pretrained.load(base)
    adapters = only_layers(init_adapters(lora, params, jax.random.key(0)), lora.layers)
    rng = np.random.default_rng(3)
    adapters = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), adapters)
    adapters = only_layers(adapters, lora.layers)
    with contextlib.closing(Checkpointer(epath.Path(folder / 'checkpoints'))) as checkpointer:
        checkpointer.save(1, {'params': adapters, 'opt_state': {'count': np.ones(1, np.int32)}}, {})
    record = {
        'base': str(base), 'fingerprint': pretrained.open(base).fingerprint, 'weights': weights, 'scale': lora.scale,
        'targets': list(lora.adapted), 'layers': list(lora.layers),
    }  # fmt: skip
    save_config(epath.Path(folder), CONFIG, base_checkpoint=str(base), adapters=record)
    return folder


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('base') / 'model'
    export.save(folder, random_source(CONFIG), None, to='orbax')
    return folder


@pytest.mark.parametrize('kind', KINDS)
def test_a_run_and_the_folder_of_peft_that_it_becomes_are_one_model(kind, base, tmp_path):
    (tmp_path / 'run').mkdir()
    opened = pretrained.open(run_of(tmp_path / 'run', base, KINDS[kind]))
    assert opened.is_adapter
    export.save_adapter(
        tmp_path / 'peft', opened.adapter, opened.base.config, to='peft', base=str(opened.base.path)
    )
    config, want, _ = pretrained.load(opened)
    found_config, found, _ = pretrained.load(tmp_path / 'peft')
    assert found_config == config
    plain = traverse_util.flatten_dict(pretrained.load(base)[1], sep='/')
    for path, value in traverse_util.flatten_dict(found, sep='/').items():
        own = traverse_util.flatten_dict(want, sep='/')[path]
        np.testing.assert_allclose(value, own, atol=1e-6, rtol=1e-6, err_msg=path)
        names = {
            *KINDS[kind].adapted,
            *(['final_norm', 'attention_norm', 'mlp_norm'] * bool(KINDS[kind].train_whole)),
        }
        assert (np.abs(value - plain[path]).max() > 0.01) == (path.rpartition('/')[2] in names), path


def test_a_base_that_is_given_is_merged_into_as_it_stands(base, tmp_path):
    (tmp_path / 'run').mkdir()
    run_of(tmp_path / 'run', base, KINDS['all linear'], weights='int8')
    kept = pretrained.open(tmp_path / 'run').source.tensors['blocks/mlp/up'][0].read()
    export.save(tmp_path / 'half', random_source(CONFIG, BFLOAT16), None, to='huggingface')
    found = {}
    for name, place in (('same', base), ('half', tmp_path / 'half')):
        found[name] = pretrained.open(tmp_path / 'run', base=place).source.tensors['blocks/mlp/up'][0].read()
    rounded = random_source(CONFIG, BFLOAT16).tensors['blocks/mlp/up'][0].read().astype(np.float32)
    plain = random_source(CONFIG).tensors['blocks/mlp/up'][0].read()
    np.testing.assert_allclose(found['same'] - found['half'], plain - rounded, atol=1e-6)
    assert 1e-4 < np.abs(kept - found['same']).max() < 0.01  # what int8 loses
    params = pretrained.load(base)[1]
    for weights in ('int8', 'nf4'):  # else into what the base stood for in training
        folder = tmp_path / weights
        folder.mkdir()
        kept = pretrained.open(run_of(folder, base, KINDS['all linear'], weights)).source
        stood = linear.materialize(quantize(params, weights)['blocks']['mlp']['up'])[0].T
        lost = kept.tensors['blocks/mlp/up'][0].read() - found['same']
        # XLA multiplies by inverses: a code that lies half way may be the next one.
        assert np.isclose(lost, np.asarray(stood) - plain, atol=1e-6).mean() > 0.98
        assert np.abs(lost).max() > 1e-4
    export.save(
        tmp_path / 'other', random_source(dataclasses.replace(CONFIG, num_layers=1)), None, to='orbax'
    )
    with pytest.raises(InputError, match=r'has shape .*the model'):
        pretrained.load(pretrained.open(tmp_path / 'run', base=tmp_path / 'other'))
