"""The reward model: the trunk with a head that scores what was read so far (Llama 2 paper, section 3.2.2)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, Transformer, weight
from llama_jax.ops.linear import einsum

VALUE = 'value'  # beside a policy's weights: those of what expects its reward, as they are trained together


class LlamaForRewardModel(Transformer):
    """The trunk with one number in the place of the next token's logits."""

    def setup(self):
        """The trunk's weights and the head's."""
        super().setup()
        if not self.config.scalar_head:
            raise InputError('this is a language model, which gives no scores; train a reward model from it')
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


def model_of(config: LlamaConfig, **knobs: Any) -> LlamaForCausalLM | LlamaForRewardModel:
    """The model that an architecture is of, with the knobs of `Transformer`."""
    return (LlamaForRewardModel if config.scalar_head else LlamaForCausalLM)(config, **knobs)
