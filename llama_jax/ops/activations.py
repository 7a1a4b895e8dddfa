"""The gated activation of the feed-forward layer (Shazeer 2020, SwiGLU)."""

import jax
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, '*B F'], up: Float[Array, '*B F']) -> Float[Array, '*B F']:
    """silu(gate) * up, with silu(z) = z * sigmoid(z); all in the dtype of its inputs, as Meta's code does."""
    return jax.nn.silu(gate) * up
