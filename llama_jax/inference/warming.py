"""What compiles before there are requests."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.ops.attention import platform_of

# Each of those that run holds memory of its own: no more than the largest rows beside those that they are made from.
_AT_ONCE = 2


def run_all(tasks: Sequence[Callable[[], object]], model: LlamaForCausalLM) -> None:
    """Runs what compiles programs of a model: on one CPU some at a time, as compiling takes one core.

    Elsewhere one after the other: several devices must hear of programs in one order, and a GPU's compiler takes the
    time of what it tries.
    """
    devices = jax.devices()[:1] if model.partitioner is None else model.partitioner.mesh.devices.flat
    if len(devices) > 1 or platform_of(model.partitioner) != 'cpu':
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix='compile') as pool:
        for running in [pool.submit(task) for task in tasks]:
            running.result()
