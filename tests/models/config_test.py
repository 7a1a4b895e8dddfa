import dataclasses
import json

import pytest

from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.models.presets import PRESETS
from llama_jax.types import InputError
from tests import toy


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'num_layers': 0}, ['num_layers', '0', 'at least 1']),
        ({'vocab_size': -5}, ['vocab_size', '-5', 'at least 1']),
        ({'num_heads': 6}, ['num_heads 6', 'num_kv_heads 4', 'multiple']),
        ({'head_dim': 7}, ['head_dim 7', 'even']),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(change, words):
    with pytest.raises(InputError) as error:
        dataclasses.replace(toy.CONFIG, **change)
    assert '\n' not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_every_preset_survives_json():
    for config in PRESETS.values():
        assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert isinstance(PRESETS['llama3_1_8b'].rope_scaling, RopeScaling)
