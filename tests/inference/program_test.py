"""What a compiled step of generation moves: it copies, converts and slices nothing as large as a weight or a cache."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference import decoding
from llama_jax.inference.sampling import Sampler, SamplerRows
from llama_jax.models.llama import Block, LlamaForCausalLM, abstract_params
from llama_jax.models.presets import PRESETS
from llama_jax.models.unstacked import unstack

PRESET, ROOM = PRESETS['stories_110m'], 1024
# The step's own work: products, and what is written where it lies. A tuple and the like move nothing.
_MOVES_NOTHING = {'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call'}
_IN_PLACE = {'scatter', 'dynamic-update-slice'}


def compiled_steps(batch_size, dtype, kind=LlamaForCausalLM):
    """The loop of decoding, of two layers, as it is compiled for use and not for tests."""
    config = dataclasses.replace(PRESET, num_layers=2, max_seq_len=ROOM)
    model = kind(config, dtype=dtype)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(model))
    cache = jax.eval_shape(functools.partial(decoding._empty_cache, model, batch_size, ROOM, False))
    rows = np.zeros(batch_size, np.int32)
    state = decoding.Decoding(
        cache, rows, np.zeros((batch_size, 256), np.int32), rows, rows > 0, None, np.int32(0)
    )
    settings = SamplerRows.create(
        [Sampler()] * batch_size, range(batch_size), [()] * batch_size, config.vocab_size
    )
    lowered = decoding.decode.lower(
        model, params if kind is Scanned else unstack(params), state, settings, rows, rows > 0, np.int32(4)
    )
    return lowered.compile(compiler_options={'xla_backend_optimization_level': 3})


def large_moves(text: str, limit: int) -> list[str]:
    """Instructions of an optimised program that are none of the step's work, with a result of so many values.

    What is within a fusion is never in memory, so a fusion counts by what it ends with.
    """
    computations = {}
    for part in re.split(r'\n(?=%|ENTRY)', text):
        if found := re.match(r'(?:ENTRY )?%([\w.-]+)', part):
            computations[found[1]] = part
    fused = {name: computations[name] for name in re.findall(r' fusion\(.*calls=%([\w.-]+)', text)}
    found = []
    for name, part in computations.items():
        for line in () if name in fused else part.splitlines():
            if not (found_one := re.match(r'\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(', line)):
                continue
            result, kind = found_one.groups()
            shapes = re.findall(r'\w+\[([\d,]+)\]', result)
            if max((math.prod(map(int, shape.split(','))) for shape in shapes), default=0) < limit:
                continue
            if kind == 'fusion' and (calls := re.search(r'calls=%([\w.-]+)', line)):
                root = re.search(r'ROOT %?[\w.-]+ = \S+ ([\w-]+)\(', fused[calls[1]])
                is_work = root is not None and root[1] in _IN_PLACE
            else:
                is_work = kind in _MOVES_NOTHING | _IN_PLACE | {'dot'}
            if not is_work:
                found.append(line.strip()[:200])
    return found


def limit_of(batch_size):
    """Values of the smallest matrix of a layer or of its keys, whichever are fewer."""
    of_keys = batch_size * PRESET.num_kv_heads * ROOM * PRESET.head_dim
    return min(PRESET.embed_dim * PRESET.num_kv_heads * PRESET.head_dim, of_keys)


@pytest.mark.parametrize(
    ('batch_size', 'dtype'),
    [
        (1, 'float32'),
        (8, 'bfloat16'),
        pytest.param(1, 'bfloat16', marks=pytest.mark.slow),
        pytest.param(8, 'float32', marks=pytest.mark.slow),
    ],
)
def test_a_step_copies_no_weight_and_no_cache(batch_size, dtype):
    """Its temporary memory does not depend on the number of layers: it is compared with the weights of all of them."""
    compiled = compiled_steps(batch_size, jnp.dtype(dtype))
    assert large_moves(compiled.as_text(), limit_of(batch_size)) == []
    weights = PRESET.num_params * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * weights


class Scanned(LlamaForCausalLM):
    """The model with a scan over stacked weights and caches where it goes from layer to layer."""

    def _by_layer(self, blocks, x, rope, segment_ids, cache):
        block = Block(*self._block_knobs, name='block', parent=None)
        layers = [cache.layer(layer) for layer in range(self.config.num_layers)]

        def apply(x, layer):
            weights, layer_cache = layer
            return block.apply({'params': weights}, x, rope, segment_ids, layer_cache)

        x, caches = jax.lax.scan(apply, x, (blocks, jax.tree.map(lambda *one: jnp.stack(one), *layers)))
        leaves, structure = jax.tree.flatten(caches)
        return x, cache.with_layers([structure.unflatten(row) for row in zip(*leaves, strict=True)])


def test_a_scan_over_stacked_weights_would_be_seen():
    """So that the test above can fail: a scan slices each weight of a layer, its keys and its values in every step."""
    compiled = compiled_steps(1, jnp.dtype('float32'), Scanned)
    assert len(large_moves(compiled.as_text(), limit_of(1))) >= 7 + 2
    assert compiled.memory_analysis().temp_size_in_bytes > 0.05 * 4 * PRESET.num_params
