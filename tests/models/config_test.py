import json

import pytest

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.models.presets import PRESETS
from tests import toy


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'num_layers': 0}, ['num_layers', '0', 'at least 1']),
        ({'vocab_size': -5}, ['vocab_size', '-5', 'at least 1']),
        ({'num_heads': 6}, ['num_heads 6', 'num_kv_heads 4', 'multiple']),
        ({'head_dim': 7}, ['head_dim 7', 'even']),
        ({'head_dim': 10**9}, ['head_dim', '1000000000', 'at most 16384']),
        ({'embed_dim': 10**5000}, ['embed_dim', 'a huge number', 'at most']),
        ({'vocab_size': 512.0}, ['vocab_size', '512.0', 'no int']),
        ({'num_layers': float('nan')}, ['num_layers', 'nan', 'no int']),
        ({'num_layers': True}, ['num_layers', 'True']),
        ({'max_seq_len': '64'}, ['max_seq_len', "'64'", 'no int']),
        ({'norm_eps': float('nan')}, ['norm_eps', 'nan', 'above 0']),
        ({'norm_eps': -1e-5}, ['norm_eps', '-1e-05', 'above 0']),
        ({'norm_eps': None}, ['norm_eps', 'None', 'no float']),
        ({'rope_theta': float('inf')}, ['rope_theta', 'inf', 'at most']),
        ({'rope_scaling': {'factor': '8'}}, ['factor', "'8'", 'no float']),
        ({'tie_embeddings': 1}, ['tie_embeddings', '1', 'no bool']),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(change, words):
    with pytest.raises(InputError) as error:
        LlamaConfig.from_dict(toy.CONFIG.to_dict() | change)
    assert '\n' not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_every_preset_survives_json():
    for config in PRESETS.values():
        assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(PRESETS['llama3_1_8b'].rope_scaling, RopeScaling)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'vocab_size': ...}, 'has no vocab_size'),
        ({'num_experts': 8}, "has 'num_experts', which is none of vocab_size"),
        ({'rope_scaling': [8]}, 'rope_scaling is a list'),
        ({'rope_scaling': {}}, 'rope_scaling has no factor'),
        ({'rope_scaling': {'factor': 8.0, 'sort': 'yarn'}}, "rope_scaling has 'sort'"),
        ({'rope_scaling': {'factor': float('nan')}}, 'factor is nan'),
        ({'rope_scaling': {'factor': 8.0, 'low_freq_factor': 4.0}}, 'must be less than high_freq_factor'),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(change, words):
    values = {key: value for key, value in (toy.CONFIG.to_dict() | change).items() if value is not ...}
    with pytest.raises(InputError) as error:
        LlamaConfig.from_dict(values)
    assert words in str(error.value) and '\n' not in str(error.value)
    for wrong in (None, [], 'tiny'):
        with pytest.raises(InputError, match='it must be an object'):
            LlamaConfig.from_dict(wrong)
