"""The optimiser by name, and the schedule of its learning rate, as the LLaMA papers set them."""

import dataclasses
import math
from typing import Any

import jax
import optax

from llama_jax.errors import InputError
from llama_jax.types import Params, PyTree

OPTIMIZERS = ('adamw', 'adafactor', 'lion', 'muon')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """LLaMA's recipe by default (LLaMA paper section 2.3; Llama 2 paper section 2.2).

    Attributes:
      name: one of `OPTIMIZERS`.
      learning_rate: the peak.
      warmup_steps: of linear warm-up from 0.
      final_fraction: the cosine ends at this share of the peak.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment. LLaMA 1 does not publish its own; Llama 2 uses 1e-5.
      weight_decay: decoupled; not on norms.
      clip_norm: global gradient norm above which gradients are scaled down; 0 does not clip.
    """

    name: str = 'adamw'
    learning_rate: float = 3e-4
    warmup_steps: int = 2000
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        """Raises InputError where a setting is out of range; a NaN is out of all."""
        if self.name not in OPTIMIZERS:
            raise InputError(f'name is {self.name!r}, which is no optimizer; choose from {OPTIMIZERS}')
        below_one, positive, at_least_0 = 'from 0 to below 1', 'above 0 and finite', '0 or more and finite'
        for name, allowed, right in (
            ('learning_rate', positive, 0 < self.learning_rate < math.inf),
            ('warmup_steps', '0 or more', self.warmup_steps >= 0),
            ('final_fraction', 'from 0 to 1', 0 <= self.final_fraction <= 1),
            ('beta1', below_one, 0 <= self.beta1 < 1),
            ('beta2', below_one, 0 <= self.beta2 < 1),
            ('eps', at_least_0, 0 <= self.eps < math.inf),
            ('weight_decay', at_least_0, 0 <= self.weight_decay < math.inf),
            ('clip_norm', at_least_0, 0 <= self.clip_norm < math.inf),
        ):
            if not right:
                raise InputError(f'{name} is {getattr(self, name)}; it must be {allowed}')


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine that reaches `final_fraction` of the peak at `num_steps`.

    A run that would end within its warm-up, as a first try of a few steps does, warms up over its first tenth.

    Raises:
      InputError: there is no step.
    """
    if num_steps < 1:
        raise InputError(f'num_steps is {num_steps}; it must be at least 1')
    warmup_steps = config.warmup_steps if config.warmup_steps < num_steps else num_steps // 10
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=num_steps,
        end_value=config.learning_rate * config.final_fraction,
    )
    # optax counts from 0: without the shift the first update would have learning rate 0.
    return lambda count: schedule(count + 1)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule | float) -> optax.GradientTransformation:
    """Clipping, the update rule, and decoupled weight decay on all but norms."""
    decay = dict(weight_decay=config.weight_decay, mask=decayed)
    if config.name == 'adamw':
        update = optax.adamw(schedule, config.beta1, config.beta2, config.eps, **decay)
    elif config.name == 'adafactor':
        # optax.adafactor takes decay off undiminished by the learning rate: a tenth of every weight, each update.
        rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        update = optax.chain(rule, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(schedule))
    elif config.name == 'lion':
        update = optax.lion(schedule, config.beta1, config.beta2, **decay)
    else:
        assert config.name == 'muon'
        # optax.contrib.muon can mask decay, or apply it to the embedding and head, not both: so decay comes after.
        rule = optax.contrib.muon(
            -1.0, adam_b1=config.beta1, adam_b2=config.beta2, muon_weight_dimension_numbers=_muon_dimensions
        )
        update = optax.chain(rule, optax.add_decayed_weights(**decay), optax.scale_by_learning_rate(schedule))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update) if config.clip_norm else update


def at_rate(tx: optax.GradientTransformation, name: str, factor: float) -> optax.GradientTransformation:
    """The same optimiser with `factor` times the learning rate for the weights under `name`; its state is the same."""

    def update(gradients: PyTree, state: PyTree, params: Params | None = None) -> tuple[Params, PyTree]:
        updates: Any
        updates, state = tx.update(gradients, state, params)
        return updates | {name: jax.tree.map(lambda leaf: factor * leaf, updates[name])}, state

    return optax.GradientTransformation(tx.init, update)


def decayed(params: Params) -> PyTree:
    """True for every weight that decays: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _weight_name(path).endswith('norm'), params)


def _weight_name(path: tuple) -> str:
    """Of the weight that a leaf is part of: the last key of the params' dicts, whatever representation stands there."""
    return next(entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))


def _muon_dimensions(params: Params) -> PyTree:
    """Which axes of a weight Muon's matrix is made of; None (tables, vectors, parts of a weight) is Adam's.

    The weights are stacked [L, in..., out...]: `o` reduces over heads and head_dim, all others over their first axis.
    So do both parts of an adapter, [L, in..., rank] and [L, rank, out...] under its weight's name.
    """
    dimensions = optax.contrib.MuonDimensionNumbers

    def of(path, leaf):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        is_whole = len(names) == len(path)
        if not is_whole or {'embed', 'head'} & set(names) or names[-1].endswith('norm') or leaf.ndim < 3:
            return None
        if names[-1] == 'o' or names[-2:] == ['o', 'a']:
            return dimensions(reduction_axis=(1, 2), output_axis=(3,))
        return dimensions(reduction_axis=(1,), output_axis=tuple(range(2, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(of, params)
