"""Packed rows as a batch of next-token prediction."""

import numpy as np
from jaxtyping import Integer

from llama_jax.types import LMBatch


def lm_batch(
    tokens: Integer[np.ndarray, 'B T_plus_1'], segment_ids: Integer[np.ndarray, 'B T_plus_1']
) -> LMBatch:
    """Next-token prediction on packed rows.

    Args:
      tokens: rows of T + 1.
      segment_ids: which document of its row a token is in, from 1; 0 is padding.

    Returns:
      Batch of T. Positions restart in every piece of a document, padding included; the mask leaves out
      targets in another document and in padding.
    """
    inputs, ahead = segment_ids[:, :-1], segment_ids[:, 1:]
    index = np.arange(inputs.shape[1], dtype=np.int32)[None, :]
    begins = np.ones(inputs.shape, bool)
    begins[:, 1:] = inputs[:, 1:] != inputs[:, :-1]
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return LMBatch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        positions=positions,
        segment_ids=inputs,
        loss_mask=(inputs == ahead) & (ahead != 0),
    )
