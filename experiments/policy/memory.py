"""What a run of policy gradients takes of a device: of its three programs, generate, score and update.

While one of them runs, what the others work with stays: `held` counts that. What a program needs for itself beside it
(activations, logits) only its compiler knows: experiments.preflight.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.run.settings import make_lora_config
from llama_jax.chips import GIB
from llama_jax.errors import InputError
from llama_jax.inference.decoding import LEAST_ROOM, power_of_two, rows_of, with_whole_rows
from llama_jax.losses.policy import policy_of
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from llama_jax.preflight.decode import decode_arguments
from llama_jax.preflight.report import device_bytes
from llama_jax.train.state import TrainState
from llama_jax.types import PyTree

# What takes less, by the program that is too large.
_REMEDIES = {
    'generate': 'lower --config.rollout.slots or --config.rollout.max_new_tokens, split the copy by '
    '--config.rollout.mesh=tensor=N',
    'score': 'split the weights by --config.mesh.fsdp, train adapters by --config.lora.rank',
    'update': 'split the weights by --config.mesh.fsdp, train adapters by --config.lora.rank',
}

logger = logging.getLogger('llama_jax.policy_memory')


def sampler_arguments(
    config: ConfigDict, objective: Any, target: TrainState, sampler: LlamaForCausalLM, longest: int
) -> tuple[LlamaForCausalLM, tuple[Any, ...]]:
    """The model that draws, and the abstract (copy of the weights, cache, tokens) of a step of it.

    Args:
      config: all keys.
      objective: whose weights are copied.
      target: the abstract state.
      sampler: its partitioner places what draws.
      longest: tokens of a prompt.
    """
    assert sampler.partitioner is not None
    whole_rows = with_whole_rows(sampler)
    wanted = min(longest + config.rollout.max_new_tokens, sampler.config.max_seq_len)
    room = min(max(LEAST_ROOM, power_of_two(wanted)), power_of_two(sampler.config.max_seq_len))
    rows = rows_of(config.rollout.slots, whole_rows.partitioner)
    weights, cache, tokens = decode_arguments(whole_rows, rows, room)
    if (
        make_lora_config(config) and _mesh_of(target) == sampler.partitioner.mesh
    ):  # they stay beside their base
        whole = objective.view(policy_of(target.params), _abstract(objective.frozen))
        weights = unstack(whole, sampler.dtype)
    return whole_rows, (weights, cache, tokens)


def held(
    config: ConfigDict,
    objective: Any,
    target: TrainState,
    sampler: LlamaForCausalLM,
    *,
    judges: PyTree = (),
    longest: int = 0,
) -> dict[str, dict[str, int]]:
    """{program: {what: bytes of one device that are taken while it runs}}.

    Args:
      config: all keys.
      objective: what is trained, and what is frozen beside it.
      target: the abstract state.
      sampler: its partitioner places what draws.
      judges: weights of reward models; what they share with the frozen ones counts once.
      longest: tokens of a prompt.
    """
    frozen = {id(leaf) for leaf in jax.tree.leaves(objective.frozen)}
    own = {id(leaf): leaf for leaf in jax.tree.leaves(judges) if id(leaf) not in frozen}
    always = {
        'weights': device_bytes(target.params), 'optimiser': device_bytes(target.opt_state),
        'base' if config.lora.rank else 'reference': device_bytes(objective.frozen),
        'judges': device_bytes(list(own.values())),
    }  # fmt: skip
    _, (copy, cache, _) = sampler_arguments(config, objective, target, sampler, longest)
    of_generate = {'copy': device_bytes(copy), 'cache': device_bytes(cache.arrays)}
    return {
        'generate': always | of_generate, 'score': always, 'update': always | {'gradients': always['weights']}
    }  # fmt: skip


def check_memory(plan: Mapping[str, Mapping[str, int]], available: int) -> None:
    """Logs what each program holds of a device.

    Raises:
      InputError: one holds more than there is.
    """
    for program, parts in plan.items():
        text = f'{program} holds {sum(parts.values()) / GIB:.2f} of {available / GIB:.2f} GiB a device ({shown(parts)})'
        logger.info('%s', text)
    for program, parts in plan.items():
        if sum(parts.values()) > available:
            raise InputError(
                f'{program} does not fit: it holds {sum(parts.values()) / GIB:.2f} of {available / GIB:.2f} GiB a '
                f'device ({shown(parts)}), activations aside; {_REMEDIES[program]}, or take more devices'
            )


def shown(parts: Mapping[str, int]) -> str:
    """Bytes by what they are of, in GiB."""
    return ', '.join(f'{name} {size / GIB:.2f}' for name, size in parts.items() if size)


def available_memory() -> int:
    """Bytes of one device; a CPU's devices share its memory evenly."""
    stats = jax.local_devices()[0].memory_stats() or {}
    pages = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return stats.get('bytes_limit') or pages // jax.local_device_count()


def gathers_weights(collectives: Mapping[str, Mapping[str, Any]], weights: PyTree) -> bool:
    """Whether a step of generation brings its weights from other devices: as many bytes as half of them all have."""
    moved = sum(figures['ici_bytes'] + figures['dcn_bytes'] for figures in collectives.values())
    return moved > sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights)) / 2


def _mesh_of(target: TrainState) -> Any:
    return jax.tree.leaves(target.params)[0].sharding.mesh


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
