"""JAX's interpreter of TPU kernels, taught the two things that the kernel over pages asks of it and it gets wrong.

It knows no references that are reshaped or read as another type, and where a store has a mask it takes the length of
each axis for one of the first (JAX 0.10 to 0.12, `jax/_src/pallas/mosaic/interpret`).
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.state import types as reference
from jax._src.state.indexing import NDIndexer
from jax.experimental.pallas import tpu as pltpu

_read, _exchange = interpreter.get, interpreter.swap


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Within it kernels for a TPU run anywhere, step by step, copies between memories and semaphores too."""
    read = interpreter.get, interpreter.swap, pltpu.with_memory_space_constraint
    _get.__wrapped__ = _read.__wrapped__  # which the interpreter itself calls for a copy
    interpreter.get, interpreter.swap = _get, _swap
    pltpu.with_memory_space_constraint = lambda x, _: x  # there is one memory
    try:
        with pltpu.force_tpu_interpret_mode():
            yield
    finally:
        interpreter.get, interpreter.swap, pltpu.with_memory_space_constraint = read


def _get(
    token: Any,
    device: Any,
    core: Any,
    space: Any,
    buffer: Any,
    transforms: tuple[Any, ...],
    *others: Any,
    **named: Any,
) -> tuple[Any, np.ndarray]:
    """What a reference holds: as far as it is indexed by the interpreter, the rest here."""
    known = tuple(itertools.takewhile(lambda transform: isinstance(transform, NDIndexer), transforms))
    token, x = _read(token, device, core, space, buffer, known, *others, **named)
    for transform in transforms[len(known) :]:
        x = _transformed(np.asarray(x), transform)
    return token, x


def _transformed(x: np.ndarray, transform: Any) -> np.ndarray:
    match transform:
        case NDIndexer():
            return x[tuple(_index(index) for index in transform.indices)]
        case reference.ReshapeTransform():
            return x.reshape(transform.shape)
        case reference.BitcastTransform() if (x.dtype.itemsize, transform.dtype.itemsize) == (2, 4):
            halves = x.view(np.uint16).astype(
                np.uint32
            )  # a TPU packs two rows into one, the first into the low half
            return (halves[0::2] | halves[1::2] << 16).view(transform.dtype)
    raise NotImplementedError(transform)


def _index(index: Any) -> slice | int:
    if not hasattr(index, 'start'):
        return int(index)
    start, size, stride = (int(x) for x in (index.start, index.size, index.stride))
    return slice(start, start + size * stride, stride)


def _swap(
    token: Any,
    device: Any,
    core: Any,
    space: Any,
    buffer: Any,
    transforms: Any,
    value: Any,
    mask: Any,
    **named: Any,
) -> Any:
    """Stores what the mask lets through, and what is there elsewhere."""
    if mask is not None:
        token, found = _get(token, device, core, space, buffer, transforms)
        value = np.where(np.asarray(mask), np.asarray(value), found)
    return _exchange(token, device, core, space, buffer, transforms, value, None, **named)
