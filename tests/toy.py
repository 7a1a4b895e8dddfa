"""A Llama of some 30,000 weights that divides over eight devices, and packed rows for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.data.lm_batch import lm_batch
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, Transformer, init_params
from llama_jax.train.optimizer import decayed
from llama_jax.types import LMBatch, Params

CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8, max_seq_len=64
)  # fmt: skip

# An optimiser that changes nothing and keeps the gradients as its state.
KEEP_GRADIENTS = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradients, _, params: (jax.tree.map(jnp.zeros_like, params), gradients),
)


def make_model(**knobs) -> LlamaForCausalLM:
    """In fp32 where nothing else is asked for."""
    return LlamaForCausalLM(CONFIG, **({'dtype': jnp.float32} | knobs))


def make_params(model: Transformer, seed: int = 0) -> Params:
    """Fresh weights made 8 times larger, so that scores have unit variance and attention is far from uniform."""
    return _larger_params(model, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def _larger_params(model: Transformer, key: jax.Array) -> Params:
    params = init_params(model, key)
    return jax.tree.map(lambda w, is_matrix: 8 * w if is_matrix else w, params, decayed(params))


def packed_rows(num_rows: int, seq_len: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [B, T + 1]: two documents a row; odd rows are padded after these, the more the later."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(CONFIG.vocab_size, size=(num_rows, seq_len + 1), dtype=np.int32)
    slots = np.arange(seq_len + 1)[None, :]
    segment_ids = 1 + (slots >= rng.integers(1, seq_len // 2, size=(num_rows, 1)))
    rows = np.arange(num_rows)[:, None]
    used = np.where(rows % 2, seq_len + 1 - rows * seq_len // (2 * num_rows), seq_len + 1)
    return tokens, np.where(slots < used, segment_ids, 0).astype(np.int32)


def packed_batch(num_rows: int, seq_len: int, seed: int = 0) -> LMBatch:
    """The batch that these rows make."""
    return jax.tree.map(jnp.asarray, lm_batch(*packed_rows(num_rows, seq_len, seed)))


def abstract_batch(partitioner, batch_size, seq_len):
    return LMBatch.abstract(batch_size, seq_len, partitioner.batch_sharding(batch_size, seq_len))


def assert_same_gradients(found: Params, wanted: Params) -> None:
    """To 1e-5 of each weight's largest: sums in another order round fp32 by 6e-8 each, a gradient has thousands."""

    def compare(path, found, want):
        scale = np.abs(want).max()
        assert scale > 0
        np.testing.assert_allclose(found / scale, want / scale, atol=1e-5, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, found, wanted)
