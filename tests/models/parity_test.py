"""Every release's model against two independent ones: float64 numpy, and Hugging Face's in fp32.

The models are small but keep what tells the releases apart: head dimension, RoPE base and scaling, epsilon,
query heads to a key-value head, tying. RoPE is relative, so positions are spread over the whole context of the
release: contiguous ones would hardly notice a wrong base or scaling, wherever they begin. Weights give queries
and keys unit variance, so that attention is far from uniform, and a residual stream of about 0.01, as released
weights do, where epsilon counts. `test_mutations_are_seen` proves that the comparison notices each mistake.
"""

import dataclasses
import functools
import secrets
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS
from tests.reference import huggingface_llama, numpy_llama

# Of the standard deviation of the logits (their largest value would flatter us 4-fold). fp32 rounds by 6e-8;
# three correct models differ by about 3e-6, and each wrong setting moves logits by more than 0.3.
TOLERANCE = 1e-4
EMBED_DIM, MLP_DIM, VOCAB_SIZE, NUM_LAYERS, NUM_KV_HEADS = 96, 128, 128, 3, 2
RESIDUAL_SCALE = 0.01


@dataclasses.dataclass(frozen=True)
class Release:
    """What was published; on purpose not read from `PRESETS`."""

    rope_theta: float
    norm_eps: float
    group_size: int  # query heads to a key-value head
    max_seq_len: int
    head_dim: int = 128
    scaling_factor: float | None = None
    tied: bool = False

    @property
    def hparams(self) -> dict:
        """What `numpy_llama.forward` reads."""
        scaling = {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_seq_len': 8192}
        scaling = scaling | {'factor': self.scaling_factor} if self.scaling_factor else None
        return {'rope_theta': self.rope_theta, 'norm_eps': self.norm_eps, 'rope_scaling': scaling}


RELEASES = {
    'llama_7b': Release(1e4, 1e-6, 1, 2048),
    'llama_13b': Release(1e4, 1e-6, 1, 2048),
    'llama_33b': Release(1e4, 1e-6, 1, 2048),
    'llama_65b': Release(1e4, 1e-5, 1, 2048),
    'llama2_7b': Release(1e4, 1e-5, 1, 4096),
    'llama2_13b': Release(1e4, 1e-5, 1, 4096),
    'llama2_70b': Release(1e4, 1e-5, 8, 4096),
    'code_llama_7b': Release(1e6, 1e-5, 1, 16384),
    'code_llama_13b': Release(1e6, 1e-5, 1, 16384),
    'code_llama_34b': Release(1e6, 1e-5, 8, 16384),
    'llama3_8b': Release(5e5, 1e-5, 4, 8192),
    'llama3_70b': Release(5e5, 1e-5, 8, 8192),
    'llama3_1_8b': Release(5e5, 1e-5, 4, 131072, scaling_factor=8.0),
    'llama3_1_70b': Release(5e5, 1e-5, 8, 131072, scaling_factor=8.0),
    'llama3_1_405b': Release(5e5, 1e-5, 16, 131072, scaling_factor=8.0),
    'llama3_2_1b': Release(5e5, 1e-5, 4, 131072, head_dim=64, scaling_factor=32.0, tied=True),
    'llama3_2_3b': Release(5e5, 1e-5, 3, 131072, scaling_factor=32.0, tied=True),
    'llama3_3_70b': Release(5e5, 1e-5, 8, 131072, scaling_factor=8.0),
}
# One of each kind in every run; a release that differs from one of these by a number, in the slow one.
KINDS = ('llama_7b', 'llama2_70b', 'llama3_8b', 'llama3_1_8b', 'llama3_2_1b')
EACH = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in RELEASES]


@pytest.fixture(scope='module')
def seed() -> int:
    """Fresh inputs in every run; a failing test shows the seed among its locals and in its message."""
    return secrets.randbits(32)


def small_config(name: str):
    """The preset with everything shrunk that does not tell it from the others."""
    preset = PRESETS[name]
    return dataclasses.replace(
        preset,
        vocab_size=VOCAB_SIZE,
        embed_dim=EMBED_DIM,
        mlp_dim=MLP_DIM,
        num_layers=NUM_LAYERS,
        num_heads=NUM_KV_HEADS * (preset.num_heads // preset.num_kv_heads),
        num_kv_heads=NUM_KV_HEADS,
    )


def random_params(release: Release, rng: np.random.Generator, residual_scale: float = RESIDUAL_SCALE) -> dict:
    """fp32 parameters of the small model, with unit-variance queries and keys."""
    num_heads, head_dim = NUM_KV_HEADS * release.group_size, release.head_dim

    def normal(*shape: int, fan_in: int, scale: float = 1.0) -> np.ndarray:
        return (rng.normal(size=shape) * scale / np.sqrt(fan_in)).astype(np.float32)

    def norm(*shape: int) -> np.ndarray:
        return (1 + 0.1 * rng.normal(size=shape)).astype(np.float32)

    layers, d, f = NUM_LAYERS, EMBED_DIM, MLP_DIM
    params = {
        'embed': normal(VOCAB_SIZE, d, fan_in=1, scale=residual_scale),
        'head': normal(VOCAB_SIZE, d, fan_in=d),
        'final_norm': norm(d),
        'blocks': {
            'attention_norm': norm(layers, d),
            'attention': {
                'q': normal(layers, d, num_heads, head_dim, fan_in=d),
                'k': normal(layers, d, NUM_KV_HEADS, head_dim, fan_in=d),
                'v': normal(layers, d, NUM_KV_HEADS, head_dim, fan_in=d),
                'o': normal(
                    layers, num_heads, head_dim, d, fan_in=num_heads * head_dim, scale=2 * residual_scale
                ),
            },
            'mlp_norm': norm(layers, d),
            'mlp': {
                'gate': normal(layers, d, f, fan_in=d),
                'up': normal(layers, d, f, fan_in=d),
                'down': normal(layers, f, d, fan_in=f, scale=2 * residual_scale),
            },
        },
    }
    if release.tied:
        del params['head']
    return params


def random_inputs(
    release: Release, rng: np.random.Generator, length: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of tokens, and strictly increasing positions from the first to the last of the context."""
    tokens = rng.integers(VOCAB_SIZE, size=(2, length), dtype=np.int32)
    inner = [np.sort(rng.choice(release.max_seq_len - 2, length - 2, replace=False)) + 1 for _ in tokens]
    positions = np.stack([[0, *row, release.max_seq_len - 1] for row in inner]).astype(np.int32)
    return tokens, positions


class Example(NamedTuple):
    """Weights and inputs of a small model, and its logits in float64."""

    params: dict
    tokens: np.ndarray
    positions: np.ndarray
    expected: np.ndarray


@functools.cache
def an_example(name: str, seed: int) -> Example:
    """Of a release; the same for all tests, as the reference takes longer than the model."""
    release, rng = RELEASES[name], np.random.default_rng(seed)
    params = random_params(release, rng)
    tokens, positions = random_inputs(release, rng)
    expected = numpy_llama.forward(release.hparams, params, tokens, positions)
    return Example(params, tokens, positions, expected)


@functools.cache
def compiled_model(config):
    return jax.jit(LlamaForCausalLM(config, dtype=jnp.float32).apply)


def run_model(config, params: dict, tokens: np.ndarray, positions=None, segment_ids=None) -> np.ndarray:
    variables, *args = jax.tree.map(jnp.asarray, ({'params': params}, tokens, positions, segment_ids))
    logits, _ = compiled_model(config)(variables, *args)
    assert logits.dtype == jnp.float32
    return np.asarray(logits)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of two arrays of logits, in standard deviations of the expected ones."""
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / expected.std())


@pytest.mark.parametrize('name', EACH)
def test_logits_match_float64_reference_over_the_whole_context(name, seed):
    example = an_example(name, seed)
    logits = run_model(small_config(name), example.params, example.tokens, example.positions)
    assert difference(logits, example.expected) <= TOLERANCE, f'seed {seed}'


def with_factor(factor: float):
    return lambda config: {'rope_scaling': dataclasses.replace(config.rope_scaling, factor=factor)}


MUTATIONS = {
    'code_llama_7b with theta of Llama 2': ('code_llama_7b', lambda config: {'rope_theta': 1e4}),
    'llama2_7b with theta of Llama 3': ('llama2_7b', lambda config: {'rope_theta': 5e5}),
    'llama3_8b with theta of Code Llama': ('llama3_8b', lambda config: {'rope_theta': 1e6}),
    'llama3_1_8b with factor 32': ('llama3_1_8b', with_factor(32.0)),
    'llama3_1_8b without scaling': ('llama3_1_8b', lambda config: {'rope_scaling': None}),
    'llama3_2_1b with factor 8': ('llama3_2_1b', with_factor(8.0)),
    'llama3_2_1b without scaling': ('llama3_2_1b', lambda config: {'rope_scaling': None}),
    'llama3_2_3b with factor 8': ('llama3_2_3b', with_factor(8.0)),
    'llama_7b with epsilon of 65b': ('llama_7b', lambda config: {'norm_eps': 1e-5}),
    'llama_65b with epsilon of 7b': ('llama_65b', lambda config: {'norm_eps': 1e-6}),
}


@pytest.mark.parametrize('mutation', MUTATIONS)
def test_mutations_are_seen(mutation, seed):
    name, change = MUTATIONS[mutation]
    example, config = an_example(name, seed), small_config(name)
    changed = dataclasses.replace(config, **change(config))
    logits = run_model(changed, example.params, example.tokens, example.positions)
    assert difference(logits, example.expected) > 1000 * TOLERANCE, f'seed {seed}'


def tiled_heads(attention: dict) -> dict:
    """Weights on which repeating key-value heads computes what tiling them would compute on those given."""
    num_heads, num_kv_heads = attention['q'].shape[2], attention['k'].shape[2]
    order = np.arange(num_heads).reshape(-1, num_kv_heads).T.ravel()
    return attention | {'q': attention['q'][:, :, order], 'o': attention['o'][:, order]}


def interleaved_rope(attention: dict) -> dict:
    """Weights in Meta's row order, as from a converter that forgot to permute them."""
    return attention | {name: numpy_llama.interleaved(attention[name]) for name in 'qk'}


@pytest.mark.parametrize('mutate', [tiled_heads, interleaved_rope])
def test_mutated_head_layouts_are_seen(mutate, seed):
    name = 'llama3_8b'
    example = an_example(name, seed)
    blocks = example.params['blocks'] | {'attention': mutate(example.params['blocks']['attention'])}
    params = example.params | {'blocks': blocks}
    logits = run_model(small_config(name), params, example.tokens, example.positions)
    assert difference(logits, example.expected) > 1000 * TOLERANCE, f'seed {seed}'


@pytest.mark.parametrize('name', ['llama2_7b', 'llama3_1_8b', 'llama3_2_1b'])
def test_packed_documents_equal_separate_ones(name, seed):
    release, rng = RELEASES[name], np.random.default_rng(seed)
    params = random_params(release, rng)
    lengths = [1, 23, 2, 30]  # and 8 of padding
    tokens = rng.integers(VOCAB_SIZE, size=(1, 64), dtype=np.int32)
    segment_ids = np.repeat([1, 2, 3, 4, 0], [*lengths, 8])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 8)])[None].astype(np.int32)
    config = small_config(name)

    packed = run_model(config, params, tokens, positions, segment_ids)
    leaking = run_model(config, params, tokens, positions)

    starts = np.cumsum([0, *lengths])
    documents = [slice(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    separate = [numpy_llama.forward(release.hparams, params, tokens[:, document]) for document in documents]
    for document, expected in zip(documents, separate, strict=True):
        assert difference(packed[:, document], expected) <= TOLERANCE, f'seed {seed}, {document}'
    assert difference(leaking[:, documents[-1]], separate[-1]) > 1000 * TOLERANCE, f'seed {seed}'


@pytest.mark.parametrize('name', EACH)
def test_logits_match_hugging_face(name, seed):
    pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    release, example = RELEASES[name], an_example(name, seed)
    model = huggingface_llama.make_model(release.hparams, example.params, release.max_seq_len)
    theirs = huggingface_llama.forward(model, example.tokens, example.positions)
    assert difference(theirs, example.expected) <= TOLERANCE, f'the references disagree: seed {seed}'
    ours = run_model(small_config(name), example.params, example.tokens, example.positions)
    assert difference(ours, theirs) <= TOLERANCE, f'seed {seed}'
