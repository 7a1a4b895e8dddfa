import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.training import Checkpointer
from llama_jax.data.tokenizer_training import train_sentencepiece
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import make_mesh
from llama_jax.pretrained import load, load_config, save_config
from llama_jax.types import InputError
from tests import toy

CONFIG = toy.CONFIG


def make_workdir(folder, params):
    """What `experiments.pretrain` leaves, without training."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder, CONFIG, base_checkpoint='')
    (folder / 'tokenizer.model').write_bytes(TOKENIZER.read_bytes())
    checkpointer = Checkpointer(folder / 'checkpoints')
    checkpointer.save(3, {'params': params, 'opt_state': {'moments': jnp.ones(3)}}, {'rows_consumed': 12})
    checkpointer.close()
    return folder


@pytest.fixture(scope='module', autouse=True)
def tokenizer_file(tmp_path_factory):
    global TOKENIZER
    TOKENIZER = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
    train_sentencepiece([f'{i} green bottles hanging on the wall' for i in range(200)], 300, TOKENIZER)


@pytest.fixture(scope='module')
def params():
    return toy.make_params(toy.make_model())


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, params, tokenizer_file):
    return make_workdir(tmp_path_factory.mktemp('run') / 'workdir', params)


def test_a_workdir_comes_back_whole(workdir, params):
    config, loaded, tokenizer = load(workdir)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(loaded)} == {1}
    assert tokenizer.decode(tokenizer.encode('green bottles')) == 'green bottles'


def test_weights_are_cast_and_placed_on_a_mesh(workdir, params):
    mesh = make_mesh({'fsdp': 2, 'tensor': 4})
    _, loaded, _ = load(str(workdir), mesh=mesh, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype('bfloat16')}
    gate = loaded['blocks']['mlp']['gate']
    assert {shard.data.shape for shard in gate.addressable_shards} == {(3, 16, 16)}  # of (3, 32, 64)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), loaded, params)


def test_another_tokenizer_may_be_given(workdir, tmp_path):
    other = tmp_path / 'other.model'
    train_sentencepiece([f'{i} green bottles' for i in range(200)], 280, other)
    assert load(workdir, tokenizer=str(other))[2].vocab_size == 280


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    for path in (tmp_path, tmp_path / 'nowhere'):
        message = refused(path)
        assert str(path) in message and 'model.json' in message and 'is not a checkpoint' in message


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('{', 'does not describe a model'),
        ('[]', 'does not describe a model'),
        ('{}', "does not describe a model: 'config'"),
        ('{"config": {"vocab_size": 5}}', 'does not describe a model'),
        (json.dumps({'config': CONFIG.to_dict() | {'num_layers': 0}}), 'num_layers is 0'),
        (json.dumps({'config': CONFIG.to_dict() | {'colour': 1}}), 'colour'),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / 'model.json').write_text(text)
    message = refused(tmp_path)
    assert 'model.json' in message and words in message


def test_what_is_missing_is_named(tmp_path, params):
    save_config(epath.Path(tmp_path), CONFIG)
    assert 'no checkpoint under' in refused(tmp_path)
    workdir = make_workdir(tmp_path / 'run', params)
    (workdir / 'tokenizer.model').unlink()
    assert 'no tokenizer in' in refused(workdir)


def test_weights_of_another_architecture_are_refused(tmp_path, params):
    workdir = make_workdir(tmp_path, params)
    save_config(workdir, PRESETS['tiny'])
    assert 'cannot be restored: its weight ' in refused(workdir)
    gc.collect()  # a read left unawaited would warn here


def test_the_description_keeps_every_number(tmp_path):
    for config in PRESETS.values():
        save_config(epath.Path(tmp_path), config, base_checkpoint='somewhere')
        assert load_config(epath.Path(tmp_path)) == config
