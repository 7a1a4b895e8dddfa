"""Which weights of a model are quantised, each in which form, and what stands for one where it is placed.

int8 has one scale for each output channel. int4 has one for every 32 weights of the layers' matrices; the embedding and
the head stay int8, a scale for each token. nf4, for bases that adapters are trained beside, is of the layers' matrices
alone. Norms are not quantised. Arithmetic and fields: `ops.quantized`, `ops.nf4`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.errors import InputError
from llama_jax.ops.nf4 import BLOCK, Nf4Array
from llama_jax.ops.quantized import CODE_MAX, QuantizedArray, scale_shape
from llama_jax.types import Params

DTYPES = tuple(CODE_MAX)  # of checkpoints
NF4 = 'nf4'
_GROUP = 32  # of int4 where no other is asked for: as GGUF's
# The axes of a weight that a product sums over, from the last; layers may be stacked in front of them.
_SUMMED: dict[str, tuple[int, ...]] = {
    'embed': (-1,), 'head': (-1,), 'q': (-3,), 'k': (-3,), 'v': (-3,), 'o': (-3, -2), 'gate': (-2,), 'up': (-2,),
    'down': (-2,),
}  # fmt: skip
_TABLES = ('embed', 'head')


@dataclasses.dataclass(frozen=True)
class Form:
    """How one weight is quantised.

    Attributes:
      dtype: of its codes, one of `DTYPES`, or `NF4`.
      group: how many weights along what a product sums over share a scale; 0: all, one scale an output channel.
      double: of nf4, whether the largest values of its blocks are of 8 bits themselves.
    """

    dtype: str
    group: int = 0
    double: bool = True

    def __str__(self) -> str:
        return f'{self.dtype} in groups of {self.group}' if self.group else f'{self.dtype} by output channel'


def summed_axes(path: str, num_axes: int) -> tuple[int, ...]:
    """The axes of the weight at a path that a product sums over; none where it is not to be quantised."""
    return tuple(axis % num_axes for axis in _SUMMED.get(path.rpartition('/')[2], ()))


def choose_forms(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, group: int | None = None
) -> tuple[dict[str, Form], dict[str, str]]:
    """(form of each weight that is quantised, why some have another than the others) by path.

    Args:
      shapes: of all weights by path.
      dtype: one of `DTYPES`, or `NF4`.
      group: of the matrices of the layers: weights that share a scale, 0 for one an output channel; None: 0 for int8,
        32 for int4, and a matrix that 32 does not divide is int8 by output channel. It is not for nf4, whose blocks are
        of 64, or of the most below that divide a matrix.

    Raises:
      InputError: an unknown dtype, or a group that does not divide a weight, which is named.
    """
    if dtype == NF4:
        return _nf4_forms(shapes)
    if dtype not in DTYPES:
        raise InputError(f'weights cannot be quantised to {dtype!r}; there are {" and ".join(DTYPES)}')
    if group is not None and group < 0:
        raise InputError(f'group is {group}; it must be 0 (one scale an output channel) or more')
    wanted = Form(dtype, (0 if dtype == 'int8' else _GROUP) if group is None else group)
    forms, reasons = {}, {}
    for path, shape in shapes.items():
        if not (summed := summed_axes(path, len(shape))):
            continue
        if path in _TABLES:
            forms[path] = Form('int8')
        elif scale_shape(shape, summed, wanted.group):
            forms[path] = wanted
        else:
            total = math.prod(shape[axis] for axis in summed)
            why = f'a product sums over {total} of its weights, which are not whole groups of {wanted.group}'
            if group is not None:
                raise InputError(
                    f'group {group} does not divide weight {path}: {why}; choose one that divides, or 0'
                )
            forms[path], reasons[path] = Form('int8'), f'{Form("int8")}, for {why}'
    return forms, reasons


def _nf4_forms(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Form], dict[str, str]]:
    forms, reasons = {}, {}
    for path, shape in shapes.items():
        if path in _TABLES or not (summed := summed_axes(path, len(shape))):
            continue
        block = next(size for size in range(BLOCK, 0, -1) if scale_shape(shape, summed, size))
        forms[path] = Form(NF4, block)
        if block != BLOCK:
            total = math.prod(shape[axis] for axis in summed)
            reasons[path] = f'{forms[path]}, for {BLOCK} do not divide the {total} that a product sums over'
    return forms, reasons


def parse_forms(description: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Form]:
    """The forms that a checkpoint says its weights are in.

    Raises:
      InputError: it says something that is no form of one of its weights.
    """
    if not isinstance(description, dict):
        raise InputError(
            f'its quantization is {str(description)[:60]!r}; it must tell a form for each weight'
        )
    forms = {}
    for path, form in description.items():
        match form:
            case {'dtype': str(dtype), 'group': int(group)} if (
                path in shapes and dtype in DTYPES and group >= 0
            ):
                summed = summed_axes(path, len(shapes[path]))
                if summed and scale_shape(shapes[path], summed, group):
                    forms[path] = Form(dtype, group)
                    continue
        raise InputError(
            f'its quantization has {str(form)[:60]!r} for {path[:60]!r}, which no weight can be in'
        )
    return forms


def represent(path: str, wanted: jax.ShapeDtypeStruct, form: Form) -> QuantizedArray | Nf4Array:
    """What stands for an abstract weight: its codes placed as it was, and scales where theirs are."""
    summed = summed_axes(path, len(wanted.shape))
    counts = scale_shape(wanted.shape, summed, form.group)
    assert counts is not None, path

    def placed(counts: tuple[int, ...], dtype: Any) -> Any:
        sharding = wanted.sharding
        if isinstance(sharding, NamedSharding):
            axes = [*sharding.spec, *[None] * (len(counts) - len(sharding.spec))]
            axes = [a if _divides(n, a, sharding) else None for a, n in zip(axes, counts, strict=True)]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(counts, dtype, sharding=sharding)

    if form.dtype != NF4:
        codes = placed(wanted.shape, jnp.dtype(form.dtype))
        return QuantizedArray(codes, placed(counts, jnp.float16 if form.group else jnp.float32))
    if not form.double:
        return Nf4Array(placed(wanted.shape, jnp.uint4), placed(counts, jnp.float32))
    nested = tuple(1 if axis in summed else count for axis, count in enumerate(counts))
    offset = tuple(n if axis < num_stacked(path, len(counts)) else 1 for axis, n in enumerate(counts))
    return Nf4Array(
        placed(wanted.shape, jnp.uint4), placed(counts, jnp.int8), placed(nested, jnp.float32),
        placed(offset, jnp.float32),
    )  # fmt: skip


def num_stacked(path: str, num_axes: int) -> int:
    """The first axes of a weight that are of layers."""
    own = {'q': 3, 'k': 3, 'v': 3, 'o': 3}.get(path.rpartition('/')[2], 2)
    return num_axes - own


def _divides(count: int, axis: Any, sharding: NamedSharding) -> bool:
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return count % math.prod(sharding.mesh.shape[name] for name in names) == 0


def represent_all(target: Params, forms: Mapping[str, Form]) -> Params:
    """Abstract params with those weights as integers that have a form."""

    def of_leaf(keys: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        form = forms.get(path := name_of(keys))
        return leaf if form is None else represent(path, leaf, form)

    return jax.tree_util.tree_map_with_path(of_leaf, target)


def name_of(keys: tuple) -> str:
    """The path of a leaf."""
    return jax.tree_util.keystr(keys, simple=True, separator='/')
