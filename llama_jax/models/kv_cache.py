"""The keys and values of the tokens already read: an explicit argument and return value, never hidden state."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.models.config import LlamaConfig


@flax.struct.dataclass
class KVCache:
    """Rotated keys and values of every layer.

    Attributes:
      keys: slot s of row b holds that row's token s.
      values: as `keys`.
      length: tokens each row has read; what lies beyond is unused and never seen.
    """

    keys: Float[Array, 'L B S K H']
    values: Float[Array, 'L B S K H']
    length: Int[Array, 'B']

    @classmethod
    def create(cls, config: LlamaConfig, batch_size: int, max_len: int, dtype=jnp.bfloat16) -> 'KVCache':
        """An empty cache for `max_len` tokens a row."""
        shape = (config.num_layers, batch_size, max_len, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size,), jnp.int32))

    def write(
        self, layer: Int[Array, ''], k: Float[Array, 'B T K H'], v: Float[Array, 'B T K H']
    ) -> 'KVCache':
        """Puts T new tokens of one layer after those each row has; `length` moves only by `advance`.

        That a row has room for them is for the caller to see to: its length is known on the device only.
        """
        if k.shape[1] > self.keys.shape[2]:
            raise ValueError(f'{k.shape[1]} tokens do not fit into a cache of {self.keys.shape[2]} slots')

        def put(cache, new):  # one row: [L, S, K, H], [T, K, H]
            return jax.vmap(
                lambda row, tokens, start: jax.lax.dynamic_update_slice(
                    row, tokens[None], (layer, start, 0, 0)
                ),
                in_axes=(1, 0, 0),
                out_axes=1,
            )(cache, new.astype(cache.dtype), self.length)

        return dataclasses.replace(self, keys=put(self.keys, k), values=put(self.values, v))

    def layer(self, layer: Int[Array, '']) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
        """One layer's keys and values."""
        return self.keys[layer], self.values[layer]

    def advance(self, num_tokens: Int[Array, 'B'] | int) -> 'KVCache':
        """Counts tokens as read. A row whose last tokens were padding counts only its own: the rest is overwritten."""
        return dataclasses.replace(self, length=self.length + num_tokens)
