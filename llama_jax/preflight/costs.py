"""What one step of a compiled program costs one device: FLOPs, bytes of main memory moved, and collectives."""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

from llama_jax.preflight.hlo import Array, Computation, Executed, Instruction, Program, replica_groups

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_COLLECTIVE = {name + suffix: name for name in COLLECTIVES for suffix in ('', '-start')} | {
    'ragged-all-to-all': 'all-to-all',
    'collective-broadcast': 'all-gather',
}
# Nothing is moved: names for what is already in memory, and the halves of what is counted at its start.
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'opt-barrier', 'partition-id',
    'replica-id', 'call-done', 'send-done', 'recv-done', 'copy-done', 'slice-done', 'dynamic-slice-done',
    'async-update', 'async-done', 'domain', 'iota',
    *(f'{name}-done' for name in COLLECTIVES),
}  # fmt: skip
_READS_A_PART = ('dynamic-slice', 'slice', 'gather')
_HBM, _HOST = 0, 5


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation that every device takes part in.

    Attributes:
      kind: one of `COLLECTIVES`.
      bytes: of the whole value that a group works on: gathered, reduced or exchanged; one device's for the last two.
      groups: who works together [groups, devices]; source and target pairs of a collective-permute.
      between_slices: the groups count slices, each device working with its counterparts there. XLA for TPU takes a
        collective over several slices apart into one within each and one between them.
      times: executed in one step.
      source: the operation of the model that it serves, as far as XLA kept the name.
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    source: str
    between_slices: bool = False

    @property
    def sent_bytes(self) -> float:
        """What one device sends over links of any kind in one execution, by the cheapest algorithm."""
        size = self.groups.shape[1]
        if self.kind == 'collective-permute':
            return float(self.bytes)
        return self.bytes * (size - 1) / size * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one step on one device.

    Attributes:
      flops: of matrix products and of kernels that declare theirs.
      hbm_bytes: read from and written to main memory, each operand and result of a fused operation once.
      collectives: in the order of the program.
      unknown_loops: loops whose length the program does not tell; their bodies are counted once.
      opaque_kernels: custom kernels that do not declare their FLOPs, by name with how often each runs.
    """

    flops: int
    hbm_bytes: int
    collectives: list[Collective]
    unknown_loops: int
    opaque_kernels: dict[str, int]


def program_costs(program: Program) -> Costs:
    """Counts everything that `program` executes, bodies of loops as often as they run."""
    flops = hbm_bytes = 0
    found: list[Collective] = []
    opaque: dict[str, int] = collections.Counter()
    for item in program.executed():
        flops += item.times * _flops(item.instruction, item.computation, program)
        hbm_bytes += item.times * _hbm_bytes(item.instruction, item.computation, program)
        found += _collectives(item, program)
        for kernel in _opaque_kernels(item.instruction):
            opaque[kernel] += item.times
    unknown = sum(loop.trips is None for loop in program.loops())
    return Costs(flops, hbm_bytes, found, unknown, dict(opaque))


def stacked_bytes(program: Program, length: int, exclude: set[tuple[int, ...]]) -> tuple[int, int]:
    """Bytes in (main memory, host memory) that the layers' loop keeps for the backward pass.

    Args:
      program: of a train step.
      length: layers, which is the leading axis of everything that is kept for each.
      exclude: shapes of what is stacked for other reasons, the weights and their gradients.
    """
    largest = (0, 0)
    for loop in program.loops():
        kept = [a for a in loop.instruction.arrays if a.dims[:1] == (length,) and len(a.dims) > 2]
        kept = [a for a in kept if a.dims not in exclude]
        on_host = sum(a.bytes for a in kept if a.space == _HOST)
        largest = max(largest, (sum(a.bytes for a in kept) - on_host, on_host), key=sum)
    return largest


def _inner(instruction: Instruction, program: Program) -> Computation:
    return program.computations[instruction.called('calls')]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _flops(instruction: Instruction, computation: Computation, program: Program) -> int:
    match instruction.opcode:
        case 'fusion':
            inner = _inner(instruction, program)
            return sum(_flops(i, inner, program) for i in inner.instructions.values())
        case 'dot':
            lhs = computation.operand(instruction, 0).arrays[0].dims
            contracted = _dimensions('lhs_contracting_dims', instruction.attributes)
            return 2 * instruction.arrays[0].elements * math.prod(lhs[d] for d in contracted)
        case 'convolution':
            lhs, rhs = (computation.operand(instruction, i).arrays[0].dims for i in (0, 1))
            return _convolution_flops(lhs, rhs, instruction.arrays[0].dims, instruction.attributes)
        case 'custom-call':
            declared = re.search(r'"flops":"?([\d.e+]+)', instruction.attributes)
            return int(float(declared[1])) if declared else _kernel_flops(instruction, computation)
    return 0


# Products of the size of scores that each kernel of splash attention makes: of its backward pass, the fused kernel
# makes all five (scores, dP, dV, dK, dQ), else one makes four of them, and another the scores and dP again for dQ.
_SPLASH_PRODUCTS = {'splash_mha_fwd': 2, 'splash_mha_dkv': 4, 'splash_mha_dq': 3}
_PAGED = 'ragged_paged_attention'


def _kernel_flops(instruction: Instruction, computation: Computation) -> int:
    """Of JAX's attention for TPUs, which declares none.

    Of splash half of all scores, as its mask is causal; of pages those of each query with all that there is room for.
    """
    operands = [computation.operand(instruction, i).arrays[0] for i in range(len(instruction.operands))]
    if instruction.name.startswith(_PAGED):
        (table,) = (a.dims for a in operands if len(a.dims) == 2)
        q, pages = (a.dims for a in operands if len(a.dims) >= 3)
        return 4 * math.prod(q) * table[1] * pages[1]
    kernel = next((name for name in _SPLASH_PRODUCTS if instruction.name.startswith(name)), '')
    if not kernel:
        return 0
    q, k = [a.dims for a in operands if len(a.dims) >= 3 and a.dtype in ('bf16', 'f16', 'f32')][:2]
    products = _SPLASH_PRODUCTS[kernel]
    # The fused kernel gives dQ too: a part of it for every block of keys, so with an axis more.
    if kernel == 'splash_mha_dkv' and any(len(array.dims) == len(q) + 1 for array in instruction.arrays):
        products = 5
    return products * math.prod(q) * k[-2]


def _dimensions(attribute: str, attributes: str) -> list[int]:
    found = re.search(rf'{attribute}=\{{([\d,]*)\}}', attributes)
    return [int(d) for d in found[1].split(',') if d] if found else []


@functools.lru_cache(maxsize=4096)
def _convolution_flops(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> int:
    """2 per product that is really made. XLA for TPU writes matrix products as convolutions, batches as windows."""
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', attributes)
    if labels is None:
        return 0
    of_lhs, of_rhs, of_out = labels.groups()
    windows = re.search(r'window=\{([^}]*)\}', attributes)
    window = dict(re.findall(r'(\w+)=([^\s}]+)', windows[1] if windows else ''))
    groups = re.search(r'batch_group_count=(\d+)', attributes)
    products = (
        lhs[of_lhs.index('b')]
        * out[of_out.index('f')]
        * rhs[of_rhs.index('i')]
        // int(groups[1] if groups else 1)
    )
    for axis in range(sum(label.isdigit() for label in of_lhs)):
        label = str(axis)

        def setting(name: str, default: str, axis=axis) -> str:
            return window[name].split('x')[axis] if name in window else default

        products *= _window_products(
            lhs[of_lhs.index(label)], rhs[of_rhs.index(label)], out[of_out.index(label)],
            int(setting('stride', '1')), int(setting('pad', '0_0').split('_')[0]),
            int(setting('lhs_dilate', '1')), int(setting('rhs_dilate', '1')),
        )  # fmt: skip
    return 2 * products


@functools.lru_cache(maxsize=4096)
def _window_products(
    size: int, kernel: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of a window's place and an output's place that meet an element of the input, and not padding or a gap."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilate - pad
    return int(np.sum((place >= 0) & (place % lhs_dilate == 0) & (place // lhs_dilate < size)))


def _opaque_kernels(instruction: Instruction) -> list[str]:
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    declares = '"flops"' in instruction.attributes or instruction.name.startswith((_PAGED, *_SPLASH_PRODUCTS))
    if instruction.opcode != 'custom-call' or not target or declares:
        return []
    return [target[1]] if target[1] in ('tpu_custom_call', '__cudnn$fmhaSoftmax') else []


# ---- Main memory -----------------------------------------------------------------------------------------------------


def _hbm_bytes(instruction: Instruction, computation: Computation, program: Program) -> int:
    if instruction.opcode in _FREE:
        return 0
    operands = [computation.operand(instruction, i) for i in range(len(instruction.operands))]
    results = _in_hbm(instruction.arrays)
    if instruction.opcode == 'fusion':
        inner = _inner(instruction, program)
        read = sum(_part_read(inner, i, _in_hbm(operand.arrays)) for i, operand in enumerate(operands))
        return read + _part_written(inner, results)
    if instruction.opcode in _READS_A_PART:
        return 2 * results
    if instruction.opcode == 'dynamic-update-slice':
        return 2 * _in_hbm(operands[1].arrays)
    if instruction.opcode.endswith('-start') or instruction.opcode in (*_COLLECTIVE, 'send', 'recv'):
        # An asynchronous operation's result holds its operand too: what it moves is what comes in and goes out.
        arrays = instruction.arrays
        source, target = arrays[0], arrays[min(1, len(arrays) - 1)]
        if instruction.opcode in ('slice-start', 'dynamic-slice-start'):
            return target.bytes * ((source.space == _HBM) + (target.space == _HBM))
        return _in_hbm((source, target))
    return sum(_in_hbm(operand.arrays) for operand in operands) + results


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.space == _HBM)


def _part_read(fused: Computation, parameter: int, whole: int) -> int:
    """What a fusion reads of an argument: only the slices, where it uses nothing else of it."""
    name = fused.parameters[parameter].name
    uses = [i for i in fused.instructions.values() if name in i.operands]
    if whole and uses and all(use.opcode in (*_READS_A_PART, 'dynamic-update-slice') for use in uses):
        return min(whole, sum(_slice_bytes(use, name) for use in uses))
    return whole


def _slice_bytes(use: Instruction, name: str) -> int:
    if use.opcode == 'dynamic-update-slice':
        return 0 if use.operands[0] == name else use.arrays[0].bytes  # written in place, not read
    return use.arrays[0].bytes


def _part_written(fused: Computation, whole: int) -> int:
    """What a fusion writes: only the update, where it updates a slice in place."""
    root = fused.root
    while root.opcode in ('bitcast', 'copy', 'convert') and root.operands:
        root = fused.operand(root, 0)
    if root.opcode == 'dynamic-update-slice' and whole:
        return min(whole, fused.operand(root, 1).arrays[0].bytes)
    return whole


# ---- Collectives -----------------------------------------------------------------------------------------------------


def _collectives(item: Executed, program: Program) -> list[Collective]:
    instruction = item.instruction
    if instruction.opcode == 'send':
        return _between_slices(item)
    if instruction.opcode != 'fusion':
        kind = _COLLECTIVE.get(instruction.opcode)
        return [_collective(kind, instruction, item.computation, item.times, program)] if kind else []
    inner = _inner(instruction, program)
    inside = [i for i in inner.instructions.values() if i.opcode in _COLLECTIVE]
    if not inside or _continues(inner, inside):
        return []
    # Where a reduced value is cut up at once, XLA for TPU runs the two as a reduce-scatter.
    scattered = inner.name.startswith('all-reduce-scatter')
    kinds = ['reduce-scatter' if scattered else _COLLECTIVE[i.opcode] for i in inside]
    return [_collective(kind, i, inner, item.times, program) for kind, i in zip(kinds, inside, strict=True)]


def _between_slices(item: Executed) -> list[Collective]:
    """What the TPU runtime ('megascale') does over the data-centre network; XLA hands it a value of this device."""
    attributes = item.instruction.attributes
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    if not found:
        return []
    kind = found[1].lower().replace('_', '-')
    kind = kind if kind in COLLECTIVES else 'collective-permute'
    # Written as {slices}x{devices}, or as groups of devices, one of each slice.
    target = re.search(r'_xla_megascale_target="?\{+([\d,:]+)\}', attributes)
    slices = 2
    if target:
        slices = sum(
            int(last or first) - int(first) + 1 for first, last in re.findall(r'(\d+)(?::(\d+))?', target[1])
        )
    size = item.computation.operand(item.instruction, 0).arrays[0].bytes * (
        slices if kind == 'all-gather' else 1
    )
    return [Collective(kind, size, np.arange(slices)[None], item.times, '', between_slices=True)]


def _continues(fused: Computation, inside: list[Instruction]) -> bool:
    """Whether a fusion is a later part of a collective that another one has begun.

    XLA for TPU spreads an asynchronous collective over several fusions, and each of them repeats its line.
    """
    targets = [i.attributes for i in fused.instructions.values() if i.opcode == 'custom-call']
    if any('"AsyncCollectiveStart"' in target for target in targets):
        return False
    if any('"AsyncCollectiveDone"' in target for target in targets):
        return True
    part = re.search(r'"flag_start":"(-?\d+)"', inside[0].attributes)
    return part is not None and int(part[1]) >= 0


def _collective(
    kind: str, instruction: Instruction, computation: Computation, times: int, program: Program
) -> Collective:
    groups = replica_groups(instruction.attributes, program.num_partitions)
    operands = [computation.operand(instruction, i) for i in range(len(instruction.operands))]
    size = sum(array.bytes for operand in operands for array in operand.arrays)
    size *= groups.shape[1] if kind == 'all-gather' else 1
    source = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, size, groups, times, source[1] if source else '')
