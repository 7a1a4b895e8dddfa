"""Policy gradients: what an algorithm is, and the loss of answers that were drawn from the policy.

Of a token, d = log pi - log pi_old is how far the policy has moved since the answer was drawn, A its advantage, rho =
exp(d) the ratio, of the token or of its whole answer. A token's loss is

    token, sequence, sequence_mean    -min(rho A, clip(rho, 1 - low, 1 + high) A)    Schulman et al. 2017
    token_weight                      -clip(rho, 1 - low, 1 + high) A log pi, where the clipped ratio has no gradient
    none                              -A log pi

Algorithms differ in that, in how advantages are made (`rl.advantages`), in how much a token counts, which is a number
in the batch, and in where the divergence from the reference stands. That decides where training ends (r a reward, one
prompt, no division by a group's spread):

    reward   k1 = log pi - log pi_ref is taken from the reward: pi_ref exp(r / beta) / Z
    k2       k1^2 / 2 in the loss: the same, for its gradient is that of the same divergence
    k3       exp(-k1) - 1 + k1 in the loss, as GRPO's paper has it: the gradient is of the other divergence, and the
             policy ends at beta pi_ref / (lambda - r)
    none     at the best answer

k1 in the loss would hold nothing: the mean of its gradient is 0. It is refused.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from llama_jax.errors import InputError, did_you_mean
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.models.reward import VALUE, LlamaForRewardModel
from llama_jax.ops.cross_entropy import token_distributions, token_log_probabilities
from llama_jax.types import Array, LossFn, Metrics, Params, PolicyBatch, PyTree

ADVANTAGES = ('gae', 'batch_mean', 'leave_one_out', 'group_mean', 'group_std')
RATIOS = ('token', 'sequence', 'sequence_mean', 'token_weight', 'none')
WEIGHTS = ('token', 'sequence', 'constant')
DIVERGENCES = ('reward', 'k2', 'k3', 'none')


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A way to learn from answers and their scores.

    Attributes:
      advantage: 'gae' with values; 'batch_mean': return less the mean of all; of the answers to one prompt, score less
        the mean of the others ('leave_one_out'), of all ('group_mean'), or that over their spread ('group_std').
      whiten: advantages are given mean 0 and variance 1 over all that an iteration has drawn.
      ratio: of the 'token'; of its answer, 'sequence' (the product of its tokens') or 'sequence_mean' (their geometric
        mean); 'token_weight', without a gradient of its own; or 'none'.
      clip_low: the ratio counts down to 1 less this.
      clip_high: and up to 1 more this.
      weights: every 'token' counts the same, every answer ('sequence'), or a token as one of all that there was room
        for ('constant').
      divergence: from the reference: in the 'reward', or 'k2' or 'k3' in the loss, or 'none'.
      refill: groups whose scores are all the same are left out, and others drawn in their place.
    """

    advantage: str = 'gae'
    whiten: bool = True
    ratio: str = 'token'
    clip_low: float = 0.2
    clip_high: float = 0.2
    weights: str = 'token'
    divergence: str = 'reward'
    refill: bool = False

    def __post_init__(self):
        """Raises InputError where a setting is none that there is."""
        if self.divergence == 'k1':
            raise InputError(
                "divergence is 'k1': in the loss the mean of its gradient is 0, and the policy would collapse; choose "
                'reward, which takes it from the reward, or k2'
            )
        known = {
            'advantage': ADVANTAGES, 'ratio': RATIOS, 'weights': WEIGHTS, 'divergence': DIVERGENCES
        }  # fmt: skip
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise InputError(f'{name} is {value!r}; {did_you_mean(value, values)}')
        for name in ('clip_low', 'clip_high'):
            if not (value := getattr(self, name)) > 0:
                raise InputError(f'{name} is {value}; it must be above 0 (inf: no clipping)')
        if self.refill and not self.in_groups:
            raise InputError(
                f'refill is {self.refill}, and the advantage {self.advantage}, which has no groups; leave it out, or '
                'choose leave_one_out, group_mean or group_std'
            )

    @property
    def has_values(self) -> bool:
        """Whether something is trained beside the policy to expect its reward."""
        return self.advantage == 'gae'

    @property
    def in_groups(self) -> bool:
        """Whether the answers to one prompt are compared with each other."""
        return self.advantage in ('leave_one_out', 'group_mean', 'group_std')

    @property
    def has_reference(self) -> bool:
        """Whether it is held near where training started."""
        return self.divergence != 'none'


PPO = Algorithm()
_NO_CLIP = math.inf
_GRPO = dataclasses.replace(PPO, advantage='group_std', whiten=False, weights='sequence', divergence='k3')
# Schulman et al. 2017 with the settings of Llama 2; Williams 1992; Ahmadian et al. 2024; Shao et al. 2024; Liu et al.
# 2025 (2503.20783); Yu et al. 2025 (2503.14476); Zheng et al. 2025 (2507.18071); MiniMax 2025 (2506.13585).
PRESETS = {
    'ppo': PPO,
    'reinforce': dataclasses.replace(
        PPO, advantage='batch_mean', whiten=False, ratio='none', clip_low=_NO_CLIP, clip_high=_NO_CLIP
    ),
    'rloo': dataclasses.replace(
        PPO, advantage='leave_one_out', whiten=False, ratio='sequence', weights='sequence'
    ),
    'grpo': _GRPO,
    'dr_grpo': dataclasses.replace(_GRPO, advantage='group_mean', weights='constant', divergence='none'),
    'dapo': dataclasses.replace(_GRPO, clip_high=0.28, weights='token', divergence='none', refill=True),
    'gspo': dataclasses.replace(
        _GRPO, ratio='sequence_mean', clip_low=3e-4, clip_high=4e-4, divergence='none'
    ),
    'cispo': dataclasses.replace(
        _GRPO, ratio='token_weight', clip_low=_NO_CLIP, clip_high=0.28, weights='token', divergence='none'
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ValueLoss:
    """How what is expected of the policy is learnt: half of the squared error.

    Attributes:
      weight: in the loss.
      clip: what counts is the larger error, of the value or of one that has moved by at most this; 0: the value's.
    """

    weight: float = 0.1
    clip: float = 0.2

    def __post_init__(self):
        for name in ('weight', 'clip'):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise InputError(f'{name} is {value}; it must be 0 or more')


def policy_losses(
    algorithm: Algorithm, log_p: Float[Array, 'B T'], batch: PolicyBatch
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
    """(the loss of each token but for its divergence from the reference, its ratio)."""
    counted = batch.weights > 0
    moved = jnp.where(counted, log_p - batch.old, 0.0)
    if algorithm.ratio.startswith('sequence'):
        mean = algorithm.ratio == 'sequence_mean'
        moved = over_answers(moved, batch.segment_ids, batch.lengths, mean=mean)
    ratios = jnp.exp(jnp.clip(moved, -30.0, 30.0))
    clipped = jnp.clip(ratios, 1.0 - algorithm.clip_low, 1.0 + algorithm.clip_high)
    match algorithm.ratio:
        case 'none':
            gain = batch.advantages * log_p
        case 'token_weight':
            gain = jax.lax.stop_gradient(clipped) * batch.advantages * log_p
        case _:
            gain = jnp.minimum(ratios * batch.advantages, clipped * batch.advantages)
    return jnp.where(counted, -gain, 0.0), ratios


def divergences(kind: str, away: Float[Array, 'B T']) -> Float[Array, 'B T']:
    """Schulman's estimators of the divergence from a reference, of each token: `away` is log pi - log pi_ref."""
    match kind:
        case 'k1':
            return away
        case 'k2':
            return 0.5 * jnp.square(away)
        case 'k3':
            return jnp.expm1(-jnp.maximum(away, -30.0)) + away  # exp of what is further would be infinite
    raise AssertionError(kind)


def value_losses(loss: ValueLoss, values: Float[Array, 'B T'], batch: PolicyBatch) -> Float[Array, 'B T']:
    """The loss of what is expected at each token, unweighted."""
    error = jnp.square(values - batch.returns)
    if loss.clip:
        near = batch.values + jnp.clip(values - batch.values, -loss.clip, loss.clip)
        error = jnp.maximum(error, jnp.square(near - batch.returns))
    return 0.5 * error


def over_answers(
    values: Float[Array, 'B T'], segment_ids: Int[Array, 'B T'], lengths: Int[Array, 'B P'], *, mean: bool
) -> Float[Array, 'B T']:
    """At each token the sum over its answer, or the mean over so many tokens of it."""
    number = lengths.shape[1]
    sums = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=number + 1))(values, segment_ids)
    if mean:
        sums = sums / jnp.maximum(jnp.pad(lengths, ((0, 0), (1, 0))), 1)
    return jnp.take_along_axis(sums, segment_ids, axis=1)


def policy_loss(
    model: LlamaForCausalLM,
    algorithm: Algorithm,
    *,
    temperature: float = 1.0,
    value_model: LlamaForRewardModel | None = None,
    value_loss: ValueLoss = ValueLoss(),
    compared: bool = True,
    num_chunks: int = 1,
) -> LossFn:
    """The loss function of a policy: the sum over tokens, as much as each counts, to be divided by `batch.counts`.

    Args:
      model: of the policy.
      algorithm: which.
      temperature: that answers were drawn at.
      value_model: expects the reward; its weights stand at `VALUE` beside the policy's. None where there is none.
      value_loss: how it learns.
      compared: `batch.reference` is of a reference; else no divergence from it is among the figures.
      num_chunks: see `token_log_probabilities`.
    """

    def loss_fn(
        params: Params, frozen: PyTree, batch: PolicyBatch, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        del frozen, rng
        policy = policy_of(params)
        log_p, entropies = token_distributions(
            hidden_of(model, policy, batch), head_weight(policy), batch.targets, num_chunks, model.partitioner,
            temperature, batch.weights > 0,
        )  # fmt: skip
        losses, ratios = policy_losses(algorithm, log_p, batch)
        away = log_p - batch.reference
        figures = _figures(algorithm, batch, log_p, ratios) | {'entropy': entropies}
        if compared:
            figures |= {kind: divergences(kind, away) for kind in ('k1', 'k3')}
        if algorithm.divergence in ('k2', 'k3'):
            losses = losses + batch.beta[:, None] * divergences(algorithm.divergence, away)
        losses = batch.importance * losses
        if value_model is not None:
            values = expected_values(value_model, params[VALUE], batch)
            of_values = value_losses(value_loss, values, batch)
            losses = losses + value_loss.weight * of_values
            figures['value_loss'] = of_values
        reported = jnp.where(batch.weights > 0, batch.reported[:, None], 0.0)
        sums = {
            name: jnp.sum(jnp.where(reported > 0, reported * value, 0.0)) for name, value in figures.items()
        }
        loss = jnp.sum(jnp.where(batch.weights > 0, batch.weights * losses, 0.0))
        return loss, jnp.sum(batch.counts), jax.lax.stop_gradient(sums)

    return loss_fn


def _figures(
    algorithm: Algorithm, batch: PolicyBatch, log_p: Float[Array, 'B T'], ratios: Float[Array, 'B T']
) -> dict[str, Float[Array, 'B T']]:
    """What is logged of each token: how far the policy has moved since it was drawn, and what was clipped."""
    up = batch.advantages > 0
    low, high = ratios < 1 - algorithm.clip_low, ratios > 1 + algorithm.clip_high
    # The smaller of two is taken: a ratio below counts where the advantage is below 0, one above where it is above. One
    # that is a weight is clipped whatever it weighs.
    always = algorithm.ratio == 'token_weight'
    acts: dict[str, Bool[Array, 'B T']] = {
        'clipped_low': low & (always | ~up), 'clipped_high': high & (always | up)
    }  # fmt: skip
    return {
        'moved': batch.old - log_p,
        'ratio_gap': jnp.abs(ratios - 1.0),
        **{name: value.astype(jnp.float32) for name, value in acts.items()},
    }


def policy_of(params: Params) -> Params:
    """The policy's weights alone."""
    return {name: weight for name, weight in params.items() if name != VALUE}


def hidden_of(model: Any, params: Params, batch: Any) -> Float[Array, 'B T D']:
    """What the head reads."""
    hidden, _ = model.apply(
        {'params': params}, batch.tokens, batch.positions, batch.segment_ids, method='hidden'
    )
    return hidden


def expected_values(model: LlamaForRewardModel, params: Params, batch: PolicyBatch) -> Float[Array, 'B T']:
    """What is expected before each target, of all that comes from it on."""
    values: Any = model.apply({'params': params}, batch.tokens, batch.positions, batch.segment_ids)
    return values


def drawn_log_probabilities(
    model: LlamaForCausalLM, params: Params, batch: PolicyBatch, *, temperature: float, num_chunks: int = 1
) -> Float[Array, 'B T']:
    """Of each target of an answer at the sampling temperature, in nats: what `old` and `reference` are made of."""
    return token_log_probabilities(
        hidden_of(model, params, batch), head_weight(params), batch.targets, num_chunks, model.partitioner,
        temperature, batch.weights > 0,
    )  # fmt: skip
