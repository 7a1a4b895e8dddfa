"""Direct preference optimisation and its kin: losses of the log-probabilities of answers that people compared.

Of an answer y to a prompt x, log pi is its log-probability under the policy, log ref under a reference (the policy that
training starts from), |y| its number of tokens; h = log pi - log ref. w is the preferred answer of a pair, l the other.

    sigmoid       -log sigmoid(beta (h_w - h_l)), labels smoothed by e       Rafailov et al. 2023
    robust        the same without the bias of labels that are wrong by e    Chowdhury et al. 2024
    hinge         max(0, 1 - beta (h_w - h_l))                               Zhao et al. 2023
    ipo           (h_w / |w| - h_l / |l| - 1 / (2 beta))^2                   Azar et al. 2023
    sigmoid_norm  -log sigmoid(beta (h_w / |w| - h_l / |l|))                 Tulu 3, Lambert et al. 2024
    simpo         -log sigmoid(beta (log pi_w / |w| - log pi_l / |l|) - m)   Meng et al. 2024; no reference
    orpo          -log pi_w / |w| - beta log sigmoid(log odds_w - log odds_l)     Hong et al. 2024; no reference
    kto           1 - sigmoid(beta (h_w - z)) and 1 - sigmoid(beta (z - h_l))     Ethayarajh et al. 2024; no pairs

Of kto, z is the mean of h over answers to other prompts, or 0 where that is negative; no gradient goes through it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from llama_jax.errors import InputError, did_you_mean
from llama_jax.losses.reward import half_for_ties
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.ops.cross_entropy import token_log_probabilities
from llama_jax.types import Array, LossFn, Metrics, Params, PreferenceBatch, PyTree

LOSSES = ('sigmoid', 'robust', 'hinge', 'ipo', 'sigmoid_norm', 'simpo', 'orpo', 'kto')
_WITHOUT_REFERENCE = ('simpo', 'orpo')


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """What is minimised.

    Attributes:
      kind: one of `LOSSES`.
      beta: how much a log-probability counts; of orpo, the weight of its second term.
      label_smoothing: e, the share of pairs that are taken to be the wrong way round; of sigmoid and robust.
      margin: m of simpo.
      nll: weight of -log pi_w / |w| beside it. Llama 3 has 0.2, and does not say whether that is of a mean or a sum.
      mask_format: whether stop tokens and headers are left out of what is compared (Llama 3); the likelihood has them.
      desirable: weight of kto's preferred answers.
      undesirable: weight of the others.
    """

    kind: str = 'sigmoid'
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.0
    nll: float = 0.0
    mask_format: bool = False
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self):
        if self.kind not in LOSSES:
            raise InputError(f'unknown loss {self.kind!r}; {did_you_mean(self.kind, LOSSES)}')
        if not 0 < self.beta < math.inf:
            raise InputError(f'beta is {self.beta}; it must be a positive number')
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f'label_smoothing is {self.label_smoothing}; it must be from 0 to below 0.5')
        compares = tuple(kind for kind in LOSSES if kind != 'kto')
        for name, unused, kinds in (
            ('label_smoothing', 0, ('sigmoid', 'robust')), ('margin', 0, ('simpo',)), ('nll', 0, compares),
            ('desirable', 1, ('kto',)), ('undesirable', 1, ('kto',)),
        ):  # fmt: skip
            if getattr(self, name) != unused and self.kind not in kinds:
                raise InputError(
                    f'{name} is {getattr(self, name)}, and the loss {self.kind}, which has none; set it to {unused}, '
                    f'or choose {" or ".join(kinds)}'
                )
        for name in ('margin', 'nll', 'desirable', 'undesirable'):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f'{name} is {getattr(self, name)}; it must be 0 or more')

    @property
    def has_reference(self) -> bool:
        """Whether log-probabilities are compared with a reference's."""
        return self.kind not in _WITHOUT_REFERENCE

    @property
    def has_pairs(self) -> bool:
        """Whether two answers to a prompt are compared; else each is judged alone."""
        return self.kind != 'kto'


def pair_losses(
    loss: PreferenceLoss,
    policy: Float[Array, 'B P 2'],
    reference: Float[Array, 'B P 2'],
    lengths: Float[Array, 'B P 2'],
    *,
    present: Bool[Array, 'B P 2'] | None = None,
    baseline: Float[Array, 'B P'] | None = None,
) -> Float[Array, 'B P']:
    """The loss of each pair but for its `nll`.

    Args:
      loss: which, and its constants.
      policy: log-probabilities of the preferred answer and of the other, in nats.
      reference: the same under the reference.
      lengths: tokens that they are sums over.
      present: of kto, which of the two there are; None: both. Each counts as half a pair.
      baseline: z of kto.
    """
    ratios = policy - reference
    lengths = jnp.maximum(lengths, 1.0)
    means, mean_ratios = policy / lengths, ratios / lengths
    difference = loss.beta * _difference(ratios)
    e = loss.label_smoothing
    match loss.kind:
        case 'sigmoid':
            return -(1 - e) * jax.nn.log_sigmoid(difference) - e * jax.nn.log_sigmoid(-difference)
        case 'robust':
            biased = -(1 - e) * jax.nn.log_sigmoid(difference) + e * jax.nn.log_sigmoid(-difference)
            return biased / (1 - 2 * e)
        case 'hinge':
            return jax.nn.relu(1.0 - difference)
        case 'ipo':
            return jnp.square(_difference(mean_ratios) - 1 / (2 * loss.beta))
        case 'sigmoid_norm':
            return -jax.nn.log_sigmoid(loss.beta * _difference(mean_ratios))
        case 'simpo':
            return -jax.nn.log_sigmoid(loss.beta * _difference(means) - loss.margin)
        case 'orpo':
            odds = _log_odds(means)
            return -means[..., 0] - loss.beta * jax.nn.log_sigmoid(_difference(odds))
        case 'kto':
            above = loss.beta * (ratios - (0.0 if baseline is None else baseline[..., None]))
            signs, weights = jnp.array([1.0, -1.0]), jnp.array([loss.desirable, loss.undesirable])
            losses = weights[None, None] * (1.0 - jax.nn.sigmoid(signs[None, None] * above))
            return 0.5 * jnp.sum(losses, axis=-1, where=present)
    raise AssertionError(loss.kind)


def _difference(of_pair: Float[Array, 'B P 2']) -> Float[Array, 'B P']:
    return of_pair[..., 0] - of_pair[..., 1]


def _log_odds(log_p: Float[Array, 'B P 2']) -> Float[Array, 'B P 2']:
    """log(p / (1 - p)), also where p is nearly 1."""
    log_p = jnp.minimum(log_p, -1e-7)  # an answer that is certain has no odds
    return log_p - jnp.log(-jnp.expm1(log_p))


def answer_sums(
    values: Float[Array, 'B T'], segment_ids: Int[Array, 'B T'], segments: Int[Array, 'B P 2']
) -> Float[Array, 'B P 2']:
    """The sum over each answer's tokens; 0 where segment 0 stands for none."""
    of_answer = segment_ids[:, None, None, :] == segments[..., None]
    return jnp.sum(values[:, None, None, :], axis=-1, where=of_answer & (segments[..., None] > 0))


def preference_loss(
    model: LlamaForCausalLM, loss: PreferenceLoss, *, kept: bool = False, num_chunks: int = 1
) -> LossFn:
    """The loss function of a policy: the sum over pairs, weighted as they are.

    Args:
      model: of the policy, and of the reference.
      loss: which.
      kept: the reference's log-probabilities are in the batch; else `frozen` are its params, which may be the base that
        an adapter is trained on (`lora.with_base`).
      num_chunks: see `token_log_probabilities`.
    """

    def loss_fn(
        params: Params, frozen: PyTree, batch: PreferenceBatch, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        del rng
        policy, reference, lengths, nll = _compare(model, loss, kept, num_chunks, params, frozen, batch)
        present = batch.pairs > 0
        baseline = jnp.broadcast_to(batch.baseline[:, None], batch.weights.shape)
        losses = pair_losses(loss, policy, reference, lengths, present=present, baseline=baseline)
        if loss.has_pairs:
            figures = _figures(loss, policy, reference, lengths, present)
        else:
            figures = _judged_figures(loss, policy, reference, present, baseline)
        if loss.nll:
            figures['nll'] = nll
            losses = losses + loss.nll * nll
        totals = {name: jnp.sum(batch.weights * figure) for name, figure in figures.items()}
        # An answer that was judged alone is half a pair.
        weight = jnp.sum(batch.weights * jnp.mean(present, axis=-1))
        return jnp.sum(batch.weights * losses), weight, jax.lax.stop_gradient(totals)

    return loss_fn


def answer_rewards(
    model: LlamaForCausalLM, loss: PreferenceLoss, *, kept: bool = False, num_chunks: int = 1
) -> Callable[[Params, PyTree, PreferenceBatch], Float[Array, 'B P 2']]:
    """(params, frozen, batch) -> the reward of each answer that the policy stands for; as `preference_loss`."""

    def rewards(params: Params, frozen: PyTree, batch: PreferenceBatch) -> Float[Array, 'B P 2']:
        return _rewards(loss, *_compare(model, loss, kept, num_chunks, params, frozen, batch)[:3])

    return rewards


def ratio_sums(
    model: LlamaForCausalLM, loss: PreferenceLoss, *, kept: bool = False, num_chunks: int = 1
) -> Callable[[Params, PyTree, PreferenceBatch], tuple[Float[Array, ''], Float[Array, '']]]:
    """(params, frozen, batch) -> the sum of h over all answers of a batch, and their number; as `preference_loss`.

    Of answers to other prompts, the one by the other is z of kto.
    """

    def sums(params: Params, frozen: PyTree, batch: PreferenceBatch) -> tuple[Array, Array]:
        policy, reference, *_ = _compare(model, loss, kept, num_chunks, params, frozen, batch)
        present = (batch.pairs > 0) & (batch.weights > 0)[..., None]
        return jnp.sum(policy - reference, where=present), jnp.sum(present, dtype=jnp.float32)

    return sums


def answer_log_probabilities(
    model: LlamaForCausalLM, loss: PreferenceLoss, *, num_chunks: int = 1
) -> Callable[[Params, PreferenceBatch], Float[Array, 'B P 2']]:
    """(params, batch) -> the log-probability of each answer, as that of a reference is kept; as `preference_loss`."""

    def sums(params: Params, batch: PreferenceBatch) -> Float[Array, 'B P 2']:
        by_token = log_probabilities(model, params, batch, num_chunks)
        return answer_sums(jnp.where(_compared(loss, batch), by_token, 0.0), batch.segment_ids, batch.pairs)

    return sums


def _compared(loss: PreferenceLoss, batch: PreferenceBatch) -> Bool[Array, 'B T']:
    """The targets whose log-probabilities are compared."""
    return batch.loss_mask & ~batch.format_mask if loss.mask_format else batch.loss_mask


def _compare(model, loss, kept, num_chunks, params, frozen, batch):
    """(log-probabilities of the answers, under the reference, their tokens, -log pi_w / |w| of all its tokens)."""
    compared = _compared(loss, batch)

    def sums(values, mask):
        return answer_sums(jnp.where(mask, values, 0.0), batch.segment_ids, batch.pairs)

    by_token = log_probabilities(model, params, batch, num_chunks)
    ones = jnp.ones_like(by_token)
    policy = sums(by_token, compared)
    if not loss.has_reference:
        reference = jnp.zeros_like(policy)
    elif kept:
        reference = batch.reference
    else:
        under = log_probabilities(model, jax.lax.stop_gradient(frozen), batch, num_chunks)
        reference = jax.lax.stop_gradient(sums(under, compared))
    tokens = jnp.maximum(sums(ones, batch.loss_mask)[..., 0], 1.0)
    return policy, reference, sums(ones, compared), -sums(by_token, batch.loss_mask)[..., 0] / tokens


def log_probabilities(
    model: LlamaForCausalLM, params: Params, batch: Any, num_chunks: int = 1
) -> Float[Array, 'B T']:
    """Of each target of a batch that counts, in nats; of the others 0."""
    hidden, _ = model.apply(
        {'params': params}, batch.tokens, batch.positions, batch.segment_ids, method='hidden'
    )
    return token_log_probabilities(
        hidden, head_weight(params), batch.targets, num_chunks, model.partitioner, mask=batch.loss_mask
    )


def _rewards(loss, policy, reference, lengths) -> Float[Array, 'B P 2']:
    ratios = policy - reference
    by_length = loss.kind in ('ipo', 'sigmoid_norm', 'simpo', 'orpo')
    return loss.beta * (ratios / jnp.maximum(lengths, 1.0) if by_length else ratios)


def _judged_figures(loss, policy, reference, present, baseline) -> dict[str, Float[Array, 'B P']]:
    """What is logged of answers that were judged alone; of a pair of them the mean.

    Rewards count against the baseline: `reward` with the sign that it should have.
    """
    ratios = policy - reference
    rewards = jnp.array([[[1.0, -1.0]]]) * loss.beta * (ratios - baseline[..., None])
    figures = {
        'reward': rewards,
        'accuracy': 0.5 * (1.0 + jnp.sign(rewards)),
        'log_prob': policy,
        'baseline': jnp.broadcast_to(baseline[..., None], rewards.shape),
    }
    return {name: 0.5 * jnp.sum(figure, axis=-1, where=present) for name, figure in figures.items()}


def _figures(loss, policy, reference, lengths, present) -> dict[str, Float[Array, 'B P']]:
    """What is logged of each pair: rewards as the loss implies them, and how far the policy is from its reference.

    k1 and k3 are Schulman's estimators, by answer: of d = (log pi - log ref) / |y| they are d and exp(-d) - 1 + d. The
    answers are the data's, not the policy's own, so that neither is a divergence.
    """
    means = (policy - reference) / jnp.maximum(lengths, 1.0)
    rewards = _rewards(loss, policy, reference, lengths)
    better, worse = rewards[..., 0], rewards[..., 1]
    figures = {
        'reward_chosen': better,
        'reward_rejected': worse,
        'reward_margin': better - worse,
        'accuracy': half_for_ties(better, worse),
        'log_prob_chosen': policy[..., 0],
        'log_prob_rejected': policy[..., 1],
    }
    if loss.has_reference:
        answers = jnp.maximum(jnp.sum(present, axis=-1), 1)
        far = jnp.maximum(means, -60.0)  # exp of what is further would be infinite, which stops a run
        for name, estimate in (('k1', means), ('k3', jnp.expm1(-far) + means)):
            figures[name] = jnp.sum(estimate, axis=-1, where=present) / answers
    return figures
