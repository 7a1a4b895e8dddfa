"""Attention against a loop over heads in float64: values, gradients, order of time, packed documents."""

import functools
import importlib
import itertools
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.ops import attention_by_heads, attention_cudnn
from llama_jax.ops.attention import attention, cached_attention, choose, first_attention
from llama_jax.ops.attention_cached import (
    attend_at_once,
    attend_by_tiles,
    attend_row_by_row,
    keys_as_codes,
    keys_of_codes,
    values_as_codes,
)
from llama_jax.partitioning import Partitioner, make_mesh, parse_rules

attention_module = importlib.import_module('llama_jax.ops.attention')

BATCH, LENGTH, HEAD_DIM = 2, 24, 16
SEGMENT_IDS = np.stack([np.repeat([1, 2, 3, 0], [5, 1, 12, 6]), np.repeat([1, 2], [20, 4])]).astype(np.int32)


def random_qkv(num_heads: int, num_kv_heads: int, num_queries: int = LENGTH) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    shapes = [(num_queries, num_heads), (LENGTH, num_kv_heads), (LENGTH, num_kv_heads)]
    return tuple(rng.normal(size=(BATCH, *shape, HEAD_DIM)).astype(np.float32) for shape in shapes)


def reference(q, k, v, mask, cotangent):
    """Attention and its gradients in float64, from the formulas: (out, dq, dk, dv)."""
    q, k, v, cotangent = (np.asarray(a, np.float64) for a in (q, k, v, cotangent))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(q.shape[0]):
        for n in range(q.shape[2]):
            kv = n // (q.shape[2] // k.shape[2])
            scores = np.where(mask[b], q[b, :, n] @ k[b, :, kv].T / np.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[b, :, n] = weights @ v[b, :, kv]
            d_weights = cotangent[b, :, n] @ v[b, :, kv].T
            d_scores = (
                weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
            )
            dq[b, :, n] = d_scores @ k[b, :, kv]
            dk[b, :, kv] += d_scores.T @ q[b, :, n]
            dv[b, :, kv] += weights.T @ cotangent[b, :, n]
    return out, dq, dk, dv


# Every pair of: heads to a key/value head, head_dim, packed or not, dtype.
CASES = [
    (8, 8, 64, True, 'float32'), (8, 8, 128, False, 'bfloat16'), (8, 2, 64, False, 'bfloat16'),
    (8, 2, 128, True, 'float32'), (8, 1, 64, True, 'bfloat16'), (8, 1, 128, False, 'float32'),
]  # fmt: skip
# No multiple of any kernel's block; documents end inside blocks.
LONG, LONG_IDS = 198, np.stack([np.repeat([1, 2, 3, 0], [70, 1, 99, 28]), np.repeat([1, 2], [130, 68])])


def run(implementation):
    """A function of q, k, v and segment ids (or None)."""
    if implementation == 'cudnn formula':  # what is handed to cuDNN, computed by XLA
        return _cudnn_formula
    return lambda q, k, v, ids: attention(
        q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation=implementation
    )


def _cudnn_formula(q, k, v, ids):
    if ids is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='xla')
    return attention_cudnn.masked_attention(q, k, v, ids, implementation='xla')


KERNELS = ['reference', 'chunked', 'splash', 'cudnn formula']


# What an accelerator takes by itself in every case: on an NVIDIA GPU cuDNN in bf16, in fp32 another.
ALL_CASES = itertools.product((8,), (8, 2, 1), (64, 128), (False, True), ('bfloat16', 'float32'))


def on_accelerator(*case):
    return pytest.param('auto', *case, marks=pytest.mark.accelerator)


@pytest.mark.parametrize(('num_kv_heads', 'dtype'), [(4, 'float32'), (2, 'bfloat16')])
def test_of_rows_without_gradients_by_heads(num_kv_heads, dtype, monkeypatch):
    """Three blocks, the last of them shorter."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, 40, n, HEAD_DIM) for n in (4, num_kv_heads, num_kv_heads)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    monkeypatch.setattr(attention_by_heads, '_BLOCK', 16)
    assert attention_by_heads.serves(17) and not attention_by_heads.serves(16)
    found = first_attention(q, k, v)
    assert found.dtype == q.dtype
    mask = np.broadcast_to(np.tri(40, dtype=bool), (BATCH, 40, 40))
    want = reference(q, k, v, mask, np.zeros(q.shape))[0]
    # Computed in fp32 both times; in bf16 the result is rounded once.
    atol = 2e-6 if dtype == 'float32' else 1e-2
    np.testing.assert_allclose(np.asarray(found, np.float64), want, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ('implementation', 'num_heads', 'num_kv_heads', 'head_dim', 'packed', 'dtype'),
    [(kernel, *case) for kernel in KERNELS for case in CASES] + [on_accelerator(*case) for case in ALL_CASES],
)
def test_values_and_gradients(implementation, num_heads, num_kv_heads, head_dim, packed, dtype):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, LONG, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    ids = jnp.asarray(LONG_IDS, jnp.int32) if packed else None

    def both(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda *qkv: run(implementation)(*qkv, ids), q, k, v)
        return out, *vjp(cotangent)

    with jax.default_matmul_precision('highest' if dtype == 'float32' else 'default'):
        found = jax.jit(both)(q, k, v, cotangent)

    mask = np.tril(np.ones((BATCH, LONG, LONG), bool))
    if packed:
        mask &= LONG_IDS[:, :, None] == LONG_IDS[:, None, :]
    # fp32: sums of some hundred roundings of 6e-8. bf16: weights, their gradient and the result keep 8 bits (2^-9).
    # An accelerator's exp in fp32 is coarser; its bf16 products may be summed in another order.
    exact, rounded = (1e-4, 1.5e-2) if implementation == 'auto' else (5e-6, 1e-2)
    tolerance = exact if dtype == 'float32' else rounded
    for actual, expected in zip(found, reference(q, k, v, mask, cotangent), strict=True):
        assert actual.dtype == dtype
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            np.asarray(actual, np.float64) / scale, expected / scale, atol=tolerance, rtol=0
        )


@pytest.mark.parametrize('implementation', [*KERNELS, on_accelerator()])
def test_a_packed_document_does_not_leak(implementation):
    """Document 2 neither sees document 1 nor teaches it anything; a kernel that ignores the ids is found out."""
    rng = np.random.default_rng(0)
    dtype = 'bfloat16' if implementation == 'auto' else 'float32'
    q, k, v, cotangent = (jnp.asarray(rng.normal(size=(1, LONG, 2, 64)), dtype) for _ in range(4))
    ids = np.repeat([1, 2], [70, LONG - 70])[None].astype(np.int32)
    first = jnp.asarray(ids == 1)[:, :, None, None]

    def leak(kernel) -> tuple[float, float]:
        """By how much the output of document 2 follows the keys and values of document 1, and the gradients back."""

        @jax.jit
        def both(k, v):
            out, vjp = jax.vjp(lambda k, v: kernel(q, k, v, jnp.asarray(ids)), k, v)
            return out, *vjp(jnp.where(first, 0, cotangent))

        out, by_k, by_v = both(k, v)
        changed, *_ = both(jnp.where(first, 5 * v, k), jnp.where(first, -3 * k, v))
        forward = jnp.where(first, 0, jnp.abs(changed - out)).max()
        return float(forward), float(jnp.where(first, jnp.abs(by_k) + jnp.abs(by_v), 0).max())

    assert leak(run(implementation)) == (0, 0)
    ignores_the_ids = leak(lambda q, k, v, ids: run(implementation)(q, k, v, None))
    assert min(ignores_the_ids) > 0.1


@pytest.fixture
def choices(caplog, monkeypatch):
    """What `choose` takes on a platform, and the lines logged for it, with no choice logged before."""
    runtime._LOGGED.clear()

    def take(
        platform,
        shape=(2, 256, 8, 64),
        dtype=jnp.bfloat16,
        packed=True,
        client='cuda 13',
        chip='8.0',
        **options,
    ):
        caplog.clear()
        q = jax.ShapeDtypeStruct(shape, dtype)
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, 'llama_jax'):
            patch.setattr(attention_module, 'platform_of', lambda partitioner: platform)
            device = SimpleNamespace(client=SimpleNamespace(platform_version=client), compute_capability=chip)
            patch.setattr(jax, 'devices', lambda *platforms: [device])
            for _ in range(2):
                kernel = choose(q, q, packed, **options)
        return kernel, caplog.messages.copy()

    yield take
    runtime._LOGGED.clear()


@pytest.mark.parametrize(('platform', 'best'), [('cpu', 'chunked'), ('gpu', 'cudnn'), ('tpu', 'splash')])
def test_a_choice_is_logged_once_automatic_or_forced(choices, platform, best):
    assert choices(platform) == (best, [f'attention: {best} ({platform})'])
    assert choices(platform) == (best, [])
    forced = dict(implementation='reference')
    assert choices(platform, **forced) == ('reference', [f'attention: reference ({platform}, as asked for)'])
    assert choices(platform, **forced) == ('reference', [])


@pytest.mark.accelerator
def test_an_accelerator_takes_its_own_kernel():
    """As far as JAX tells; so the tests with 'auto' test it."""
    q = jax.ShapeDtypeStruct((2, LONG, 8, 64), jnp.bfloat16)
    assert choose(q, q, packed=True) == {'gpu': 'cudnn', 'tpu': 'splash'}[jax.default_backend()]


def test_attention_itself_logs_what_was_forced(caplog):
    runtime._LOGGED.clear()
    with caplog.at_level(logging.INFO, 'llama_jax'):
        for _ in range(2):
            attention(*(jnp.asarray(a) for a in random_qkv(2, 2)), implementation='reference')
    assert caplog.messages == [f'attention: reference ({jax.default_backend()}, as asked for)']


def test_one_token_is_no_choice_to_log(caplog):
    """So neither the shapes of the weights nor a step of generation tell of a kernel."""
    runtime._LOGGED.clear()
    with caplog.at_level(logging.INFO, 'llama_jax'):
        attention(*(jnp.asarray(a[:, :1]) for a in random_qkv(2, 2)))
    assert not caplog.messages


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (dict(dtype=jnp.float32), 'cudnn: it computes in bfloat16 or float16, not float32'),
        (dict(shape=(2, 256, 8, 20)), 'cudnn: head_dim 20 is not a multiple of 8 up to 128'),
        (dict(shape=(2, 255, 8, 64)), 'cudnn: with segment ids it needs an even number of tokens, not 255'),
        (
            dict(shape=(2, 65_536, 8, 64)),
            'cudnn: it honours segment ids only as a mask of 16.0 GiB a device, over the limit of 1',
        ),
        (dict(client='rocm 7'), 'cudnn: it needs an NVIDIA GPU, and this is a gpu'),
        (dict(context=2), 'cudnn: it cannot attend with a part of a row (mesh axis context)'),
        (
            dict(platform='tpu', shape=(2, 768, 8, 64), context=2),
            'splash: a row of 768 tokens does not divide into chunks of 128 on 2 devices',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_auto_falls_back_to_chunked_and_says_why(choices, options, reason):
    options = {'platform': 'gpu'} | options
    if size := options.pop('context', None):
        options['partitioner'] = Partitioner(make_mesh({'context': size}, jax.devices()[:size]))
    assert choices(**options) == ('chunked', [f'attention: chunked, not {reason}'])
    with pytest.raises(InputError, match=re.escape(reason.split(': ')[1])):
        choices(**options, implementation=reason.split(':')[0])


@pytest.mark.parametrize('packed', [False, True])
def test_without_segments_or_from_hopper_on_cudnn_takes_long_and_odd_rows(choices, packed):
    for length in (65_536, 255):
        assert choices('gpu', (2, length, 8, 64), packed=packed, chip='9.0')[0] == 'cudnn'
    assert choices('gpu', (2, 255, 8, 64), packed=False, chip='8.0')[0] == 'cudnn'


def test_documents_are_found():
    rng = np.random.default_rng(0)
    found = jax.jit(attention_cudnn.documents, static_argnums=1)
    for _ in range(50):
        counts = rng.integers(1, 9, size=2)
        rows = [np.sort(rng.choice(np.arange(1, 40), size=n - 1, replace=False)) for n in counts]
        ids = np.stack([np.searchsorted(row, np.arange(40), side='right') + 1 for row in rows])
        if rng.random() < 0.5:  # the last is padding
            ids[0, ids[0] == ids[0, -1]] = 0
        lengths, starts, fits = found(jnp.asarray(ids, jnp.int32), 6)
        assert fits == (counts.max() <= 6)
        for row, found_lengths, found_starts in zip(rows, lengths, starts, strict=True):
            expected = np.array([0, *row])[:6]
            np.testing.assert_array_equal(
                found_starts[:6], np.pad(expected, (0, 6 - len(expected)), constant_values=-1)
            )
            if len(row) < 6:
                sizes = np.diff([0, *row, 40])
                np.testing.assert_array_equal(
                    found_lengths, np.pad(sizes, (0, 6 - len(sizes)), constant_values=-1)
                )
    for pieces in ([1, 2, 1], [0, 1, 0], [0, 1, 1], [2, 1, 0]):
        ids = jnp.repeat(jnp.asarray([pieces], jnp.int32), 4, axis=1)
        assert not found(ids, 6)[2]


@pytest.mark.parametrize(
    ('shape', 'kv_heads', 'limit'),
    [
        ((2, 4096, 32, 128), 32, 16),
        ((1, 8192, 32, 128), 8, 16),
        ((1, 32_768, 32, 128), 8, 4),
        ((2, 131_072, 32, 128), 8, 0),
    ],
)
def test_as_many_documents_as_there_is_memory_for(shape, kv_heads, limit):
    q, k = (
        jax.ShapeDtypeStruct((*shape[:2], heads, shape[3]), jnp.bfloat16) for heads in (shape[2], kv_heads)
    )
    assert attention_cudnn.max_documents(q, k) == limit


@pytest.mark.accelerator
def test_rows_of_many_documents_are_attended_to():
    """More than cuDNN takes apart, or in pieces: the same as with a mask."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 512, 4, 64)), 'bfloat16') for _ in range(3))
    many = np.arange(512) // 8
    for ids in (many + 1, many % 3, np.where(many < 40, many // 4, 0)):
        ids = jnp.asarray(np.stack([ids, np.ones(512)]), jnp.int32)
        found, expected = (run(name)(q, k, v, ids).astype(jnp.float32) for name in ('auto', 'reference'))
        np.testing.assert_allclose(found, expected, atol=3e-2, rtol=0)


def test_a_kernel_that_cannot_serve_is_refused_in_one_line():
    """cuDNN in fp32: elsewhere because of the platform, on an NVIDIA GPU because of the type."""
    platform = jax.default_backend()
    reason = f'it needs an NVIDIA GPU, and this is a {platform}'
    if platform == 'gpu':
        reason = 'it computes in bfloat16 or float16, not float32'
    with pytest.raises(InputError, match=f"'cudnn' cannot be used: {reason}; choose"):
        attention(*(jnp.asarray(a) for a in random_qkv(2, 2)), implementation='cudnn')


def test_memory_is_linear_in_the_length():
    def temporary_bytes(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def total(q, k, v, ids):
            return attention(q, k, v, q_segment_ids=ids, kv_segment_ids=ids, implementation='chunked').sum()

        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        return gradients.lower(shape, shape, shape, ids).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32_768) < 2.2 * temporary_bytes(16_384)


@pytest.mark.parametrize(('num_heads', 'num_kv_heads'), [(8, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('num_queries', [1, 4, LENGTH])
def test_queries_that_continue_a_cache(num_queries, num_heads, num_kv_heads):
    """Row b's queries stand at slots start[b], ...; the slots after them hold rubbish. At once and by tiles."""
    q, k, v = random_qkv(num_heads, num_kv_heads, num_queries)
    start = np.array([0, 17], np.int32)
    slots = start[:, None] + np.arange(num_queries)
    mask = slots[:, :, None] >= np.arange(LENGTH)
    for b in range(BATCH):
        k[b, slots[b, -1] + 1 :] = v[b, slots[b, -1] + 1 :] = 1e30
    want = reference(q, k, v, mask, np.zeros_like(q))[0]
    arguments = jnp.asarray(q), *(jnp.asarray(a.swapaxes(1, 2)) for a in (k, v)), jnp.asarray(start)
    for attend in (cached_attention, functools.partial(attend_by_tiles, max_block=16)):
        np.testing.assert_allclose(jax.jit(attend)(*arguments), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('start', [0, 7, 16, 30])
def test_a_piece_of_one_row_behind_a_cache_goes_head_by_head(start, monkeypatch):
    """Two blocks of queries, of which those behind slot 48 go tile by tile; whatever room there is, the same bits."""
    monkeypatch.setattr(attention_by_heads, '_BLOCK', 16)
    monkeypatch.setattr(attention_by_heads, '_MAX_LENGTH', 48)
    assert attention_by_heads.serves_behind(1, 32, 64) and not attention_by_heads.serves_behind(1, 24, 64)
    rng, room, end = np.random.default_rng(0), 128, start + 32
    q, k, v = (
        rng.normal(size=(1, n, h, HEAD_DIM)).astype(np.float32) for n, h in ((32, 4), (room, 2), (room, 2))
    )
    k[:, end:] = v[:, end:] = 1e30
    mask = (start + np.arange(32))[None, :, None] >= np.arange(room)
    want = reference(q, k, v, mask, np.zeros_like(q))[0]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    small, large = (
        jax.jit(cached_attention)(q, k[:, :, :size], v[:, :, :size], np.array([start])) for size in (64, room)
    )
    np.testing.assert_allclose(small, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(small, large)


def codes_of_cache(k, v):
    """int8 of keys and values [B, T, K, H], heads first, and what they stand for."""
    k, v = jax.jit(keys_as_codes)(k), jax.jit(values_as_codes)(v)
    held = jax.jit(keys_of_codes)(k), v.materialize()
    return jax.tree.map(lambda x: x.swapaxes(1, 2), (k, v)), held


@pytest.mark.parametrize(('num_heads', 'num_kv_heads'), [(8, 2), pytest.param(4, 4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('num_queries', [1, 4, LENGTH])
def test_a_cache_of_int8_is_attended_to_as_what_it_stands_for(num_queries, num_heads, num_kv_heads):
    q, k, v = random_qkv(num_heads, num_kv_heads, num_queries)
    start = np.array([0, 17], np.int32)
    slots = start[:, None] + np.arange(num_queries)
    cache, held = codes_of_cache(k, v)
    want = reference(q, *held, slots[:, :, None] >= np.arange(LENGTH), np.zeros_like(q))[0]
    for b in range(BATCH):  # rubbish behind what was read
        cache = jax.tree.map(lambda x: x.at[b, :, slots[b, -1] + 1 :].set(100), cache)  # noqa: B023
    arguments = jnp.asarray(q), *cache, jnp.asarray(start)
    for attend in (
        cached_attention, attend_at_once, functools.partial(attend_by_tiles, max_block=16),
        functools.partial(attend_row_by_row, max_bytes=4 * 8 * num_kv_heads * HEAD_DIM),
    ):  # fmt: skip
        np.testing.assert_allclose(jax.jit(attend)(*arguments), want, rtol=1e-5, atol=1e-5)
    # bfloat16 rounds the result, and the queries to begin with, by 2^-9.
    out = jax.jit(cached_attention)(arguments[0].astype(jnp.bfloat16), *arguments[1:])
    np.testing.assert_allclose(out.astype(jnp.float32), want, rtol=0.02, atol=0.02)


def test_a_cache_of_int8_is_never_made_into_floats_as_a_whole():
    def temporary_bytes(batch: int, slots: int) -> int:
        q, start = jnp.zeros((batch, 1, 4, 64)), jnp.zeros(batch, jnp.int32)
        cache = codes_of_cache(*jnp.zeros((2, batch, slots, 4, 64)))[0]
        compiled = jax.jit(cached_attention).lower(q, *cache, start).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Of one array of keys in fp32 it would be 16 MiB; a tile of keys and one of values are 512 KiB.
    assert temporary_bytes(2, 8192) < 1 << 20


@pytest.mark.parametrize('rules', ['', 'kv_heads='], ids=['heads split', 'kv heads whole'])
@pytest.mark.parametrize('num_queries', [2, 24])
@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_a_cache_that_is_split_over_devices_is_attended_to_as_a_whole_one(num_queries, rules, dtype):
    partitioner = Partitioner(make_mesh({'data': 2, 'tensor': 4}), parse_rules(rules))
    q, k, v = random_qkv(8, 4, num_queries)
    cache = [jnp.asarray(a.swapaxes(1, 2)) for a in (k, v)] if dtype == 'float32' else codes_of_cache(k, v)[0]
    arguments = jnp.asarray(q), *cache, jnp.array([3, 17])
    found = jax.jit(functools.partial(cached_attention, partitioner=partitioner))(*arguments)
    np.testing.assert_allclose(found, jax.jit(cached_attention)(*arguments), rtol=1e-5, atol=1e-5)


def test_a_long_piece_behind_a_cache_takes_memory_of_its_length():
    def temporary_bytes(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        cache = jax.ShapeDtypeStruct((1, 2, 2 * length, 16), jnp.float32)
        start = jax.ShapeDtypeStruct((1,), jnp.int32)
        compiled = jax.jit(cached_attention).lower(q, cache, cache, start).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.2 * temporary_bytes(4096)


@pytest.mark.parametrize('packed', [False, True], ids=['one document', 'packed'])
def test_gradients_show_who_sees_whom(packed):
    """The gradient of query t by the value, key and query of slot s is exactly zero where t may not see s."""
    q, k, v = random_qkv(4, 2)
    segments = dict.fromkeys(['q_segment_ids', 'kv_segment_ids'], jnp.asarray(SEGMENT_IDS)) if packed else {}
    direction = np.random.default_rng(1).normal(size=(4, HEAD_DIM)).astype(np.float32)

    def project(*qkv):
        return jnp.einsum('btnh,nh->bt', attention(*qkv, **segments), direction).sum(0)

    jacobians = jax.jit(jax.jacrev(project, argnums=(0, 1, 2)))(q, k, v)

    by_q, by_k, by_v = (np.abs(j).max((-1, -2)).transpose(1, 0, 2) for j in jacobians)  # [B, T, S]
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))[None].repeat(BATCH, 0)
    if packed:
        seen &= SEGMENT_IDS[:, :, None] == SEGMENT_IDS[:, None, :]
    assert (by_v[~seen] == 0).all()
    assert (by_k[~seen] == 0).all()
    assert (by_v[seen] > 0).all()
    assert (by_q * (1 - np.eye(LENGTH)) == 0).all()


def test_a_query_that_sees_no_key_poisons_nothing():
    q, k, v = random_qkv(2, 2)
    nobody = np.full_like(SEGMENT_IDS, 9)
    nobody[:, :4] = SEGMENT_IDS[:, :4]

    def total(*qkv):
        out = attention(*qkv, q_segment_ids=jnp.asarray(nobody), kv_segment_ids=jnp.asarray(SEGMENT_IDS))
        return jnp.sum(out[:, :4] ** 2) + 0.0 * jnp.sum(out)

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    assert all(np.isfinite(a).all() for a in (value, *gradients))


def test_bf16_keeps_the_softmax_in_fp32():
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in random_qkv(4, 2))

    out = attention(8 * q, k, v)

    mask = np.tril(np.ones((BATCH, LENGTH, LENGTH), bool))
    q64, k64, v64 = (np.asarray(a, np.float64) for a in (8 * q, k, v))
    expected = reference(q64, k64, v64, mask, np.zeros_like(q64))[0]
    assert out.dtype == jnp.bfloat16
    # Weights and result are rounded to 8 bits (2^-8 of 3); scores of size 30 in bf16 are off by 0.1.
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)


def test_unknown_implementation_is_refused():
    with pytest.raises(InputError, match="'fast'.*reference"):
        attention(*(jnp.asarray(a) for a in random_qkv(2, 2)), implementation='fast')
