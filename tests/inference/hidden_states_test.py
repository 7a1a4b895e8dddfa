import jax
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference.hidden_states import hidden_states
from llama_jax.models.llama import param_axes
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy
from tests.reference import huggingface_llama

PROMPTS = [[1, 5, 9, 33, 60], [1, 7, 2, 8, 30, 11, 4], [1]]
LAYERS = [0, 1, 2, 3, -1, -4, -2]


@pytest.fixture(scope='module')
def found(model, params):
    return hidden_states(model, params, None, PROMPTS, layers=LAYERS)


def test_they_are_those_of_transformers(params, found):
    """To 1e-4 of values of unit variance after the norm, a few units before: sums in another order."""
    torch = pytest.importorskip('torch', reason="needs torch: pip install 'llama_jax[parity]'")
    pytest.importorskip('transformers', reason="needs transformers: pip install 'llama_jax[parity]'")
    config = toy.CONFIG
    hparams = {'norm_eps': config.norm_eps, 'rope_theta': config.rope_theta, 'rope_scaling': None}
    theirs = huggingface_llama.make_model(hparams, params, config.max_seq_len)
    for prompt, states in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            wanted = theirs(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        assert states.shape == (len(LAYERS), len(prompt), config.embed_dim) and states.dtype == np.float32
        for layer, state in zip(LAYERS, states, strict=True):
            np.testing.assert_allclose(state, wanted[layer][0].numpy(), atol=1e-4)


def test_the_first_is_the_embedding_and_the_last_meets_the_head(params, found, logits_of):
    for prompt, states in zip(PROMPTS, found, strict=True):
        np.testing.assert_array_equal(states[0], np.asarray(params['embed'])[prompt])
    np.testing.assert_allclose(found[1][4] @ np.asarray(params['head']).T, logits_of(PROMPTS[1]), atol=1e-4)


@pytest.mark.slow
def test_a_mesh_finds_the_same(model, params, found):
    partitioner = Partitioner(make_mesh({'data': 2, 'context': 2, 'tensor': 2}))
    placed = jax.device_put(params, partitioner.tree_shardings(params, param_axes(model)))
    spread = model.clone(partitioner=partitioner)
    for wanted, states in zip(
        found, hidden_states(spread, placed, None, PROMPTS, layers=LAYERS), strict=True
    ):
        np.testing.assert_allclose(states, wanted, atol=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ('prompts', 'layers', 'words'),
    [
        ([[1]], [4], 'layer 4 is asked for; the model has 3'),
        ([[1]], [-5], 'layer -5 is asked for'),
        ([[1], []], [0], 'prompt 1 has no token'),
        ([[1] * 65], [0], 'prompt 0 has 65 tokens; the model reads 64, so shorten it to at most 64'),
        ([[64]], [0], 'prompt 0 holds token 64, for which the model has no row: it has 64'),
        ([[-1]], [0], 'prompt 0 holds -1'),
        (['a'], [0], 'text needs a tokenizer'),
    ],
)
def test_what_has_no_states_is_refused_in_one_line(model, params, prompts, layers, words):
    with pytest.raises(InputError, match=words) as error:
        hidden_states(model, params, None, prompts, layers=layers)
    assert '\n' not in str(error.value)
