"""Model FLOPs, peak FLOP/s, and both utilisations: causal attention counted by half, and in full."""

import time

import jax
import jax.numpy as jnp

from llama_jax.models.config import LlamaConfig

# Dense bf16 FLOP/s of one JAX device, from the vendors' data sheets. The first key found in `device_kind` is taken.
_PEAK_FLOPS = {
    'TPU7x': 2307e12 / 2,  # a chip is two devices
    'TPU v6': 918e12,
    'TPU v5p': 459e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v4': 275e12,
    'TPU v3': 123e12 / 2,
    'B200': 2250e12,
    'H200': 989e12,
    'H100': 989e12,
    'A100': 312e12,
}


def training_flops_per_token(config: LlamaConfig, seq_len: int) -> tuple[float, float]:
    """FLOPs of one token's forward and backward pass, matrix products only: (causal, full).

    6 per weight of the layers and the head (2 forward, 4 backward), and 12 L N H T for scores and values against all T
    positions, of which a causal mask leaves half. The embedding's look-up costs nothing; recomputation does not count.
    """
    norms = config.num_layers * 2 * config.embed_dim
    weights = config.num_block_params - norms + config.vocab_size * config.embed_dim
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
    return 6.0 * weights + attention / 2, 6.0 * weights + attention


def peak_flops_per_device() -> float:
    """Dense FLOP/s of one device: the data sheet's bf16 figure, or on other devices a measured fp32 product's."""
    device = jax.local_devices()[0]
    for kind, peak in _PEAK_FLOPS.items():
        if kind in device.device_kind:
            return peak
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
