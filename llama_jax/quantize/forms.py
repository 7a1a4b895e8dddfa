"""Which weights of a model are quantised, each in which form, and what stands for one where it is placed.

int8 has one scale for each output channel. int4 has one for every 32 weights of the layers' matrices; the embedding and
the head stay int8, a scale for each token. Norms are not quantised. Arithmetic and fields: `ops.quantized`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.ops.quantized import CODE_MAX, QuantizedArray, scale_shape
from llama_jax.types import InputError, Params

DTYPES = tuple(CODE_MAX)
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
      dtype: of its codes, one of `DTYPES`.
      group: how many weights along what a product sums over share a scale; 0: all, one scale an output channel.
    """

    dtype: str
    group: int = 0

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
      dtype: one of `DTYPES`.
      group: of the matrices of the layers: weights that share a scale, 0 for one an output channel; None: 0 for int8,
        32 for int4, and a matrix that 32 does not divide is int8 by output channel.

    Raises:
      InputError: an unknown dtype, or a group that does not divide a weight, which is named.
    """
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


def represent(path: str, wanted: jax.ShapeDtypeStruct, form: Form) -> QuantizedArray:
    """What stands for an abstract weight: its codes placed as it was, and scales where theirs are."""
    counts = scale_shape(wanted.shape, summed_axes(path, len(wanted.shape)), form.group)
    assert counts is not None, path
    sharding = wanted.sharding
    if isinstance(sharding, NamedSharding):
        axes = [*sharding.spec, *[None] * (len(counts) - len(sharding.spec))]
        axes = [
            axis if _divides(count, axis, sharding) else None
            for axis, count in zip(axes, counts, strict=True)
        ]
        of_scale = NamedSharding(sharding.mesh, PartitionSpec(*axes))
    else:
        of_scale = sharding
    return QuantizedArray(  # pyright: ignore[reportCallIssue] - abstract leaves
        jax.ShapeDtypeStruct(wanted.shape, jnp.dtype(form.dtype), sharding=sharding),  # pyright: ignore
        jax.ShapeDtypeStruct(counts, jnp.float16 if form.group else jnp.float32, sharding=of_scale),  # pyright: ignore
    )


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
