"""The keys and values of the tokens already read: an explicit argument and return value, never hidden state."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.models.config import LlamaConfig

# Logical axes of `keys` and `values`.
CACHE_AXES = ('layers', 'batch', None, 'kv_heads', 'head_dim')


@flax.struct.dataclass
class KVCache:
    """Rotated keys and values of every layer.

    Attributes:
      keys: slot s of row b holds that row's token s.
      values: as `keys`.
      length: tokens each row has read; what lies beyond is unused and never seen.
      is_empty: it is said, before anything runs, that `length` is 0: new tokens then see each other alone, through the
        kernels of training. `advance` takes it back.
    """

    keys: Float[Array, 'L B S K H']
    values: Float[Array, 'L B S K H']
    length: Int[Array, 'B']
    is_empty: bool = flax.struct.field(pytree_node=False, default=False)

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

        # A scatter with the rows as its batch: `vmap` over rows that are not the first axis would copy the whole cache.
        places = jnp.stack([jnp.broadcast_to(layer, self.length.shape), self.length], axis=-1)
        axes = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2),
            operand_batching_dims=(1,), scatter_indices_batching_dims=(0,),
        )  # fmt: skip

        def put(cache, new):
            return jax.lax.scatter(
                cache, places, new.astype(cache.dtype), axes,
                indices_are_sorted=True, unique_indices=True, mode='clip',
            )  # fmt: skip

        return dataclasses.replace(self, keys=put(self.keys, k), values=put(self.values, v))

    def layer(self, layer: Int[Array, '']) -> tuple[Float[Array, 'B S K H'], Float[Array, 'B S K H']]:
        """One layer's keys and values."""
        return self.keys[layer], self.values[layer]

    def advance(self, num_tokens: Int[Array, 'B'] | int) -> 'KVCache':
        """Counts tokens as read. A row whose last tokens were padding counts only its own: the rest is overwritten."""
        return dataclasses.replace(self, length=self.length + num_tokens, is_empty=False)
