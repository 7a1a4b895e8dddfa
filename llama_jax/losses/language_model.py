"""Next-token prediction: pretraining and supervised fine-tuning, told apart by the batch's loss mask alone."""

import jax.numpy as jnp

from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.cross_entropy import head_cross_entropy
from llama_jax.types import Array, LMBatch, LossFn, Metrics, Params, PyTree


def language_model_loss(model: LlamaForCausalLM, *, z_loss: float = 0.0, num_chunks: int = 1) -> LossFn:
    """The loss function of a model: the sum over counted tokens of -log p(target), in nats, and of what is added to it.

    Args:
      model: applied to the batch's tokens, positions and segments.
      z_loss: weight of the squared log-normaliser; the LLaMA papers use none. With it the likelihood's share of the
        loss is among the further sums, as `nll`.
      num_chunks: pieces that the sequence is taken in; one piece's logits are held at a time (`ops.cross_entropy`).
    """

    def loss_fn(params: Params, frozen: PyTree, batch: LMBatch, rng: Array) -> tuple[Array, Array, Metrics]:
        del frozen, rng
        hidden, _ = model.apply(
            {'params': params}, batch.tokens, batch.positions, batch.segment_ids, method='hidden'
        )
        loss, nll = head_cross_entropy(
            hidden, head_weight(params), batch.targets, batch.loss_mask, num_chunks, z_loss, model.partitioner
        )
        sums = {'nll': nll} if z_loss else {}
        return loss, jnp.sum(batch.loss_mask, dtype=jnp.float32), sums

    return loss_fn
