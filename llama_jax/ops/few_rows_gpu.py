"""Few activations times a matrix of int8 on a GPU, where all the time goes into reading the matrix.

XLA hands such a product to its tensor cores' kernels, which read bytes at a fraction of the memory's speed: on an H200
a step with int8 weights takes longer than one with bf16. Here each program of a grid reads a block of the matrix once,
converts it in registers and sums its products; another sum joins the blocks of a column. It is written for Pallas'
Triton, which JAX means to give up; where it is gone, the compiler's product serves.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows and columns of a program's block, and how many of its rows are read at a time.
_ROWS, _COLUMNS, _AT_A_TIME = 256, 256, 16
_WARPS = 8
_MAX_ACTIVATIONS = 4  # more of them are worth a tensor core


def fits(x: Array, codes: Array) -> bool:
    """Whether the kernel takes activations [B, D] and codes [D, F], which the caller knows to be on one device."""
    (num_activations, size), columns = x.shape, codes.shape[1]
    return (
        _has_triton()
        and codes.dtype == jnp.int8
        and num_activations in (1, 2, _MAX_ACTIVATIONS)
        and not size % _ROWS
        and not columns % _COLUMNS
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec('jax.experimental.pallas.triton') is not None


@functools.partial(jax.jit, static_argnames='interpret')
def few_rows_product(
    x: Float[Array, 'B D'], codes: Int[Array, 'D F'], interpret: bool = False
) -> Float[Array, 'B F']:
    """`x @ codes`, products and sums in float32.

    Args:
      x: activations that `fits`.
      codes: int8.
      interpret: without a GPU, for tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (num_activations, size), columns = x.shape, codes.shape[1]

    def kernel(x_ref, codes_ref, sums_ref):
        def add_rows(step, sums):
            rows = pl.ds(step * _AT_A_TIME, _AT_A_TIME)
            block = codes_ref[rows, :].astype(jnp.float32)
            return tuple(
                total + block * x_ref[index, rows].astype(jnp.float32)[:, None]
                for index, total in enumerate(sums)
            )

        zeros = jnp.zeros((_AT_A_TIME, _COLUMNS), jnp.float32)
        sums = jax.lax.fori_loop(0, _ROWS // _AT_A_TIME, add_rows, (zeros,) * num_activations)
        for index, total in enumerate(sums):
            sums_ref[index] = jnp.sum(total, axis=0)

    blocks = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((size // _ROWS, num_activations, columns), jnp.float32),
        grid=(columns // _COLUMNS, size // _ROWS),
        in_specs=[
            pl.BlockSpec((num_activations, _ROWS), lambda column, row: (0, row)),
            pl.BlockSpec((_ROWS, _COLUMNS), lambda column, row: (row, column)),
        ],
        out_specs=pl.BlockSpec((None, num_activations, _COLUMNS), lambda column, row: (row, 0, column)),
        interpret=interpret,
        compiler_params=None if interpret else triton.CompilerParams(num_warps=_WARPS, num_stages=3),
    )(x, codes)
    return blocks.sum(axis=0)
