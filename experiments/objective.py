"""What trainings differ in, as plain values: an objective has no step, no loop and no files of its own."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from ml_collections import ConfigDict

from experiments.adapters import adapted
from experiments.start import first_params
from llama_jax import pretrained
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.partitioning import Partitioner
from llama_jax.train.state import TrainState, abstract_state
from llama_jax.train.step import compile_train_step
from llama_jax.types import LMBatch, LossFn, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is trained and what it is to minimise; a reference, a reward, an adapter's base are `frozen`."""

    params: Params  # abstract, of what is trained; weights in any representation (`ops.linear`)
    axes: PyTree  # a tree like `params` with a tuple of logical axes at each leaf
    first_params: Callable[[Params], Params]  # `params` with shardings -> those that a new run starts with
    loss_fn: LossFn
    batch: PyTree  # the abstract global batch with its shardings
    frozen: PyTree = dataclasses.field(default_factory=dict)  # what the loss reads and nothing changes
    # (params, frozen) -> the model's whole weights, which are validated, examined and sampled from.
    view: Callable[[Params, PyTree], Params] = lambda params, frozen: params
    beside_base: bool = False  # what is trained stands beside frozen weights, whose gradient nobody takes
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what model.json says of them

    def weights(self, state: TrainState) -> Params:
        """The whole weights as they are in `state`."""
        return self.view(state.params, self.frozen)


def objective_of(
    config: ConfigDict,
    model: LlamaForCausalLM,
    partitioner: Partitioner,
    base: pretrained.Checkpoint | None = None,
) -> Objective:
    """What a configuration describes, told by its sections: what a command trains, and preflight compiles."""
    return adapted(language_modelling(config, model, partitioner, base), config, partitioner, base)


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
