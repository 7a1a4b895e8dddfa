"""Next-token prediction: pretraining and supervised fine-tuning, told apart by the batch's loss mask alone."""

import jax
import jax.numpy as jnp

from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.cross_entropy import head_cross_entropy
from llama_jax.types import Array, LMBatch, LossFn, Metrics, Params, PyTree


def language_model_loss(model: LlamaForCausalLM, *, z_loss: float = 0.0, num_chunks: int = 1) -> LossFn:
    """The loss function of a model: the sum over counted tokens of -log p(target), in nats.

    Args:
      model: applied to the batch's tokens, positions and segments.
      z_loss: weight of the squared log-normaliser; the LLaMA papers use none.
      num_chunks: pieces that the sequence is taken in; one piece's logits are held at a time (`ops.cross_entropy`).
    """

    def loss_fn(params: Params, frozen: PyTree, batch: LMBatch, rng: Array) -> tuple[Array, Array, Metrics]:
        del frozen, rng
        hidden, _ = model.apply(
            {'params': params}, batch.tokens, batch.positions, batch.segment_ids, method='hidden'
        )
        loss = head_cross_entropy(
            hidden, head_weight(params), batch.targets, batch.loss_mask, num_chunks, z_loss, model.partitioner
        )
        return loss, jnp.sum(batch.loss_mask, dtype=jnp.float32), {}

    return loss_fn


def evaluate_loss(loss_fn: LossFn):
    """A jitted (params, batch) -> (sum of losses, sum of weights) for validation."""

    @jax.jit
    def step(params: Params, batch: LMBatch) -> tuple[Array, Array]:
        loss, weight, _ = loss_fn(params, None, batch, jax.random.key(0))
        return loss, weight

    return step
