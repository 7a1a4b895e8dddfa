"""What a compiled step tells, as one JSON object and as text: memory, communication, roofline."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.chips import GIB
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.preflight.compile import Compiled
from llama_jax.preflight.costs import program_costs, stacked_bytes
from llama_jax.preflight.hlo import Program
from llama_jax.preflight.roofline import Place, link_seconds, roofline
from llama_jax.preflight.topology import Topology
from llama_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step is meant to do, independent of how it is compiled.

    Attributes:
      tokens: of one step, over all devices.
      flops: of the model for these tokens (causal, full), see `training_flops_per_token`.
      parameters: bytes of the weights on one device.
      optimizer: bytes of the optimiser's state on one device.
      gradients: bytes of the gradients on one device; 0 where there are none.
      kv_cache: bytes of the keys and values of earlier tokens on one device.
      must_read: bytes that one device cannot do without reading; 0 where that is not known beforehand.
      num_layers: of the model.
      weight_shapes: local shapes of the stacked weights, which activations are told from.
    """

    tokens: int
    flops: tuple[float, float]
    parameters: int
    optimizer: int = 0
    gradients: int = 0
    kv_cache: int = 0
    must_read: int = 0
    num_layers: int = 0
    weight_shapes: frozenset[tuple[int, ...]] = frozenset()


def device_bytes(tree: PyTree) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) // 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: Any) -> int:
    """Of a value; int4 lies two in a byte, which NumPy does not know."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def stacked_weight_shapes(model: LlamaForCausalLM) -> frozenset[tuple[int, ...]]:
    """One device's shapes of the weights that are stacked over layers."""
    params = abstract_params(model)
    assert model.partitioner is not None
    shardings = model.partitioner.tree_shardings(params, param_axes(model))
    local = jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), params, shardings)
    shapes = jax.tree.leaves(local, is_leaf=lambda shape: isinstance(shape, tuple))
    return frozenset(shape for shape in shapes if shape[0] == model.config.num_layers)


def step_report(
    compiled: Compiled, work: Work, topology: Topology, places: Sequence[Place]
) -> dict[str, Any]:
    """All figures of one compiled step, plain values for JSON; bytes and seconds, None where unknown."""
    report: dict[str, Any] = {
        'fits': compiled.fits,
        'involuntary_rematerializations': list(compiled.rematerializations),
        'trace_seconds': round(compiled.trace_seconds, 2),
        'compile_seconds': round(compiled.compile_seconds, 2),
    }
    if work.must_read:
        seconds = work.must_read * topology.chip.devices / topology.chip.hbm_bandwidth
        report['reading'] = {
            'bytes': work.must_read,
            'seconds': seconds,
            'tokens_per_second': work.tokens / seconds,
        }
    hbm: dict[str, int] = {
        'available': compiled.available,
        'total': compiled.needed,
        'parameters': work.parameters,
        'optimizer': work.optimizer,
        'kv_cache': work.kv_cache,
    }
    if compiled.memory is None:
        held = work.parameters + work.optimizer + work.kv_cache
        return report | {'hbm': hbm | {'all_else': max(0, compiled.needed - held)}}
    program = Program(compiled.executable.as_text())
    costs = program_costs(program)
    memory = compiled.memory
    kept, kept_on_host = stacked_bytes(program, work.num_layers, set(work.weight_shapes))
    activations = min(kept, memory.temporaries)
    gradients = min(work.gradients, memory.temporaries - activations)
    report['hbm'] = hbm | {
        'batch': memory.arguments - work.parameters - work.optimizer - work.kv_cache,
        'gradients': gradients,
        'activations': activations,
        'temporaries': memory.temporaries - activations - gradients + memory.outputs,
        'code': memory.code,
        'host': memory.host or kept_on_host,
    }
    report['memory_analysis'] = dict(memory.statistics)
    ici, dcn, kinds = link_seconds(costs.collectives, topology, places)
    terms = roofline(costs, ici, dcn, topology)
    devices = topology.num_chips * topology.chip.devices
    peak = topology.chip.peak_flops / topology.chip.devices
    report['collectives'] = kinds
    report['flops'] = {
        'per_device': costs.flops,
        'model_causal': work.flops[0] / devices,
        'model_full': work.flops[1] / devices,
        'unknown_loops': costs.unknown_loops,
        'opaque_kernels': costs.opaque_kernels,
    }
    report['hbm_traffic'] = costs.hbm_bytes
    report['roofline'] = dataclasses.asdict(terms) | {
        'bound': terms.bound,
        'seconds': terms.seconds,
        'tokens_per_second_per_device': work.tokens / devices / terms.seconds,
        'mfu_causal': work.flops[0] / devices / peak / terms.seconds,
        'mfu_full': work.flops[1] / devices / peak / terms.seconds,
    }
    return report


_MEMORY = (
    'parameters', 'optimizer', 'kv_cache', 'gradients', 'activations', 'batch', 'temporaries', 'code', 'host',
)  # fmt: skip
_TERMS = {'compute': 'compute', 'hbm': 'HBM', 'ici': 'ICI (within a slice)', 'dcn': 'DCN (between slices)'}


def describe(title: str, report: dict[str, Any]) -> str:
    """The report of one step as people read it; GiB of one device, milliseconds of one step."""
    hbm = report['hbm']
    lines = [f'{title}: {"fits" if report["fits"] else "DOES NOT FIT"}']
    lines.append(
        f'  traced in {report["trace_seconds"]:.1f} s, compiled in {report["compile_seconds"]:.1f} s; involuntary '
        f'rematerialisations: {len(report["involuntary_rematerializations"]) or "none"}'
    )
    lines += [f'    {line[:300]}' for line in report['involuntary_rematerializations']]
    needed = f'{hbm["total"] / GIB:.2f}' if hbm['total'] > 1 else 'more than all'
    lines.append(f'  HBM a device: {needed} of {hbm["available"] / GIB:.2f} GiB')
    if reading := report.get('reading'):
        lines.append(
            f'  reading weights as stored and the whole cache, {reading["bytes"] / 1e9:.2f} GB a device, takes '
            f'{reading["seconds"] * 1e3:.2f} ms: at most {reading["tokens_per_second"]:,.0f} tokens/s of all rows'
        )
    if 'all_else' in hbm:
        lines.append(
            f'    parameters {hbm["parameters"] / GIB:.2f}, optimiser {hbm["optimizer"] / GIB:.2f}'
            + (f', all else {hbm["all_else"] / GIB:.2f}' if hbm['total'] > 1 else '')
        )
        return '\n'.join(lines)
    lines += [
        f'    {name.replace("_", " "):14}{hbm[name] / GIB:9.2f}'
        for name in _MEMORY
        if hbm[name] or name not in ('kv_cache', 'host')
    ]
    lines.append('  collectives a step and device:     times   GB over ICI   GB over DCN')
    for kind, figures in sorted(report['collectives'].items()):
        lines.append(
            f'    {kind:26}{figures["count"]:10,}{figures["ici_bytes"] / 1e9:14.3f}{figures["dcn_bytes"] / 1e9:14.3f}'
        )
    if not report['collectives']:
        lines.append('    none')
    flops, terms = report['flops'], report['roofline']
    lines.append(
        f'  TFLOP a step and device: {flops["per_device"] / 1e12:.2f}, of which the model needs '
        f'{flops["model_causal"] / 1e12:.2f} (causal), {flops["model_full"] / 1e12:.2f} (full)'
    )
    if flops['unknown_loops']:  # those of chunked attention, which packed documents end early
        lines.append(f'    counted once: loops of unknown length ({flops["unknown_loops"]})')
    if flops['opaque_kernels']:
        lines.append(f'    not counted: kernels that do not declare theirs {flops["opaque_kernels"]}')
    lines.append(
        f'  a step takes at least {terms["seconds"] * 1e3:.1f} ms, bound by {_TERMS[terms["bound"]]}'
    )
    for name, label in _TERMS.items():
        lines.append(
            f'    {label:22}' + ('   unknown' if terms[name] is None else f'{terms[name] * 1e3:10.1f} ms')
        )
    lines.append(
        f'  so at most {terms["tokens_per_second_per_device"]:,.0f} tokens/s a device, MFU '
        f'{terms["mfu_causal"]:.1%} (causal), {terms["mfu_full"]:.1%} (full)'
    )
    return '\n'.join(lines)
