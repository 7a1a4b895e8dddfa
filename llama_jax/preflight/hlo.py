"""Reads the text of an optimised XLA program, and walks what it executes with how often it does.

Only what the cost model asks for is understood: shapes, operands, called computations, trip counts, replica groups.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 's4': 4, 'u4': 4, 's2': 2, 'u2': 2, 'f4e2m1fn': 4}
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=\s]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{\s*$')
_END = re.compile(r'\}(, execution_thread="\w+")?')
_NAME = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_OPERAND = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape; a tuple is a list of them.

    Attributes:
      dtype: XLA's name, such as 'bf16'.
      dims: its size on one device.
      space: 0 is the device's main memory (HBM), 1 on-chip memory (VMEM on a TPU), 5 the host's; others are registers.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r'\d+', self.dtype)
            bits = int(digits[0]) if digits else 0
        return self.elements * bits // 8


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation; `attributes` is what stands behind its operands, unparsed."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """Its results; more than one where it is a tuple."""
        return tuple(_parse_array(*match) for match in _ARRAY.findall(self.shape))

    def called(self, attribute: str) -> str:
        """The computation that an attribute names, such as 'body'; '' without it."""
        found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)
        return found[1] if found else ''


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions in the order of the text, by name."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value is returned."""
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By their numbers."""
        return {int(i.argument): i for i in self.instructions.values() if i.opcode == 'parameter'}

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """The instruction that gives an operand."""
        return self.instructions[instruction.operands[index]]


@dataclasses.dataclass(eq=False)
class Executed:
    """An instruction of the running program: where it stands and how often it runs in one step."""

    instruction: Instruction
    computation: Computation
    times: int


@dataclasses.dataclass(eq=False)
class Loop:
    """A while loop: `trips` per entry (None: the text does not tell, 1 was assumed), entered `times` a step."""

    instruction: Instruction
    trips: int | None
    times: int


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A computation being executed, and the instruction of which outer scope passes it its arguments."""

    computation: Computation
    caller: Instruction | None = None
    outer: '_Scope | None' = None


class Program:
    """A parsed module.

    Attributes:
      computations: by name.
      entry: the one that a step executes.
      num_partitions: devices that run it.
    """

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        found = re.search(r'num_partitions=(\d+)', text[: text.find('\n')])
        self.num_partitions = int(found[1]) if found else 1

    def loops(self) -> list[Loop]:
        """Every while loop that is executed, outer ones first."""
        found: list[Loop] = []
        for _ in self._walk(_Scope(self.entry), 1, found):
            pass
        return found

    def executed(self) -> Iterator[Executed]:
        """What runs in one step: fusions whole, bodies of loops times their trips, other calls in place."""
        yield from self._walk(_Scope(self.entry), 1, [])

    def _walk(self, scope: _Scope, times: int, loops: list[Loop]) -> Iterator[Executed]:
        for instruction in scope.computation.instructions.values():
            if instruction.opcode == 'while':
                trips = self._trip_count(instruction, scope)
                loops.append(Loop(instruction, trips, times))
                names = [instruction.called('body')]
                inner_times = times * (1 if trips is None else trips)
            elif instruction.opcode == 'conditional':
                branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
                names = _OPERAND.findall(branches[1]) if branches else []
                names += [instruction.called(f'{case}_computation') for case in ('true', 'false')]
                inner_times = times
            elif instruction.opcode in ('call', 'call-start', 'async-start'):
                names = [instruction.called('to_apply') or instruction.called('calls')]
                inner_times = times
            else:
                yield Executed(instruction, scope.computation, times)
                continue
            for name in filter(None, names):
                inner = _Scope(self.computations[name], instruction, scope)
                yield from self._walk(inner, inner_times, loops)

    def _trip_count(self, loop: Instruction, scope: _Scope) -> int | None:
        """From XLA's own note; else from `counter < bound` at the start and `counter + step` at the end of the body.

        That is the form of the loops that `jax.lax.scan` and XLA's own passes make; TPU programs carry no note.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = _Scope(self.computations[loop.called('condition')], loop, scope)
        where, compare = self._through_fusions(condition, condition.computation.root)
        direction = re.search(r'direction=(\w+)', compare.attributes)
        if compare.opcode != 'compare' or not direction:
            return None
        left, right = (where.computation.operand(compare, i) for i in (0, 1))
        start, bound = self._constant(where, left), self._constant(where, right)
        step = self._step(
            _Scope(self.computations[loop.called('body')], loop, scope), self._element(where, left)
        )
        if start is None or bound is None or not step:
            return None
        last = {'LT': bound - 1, 'LE': bound, 'GT': bound + 1, 'GE': bound, 'NE': bound - step}.get(
            direction[1]
        )
        return None if last is None else max((last - start) // step + 1, 0)

    def _step(self, body: _Scope, element: int | None) -> int | None:
        """What an iteration adds to an element of what the loop carries."""
        if element is None or body.computation.root.opcode != 'tuple':
            return None
        where, add = self._through_fusions(body, body.computation.operand(body.computation.root, element))
        if add.opcode not in ('add', 'subtract'):
            return None
        first, second = (where.computation.operand(add, i) for i in (0, 1))
        if add.opcode == 'add' and self._element(where, second) == element:
            first, second = second, first
        step = self._constant(where, second)
        if self._element(where, first) != element or step is None:
            return None
        return step if add.opcode == 'add' else -step

    def _through_fusions(self, scope: _Scope, value: Instruction) -> tuple[_Scope, Instruction]:
        """The instruction that computes a value, and where it stands."""
        while value.opcode in ('fusion', 'copy', 'bitcast', 'reshape', 'convert'):
            if value.opcode == 'fusion':
                scope = _Scope(self.computations[value.called('calls')], value, scope)
                value = scope.computation.root
            else:
                value = scope.computation.operand(value, 0)
        return scope, value

    def _element(self, scope: _Scope, value: Instruction) -> int | None:
        """The place of a value in the tuple that a loop carries, where it is one of it as it came."""
        if value.opcode == 'get-tuple-element':
            index = re.search(r'index=(\d+)', value.attributes)
            return int(index[1]) if index else None
        if value.opcode == 'parameter' and scope.caller is not None and scope.outer is not None:
            outer = scope.outer.computation
            return self._element(scope.outer, outer.operand(scope.caller, int(value.argument)))
        if value.opcode in ('copy', 'bitcast', 'reshape', 'convert'):
            return self._element(scope, scope.computation.operand(value, 0))
        return None

    def _constant(self, scope: _Scope, value: Instruction, element: int | None = None) -> int | None:
        """The integer that a scalar, or that element of a tuple, holds when its computation is entered first."""
        operand = functools.partial(scope.computation.operand, value)
        match value.opcode:
            case 'constant':
                return int(value.argument) if re.fullmatch(r'-?\d+', value.argument) else None
            case 'get-tuple-element':
                index = re.search(r'index=(\d+)', value.attributes)
                return self._constant(scope, operand(0), int(index[1]) if index else None)
            case 'tuple' if element is not None:
                return self._constant(scope, operand(element))
            case 'parameter' if scope.outer is not None and scope.caller is not None:
                return self._constant(
                    scope.outer,
                    scope.outer.computation.operand(scope.caller, int(value.argument)),
                    element,
                )
            case (
                'copy'
                | 'bitcast'
                | 'reshape'
                | 'convert'
                | 'copy-start'
                | 'copy-done'
                | 'broadcast'
                | 'while'
            ):
                # A loop's result is taken for its first value: right for what it carries along unchanged.
                keeps = value.opcode in ('while', 'copy')
                return self._constant(scope, operand(0), element if keeps else None)
            case 'opt-barrier':
                return self._constant(scope, operand(0), element)
        return None


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """The groups [groups, devices] that a collective works within, as numbers of partitions.

    Raises:
      ValueError: they are written in a form that is not known.
    """
    if pairs := re.search(r'source_target_pairs=\{(.*?)\}(?:,\s*\w+=|$|\s)', attributes):
        return np.array(re.findall(r'\{?(\d+),(\d+)\}?', pairs[1]), int).reshape(-1, 2)
    if mesh := re.search(r'replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}', attributes):
        return _mesh_groups(*mesh.groups(default=''))
    if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes):
        return _iota(iota[2], iota[3]).reshape(tuple(map(int, iota[1].split(','))))
    if written := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}', attributes):
        groups = [[int(d) for d in group.split(',')] for group in re.findall(r'\{([\d,]+)\}', written[1])]
        return np.array(groups, int) if groups else np.arange(num_devices)[None]
    if 'replica_groups=' in attributes:
        raise ValueError(f'replica groups in an unknown form: {attributes[:200]}')
    return np.arange(num_devices)[None]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """'8,2', '1,0' -> the numbers from 0 in 8 rows, transposed."""
    sizes = tuple(map(int, dims.split(',')))
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(tuple(map(int, order.split(',')))) if order else devices


def _mesh_groups(mesh: str, device_ids: str, axes: str) -> np.ndarray:
    """Groups along some axes of a mesh, as in ("'a'=2,'b'=4", '', "'b':(2)2"): of b, the minor factor of 2."""
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    if order := re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', device_ids):
        devices = _iota(*order.groups())
    elif device_ids:
        devices = np.array([int(number) for number in device_ids.split(',')])
    else:
        devices = _iota(','.join(sizes.values()), None)
    parts = {name: (1, int(size or sizes[name])) for name, _, size in re.findall(_AXIS, axes)}
    parts |= {name: (int(before), int(size)) for name, before, size in re.findall(_AXIS, axes) if size}
    shape: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        grouped += [len(shape) + 1] if name in parts else []
        shape += [before, part, int(size) // (before * part)]
    others = [axis for axis in range(len(shape)) if axis not in grouped]
    members = math.prod(shape[axis] for axis in grouped)
    return devices.reshape(shape).transpose(others + grouped).reshape(-1, members)


def _parse(text: str) -> tuple[dict[str, Computation], Computation]:
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in text.splitlines():
        if current is None:
            # A computation begins with its signature; the module's own first line ends differently.
            if (header := _HEADER.match(line)) and not line.startswith('HloModule'):
                current = Computation(header[2], {})
                computations[current.name] = current
                entry = current if header[1] else entry
        elif _END.fullmatch(line):
            current = None
        elif name := _NAME.match(line):
            instruction = _parse_instruction(name[2], bool(name[1]), line[name.end() :])
            current.instructions[instruction.name] = instruction
        elif current.instructions:
            next(
                reversed(current.instructions.values())
            ).attributes += line  # a kernel's own text may have line ends
    if entry is None:
        raise ValueError('the text is not that of an XLA module: it has no ENTRY computation')
    return computations, entry


def _parse_instruction(name: str, is_root: bool, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    opening = rest.index('(', end)
    closing = _closing(rest, opening)
    argument = rest[opening + 1 : closing]
    opcode = rest[end:opening].strip()
    # A constant's text may hold anything, percent signs included.
    operands = () if opcode in ('constant', 'parameter') else tuple(_OPERAND.findall(argument))
    return Instruction(name, opcode, rest[:end], operands, argument.strip(), rest[closing + 1 :], is_root)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for match in re.compile(r'[()]').finditer(text, opening):
        depth += 1 if match[0] == '(' else -1
        if not depth:
            return match.start()
    raise ValueError(f'unbalanced brackets: {text[:200]}')


def _parse_array(dtype: str, dims: str, layout: str) -> Array:
    space = re.search(r'S\((\d+)\)', layout)
    sizes = tuple(int(size.strip('<= ')) for size in dims.split(',') if size.strip())
    return Array(dtype, sizes, int(space[1]) if space else 0)
