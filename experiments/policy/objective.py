"""A policy that is trained on its own answers: `config.algorithm` as the library takes it, and what is held beside it.

Trained whole, the reference is a second copy of the weights, and what expects the reward has a trunk of its own. As
adapters, policy, reference and values share one base: the policy's adapters and the values' stand beside it, and the
base alone is the reference.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.run.adapters import adapted
from experiments.run.config_file import split_list
from experiments.run.settings import make_lora_config, mesh_sizes
from experiments.run.start import first_scores
from llama_jax import pretrained
from llama_jax.errors import InputError, did_you_mean
from llama_jax.lora import LoraConfig, abstract_adapters, combine, init_adapters, only_layers
from llama_jax.losses.policy import (
    PRESETS,
    Algorithm,
    ValueLoss,
    drawn_log_probabilities,
    expected_values,
    policy_loss,
    policy_of,
)
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.models.reward import VALUE, LlamaForRewardModel
from llama_jax.partitioning import Partitioner, make_mesh, parse_rules
from llama_jax.pretrained.adapters import trained_params
from llama_jax.rl.advantages import Horizon
from llama_jax.rl.iteration import Shape
from llama_jax.train.optimizer import decayed
from llama_jax.train.state import shardings_of
from llama_jax.types import Array, LossFn, Params, PolicyBatch, PyTree


@dataclasses.dataclass(frozen=True)
class Course:
    """How an iteration goes, whatever the algorithm.

    Attributes:
      epochs: passes over its answers.
      kl_limit: nats an answer that the policy may move before it ends; 0: any.
      beta_target: nats an answer to the reference, which beta is moved to hold; 0: it stays.
      importance: limit of the weights for what the sampler did otherwise than the policy; 0: there are none.
      patience: measurements without a better held-out reward after which a run ends; 0: it does not.
      value_rate: learning rate of the values, as a multiple of the policy's; 0: they stay as they begin.
    """

    epochs: int = 1
    kl_limit: float = 0.0
    beta_target: float = 0.0
    importance: float = 0.0
    patience: int = 0
    value_rate: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least, value = int(field.name == 'epochs'), getattr(self, field.name)
            if not least <= value < math.inf:
                raise InputError(f'{field.name} is {value}; it must be at least {least}')


@dataclasses.dataclass(frozen=True)
class Recipe:
    """`config.algorithm`: a preset and what overrides its numbers."""

    algorithm: Algorithm
    horizon: Horizon
    value_loss: ValueLoss
    course: Course


_PARTS = {
    **{field.name: ('algorithm', field.name) for field in dataclasses.fields(Algorithm)},
    **{field.name: ('course', field.name) for field in dataclasses.fields(Course)},
    'discount': ('horizon', 'discount'), 'trace': ('horizon', 'trace'),
    'value_weight': ('value_loss', 'weight'), 'value_clip': ('value_loss', 'clip'),
}  # fmt: skip


def recipe_of(config: ConfigDict) -> Recipe:
    """The algorithm of a configuration.

    Raises:
      InputError: it is none, or asks for what an algorithm cannot have.
    """
    section = config.algorithm
    with flags_named('--config.algorithm.name'):
        if section.name not in PRESETS:
            raise InputError(f'unknown algorithm {section.name!r}; {did_you_mean(section.name, PRESETS)}')
    parts: dict[str, Any] = {
        'algorithm': PRESETS[section.name], 'horizon': Horizon(), 'value_loss': ValueLoss(), 'course': Course()
    }  # fmt: skip
    with flags_named('--config.algorithm.constants'):
        for text in split_list(section.constants):
            name, equals, value = (part.strip() for part in text.partition('='))
            if not equals or name not in _PARTS:
                raise InputError(
                    f'constants has {text!r}; write them as in clip_high=0.28,whiten=false; '
                    f'{did_you_mean(name, _PARTS)}'
                )
            part, field = _PARTS[name]
            parts[part] = dataclasses.replace(
                parts[part], **{field: _parsed(name, value, getattr(parts[part], field))}
            )
    return Recipe(**parts)


def _parsed(name: str, value: str, known: Any) -> Any:
    kinds: dict[type, Callable[[str], Any]] = {
        bool: {'true': True, 'false': False}.__getitem__, float: float, int: int, str: str
    }  # fmt: skip
    try:
        return kinds[type(known)](value.lower())
    except (KeyError, ValueError):
        raise InputError(
            f'constants has {name}={value!r}; it must be of type {type(known).__name__}, as {known!r} is'
        ) from None


def check_policy(config: ConfigDict) -> Recipe:
    """What is wrong with the keys of policy gradients, before anything is read."""
    recipe = recipe_of(config)
    rollout, section, batch = config.rollout, config.algorithm, config.train.batch_size
    for key in ('batch_size', 'samples', 'max_new_tokens', 'slots'):
        if rollout[key] < 1:
            raise InputError(f'--config.rollout.{key}={rollout[key]}; it must be at least 1')
    if not rollout.temperature > 0:
        raise InputError(f'--config.rollout.temperature={rollout.temperature}; it must be above 0')
    if recipe.algorithm.in_groups and rollout.samples < 2:
        raise InputError(
            f'--config.rollout.samples={rollout.samples}, and the advantage {recipe.algorithm.advantage} of '
            f'--config.algorithm.name={section.name}, which compares the answers to one prompt; draw at least 2'
        )
    for name, part in (('--config.train.batch_size', batch), ('--config.rollout.samples', rollout.samples)):
        if rollout.batch_size % part:
            raise InputError(
                f'--config.rollout.batch_size={rollout.batch_size} answers do not divide into {name}={part}; make it a '
                'multiple'
            )
    if rollout.max_new_tokens >= config.data.seq_len:
        raise InputError(
            f'--config.rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in rows of '
            f'--config.data.seq_len={config.data.seq_len}'
        )
    if values_begin_as_a_judge(config) and not recipe.algorithm.has_values:
        raise InputError(
            f'--config.algorithm.values_from={section.values_from}, and --config.algorithm.name={section.name}, '
            'which has no values; leave it empty'
        )
    return recipe


def shape_of(config: ConfigDict, partitioner: Partitioner) -> Shape:
    """How minibatches are made."""
    return Shape(
        config.train.batch_size, config.data.seq_len, partitioner.axis_size('batch') * config.train.num_microbatches,
        config.rollout.max_new_tokens, config.seed,
    )  # fmt: skip


def abstract_reference(model: LlamaForCausalLM, partitioner: Partitioner) -> Params:
    """A policy's weights as they are held to be compared with: matrices in the type that they are computed with."""
    shapes, axes = abstract_params_and_axes(model)
    return jax.tree.map(
        lambda leaf, sharding, is_matrix: jax.ShapeDtypeStruct(
            leaf.shape, model.dtype if is_matrix else leaf.dtype, sharding=sharding
        ),
        shapes, partitioner.tree_shardings(shapes, axes), decayed(shapes),
    )  # fmt: skip


def policy_objective(
    of_policy: Any,
    config: ConfigDict,
    value_model: LlamaForRewardModel,
    partitioner: Partitioner,
    base: pretrained.Checkpoint | None,
    reference: Params | None,
) -> Any:
    """The `Objective` of policy gradients.

    Args:
      of_policy: of the same model's whole weights, whatever it minimises.
      config: all keys.
      value_model: the architecture with a score; without an algorithm that has values nothing is made of it.
      partitioner: places weights and batches.
      base: whose weights it starts with.
      reference: the weights of one; None: their shapes, for a step that is compiled and not run.
    """
    recipe, lora = recipe_of(config), make_lora_config(config)
    model = language_model(value_model)
    made = adapted(of_policy, config, partitioner, base)
    params, axes = dict(made.params), dict(made.axes)
    if recipe.algorithm.has_values:
        shapes = abstract_params_and_axes(value_model)
        params[VALUE], axes[VALUE] = (
            abstract_adapters(_of_values(lora), *shapes, partitioner) if lora else shapes
        )
    frozen = made.frozen
    if not lora:
        has = recipe.algorithm.has_reference
        frozen = (abstract_reference(model, partitioner) if has else {}) if reference is None else reference
    loss_fn = policy_loss(
        model, recipe.algorithm, temperature=config.rollout.temperature,
        value_model=value_model if recipe.algorithm.has_values else None, value_loss=recipe.value_loss,
        compared=is_compared(config), num_chunks=config.train.loss_chunks,
    )  # fmt: skip

    def first_params(target: Params) -> Params:
        begun = made.first_params(policy_of(target))
        if VALUE in target:
            begun = begun | {VALUE: _first_values(config, value_model, base, made.provenance, target[VALUE])}
        return begun

    shape, num_answers = (
        (config.train.batch_size, config.data.seq_len),
        shape_of(config, partitioner).most_in_row,
    )
    return dataclasses.replace(
        made, params=params, axes=axes, first_params=first_params, loss_fn=_of_whole(loss_fn, lora), frozen=frozen,
        batch=PolicyBatch.abstract(
            *shape, num_answers, partitioner.batch_sharding(*shape), partitioner.sharding(('batch',))
        ),
        models=(model.config, *([value_model.config] if recipe.algorithm.has_values else [])),
        view=lambda params, frozen: made.view(policy_of(params), frozen),
    )  # fmt: skip


def language_model(value_model: LlamaForRewardModel) -> LlamaForCausalLM:
    """The language model of the same trunk and knobs."""
    knobs = {
        name: getattr(value_model, name) for name in ('dtype', 'remat', 'unroll', 'attention_implementation')
    }
    config = dataclasses.replace(value_model.config, scalar_head=False)
    return LlamaForCausalLM(config, partitioner=value_model.partitioner, **knobs)


def is_compared(config: ConfigDict) -> bool:
    """Whether there is a reference: where the algorithm has one, or where it is there as the base of adapters."""
    return recipe_of(config).algorithm.has_reference or bool(config.lora.rank)


def values_begin_as_a_judge(config: ConfigDict) -> bool:
    """Whether what expects the reward begins as a reward model; else it expects nothing."""
    return config.algorithm.values_from not in ('', 'zero')


def _of_values(lora: LoraConfig | None) -> LoraConfig:
    """What is trained of the values beside the policy's base."""
    assert lora is not None
    return dataclasses.replace(
        lora, targets=tuple(name for name in lora.adapted if name != 'head'),
        train_whole=(*(name for name in lora.train_whole if name not in ('head', 'score')), 'score'),
    )  # fmt: skip


def _of_whole(loss_fn: LossFn, lora: LoraConfig | None) -> LossFn:
    """A loss of whole weights as one of what is trained."""

    def loss(params: Params, frozen: PyTree, batch: PolicyBatch, rng: Array):
        return loss_fn(_whole(lora, params, frozen), frozen, batch, rng)

    return loss


def _whole(lora: LoraConfig | None, params: Params, frozen: PyTree) -> Params:
    """The policy's weights, and beside them those of the values."""
    if lora is None:
        return params
    whole = combine(only_layers(policy_of(params), lora.layers), frozen, lora.scale)
    if VALUE in params:
        trunk = {name: leaf for name, leaf in frozen.items() if name != 'head'}
        whole[VALUE] = combine(only_layers(params[VALUE], lora.layers), trunk, lora.scale)
    return whole


def _first_values(
    config: ConfigDict,
    model: LlamaForRewardModel,
    base: pretrained.Checkpoint | None,
    provenance: Mapping[str, Any],
    target: Params,
) -> Params:
    """What expects the reward, as it begins: a reward model's weights, or the policy's trunk, which expects nothing."""
    given, lora = config.algorithm.values_from, make_lora_config(config)
    if not values_begin_as_a_judge(config):
        if lora is None:
            trunk = {name: leaf for name, leaf in target.items() if name != 'score'}
            begun = first_scores(model, base, config.seed, trunk | {'score': target['score']})
            return begun | {'score': jnp.zeros_like(begun['score'])}
        zeros = {**_shapes(model), 'score': jnp.zeros(target['score'].shape, jnp.float32)}
        start = functools.partial(init_adapters, _of_values(lora), zeros)
        return jax.jit(start, out_shardings=shardings_of(target))(jax.random.key(config.seed + 2))
    with flags_named('--config.algorithm.values_from'):
        opened = pretrained.open(given)
        if not opened.config.scalar_head:
            raise InputError(f'{given} is a language model, which has no score; give a reward model, or zero')
        if dataclasses.replace(opened.config, scalar_head=False) != dataclasses.replace(
            model.config, scalar_head=False
        ):
            raise InputError(
                f'the reward model {given} has other sizes than the policy; give one of its size, or zero'
            )
        if lora is None:
            return opened.params(target)
        if not opened.adapters:
            raise InputError(
                f'the reward model {given} was trained whole, and --config.lora.rank={lora.rank} has values as '
                "adapters beside the policy's base; give one that was trained as adapters beside it, or zero"
            )
        for name, of_policy in provenance.get('adapters', {}).items():
            if name in ('fingerprint', 'weights', 'scale') and (its := opened.adapters[name]) != of_policy:
                raise InputError(
                    f"the reward model {given} is adapters of {name} {its}, the policy's have {of_policy}; give one "
                    'that was trained beside the same base with the same --config.lora, or zero'
                )
        return trained_params(opened.place, target)


def with_scaled_values(params: Params, slope: float) -> Params:
    """What is trained, with all values multiplied by a number: their score is, which they are linear in."""
    values = params[VALUE]
    scale = jax.jit(lambda score: score * slope, out_shardings=values['score'].sharding)
    return params | {VALUE: values | {'score': scale(values['score'])}}


def _shapes(model: LlamaForRewardModel) -> Params:
    return abstract_params_and_axes(model)[0]


def make_scorer(config: ConfigDict, value_model: LlamaForRewardModel) -> Callable[..., dict[str, Array]]:
    """A jitted (params, frozen, batch) -> what is known of drawn answers: `old`, `reference` and `values`, [B, T] each.

    By the forward pass of training, at the sampling temperature: the ratio of a policy that has not moved is 1.
    """
    recipe, lora, model = recipe_of(config), make_lora_config(config), language_model(value_model)
    log_p = functools.partial(
        drawn_log_probabilities, model, temperature=config.rollout.temperature, num_chunks=config.train.loss_chunks
    )  # fmt: skip

    def score(params: Params, frozen: PyTree, batch: PolicyBatch) -> dict[str, Array]:
        whole = _whole(lora, params, frozen)
        found = {'old': log_p(policy_of(whole), batch)}
        if is_compared(config):
            found['reference'] = log_p(frozen, batch)
        if recipe.algorithm.has_values:
            found['values'] = expected_values(value_model, whole[VALUE], batch)
        return found

    partitioner = value_model.partitioner
    return jax.jit(score, out_shardings=None if partitioner is None else partitioner.sharding())


def sampler_partitioner(
    config: ConfigDict, training: Partitioner, devices: Sequence[Any] | None = None
) -> Partitioner:
    """Where answers are drawn: training's own mesh, or `config.rollout.mesh` of these devices (all there are).

    Raises:
      InputError: the devices do not make that mesh.
    """
    if not config.rollout.mesh:
        if config.rollout.axis_rules:
            raise InputError(
                f'--config.rollout.axis_rules={config.rollout.axis_rules} without --config.rollout.mesh; give both'
            )
        return training
    with flags_named('--config.rollout.mesh'):
        mesh = make_mesh(mesh_sizes(split_list(config.rollout.mesh), '--config.rollout.mesh'), devices)
    with flags_named('--config.rollout.axis_rules'):
        return Partitioner(mesh, parse_rules(config.rollout.axis_rules))
