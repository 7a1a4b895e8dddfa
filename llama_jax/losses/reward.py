"""Reward models: how well scores order answers as people did, by Bradley and Terry's likelihood.

Llama 2 paper, section 3.2.2: -log sigmoid(r(x, y_chosen) - r(x, y_rejected) - m).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from llama_jax.errors import InputError
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.types import Array, LossFn, Metrics, Params, PreferenceBatch, PyTree

# What a pair's margin is multiplied by. In the data's unit the four ratings of Llama 2 are 3, 2, 1 and 0, which is its
# table's large margin; the small one is a third of that.
MARGINS = {'none': 0.0, 'small': 1 / 3, 'large': 1.0}


def ranking_losses(
    scores: Float[Array, 'B P 2'], margins: Float[Array, 'B P'], centering: float = 0.0
) -> Float[Array, 'B P']:
    """-log sigmoid(preferred - other - margin), in nats.

    Args:
      scores: of the preferred answer and of the other.
      margins: by how much the one is to be above the other.
      centering: weight of the squared sum of the two, which holds scores about 0 (Eisenstein et al. 2023).
    """
    better, worse = scores[..., 0], scores[..., 1]
    return -jax.nn.log_sigmoid(better - worse - margins) + centering * jnp.square(better + worse)


def safety_losses(scores: Float[Array, 'B P 2'], safe: Int[Array, 'B P 2']) -> Float[Array, 'B P']:
    """-log sigmoid(r) of a safe answer, -log sigmoid(-r) of an unsafe one; the mean of a pair's two.

    An answer that nobody judged (-1) adds 0. Llama 2's auxiliary loss (appendix A.3.4), whose formula is not published:
    an answer is taken for safe where sigmoid(r) is above 0.5.
    """
    losses = -jax.nn.log_sigmoid(jnp.where(safe == 1, scores, -scores))
    return jnp.mean(jnp.where(safe >= 0, losses, 0.0), axis=-1)


def margin_scale(name: str) -> float:
    """What is multiplied with the margins of the data.

    Raises:
      InputError: there is no such way.
    """
    if name not in MARGINS:
        raise InputError(f'unknown margin {name!r}; choose from {", ".join(MARGINS)}')
    return MARGINS[name]


def reward_loss(
    model: LlamaForRewardModel, *, margin: str = 'none', centering: float = 0.0, safety: float = 0.0
) -> LossFn:
    """The loss function of a reward model: the sum over pairs, weighted as they are.

    Several answers of one prompt are so many pairs that name the same segments.

    Args:
      model: gives a score at each token.
      margin: a name of `MARGINS`.
      centering: see `ranking_losses`.
      safety: weight of `safety_losses`.

    Raises:
      InputError: `margin` is unknown.
    """
    scale = margin_scale(margin)

    def loss_fn(
        params: Params, frozen: PyTree, batch: PreferenceBatch, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        del frozen, rng
        scores = pair_scores(model, params, batch)
        ranking = ranking_losses(scores, scale * batch.margins, centering)
        losses = ranking + (safety * safety_losses(scores, batch.safe) if safety else 0.0)
        better, worse = scores[..., 0], scores[..., 1]
        figures = {
            'accuracy': half_for_ties(better, worse),
            'margin': better - worse,
            'score_chosen': better,
            'score_rejected': worse,
        }
        if safety:
            figures['ranking_loss'] = ranking
        sums = {name: jnp.sum(batch.weights * figure) for name, figure in figures.items()}
        return jnp.sum(batch.weights * losses), jnp.sum(batch.weights), sums

    return loss_fn


def pair_scores(model: LlamaForRewardModel, params: Params, batch: PreferenceBatch) -> Float[Array, 'B P 2']:
    """The score of each answer, at its last token; 0 where there is none."""
    scores: Any = model.apply({'params': params}, batch.tokens, batch.positions, batch.segment_ids)
    found = jnp.take_along_axis(scores, batch.ends.reshape(batch.ends.shape[0], -1), axis=1)
    return jnp.where(batch.pairs > 0, found.reshape(batch.ends.shape), 0.0)


def half_for_ties(better: Float[Array, 'B P'], worse: Float[Array, 'B P']) -> Float[Array, 'B P']:
    """1 where a pair is ordered rightly, 0 where wrongly, 0.5 where its scores are equal."""
    return 0.5 * (1.0 + jnp.sign(better - worse))
