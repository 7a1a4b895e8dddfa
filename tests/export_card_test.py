"""The page beside a model."""

import pytest

from llama_jax.export.card import model_card
from llama_jax.models.presets import PRESETS


def test_a_card_says_what_the_model_is():
    yaml = pytest.importorskip('yaml')
    card = model_card(
        'me/mine', PRESETS['llama3_8b'], license='llama3', made_from='a/b', measured={'piqa': '80 %'}
    )
    _, header, body = card.split('---\n', 2)
    assert yaml.safe_load(header) == {
        'license': 'llama3', 'pipeline_tag': 'text-generation', 'tags': ['llama', 'llama_jax'], 'base_model': 'a/b',
    }  # fmt: skip
    assert '# mine\n' in body and '| parameters | 8,030,261,248 |' in body and "load('hf://me/mine')" in body
    assert '| piqa | 80 % |' in body
    assert '## Measured' not in model_card('me/mine', PRESETS['tiny'], license='mit')
