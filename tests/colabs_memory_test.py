"""Whether what the notebooks are set to fits a free GPU (a T4 of 15 GB) and one TPU v5e chip, told without either."""

import ast

import pytest

from llama_jax import preflight
from llama_jax.models.config import LlamaConfig
from llama_jax.models.presets import PRESETS
from tests.colabs_test import NAMES, read

T4_BYTES = 15e9  # of the 16 of the board, with ECC and the driver's own part gone
# By the default CKPT: the `config.json` of each on the hub.
SIZES = {
    'hf://HuggingFaceTB/SmolLM2-135M': LlamaConfig(
        vocab_size=49_152, embed_dim=576, mlp_dim=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        max_seq_len=8192, rope_theta=100_000.0, tie_embeddings=True,
    ),
    'hf://karpathy/tinyllamas/stories15M.pt': PRESETS['stories_15m'],
}  # fmt: skip
# Copies of the weights that a notebook holds at once at most, in float32 each.
COPIES = {'quickstart': 2, 'inside': 2, 'formats': 4, 'evaluate': 2, 'pods': 7}
# Rows and tokens of what is read at once; the engine of `evaluate` takes 8,192 tokens in a batch.
TOKENS = {'quickstart': 64, 'inside': 64, 'formats': 64, 'evaluate': 8192, 'pods': 256}


def parameters_of(name):
    [cell] = [cell for cell in read(name).cells if cell.id == 'parameters']
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}


def activation_bytes(config, tokens, row, kept_layers):
    """Logits twice, the widest of a layer and all layers' inputs, and the attention of as many layers as are kept."""
    attention = kept_layers * config.num_heads * tokens * row
    widths = (4 + config.num_layers) * tokens * config.mlp_dim
    return 4 * (2 * tokens * config.vocab_size + widths + attention)


def test_every_notebook_is_reckoned_with():
    assert {*COPIES, 'pretrain'} == set(NAMES) and COPIES.keys() == TOKENS.keys()


@pytest.mark.parametrize('name', COPIES)
def test_what_is_loaded_fits_a_t4(name):
    config = SIZES[parameters_of(name)['CKPT']]
    row = min(TOKENS[name], 1024)
    needed = 4 * COPIES[name] * config.num_params + activation_bytes(
        config, TOKENS[name], row, config.num_layers if name == 'inside' else 1
    )
    assert needed < 0.8 * T4_BYTES, f'{needed / 1e9:.1f} GB'


def trained():
    settings = parameters_of('pretrain')
    return PRESETS[settings['PRESET']], settings['BATCH_SIZE'] * settings['SEQ_LEN'], settings


def test_what_is_trained_fits_a_t4():
    """Weights with their moments twice, as no state is donated, the first weights and the gradients."""
    config, tokens, settings = trained()
    kept = (
        activation_bytes(config, tokens, settings['SEQ_LEN'], config.num_layers) * 6
    )  # nothing is recomputed
    assert 4 * (1 + 2 * 3 + 1) * config.num_params + kept < 0.8 * T4_BYTES


@pytest.mark.slow
def test_what_is_trained_fits_a_v5e_chip():
    pytest.importorskip('libtpu')
    _, _, settings = trained()
    report = preflight.run(
        f'configs/pretrain.py:{settings["PRESET"]}', 'v5e:1x1',
        {
            'data.seq_len': settings['SEQ_LEN'], 'train.batch_size': settings['BATCH_SIZE'],
            'model.dtype': 'bfloat16', 'model.remat': 'none', 'train.loss_chunks': 1,
        },
    )  # fmt: skip
    memory = report.train['hbm']
    assert report.train['fits'] and memory['total'] < 0.8 * memory['available']
    assert report.train['involuntary_rematerializations'] == []
