"""What programs of generation gave the rows: new tokens of each, and what the model thought of them."""

from collections.abc import Callable

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.inference.sampling import Drawn, candidates


@flax.struct.dataclass
class Steps:
    """What a program gave the rows.

    Attributes:
      tokens: new ones, from the first column on; a stop token that ends a row is its last.
      count: how many of them are a row's.
      log_probability: of each by the model, as are those of `candidates`; see `sampling.Drawn`.
      filtered_log_probability: see `sampling.Drawn`.
      candidates: the most likely tokens at each place and their log-probabilities, where they were asked for.
      running: rows that may get more.
    """

    tokens: Int[Array, 'B C']
    count: Int[Array, 'B']
    log_probability: Float[Array, 'B C']
    filtered_log_probability: Float[Array, 'B C']
    candidates: tuple[Int[Array, 'B C n'], Float[Array, 'B C n']] | None
    running: Bool[Array, 'B']

    @classmethod
    def create(cls, num_rows: int, num_columns: int, num_candidates: int) -> 'Steps':
        """None yet."""
        shape = num_rows, num_columns
        tokens, zeros, count = jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(num_rows, jnp.int32)
        several = (*shape, num_candidates)
        found = (jnp.zeros(several, jnp.int32), jnp.zeros(several)) if num_candidates else None
        return cls(tokens, count, zeros, zeros, found, count > 0)

    def add(
        self,
        put: Callable[[Array, Array], Array],
        drawn: Drawn,
        logits: Float[Array, '*rows V'],
        count: Int[Array, 'B'] | Bool[Array, 'B'],
    ) -> 'Steps':
        """With `count` tokens more of each row, drawn by these logits; `put` puts new values of rows among all."""
        found = self.candidates
        if found is not None:
            most = found[0].shape[2]
            ids, values = candidates(logits.reshape(-1, logits.shape[-1]), most)
            shape = (*drawn.token.shape, most)
            found = put(found[0], ids.reshape(shape)), put(found[1], values.reshape(shape))
        return Steps(
            put(self.tokens, drawn.token),
            self.count + count,
            put(self.log_probability, drawn.log_probability),
            put(self.filtered_log_probability, drawn.filtered_log_probability),
            found,
            self.running,
        )
