"""Generation out of pages, by a kernel's stand-in that any device runs: the programs are those of a TPU."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import ragged_paged_attention as kernel

from llama_jax.inference import decoding
from llama_jax.inference import generator as generator_module
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.generator import Generator
from llama_jax.inference.proposers import Draft, Lookup
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler
from llama_jax.models import kv_cache
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import param_axes
from llama_jax.ops.attention import cache_layout
from llama_jax.ops.attention_cached import attend_at_once
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy

PROMPTS = [[1, 5, 9], [1, 7, 2, 8, 30, 11, 4], [1], [1, 2] * 10]


def by_table(q, pages, num_tokens, table, query_starts, num_rows, *, sm_scale, **_):
    """The kernel's contract, read plainly: the pages of each row out of its table, all rows of as many queries."""
    del query_starts, num_rows, sm_scale
    in_rows = pages[table].reshape(len(table), -1, *pages.shape[2:])
    queries = q.reshape(len(table), -1, *q.shape[1:])
    k, v = (in_rows[:, :, which::2].swapaxes(1, 2) for which in (0, 1))
    return attend_at_once(queries, k, v, num_tokens - queries.shape[1]).reshape(q.shape)


@pytest.fixture
def in_pages(monkeypatch):
    """A model whose caches are of pages, with programs of its own; it has the weights of `toy`."""
    monkeypatch.setattr(kernel, 'ragged_paged_attention', by_table)
    monkeypatch.setattr(pltpu, 'with_memory_space_constraint', lambda x, _: x)  # of a TPU
    monkeypatch.setattr(kv_cache, 'cache_layout', lambda *_: 'pages')
    monkeypatch.setattr(decoding, 'LEAST_ROOM', 16)
    return toy.make_model(unroll=2)


@pytest.fixture(scope='module')
def params():
    return toy.make_params(toy.make_model())


@pytest.fixture(scope='module')
def heads_first(params):
    """(prompts, settings) -> what a cache that is heads first gives, made before any is of pages."""
    sampled = {'max_new_tokens': 30, 'sampler': Sampler(temperature=1.0, seed=1), 'stop_ids': (7,)}
    greedy = {'max_new_tokens': 9, 'sampler': Sampler(), 'stop_ids': (7,)}
    rng = np.random.default_rng(0)
    beginnings = rng.integers(3, 64, size=(3, 33)).tolist()
    alike = [[*beginnings[i % 3], *rng.integers(3, 64, size=i).tolist()] for i in range(9)]
    return [
        (prompts, options, generate_tokens(toy.make_model(), params, prompts, **options))
        for prompts, options in ((PROMPTS, sampled), (alike, greedy))
    ]


def test_logits_are_the_same(in_pages, params):
    """Rows of 0 to 7 tokens are read on, one of them to its end; in fp32, the order of sums apart."""
    tokens, found = jax.random.randint(jax.random.key(0), (3, 12), 0, toy.CONFIG.vocab_size), []
    apply = jax.jit(lambda tokens, cache: in_pages.apply({'params': params}, tokens, cache=cache))
    for is_paged in (True, False):
        cache = KVCache.create(toy.CONFIG, 3, 12, jnp.float32, is_paged)
        _, cache = apply(tokens[:, :7], cache)
        several, cache = apply(tokens[:, 7:11], cache.replace(length=jnp.array([0, 3, 7])))
        one, cache = apply(tokens[:, 11:], cache)
        found.append(np.concatenate([several, one], axis=1))
        assert cache.max_len == 12 and cache.length.tolist() == [5, 8, 12]
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [None, {'data': 2, 'tensor': 4}])
def test_rows_are_completed_as_without(heads_first, in_pages, params, mesh):
    """Their rooms grow from 16 tokens to 64 meanwhile."""
    prompts, options, want = heads_first[0]
    if mesh:
        partitioner = Partitioner(make_mesh(mesh))
        params = jax.device_put(params, partitioner.tree_shardings(params, param_axes(in_pages)))
        in_pages = in_pages.clone(partitioner=partitioner)
    assert generate_tokens(in_pages, params, prompts, **options) == want


@pytest.mark.slow
@pytest.mark.parametrize('draft', [None, Lookup(2), 'itself'])
def test_beginnings_are_kept_and_tokens_proposed(heads_first, in_pages, params, draft, monkeypatch):
    """Blocks of 16 tokens, two of them on the devices, go down to the host and come back."""
    monkeypatch.setattr(generator_module, '_BLOCK', 16)
    monkeypatch.setattr(generator_module, '_WIDTHS', {'cpu': (16,)})
    prompts, _, want = heads_first[1]
    asked = [CompletionRequest(prompt, 9, stop_ids=(7,)) for prompt in prompts]
    proposer = Draft(in_pages, params, 2) if draft == 'itself' else draft
    block = 16 * toy.CONFIG.num_layers * 2 * toy.CONFIG.num_kv_heads * toy.CONFIG.head_dim * 4
    generator = Generator(
        in_pages, params, num_slots=2, prefix_bytes=(4 * 2 * block, 8 * block), draft=proposer
    )
    found, cached = [[] for _ in asked], 0
    for one in asked:
        generator.submit(one)
    for progress in generator.run():
        found[progress.number] += progress.tokens
        cached += progress.ended.cached_tokens if progress.ended else 0
    assert found == want and cached >= 2 * 32


def test_pages_are_for_a_tpu_alone_and_another_choice_is_told(monkeypatch, caplog):
    heads = 32, 8, 128
    assert cache_layout(*heads, jnp.bfloat16) == 'heads first'  # of a CPU
    monkeypatch.setattr('llama_jax.ops.attention.platform_of', lambda _: 'tpu')
    partitioner = Partitioner(make_mesh({'tensor': 8}))
    with caplog.at_level(logging.INFO):
        assert cache_layout(*heads, jnp.bfloat16, partitioner) == 'pages'
        assert not caplog.messages
        assert cache_layout(*heads, jnp.int8, partitioner) == 'heads first'
    assert caplog.messages == ['cache: heads first, not in pages: pages hold bfloat16, not int8']
