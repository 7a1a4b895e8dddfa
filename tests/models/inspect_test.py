"""What `models.inspect` shows of the layers is what the reference computes, and what is changed there has effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference.scoring import score
from llama_jax.models.inspect import inspect, token_log_probabilities
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner, make_mesh
from tests.reference import numpy_llama
from tests.toy import CONFIG, make_model, make_params, packed_rows

HPARAMS = {'norm_eps': CONFIG.norm_eps, 'rope_theta': CONFIG.rope_theta, 'rope_scaling': None}


@pytest.fixture(scope='module')
def params():
    return make_params(make_model(), seed=3)


@pytest.fixture(scope='module')
def rows():
    """Tokens and segments of packed rows."""
    tokens, segment_ids = packed_rows(8, 24, seed=5)
    return jnp.asarray(tokens[:, :24]), jnp.asarray(segment_ids[:, :24])


def reference(params, tokens, segment_ids):
    """Probabilities by head, and the residual stream behind each layer, in float64."""
    params = numpy_llama.to_float64(jax.tree.map(np.asarray, params))
    tokens, segment_ids = np.asarray(tokens), np.asarray(segment_ids)
    length, blocks = tokens.shape[1], params['blocks']
    mask = np.tril(np.ones((length, length), bool)) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    frequencies = numpy_llama.inverse_frequencies(CONFIG.head_dim, CONFIG.rope_theta, None)
    rotation = numpy_llama.rotations(np.tile(np.arange(length), (len(tokens), 1)), frequencies)
    x, attention, hidden = params['embed'][tokens], [], []
    for layer in range(CONFIG.num_layers):
        weights = {name: w[layer] for name, w in blocks['attention'].items()}
        normed = numpy_llama.rms_norm(x, blocks['attention_norm'][layer], CONFIG.norm_eps)
        wq, wk = numpy_llama.interleaved(weights['q']), numpy_llama.interleaved(weights['k'])
        heads = []
        for n in range(CONFIG.num_heads):
            q = numpy_llama.rotate(normed @ wq[:, n], rotation)
            k = numpy_llama.rotate(normed @ wk[:, n // (CONFIG.num_heads // CONFIG.num_kv_heads)], rotation)
            scores = q @ k.swapaxes(-1, -2) / np.sqrt(CONFIG.head_dim)
            heads.append(numpy_llama.softmax(np.where(mask, scores, -np.inf)))
        attention.append(np.stack(heads, axis=1))
        x = x + numpy_llama.attention(normed, weights, rotation, mask)
        mlp = {name: w[layer] for name, w in blocks['mlp'].items()}
        x = x + numpy_llama.mlp(numpy_llama.rms_norm(x, blocks['mlp_norm'][layer], CONFIG.norm_eps), mlp)
        hidden.append(x)
    return np.stack(attention), np.stack(hidden)


@pytest.mark.parametrize('placing', ['one device', 'unstacked', 'eight devices', 'rows split'])
def test_what_is_seen_is_the_references(params, rows, placing):
    sizes = {'eight devices': {'fsdp': 4, 'tensor': 2}, 'rows split': {'fsdp': 4, 'context': 2}}
    partitioner = Partitioner(make_mesh(sizes[placing])) if placing in sizes else None
    given = unstack(params) if placing == 'unstacked' else params
    model = make_model(partitioner=partitioner)
    seen = inspect(model, given, rows[0], segment_ids=rows[1])
    attention, hidden = reference(params, *rows)
    # fp32 against float64; the stream's values grow to about 30.
    np.testing.assert_allclose(seen['attention'], attention, atol=1e-5)
    np.testing.assert_allclose(seen['hidden'], hidden, atol=1e-5 * np.abs(hidden).max())
    np.testing.assert_allclose(seen['attention'].sum(-1), 1.0, atol=1e-6)
    assert not np.triu(np.asarray(seen['attention']), 1).any()


def test_layers_and_kinds_are_chosen(params, rows):
    everything = inspect(make_model(), params, *rows[:1], what=['hidden', 'heads', 'mlp', 'attention'])
    chosen = inspect(make_model(), params, rows[0], what='heads', layers=[-1, 0])
    assert set(chosen) == {'heads', 'logits'} and chosen['heads'].shape == (2, *rows[0].shape, 8, 8)
    np.testing.assert_array_equal(chosen['heads'], everything['heads'][jnp.array([2, 0])])
    # What the layer adds to the stream is what its parts do.
    logits, _ = make_model().apply({'params': params}, rows[0])
    np.testing.assert_allclose(everything['logits'], logits, atol=2e-5)  # sums in another order


def test_an_edit_that_does_nothing_changes_no_bit(params, rows):
    def edit(layer, kind, value):
        return value + 0.0 if layer == 1 else value

    plain, edited = (inspect(make_model(), params, rows[0], edit=e) for e in (None, edit))
    for kind, value in plain.items():
        np.testing.assert_array_equal(value, edited[kind])


@pytest.mark.parametrize('kind', ['attention', 'heads'])
def test_ablating_a_head_is_zeroing_its_rows_of_o(params, rows, kind):
    def ablate(layer, name, value):
        at = (slice(None), 5) if kind == 'attention' else (slice(None), slice(None), 5)
        return value.at[at].set(0.0) if (layer, name) == (1, kind) else value

    without = jax.tree.map(lambda x: x, params)
    without['blocks']['attention']['o'] = params['blocks']['attention']['o'].at[1, 5].set(0.0)
    ablated = inspect(make_model(), params, rows[0], what=(), edit=ablate)['logits']
    np.testing.assert_allclose(
        ablated, inspect(make_model(), without, rows[0], what=())['logits'], rtol=0, atol=1e-6
    )
    assert np.abs(ablated - inspect(make_model(), params, rows[0], what=())['logits']).max() > 0.01


def test_log_probabilities_are_those_of_scoring(params, rows):
    model, (tokens, segment_ids) = make_model(), rows
    found = np.asarray(token_log_probabilities(model, params, tokens))
    assert found.shape == (8, 23)
    pairs = [(tuple(row[:4]), tuple(row[4:])) for row in np.asarray(tokens).tolist()]
    for index, wanted in score(model, params, pairs):
        np.testing.assert_allclose(found[index, 3:].sum(dtype=np.float64), wanted.log_probability, atol=1e-4)
    packed = np.asarray(token_log_probabilities(model, params, tokens, segment_ids))
    first = int((np.asarray(segment_ids)[0] == 1).sum())
    np.testing.assert_allclose(packed[0, : first - 1], found[0, : first - 1], atol=1e-5)
    assert packed[0, first - 1] == 0 and (packed[0, first:] < 0).all()
    assert not packed[:, :][np.asarray(segment_ids)[:, 1:] == 0].any()


@pytest.mark.parametrize(
    ('asked', 'told'),
    [
        ({'what': 'atention'}, "what names 'atention', which no layer has; did you mean attention?"),
        ({'layers': [3]}, 'layer 3 is asked for; the model has 3, so it must be from 0 to 2'),
        ({'edit': lambda layer, kind, value: value[..., :1]}, 'edit makes attention of layer 0'),
        ({'whta': 'mlp'}, "inspect has no argument 'whta'; did you mean what?"),
    ],
)
def test_what_is_not_there_is_refused(params, rows, asked, told):
    with pytest.raises(InputError) as refused:
        inspect(make_model(), params, rows[0], **asked)
    assert str(refused.value).startswith(told)


def test_what_no_memory_holds_is_refused(params, monkeypatch):
    monkeypatch.setattr('llama_jax.models.inspect._device_bytes', lambda: 10**6)
    with pytest.raises(
        InputError, match=r'of 8 x 64 tokens takes [\d,]{7,} bytes, a device has 1,000,000; ask'
    ):
        inspect(make_model(), params, jnp.zeros((8, 64), jnp.int32))
