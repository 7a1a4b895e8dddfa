import math

import jax
import pytest

from llama_jax.models.config import RopeScaling
from llama_jax.models.llama import LlamaForCausalLM, abstract_params
from llama_jax.models.presets import PRESETS, with_vocab_size

# As counted from the weights that Meta released, embedding and head apart unless tied.
NUM_PARAMS = {
    'llama_7b': 6_738_415_616,
    'llama_13b': 13_015_864_320,
    'llama_33b': 32_528_943_616,
    'llama_65b': 65_285_660_672,
    'llama2_7b': 6_738_415_616,
    'llama2_13b': 13_015_864_320,
    'llama2_34b': 33_743_970_304,
    'llama2_70b': 68_976_648_192,
    'code_llama_7b': 6_738_546_688,
    'code_llama_13b': 13_016_028_160,
    'code_llama_34b': 33_743_970_304,
    'llama3_8b': 8_030_261_248,
    'llama3_70b': 70_553_706_496,
    'llama3_1_8b': 8_030_261_248,
    'llama3_1_70b': 70_553_706_496,
    'llama3_1_405b': 405_853_388_800,
    'llama3_2_1b': 1_235_814_400,
    'llama3_2_3b': 3_212_749_824,
    'llama3_3_70b': 70_553_706_496,
}
SMALL = {'tiny', 'stories_15m', 'stories_110m'}


@pytest.mark.parametrize('name', PRESETS)
def test_parameter_counts_are_exact(name):
    shapes = abstract_params(LlamaForCausalLM(PRESETS[name]))
    counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert counted == PRESETS[name].num_params == NUM_PARAMS.get(name, counted)


def test_every_release_is_there():
    assert set(PRESETS) == set(NUM_PARAMS) | SMALL


def test_presets_keep_the_rules_of_the_family():
    for name, config in PRESETS.items():
        assert config.num_heads * config.head_dim == config.embed_dim, name
        if name in NUM_PARAMS:
            assert config.num_heads // config.num_kv_heads in (1, 3, 4, 8, 16), name
            # SwiGLU's hidden size: 8/3 of the embedding, at times 1.2 to 1.5 times that, rounded up.
            assert 8 / 3 <= config.mlp_dim / config.embed_dim <= 1.5 * 8 / 3, name
            assert config.mlp_dim % 256 == 0, name


# norm_eps, rope_theta, RopeScaling.factor, tie_embeddings, max_seq_len: params.json and model card of each release.
CONSTANTS = {
    'llama_': (1e-6, 1e4, None, False, 2048),
    'llama2_': (1e-5, 1e4, None, False, 4096),
    'code_llama_': (1e-5, 1e6, None, False, 16_384),
    'llama3_8b': (1e-5, 5e5, None, False, 8192),
    'llama3_70b': (1e-5, 5e5, None, False, 8192),
    'llama3_1_': (1e-5, 5e5, 8.0, False, 131_072),
    'llama3_2_': (1e-5, 5e5, 32.0, True, 131_072),
    'llama3_3_': (1e-5, 5e5, 8.0, False, 131_072),
}


@pytest.mark.parametrize('name', NUM_PARAMS)
def test_constants_are_those_of_the_release(name):
    config, scaling = PRESETS[name], PRESETS[name].rope_scaling
    (wanted,) = (constants for release, constants in CONSTANTS.items() if name.startswith(release))
    if name == 'llama_65b':  # by its own params.json
        wanted = (1e-5, *wanted[1:])
    found = (
        config.norm_eps, config.rope_theta, scaling and scaling.factor, config.tie_embeddings, config.max_seq_len
    )  # fmt: skip
    assert found == wanted
    assert scaling is None or scaling == RopeScaling(scaling.factor, 1.0, 4.0, 8192)


def test_another_vocabulary_changes_nothing_else():
    config = with_vocab_size(PRESETS['tiny'], 4096)
    assert config.vocab_size == 4096
    assert config.num_params - PRESETS['tiny'].num_params == (4096 - 2048) * config.embed_dim
