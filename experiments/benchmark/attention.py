"""Every attention kernel of this machine: is it right, and how long does it take.

Right means: values and gradients against the formula in float64 NumPy, for 1, 4 and 8 query heads to a key/value head,
head_dim 64 and 128, one document a row and several, in fp32 and bf16, at a length that is no multiple of a block; and
that no packed document sees another. A kernel that is wrong ends the command with status 1.

Time is that of causal self-attention on packed rows, forward alone and with the backward pass; kernels take turns, and
the figure of each is its median.
"""

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.prompting.checkpoint import DTYPES, dtype_name
from llama_jax.errors import InputError
from llama_jax.ops.attention import attention, choose

_SHAPES = flags.DEFINE_string(
    'attention_shapes', '', "B,T,N,K,H to time, several joined by ';'; '': some for this platform"
)
_DTYPE = flags.DEFINE_enum('attention_dtype', 'auto', ['auto', *DTYPES], 'to time; auto: float32 on a CPU')
_ROUNDS = flags.DEFINE_integer('attention_rounds', 5, 'turns that each kernel takes', lower_bound=1)
_CHECK = flags.DEFINE_boolean('attention_check', True, 'compare with float64 first')

KERNELS = {
    'cpu': ('reference', 'chunked'),
    'gpu': ('reference', 'chunked', 'cudnn'),
    'tpu': ('reference', 'chunked', 'splash'),
}
# On a CPU what two cores do in a second; on an accelerator an 8B model's heads.
SHAPES = {'cpu': '1,1024,8,2,64;1,4096,8,2,64'}
_ACCELERATOR_SHAPES = '2,4096,32,8,128;1,8192,32,8,128;1,32768,32,8,128'

LENGTH = 298
# Heads to a key/value head, head_dim, packed or not, dtype: all of them, and on a CPU, where most of the time goes into
# compiling each, those in which every pair of values meets.
CASES = tuple(itertools.product((1, 4, 8), (64, 128), (False, True), ('float32', 'bfloat16')))
_CPU_CASES = (
    (1, 64, True, 'float32'), (1, 128, False, 'bfloat16'), (4, 64, False, 'bfloat16'),
    (4, 128, True, 'float32'), (8, 64, True, 'bfloat16'), (8, 128, False, 'float32'),
)  # fmt: skip
_LEAK_CASE = (8, 64, True, 'bfloat16')  # one of both
# fp32 with products in full precision: sums of some hundred roundings of 6e-8; an accelerator's exp is coarser, and
# products of fewer bits, as TF32, would give 1e-3. bf16: weights, their gradient and the result keep 8 bits.
TOLERANCE = {'cpu': {'float32': 5e-6, 'bfloat16': 1e-2}}
_ACCELERATOR_TOLERANCE = {'float32': 1e-4, 'bfloat16': 1.5e-2}

Kernel = Callable[..., jax.Array]  # of q, k, v and segment ids or None


def main() -> dict[str, Any]:
    """Checks and times; prints a table of each. Ends the process where a kernel is wrong."""
    platform = jax.default_backend()
    names = KERNELS.get(platform, ('reference', 'chunked'))
    figures: dict[str, Any] = {'kernels': ','.join(names)}
    if _CHECK.value:
        print(
            f'{"":12}{"values":>10}{"gradients":>10}   worst error relative to the largest value, then leaks'
        )
        for name in names:
            figures |= {f'{name}_{key}': value for key, value in check(name, platform).items()}
        if wrong := [name for name in names if not figures.get(f'{name}_correct', True)]:
            sys.exit(f'error: wrong attention kernel: {", ".join(wrong)}; the table says in what')
    dtype = dtype_name(_DTYPE.value)
    figures['attention_dtype'] = dtype
    for shape in parse_shapes(_SHAPES.value or SHAPES.get(platform, _ACCELERATOR_SHAPES)):
        figures |= time_kernels(names, shape, dtype, _ROUNDS.value)
    return figures


def parse_shapes(text: str) -> list[tuple[int, ...]]:
    """'1,1024,8,2,64;...' as tuples (B, T, N, K, H)."""
    try:
        shapes = [tuple(int(size) for size in shape.split(',')) for shape in text.split(';')]
    except ValueError as error:
        raise InputError(
            f'--attention_shapes={text!r}: {error}; give B,T,N,K,H as in 1,1024,8,2,64'
        ) from error
    for shape in shapes:
        if len(shape) != 5 or min(shape) < 1 or shape[2] % shape[3]:
            raise InputError(
                f'--attention_shapes={text!r}: {shape} is not B,T,N,K,H with N a multiple of K, as in 1,1024,8,2,64'
            )
    return shapes


def kernel_of(name: str) -> Kernel:
    """The kernel as a function of q, k, v and segment ids (None: one document a row)."""

    def kernel(q, k, v, ids):
        return attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation=name)

    return kernel


def check(name: str, platform: str) -> dict[str, Any]:
    """Worst errors of a kernel over all cases, relative to the largest value of each array, and what leaks.

    Nothing, with a line that says why, of a kernel that this machine cannot use.
    """
    worst: dict[str, list[float]] = {}
    limits = TOLERANCE.get(platform, _ACCELERATOR_TOLERANCE)
    # LLVM's optimisation takes longer than all that is computed here, and changes none of it by much.
    options = {'xla_backend_optimization_level': 0} if platform == 'cpu' else None
    both = jax.jit(with_gradients(kernel_of(name)), compiler_options=options)
    try:
        for case in _CPU_CASES if platform == 'cpu' else CASES:
            dtype = case[-1]
            if name == 'cudnn' and dtype == 'float32':
                continue  # it attends in 16 bits
            (q, k, v, cotangent, ids), wanted = checked_case(*case)
            with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
                found = both(q, k, v, ids, cotangent)
            value, *gradients = (
                float(np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max())
                for x, y in zip(found, wanted, strict=True)
            )
            before = worst.get(dtype, [0.0, 0.0])
            worst[dtype] = np.maximum(before, [value, np.max(gradients)]).tolist()  # a NaN stays one
        with jax.default_matmul_precision('default'):
            leaked = leak(both)
    except InputError as error:
        print(f'{name:12}left out, {error}')
        return {}
    figures: dict[str, Any] = {'leak': leaked}
    correct = leaked == 0
    for dtype, (value, gradient) in worst.items():
        figures |= {f'{dtype}_error': value, f'{dtype}_gradient_error': gradient}
        ok = value <= limits[dtype] and gradient <= limits[dtype]
        correct &= ok
        print(
            f'{name:12}{value:10.1e}{gradient:10.1e}   {dtype}, {"ok" if ok else "WRONG"} to {limits[dtype]:.0e}'
        )
    print(
        f'{name:12}{"packed documents do not leak" if leaked == 0 else f"WRONG: documents leak by {leaked:.1e}"}'
    )
    return figures | {'correct': correct}


@functools.cache
def checked_case(
    group: int, head_dim: int, packed: bool, dtype: str
) -> tuple[tuple[Any, ...], tuple[np.ndarray, ...]]:
    """Arguments (q, k, v, output gradient, segment ids) and what is right: (out, dq, dk, dv)."""
    q, k, v, cotangent, ids = arguments((2, LENGTH, 8, 8 // group, head_dim), dtype)
    own = ids if packed else None
    return (q, k, v, cotangent, own), exact_attention(q, k, v, own, cotangent)


def leak(both: Kernel) -> float:
    """How far document 2 of a row follows document 1, forward and in the gradients back; a right kernel gives 0.

    Args:
      both: the kernel `with_gradients`.
    """
    (q, k, v, cotangent, _), _ = checked_case(*_LEAK_CASE)
    ids = jnp.asarray(np.repeat([[1, 2]], [100, LENGTH - 100], axis=1).repeat(2, axis=0), jnp.int32)
    first = (ids == 1)[:, :, None, None]
    out, _, by_k, by_v = both(q, k, v, ids, jnp.where(first, 0, cotangent))
    changed, *_ = both(q, jnp.where(first, 5 * v, k), jnp.where(first, -3 * k, v), ids, cotangent)
    forward = jnp.where(first, 0, jnp.abs(changed - out)).max()
    backward = jnp.where(first, jnp.abs(by_k) + jnp.abs(by_v), 0).max()
    return float(jnp.maximum(forward, backward))


def with_gradients(kernel: Kernel) -> Callable[..., tuple[jax.Array, ...]]:
    """A function of q, k, v, segment ids and the output's gradient: (out, dq, dk, dv)."""

    def both(q, k, v, ids, cotangent):
        out, vjp = jax.vjp(lambda q, k, v: kernel(q, k, v, ids), q, k, v)
        return out, *vjp(cotangent)

    return both


def arguments(shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, ...]:
    """Random q, k, v and output gradient of shape (B, T, N, K, H), and ids of some documents a row."""
    batch, length, num_heads, num_kv_heads, head_dim = shape
    rng = np.random.default_rng(0)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    arrays = [
        jnp.asarray(rng.standard_normal((batch, length, n, head_dim), np.float32), dtype) for n in heads
    ]
    ids = 1 + np.sort(rng.integers(4, size=(batch, length)), axis=1)
    return *arrays, jnp.asarray(ids, jnp.int32)


def exact_attention(q, k, v, ids, cotangent) -> tuple[np.ndarray, ...]:
    """The formula and its gradients in float64: (out, dq, dk, dv)."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    group, scale = q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    mask = np.tril(np.ones((q.shape[1], q.shape[1]), bool))[None, None]
    if ids is not None:
        ids = np.asarray(ids)
        mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    # [B, N, T, H], for products by BLAS.
    q, keys, values, cotangent = (
        x.transpose(0, 2, 1, 3)
        for x in (q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2), cotangent)
    )
    scores = np.where(mask, q @ keys.swapaxes(2, 3) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    by_weights = cotangent @ values.swapaxes(2, 3)
    by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdims=True)) * scale
    by_keys, by_values = by_scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ cotangent
    out, by_queries, by_keys, by_values = (
        x.transpose(0, 2, 1, 3) for x in (weights @ values, by_scores @ keys, by_keys, by_values)
    )
    return out, by_queries, *(x.reshape(*k.shape[:3], group, -1).sum(3) for x in (by_keys, by_values))


def time_kernels(names: tuple[str, ...], shape: tuple[int, ...], dtype: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each kernel on rows of this shape; one that cannot take it is left out with the reason."""
    batch, length, num_heads, _, head_dim = shape
    q, k, v, cotangent, ids = arguments(shape, dtype)
    label = 'x'.join(map(str, shape))
    chosen = choose(q, k, packed=True)
    figures: dict[str, Any] = {f'{label}_auto': chosen}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in names:
        if name == 'reference' and 4 * batch * num_heads * length**2 > 8 << 30:
            print(
                f'{label} reference: left out, its scores take {4 * batch * num_heads * length**2 / 2**30:.0f} GiB'
            )
            continue
        try:
            forward = jax.jit(kernel_of(name)).lower(q, k, v, ids).compile()
            both = jax.jit(with_gradients(kernel_of(name))).lower(q, k, v, ids, cotangent).compile()
        except InputError as error:
            print(f'{label} {name}: left out, {error}')
            continue
        memory: Any = both.memory_analysis()
        figures[f'{label}_{name}_temporary_bytes'] = memory.temp_size_in_bytes
        calls[name, 'forward'] = lambda forward=forward: forward(q, k, v, ids)
        calls[name, 'both'] = lambda both=both: both(q, k, v, ids, cotangent)
    milliseconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    # An accelerator is handed several calls at a time, or the way to it would be measured too.
    times = 1 if jax.default_backend() == 'cpu' else 8
    for turn in range(rounds + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(times)])
            if turn:  # the first warms up
                milliseconds[key].append(1e3 * (time.perf_counter() - start) / times)
    print(f'\n{label} (B T N K H), {dtype}, auto takes {chosen}')
    print(f'{"":12}{"forward ms":>12}{"TFLOP/s":>10}{"both ms":>12}{"TFLOP/s":>10}{"memory MiB":>12}')
    # Two products forward and five backward, of which the causal mask leaves half; documents are not counted.
    flops = 2 * batch * num_heads * head_dim * length**2
    for name in dict.fromkeys(name for name, _ in calls):
        forward, both = (statistics.median(milliseconds[name, kind]) for kind in ('forward', 'both'))
        memory = figures[f'{label}_{name}_temporary_bytes'] / 2**20
        figures |= {f'{label}_{name}_forward_ms': forward, f'{label}_{name}_both_ms': both}
        print(
            f'{name:12}{forward:12.2f}{flops / forward / 1e9:10.3f}{both:12.2f}{3.5 * flops / both / 1e9:10.3f}'
            f'{memory:12.0f}'
        )
    return figures
