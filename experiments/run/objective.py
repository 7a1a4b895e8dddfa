"""What trainings differ in, as plain values: an objective has no step, no loop and no files of its own."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.policy.objective import abstract_reference, policy_objective
from experiments.run.adapters import adapted
from experiments.run.config_file import split_list
from experiments.run.start import first_params, first_scores
from llama_jax import pretrained
from llama_jax.errors import InputError
from llama_jax.losses.dpo import PreferenceLoss, preference_loss, ratio_sums
from llama_jax.losses.language_model import language_model_loss
from llama_jax.losses.reward import reward_loss
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import Partitioner
from llama_jax.train.state import TrainState, abstract_state
from llama_jax.train.step import compile_train_step
from llama_jax.train.throughput import training_flops_per_token
from llama_jax.types import LMBatch, LossFn, Params, PreferenceBatch, PyTree


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained and what it is to minimise; a reference, a reward, an adapter's base are `frozen`."""

    params: Params  # abstract, of what is trained; weights in any representation (`ops.linear`)
    axes: PyTree  # a tree like `params` with a tuple of logical axes at each leaf
    first_params: Callable[[Params], Params]  # `params` with shardings -> those that a new run starts with
    loss_fn: LossFn
    batch: PyTree  # the abstract global batch with its shardings
    models: tuple[LlamaConfig, ...]  # which a batch goes through forward and backward
    read: tuple[LlamaConfig, ...] = ()  # forward alone
    frozen: PyTree = dataclasses.field(default_factory=dict)  # what the loss reads and nothing changes
    # (params, frozen) -> the model's whole weights, which are validated, examined and sampled from.
    view: Callable[[Params, PyTree], Params] = lambda params, frozen: params
    # (whole weights, frozen, batch) -> what the next batch is compared with: a pass forward before each update.
    before: Callable[[Params, PyTree, PyTree], jax.Array] | None = None
    read_before: tuple[LlamaConfig, ...] = ()  # which that batch goes through
    beside_base: bool = False  # what is trained stands beside frozen weights, whose gradient nobody takes
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what model.json says of them

    def weights(self, state: TrainState) -> Params:
        """The whole weights as they are in `state`."""
        return self.view(state.params, self.frozen)

    def flops_per_token(self, seq_len: int, *, and_before: bool = False) -> tuple[float, float]:
        """Of an update, and of the pass before it where that is asked for: as `training_flops_per_token`."""
        trained = (training_flops_per_token(model, seq_len, self.beside_base) for model in self.models)
        read = (*self.read, *self.read_before) if and_before else self.read
        return _sums((*trained, forward_flops_per_token(read, seq_len)))


def forward_flops_per_token(models: Iterable[LlamaConfig], seq_len: int) -> tuple[float, float]:
    """One token's way forward through these models, a third of training: (causal, full)."""
    causal, full = _sums(training_flops_per_token(model, seq_len) for model in models)
    return causal / 3, full / 3


def _sums(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    pairs = tuple(pairs)
    return sum(causal for causal, _ in pairs), sum(full for _, full in pairs)


def objective_of(
    config: ConfigDict,
    model: LlamaForCausalLM,
    partitioner: Partitioner,
    base: pretrained.Checkpoint | None = None,
    *,
    num_pairs: int = 0,
    reference: Params | None = None,
) -> Objective:
    """What a configuration describes, told by its sections: what a command trains, and preflight compiles.

    Args:
      config: all keys.
      model: of the policy, with the knobs that any objective has.
      partitioner: places weights and batches.
      base: whose weights it starts with.
      num_pairs: of answers in a row, where it is trained on such; 0: one for 512 tokens.
      reference: the weights of a live one; None: their shapes.
    """
    num_pairs = num_pairs or max(1, config.data.seq_len // 512)
    if 'algorithm' in config:
        of_policy = language_modelling(config, model, partitioner, base)
        return policy_objective(of_policy, config, scored(model), partitioner, base, reference)
    if 'reward' in config:
        objective = scoring(config, scored(model), partitioner, num_pairs, base)
    elif 'loss' in config:
        objective = preferring(config, model, partitioner, num_pairs, base, reference)
    else:
        objective = language_modelling(config, model, partitioner, base)
    return adapted(objective, config, partitioner, base)


def language_modelling(
    config: ConfigDict,
    model: LlamaForCausalLM,
    partitioner: Partitioner,
    base: pretrained.Checkpoint | None = None,
) -> Objective:
    """Next-token prediction with all weights; which targets count is the batch's to say."""
    shape = config.train.batch_size, config.data.seq_len
    return Objective(
        *abstract_params_and_axes(model),
        first_params=functools.partial(first_params, model, base, config.seed),
        loss_fn=language_model_loss(
            model, z_loss=config.train.get('z_loss', 0.0), num_chunks=config.train.loss_chunks
        ),
        batch=LMBatch.abstract(*shape, partitioner.batch_sharding(*shape)),
        models=(model.config,),
    )


def scoring(
    config: ConfigDict,
    model: LlamaForRewardModel,
    partitioner: Partitioner,
    num_pairs: int,
    base: pretrained.Checkpoint | None = None,
) -> Objective:
    """A reward model with all weights."""
    return Objective(
        *abstract_params_and_axes(model),
        first_params=functools.partial(first_scores, model, base, config.seed),
        loss_fn=pair_loss(config, model),
        batch=_pairs_batch(config, partitioner, num_pairs),
        models=(model.config,),
    )


def preferring(
    config: ConfigDict,
    model: LlamaForCausalLM,
    partitioner: Partitioner,
    num_pairs: int,
    base: pretrained.Checkpoint | None = None,
    reference: Params | None = None,
) -> Objective:
    """A policy with all weights, and a reference that is frozen, or whose log-probabilities are in the batch."""
    is_live = loss_of(config).has_reference and config.loss.reference == 'live'
    if reference is None:
        reference = abstract_reference(model, partitioner) if is_live else {}
    before = None if loss_of(config).has_pairs else _baseline(config, model)
    return Objective(
        *abstract_params_and_axes(model),
        first_params=functools.partial(first_params, model, base, config.seed),
        loss_fn=pair_loss(config, model),
        batch=_pairs_batch(config, partitioner, num_pairs),
        models=(model.config,),
        read=(model.config,) * is_live,
        frozen=reference,
        before=before,
        read_before=(model.config,) * (1 + is_live) if before else (),
    )


def _baseline(config: ConfigDict, model: LlamaForCausalLM) -> Callable[[Params, PyTree, PyTree], jax.Array]:
    sums = baseline_sums(config, model)

    def measured(weights: Params, frozen: PyTree, batch: PreferenceBatch) -> jax.Array:
        total, number = sums(weights, frozen, batch)
        return jnp.full_like(batch.baseline, jnp.maximum(total / jnp.maximum(number, 1.0), 0.0))

    return measured


def baseline_sums(
    config: ConfigDict, model: LlamaForCausalLM
) -> Callable[[Params, PyTree, PreferenceBatch], tuple[jax.Array, jax.Array]]:
    """Of answers to other prompts, which those that were judged alone are compared with: `losses.dpo.ratio_sums`."""
    read = reading_model(config, model).clone(remat='none')
    kept = config.loss.reference == 'kept'
    return ratio_sums(read, loss_of(config), kept=kept, num_chunks=config.train.loss_chunks)


def pair_loss(config: ConfigDict, model: Any) -> LossFn:
    """The loss of a model's whole weights on rows of pairs."""
    read = reading_model(config, model)
    if 'reward' in config:
        return reward_loss(read, **config.reward)
    kept = config.loss.reference == 'kept'
    return preference_loss(read, loss_of(config), kept=kept, num_chunks=config.train.loss_chunks)


def loss_of(config: ConfigDict) -> PreferenceLoss:
    """`config.loss` as the dataclass that the library takes."""
    if config.loss.reference not in ('live', 'kept'):
        raise InputError(f'--config.loss.reference={config.loss.reference} is neither live nor kept')
    given = {name: value for name, value in config.loss.items() if name not in ('reference', 'constants')}
    with flags_named(*(f'--config.loss.{name}' for name in config.loss)):
        return PreferenceLoss(**given, **_constants(config.loss.constants))


def _constants(text: str) -> dict[str, Any]:
    """'label_smoothing=0.1' as {'label_smoothing': 0.1}."""
    names = ('label_smoothing', 'margin', 'desirable', 'undesirable')
    try:
        pairs = [
            (name.strip(), float(value)) for name, value in (part.split('=') for part in split_list(text))
        ]
    except ValueError:
        pairs = [('', 0.0)]
    if not all(name in names for name, _ in pairs):
        raise InputError(
            f'constants is {text!r}; write them as in label_smoothing=0.1; there are {", ".join(names)}'
        )
    return dict(pairs)


def reading_model(config: ConfigDict, model: Any) -> Any:
    """The model as it reads rows of pairs."""
    return model.clone(attention_implementation='shared_prefix') if config.data.share_prompt else model


def scored(model: LlamaForCausalLM) -> LlamaForRewardModel:
    """A language model's architecture and knobs with a score in the place of its head."""
    knobs = {name: getattr(model, name) for name in ('dtype', 'remat', 'unroll', 'attention_implementation')}
    config = dataclasses.replace(model.config, scalar_head=True)
    return LlamaForRewardModel(config, partitioner=model.partitioner, **knobs)


def _pairs_batch(config: ConfigDict, partitioner: Partitioner, num_pairs: int) -> PreferenceBatch:
    shape = config.train.batch_size, config.data.seq_len
    return PreferenceBatch.abstract(
        *shape, num_pairs, partitioner.batch_sharding(*shape), partitioner.sharding(('batch',))
    )


def compile_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    partitioner: Partitioner,
    num_microbatches: int,
    compiler_options: Mapping[str, Any],
) -> tuple[TrainState, Callable]:
    """(the abstract state with its shardings, the jitted update) of an objective; no memory is taken."""
    target = abstract_state(objective.params, objective.axes, tx, partitioner)
    step_fn = compile_train_step(
        target, loss_fn=objective.loss_fn, tx=tx, num_microbatches=num_microbatches,
        compiler_options=compiler_options,
    )  # fmt: skip
    return target, step_fn
