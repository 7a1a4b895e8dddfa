"""Mesh, axis rules, and the look-up from logical axes to shardings, which raises where Flax silently replicates.

Every array of the program names its axes ('batch', 'embed', 'heads', ...); one table says which mesh axes split them.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_jax.errors import InputError, did_you_mean
from llama_jax.table import html_of
from llama_jax.types import Array, PyTree

MESH_AXES = ('dcn_data', 'data', 'fsdp', 'context', 'tensor')

LogicalAxes: TypeAlias = tuple[str | None, ...]
Rules: TypeAlias = tuple[tuple[str, tuple[str, ...]], ...]

# Weights are split over `fsdp` and `context` along embed, and over `tensor` along the axis that heads or mlp units live
# on; activations over `data` and `fsdp` along the batch, `context` along the sequence, `tensor` as the weights.
# `dcn_data` splits the batch once more, over slices that only the data-centre network joins.
DEFAULT_RULES: Rules = (
    ('batch', ('dcn_data', 'data', 'fsdp')),
    ('length', ('context',)),
    ('act_embed', ()),
    ('vocab', ('tensor',)),
    ('embed', ('fsdp', 'context')),
    ('mlp', ('tensor',)),
    ('heads', ('tensor',)),
    ('kv_heads', ('tensor',)),
    ('head_dim', ()),
    ('norm', ()),
    ('layers', ()),
)


def make_mesh(axis_sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`; one size may be -1: what the other axes leave.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    if not isinstance(axis_sizes, Mapping):
        raise InputError(
            f"a mesh is {axis_sizes!r}; give the sizes of its axes, as {{'fsdp': 4, 'tensor': 2}}"
        )
    devices = list(jax.devices() if devices is None else devices)
    sizes = [axis_sizes.get(name, 1) for name in MESH_AXES]
    shown = ', '.join(f'{name}={size}' for name, size in zip(MESH_AXES, sizes, strict=True))
    if unknown := set(axis_sizes) - set(MESH_AXES):
        raise InputError(f'unknown mesh axes {sorted(unknown)}; {did_you_mean(min(unknown), MESH_AXES)}')
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f'impossible mesh ({shown}): sizes are positive, and at most one is -1 (the rest)')
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != len(devices):
        raise InputError(
            f'impossible mesh ({shown}): there are {len(devices)} devices, and the sizes must multiply to that '
            '(-1 takes what the others leave)'
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    slices = {getattr(device, 'slice_index', None) for device in devices}
    if len(slices) > 1 and devices[0].platform == 'tpu' and sizes[0] != len(slices):
        raise InputError(
            f'impossible mesh ({shown}): the devices are in {len(slices)} slices; '
            f'dcn_data must be {len(slices)}'
        )
    if 1 < sizes[0] == len(slices):
        inner, outer = (1, *sizes[1:]), (sizes[0], *[1] * (len(sizes) - 1))
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=axis_types)
    if devices[0].platform == 'tpu':  # an axis of the mesh may have to take part of one of the pod's
        placed = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=axis_types)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=axis_types, devices=devices)


def as_mesh(mesh: Mesh | Mapping[str, int] | None) -> Mesh:
    """A mesh as it is, or of the sizes of its axes (`make_mesh`); None is the first device alone.

    Raises:
      InputError: as `make_mesh`.
    """
    if isinstance(mesh, Mesh):
        return mesh
    return make_mesh({}, jax.devices()[:1]) if mesh is None else make_mesh(mesh)


def parse_rules(overrides: str) -> Rules:
    """`DEFAULT_RULES` with some replaced: 'kv_heads=,embed=fsdp+data' replicates kv_heads and splits embed two ways.

    Raises:
      InputError: a rule without '=', or an axis that is unknown.
    """
    rules = dict(DEFAULT_RULES)
    for item in filter(None, (part.strip() for part in overrides.split(','))):
        axis, equals, mesh_axes = item.partition('=')
        if not equals:
            raise InputError(
                f"axis rule {item!r}: write '{axis}=fsdp' to split an axis, '{axis}=' to replicate it"
            )
        if axis not in rules:
            raise InputError(
                f'axis rule {item!r}: unknown logical axis {axis!r}; known axes: {sorted(rules)}'
            )
        rules[axis] = tuple(filter(None, mesh_axes.split('+')))
        if unknown := set(rules[axis]) - set(MESH_AXES):
            raise InputError(
                f'axis rule {item!r}: unknown mesh axes {sorted(unknown)}; the axes are {MESH_AXES}'
            )
    return tuple(rules.items())


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh with the rules that place logical axes on it.

    Attributes:
      mesh: the devices.
      rules: logical axis -> mesh axes that split it, in order; () replicates.
    """

    mesh: Mesh
    rules: Rules = DEFAULT_RULES

    def __repr__(self) -> str:
        return f'Partitioner({", ".join(f"{name}: {value}" for name, value in self._shown().items())})'

    def _repr_html_(self) -> str:
        return html_of('Partitioner', self._shown())

    def _shown(self) -> dict[str, str]:
        """The devices, the axes that split something, and what each splits."""
        first = self.mesh.devices.flat[0]
        split = {name: size for name, size in self.mesh.shape.items() if size > 1}
        return {'devices': f'{self.mesh.size} {first.platform}'} | {
            f'{name}={size}': ' '.join(axis for axis, by in self.rules if name in by)
            for name, size in split.items()
        }

    def spec(
        self, axes: LogicalAxes, shape: Sequence[int] | None = None, name: str = 'array'
    ) -> PartitionSpec:
        """The mesh axes of an array with these logical axes.

        Args:
          axes: one name (or None: not split) per dimension; 'mlp+embed' is split as both are.
          shape: checked for divisibility where given.
          name: of the array, for the error.

        Raises:
          InputError: an axis no rule knows, one mesh axis used twice, or a dimension that its mesh axes do not divide.
        """
        rules = dict(self.rules)
        parts_of = [() if axis is None else axis.split('+') for axis in axes]
        if unknown := [axis for axis in itertools.chain(*parts_of) if axis not in rules]:
            raise InputError(f'{name}: unknown logical axes {unknown} in {axes}; known axes: {sorted(rules)}')
        if shape is not None and len(shape) != len(axes):
            raise InputError(
                f'{name}: shape {tuple(shape)} has {len(shape)} dimensions, its axes {axes} {len(axes)}'
            )
        entries = [tuple(itertools.chain(*(rules[axis] for axis in parts))) for parts in parts_of]
        # A mesh axis of size 1 splits nothing, so it may stand in any number of dimensions.
        entries = [tuple(a for a in entry if self.mesh.shape[a] > 1) for entry in entries]
        used: dict[str, str | None] = {}
        for axis, entry in zip(axes, entries, strict=True):
            for mesh_axis in entry:
                if mesh_axis in used:
                    raise InputError(
                        f'{name}: logical axes {used[mesh_axis]!r} and {axis!r} are both split over mesh axis '
                        f"{mesh_axis!r}; free one with the axis rule '{axis}='"
                    )
                used[mesh_axis] = axis
        for index, entry in enumerate(entries):
            parts = math.prod(self.mesh.shape[mesh_axis] for mesh_axis in entry)
            if shape is not None and shape[index] % parts:
                over = ' x '.join(f'{mesh_axis}={self.mesh.shape[mesh_axis]}' for mesh_axis in entry)
                raise InputError(
                    f'{name}: axis {axes[index]!r} of size {shape[index]} does not divide over mesh axes {over}; '
                    f"change the size of {entry[0]}, or replicate it with the axis rule '{axes[index]}='"
                )
        return PartitionSpec(*[entry[0] if len(entry) == 1 else entry or None for entry in entries])

    def split_also(self, axes: LogicalAxes, shape: Sequence[int], over: str) -> LogicalAxes:
        """The axes, one of them split as `over` too: the first whose size allows it, where there is one.

        For small arrays that may stand whole on every device; what must be split has an axis `over` of its own.

        Args:
          axes: one name (or None: stays whole) per dimension.
          shape: of the array.
          over: a logical axis.
        """
        if over in axes or (more := self.axis_size(over)) == 1:
            return axes
        for index, axis in enumerate(axes):
            if axis is not None and axis != 'layers' and shape[index] % (self.axis_size(axis) * more) == 0:
                return (*axes[:index], f'{axis}+{over}', *axes[index + 1 :])
        return axes

    def sharding(
        self, axes: LogicalAxes = (), shape: Sequence[int] | None = None, name: str = 'array'
    ) -> NamedSharding:
        """`spec` on this mesh; with no axes, the sharding of a replicated array of any shape."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    def shard(self, x: Array, axes: LogicalAxes, name: str = 'activation') -> Array:
        """Constrains an intermediate value of a jitted function."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, name))

    def tree_shardings(self, abstract: PyTree, axes: PyTree) -> PyTree:
        """Shardings of a tree of arrays from the tree of their logical axes, errors named by path."""

        def leaf_sharding(path, leaf, leaf_axes):
            return self.sharding(
                leaf_axes, leaf.shape, jax.tree_util.keystr(path, simple=True, separator='/')
            )

        return jax.tree_util.tree_map_with_path(leaf_sharding, abstract, axes)

    def batch_sharding(self, batch_size: int, seq_len: int | None = None) -> NamedSharding:
        """Sharding of host data [B, T]; checks that the batch divides.

        Raises:
          InputError: the batch or the sequence does not divide over its mesh axes.
        """
        parts = self.axis_size('batch')
        if batch_size % parts:
            raise InputError(
                f'batch size {batch_size} does not divide over the {parts} devices of mesh axes data x fsdp; '
                f'it must be a multiple of {parts}'
            )
        parts = self.axis_size('length')
        if seq_len is not None and parts > 1 and seq_len % (2 * parts):
            raise InputError(
                f"batch: axis 'length' of size {seq_len} does not divide into two chunks (ops.context_parallel) for "
                f'each device of mesh axis context={parts}; it must be a multiple of {2 * parts}'
            )
        shape = None if seq_len is None else (batch_size, seq_len)
        return self.sharding(('batch', 'length'), shape, 'batch')

    def axis_size(self, axis: str) -> int:
        """Number of parts that a logical axis is split into."""
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in dict(self.rules)[axis])


def make_global_array(
    host_rows: np.ndarray, row_of: Mapping[int, int], global_rows: int, sharding: NamedSharding
):
    """A global array [global_rows, ...] from the rows that this host read.

    Args:
      host_rows: the rows this host's devices hold, in any order.
      row_of: global row -> its index in `host_rows`.
      global_rows: the size of the whole batch.
      sharding: of the global array.
    """

    def read(index: Any) -> np.ndarray:
        rows = range(*index[0].indices(global_rows))
        return host_rows[np.array([row_of[row] for row in rows])][(slice(None), *index[1:])]

    return jax.make_array_from_callback((global_rows, *host_rows.shape[1:]), sharding, read)


def place_whole(array: np.ndarray, sharding: NamedSharding) -> Array:
    """A global array from one that every process has whole."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
