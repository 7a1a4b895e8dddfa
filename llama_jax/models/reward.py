"""The reward model: the trunk with a head that scores what was read so far (Llama 2 paper, section 3.2.2)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.models.llama import Transformer, weight
from llama_jax.ops.linear import einsum


class LlamaForRewardModel(Transformer):
    """The trunk with one number in the place of the next token's logits."""

    def setup(self):
        super().setup()
        D = self.config.embed_dim
        # So that the first scores have a variance near 1 (Huang et al. 2024, detail 8).
        self.score = weight(self, 'score', (D,), ('embed',), nn.initializers.normal((D + 1) ** -0.5))

    def __call__(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'] | None = None,
        segment_ids: Int[Array, 'B T'] | None = None,
    ) -> Float[Array, 'B T']:
        """The score at each token, fp32; that of an answer stands at its last.

        Args:
          tokens: ids.
          positions: what RoPE rotates by; by default consecutive.
          segment_ids: sequences packed in a row do not see each other.
        """
        hidden, _ = self.hidden(tokens, positions, segment_ids)
        return einsum('btd,d->bt', hidden, self.score, jnp.float32)
