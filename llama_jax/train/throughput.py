"""Model FLOPs, peak FLOP/s, and both utilisations: causal attention counted by half, and in full."""

import time

import jax
import jax.numpy as jnp

from llama_jax import chips
from llama_jax.models.config import LlamaConfig


def training_flops_per_token(config: LlamaConfig, seq_len: int, frozen: bool = False) -> tuple[float, float]:
    """FLOPs of one token's forward and backward pass, matrix products only: (causal, full).

    6 per weight of the layers and the head (2 forward, 4 backward), and 12 L N H T for scores and values against all T
    positions, of which a causal mask leaves half. The embedding's look-up costs nothing; recomputation does not count.
    Of frozen weights there is no gradient to be taken, which leaves 4; of adapters beside them, a hundredth, nothing is
    counted.
    """
    norms = config.num_layers * 2 * config.embed_dim
    head = config.embed_dim * (1 if config.scalar_head else config.vocab_size)
    weights = config.num_block_params - norms + head
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    of_weights = (4.0 if frozen else 6.0) * weights
    return of_weights + attention / 2, of_weights + attention


def peak_flops_per_device() -> float:
    """Dense FLOP/s of one device: in bf16, as its maker says, or of others a measured fp32 product's."""
    device = jax.local_devices()[0]
    if chip := chips.find(device.device_kind):
        return chip.peak_flops / chip.devices
    # A CPU has no data sheet for this: time one product large enough to be bound by arithmetic, keep the best.
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Emulated devices share the machine, so each has its part of it.
    return 2 * size**3 / min(seconds) / jax.local_device_count()
