"""A bar that shows how much of the weights has been read, to who looks on."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llama_jax.types import Params

_LEAST_BYTES = 200_000_000


@contextlib.contextmanager
def show_loading(target: Params, wanted: bool) -> Iterator[Callable[[int], Any]]:
    """What is called with the bytes of each block placed.

    Args:
      target: abstract params.
      wanted: False shows nothing.
    """
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(target))
    looks_on = 'ipykernel' in sys.modules or sys.stderr.isatty()
    if not wanted or not looks_on or total < _LEAST_BYTES or jax.process_index():
        yield lambda _: None
        return
    import tqdm

    with tqdm.tqdm(total=total, unit='B', unit_scale=True, desc='loading') as bar:
        yield bar.update
