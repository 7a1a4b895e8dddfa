import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from llama_jax.convert.meta_params import ffn_rule, from_config, mlp_dim, parse_params, read_params, to_config
from llama_jax.convert.tensors import BFLOAT16
from llama_jax.errors import InputError
from llama_jax.models.config import RopeScaling
from llama_jax.models.presets import PRESETS
from tests import toy

SMALL = dataclasses.replace(toy.CONFIG, head_dim=4)  # so that heads have embed_dim / num_heads values

# `params.json` as Meta ships it, but for the order of its keys; vocab_size -1 in the first two families.
RELEASED = {
    'llama_7b': dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-6),
    'llama_65b': dict(dim=8192, multiple_of=256, n_heads=64, n_layers=80, norm_eps=1e-5),
    'llama2_13b': dict(dim=5120, multiple_of=256, n_heads=40, n_layers=40, norm_eps=1e-5),
    'llama2_70b': dict(
        dim=8192, multiple_of=4096, ffn_dim_multiplier=1.3, n_heads=64, n_kv_heads=8, n_layers=80, norm_eps=1e-5
    ),
    'code_llama_34b': dict(
        dim=8192, multiple_of=256, ffn_dim_multiplier=1.0, n_heads=64, n_kv_heads=8, n_layers=48, norm_eps=1e-5,
        rope_theta=1_000_000.0,
    ),
    'llama3_8b': dict(
        dim=4096, multiple_of=1024, ffn_dim_multiplier=1.3, n_heads=32, n_kv_heads=8, n_layers=32, norm_eps=1e-5,
        rope_theta=500_000.0,
    ),
    'llama3_1_405b': dict(
        dim=16384, multiple_of=4096, ffn_dim_multiplier=1.2, n_heads=128, n_kv_heads=8, n_layers=126, norm_eps=1e-5,
        rope_theta=500_000.0, use_scaled_rope=True,
    ),
    'llama3_2_1b': dict(
        dim=2048, multiple_of=256, ffn_dim_multiplier=1.5, n_heads=32, n_kv_heads=8, n_layers=16, norm_eps=1e-5,
        rope_theta=500_000.0, use_scaled_rope=True,
    ),
}  # fmt: skip
EXTRA = {'llama3_2_1b': dict(rope_scaling_factor=32.0)}  # which Meta's code needs to be told


def dtype_of(preset: str) -> np.dtype:
    return np.dtype(np.float16) if preset.startswith('llama_') else BFLOAT16


@pytest.mark.parametrize('preset', RELEASED)
def test_released_file_gives_the_preset_and_the_preset_the_file(preset):
    config, dtype = PRESETS[preset], dtype_of(preset)
    params = parse_params(RELEASED[preset] | {'vocab_size': -1}, preset)
    assert params.vocab_size is None
    read = to_config(params, vocab_size=config.vocab_size, tied=config.tie_embeddings, dtype=dtype)
    assert read == config
    expected = RELEASED[preset] | EXTRA.get(preset, {}) | {'vocab_size': config.vocab_size}
    assert from_config(config, dtype, config.num_kv_heads) == expected


CONFIGS = PRESETS | {
    'no context of a release': dataclasses.replace(PRESETS['llama2_7b'], max_seq_len=1234),
    'Llama 2-Chat 7B': dataclasses.replace(PRESETS['llama2_7b'], norm_eps=1e-6),
    'other factor': dataclasses.replace(PRESETS['llama3_2_3b'], rope_scaling=RopeScaling(8.0, high_freq_factor=2.0)),
    'more tokens': dataclasses.replace(PRESETS['llama2_13b'], vocab_size=32_001),
    'prime FFN': dataclasses.replace(SMALL, mlp_dim=104_729, num_kv_heads=2),
}  # fmt: skip


@pytest.mark.parametrize('dtype', [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize('name', CONFIGS)
def test_what_is_written_is_read_back(name, dtype, tmp_path):
    config = CONFIGS[name]
    path = epath.Path(tmp_path / 'params.json')
    path.write_text(json.dumps(from_config(config, dtype, config.num_kv_heads)))
    params = read_params(path)
    assert to_config(params, vocab_size=params.vocab_size, tied=config.tie_embeddings, dtype=dtype) == config


def test_any_ffn_size_has_a_rule():
    for size in [*range(1, 60), 1000, 11008, 2**31 - 1]:
        config = dataclasses.replace(SMALL, mlp_dim=size)
        assert mlp_dim(config.embed_dim, *ffn_rule(config)) == size


def test_keys_may_be_nested_unknown_or_absent(tmp_path):
    path = epath.Path(tmp_path / 'params.json')
    path.write_text(json.dumps({'model': {'dim': 64, 'n_heads': 4, 'n_layers': 2, 'moe': {'x': [1]}}}))
    params = read_params(path)
    assert (params.n_kv_heads, params.multiple_of, params.rope_theta, params.norm_eps) == (
        4,
        256,
        10_000.0,
        1e-5,
    )


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'is not JSON'),
        ('{"dim": 64', 'is not JSON'),
        ('[' * 100_000, 'is not JSON'),
        ('\x00\xff', 'is not JSON'),
        ('9' * 5000, 'is not JSON'),
        ('[1, 2]', 'is a JSON list, it must be an object'),
        ('null', 'is a JSON NoneType'),
        ('{"n_heads": 4}', 'has no dim'),
        ('{"n_heads": 4, "n_heads": 8}', "'n_heads' stands twice"),
        ('{"n_heads": "4"}', "n_heads is '4'; it must be a whole number from 1 to 2147483647"),
        ('{"n_heads": true}', 'n_heads is True; it must be'),
        ('{"n_heads": -4}', 'n_heads is -4; it must be'),
        ('{"n_heads": 1e400}', 'is not JSON: 1e400 is beyond the largest number'),
        ('{"n_heads": 4, "dim": 64.5}', 'dim is 64.5; it must be'),
        ('{"n_heads": 4, "dim": 64, "n_layers": 1000000000000}', 'n_layers is 1000000000000; it must be'),
        ('{"n_heads": 4, "dim": 64, "n_layers": %s}' % ('9' * 4000), 'is not JSON: a number has 4000 digits'),
        ('{"n_heads": 4, "dim": 64, "n_layers": [[[]]]}', 'n_layers is a list; it must be'),
        ('{"n_heads": 4, "dim": 64, "n_layers": 2, "norm_eps": NaN}', 'is not JSON: NaN is no number'),
        ('{"n_heads": 4, "dim": 64, "n_layers": 2, "ffn_dim_multiplier": 1e300}', 'ffn_dim_multiplier is 1e.300;'),
        ('{"n_heads": 4, "dim": 64, "n_layers": 2, "use_scaled_rope": 1}', 'use_scaled_rope is 1; it must be true'),
        ('{"n_heads": 5, "dim": 64, "n_layers": 2}', 'dim 64 over n_heads 5 is no size of a head'),
        ('{"n_heads": 4, "dim": 64, "n_layers": 2, "n_kv_heads": 3}', 'n_heads 4 is not a multiple of n_kv_heads 3'),
        ('{"quantization_args": {"group_size": 32}}', 'has quantization_args: these are quantised weights'),
        (' ' * 2**21, 'has more than 1048576 bytes'),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    path = epath.Path(tmp_path / 'params.json')
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(InputError, match=message) as error:
        read_params(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r'params.json is missing'):
        read_params(epath.Path(tmp_path / 'params.json'))


def test_architecture_without_a_place_is_refused():
    with pytest.raises(InputError, match='head_dim 16'):
        from_config(dataclasses.replace(toy.CONFIG, head_dim=16), BFLOAT16, 4)
    scaling = RopeScaling(8.0, original_max_seq_len=64)
    with pytest.raises(InputError, match='original_max_seq_len 8192 only'):
        from_config(dataclasses.replace(SMALL, rope_scaling=scaling), BFLOAT16, 4)
