"""What a compiled step of generation moves: it copies, converts and slices nothing as large as a weight or a cache."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference import decoding
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler, SamplerRows
from llama_jax.models.llama import Block, LlamaForCausalLM, abstract_params
from llama_jax.models.presets import PRESETS
from llama_jax.models.unstacked import unstack
from llama_jax.ops.quantized import CODE_MAX
from llama_jax.quantize.forms import choose_forms, name_of, represent_all
from tests import toy
from tests.command_line import REPOSITORY

PRESET, ROOM = PRESETS['stories_110m'], 1024
# The step's own work: products, and what is written where it lies. A tuple and the like move nothing.
_MOVES_NOTHING = {'parameter', 'get-tuple-element', 'tuple', 'bitcast', 'while', 'conditional', 'call'}
_IN_PLACE = {'scatter', 'dynamic-update-slice'}
_AS_IN_USE = {'xla_backend_optimization_level': 3}
_BYTES = {'float32': 4, 'bfloat16': 2, 'int8': 1}


def compiled_steps(batch_size, weights, kind=LlamaForCausalLM, cache='auto'):
    """The loop of decoding, of two layers, as it is compiled for use and not for tests.

    Args:
      batch_size: rows.
      weights: the type that they and the computation are of, or that of the codes that they are kept in.
      kind: of model.
      cache: see `models.kv_cache.CACHE_DTYPES`.
    """
    model, params = model_and_params(weights, kind, cache)
    settings = SamplerRows.create(
        [Sampler()] * batch_size, range(batch_size), [()] * batch_size, PRESET.vocab_size
    )
    rows = jax.eval_shape(functools.partial(decoding.empty_rows, model, batch_size, ROOM, settings))
    params = params if kind is Scanned else unstack(params, model.dtype)
    lowered = decoding.decode.lower(model, params, rows, np.zeros(batch_size, bool), np.int32(4))
    return lowered.compile(compiler_options=_AS_IN_USE)


def model_and_params(weights, kind=LlamaForCausalLM, cache='auto'):
    """As for `compiled_steps`, params of a checkpoint."""
    dtype = jnp.dtype('float32' if weights in CODE_MAX else weights)
    model = kind(dataclasses.replace(PRESET, num_layers=2, max_seq_len=ROOM), dtype=dtype, cache_dtype=cache)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(model))
    return model, represent_all(params, forms_of(params, weights)) if weights in CODE_MAX else params


def compiled_piece(weights, cache, *, is_first):
    """What reads 256 tokens of a prompt into a cache, as `compiled_steps`."""
    model, params = model_and_params(weights, cache=cache)
    empty = jax.eval_shape(functools.partial(decoding.empty_cache, model, 1, ROOM))
    one, tokens = np.zeros(1, np.int32), np.zeros((1, 256), np.int32)
    args = model, unstack(params, model.dtype), empty, None, one, tokens, one, is_first
    return decoding.extend.lower(*args).compile(compiler_options=_AS_IN_USE)


def large_moves(text: str, limit: int) -> list[str]:
    """Instructions of an optimised program that are none of the step's work, with a result of so many values.

    What is within a fusion is never in memory, so a fusion counts by what it ends with: a product, on a TPU, or what
    it writes where it lies.
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
            # What a TPU fetches into its own memory (S(1)), it reads once; of what it starts to move, the end counts.
            if 'S(1)' in result or kind.endswith('-start'):
                continue
            shapes = re.findall(r'\w+\[([\d,]+)\]', result)
            if max((math.prod(map(int, shape.split(','))) for shape in shapes), default=0) < limit:
                continue
            if kind == 'fusion' and 'kind=kOutput' in line:
                is_work = True
            elif kind == 'fusion' and (calls := re.search(r'calls=%([\w.-]+)', line)):
                root = re.search(r'ROOT %?[\w.-]+ = \S+ ([\w-]+)\(', fused[calls[1]])
                is_work = root is not None and root[1] in _IN_PLACE
            else:
                is_work = kind in _MOVES_NOTHING | _IN_PLACE | {'dot'}
            if not is_work:
                found.append(line.strip()[:200])
    return found


def forms_of(params, weights):
    shapes = {name_of(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return choose_forms(shapes, weights)[0]


def limit_of(batch_size):
    """Values of the smallest matrix of a layer or of its keys, whichever are fewer."""
    of_keys = batch_size * PRESET.num_kv_heads * ROOM * PRESET.head_dim
    return min(PRESET.embed_dim * PRESET.num_kv_heads * PRESET.head_dim, of_keys)


@pytest.mark.parametrize(
    ('batch_size', 'weights'),
    [
        (1, 'float32'),
        (8, 'bfloat16'),
        *(pytest.param(1, name, marks=pytest.mark.slow) for name in ('bfloat16', 'int8')),
        *(pytest.param(8, name, marks=pytest.mark.slow) for name in ('float32', 'int8')),
    ],
)
def test_a_step_copies_no_weight_and_no_cache(batch_size, weights):
    """Its temporary memory does not depend on the number of layers: it is compared with the weights of all of them."""
    compiled = compiled_steps(batch_size, weights)
    assert large_moves(compiled.as_text(), limit_of(batch_size)) == []
    allowed = 0.05 * PRESET.num_params * _BYTES[weights]
    # Filters of top-k and the like work on numbers by row and token of the vocabulary, in a few arrays of them: 6 % of
    # the weights in int8, where these are of so small a model and the rows are 8.
    allowed = max(allowed, 6.5 * 4 * batch_size * PRESET.vocab_size)
    assert compiled.memory_analysis().temp_size_in_bytes < allowed


@pytest.mark.slow
@pytest.mark.parametrize('batch_size', [1, 8])
def test_a_step_makes_no_floats_of_a_cache_of_int8(batch_size):
    compiled = compiled_steps(batch_size, 'float32', cache='int8')
    assert large_moves(compiled.as_text(), limit_of(batch_size)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ('weights', 'cache', 'is_first'),
    [('float32', 'auto', True), ('bfloat16', 'auto', False), ('int8', 'auto', True), ('int8', 'int8', False)],
)
def test_a_piece_of_a_prompt_copies_no_weight_and_no_cache(weights, cache, is_first):
    """Angles of rotation it makes once, and not for each head of each layer."""
    text = compiled_piece(weights, cache, is_first=is_first).as_text()
    assert large_moves(text, limit_of(1)) == []
    assert text.count(' cosine(') <= 2  # of the first angle alone too, to choose by


@pytest.mark.slow
@pytest.mark.parametrize('batch_size', [1, 8])
def test_int4_is_seen_as_bytes_before_the_steps_and_copied_in_none(batch_size):
    """An array of int4 can be read value by value alone, so there is a copy as bytes, once for all steps of a call."""
    text = compiled_steps(batch_size, 'int4').as_text()
    moved = large_moves(text, limit_of(batch_size))
    assert len(moved) <= 2 * 7 and all('= s8[' in line and 'qvalue' in line for line in moved)
    before_the_loop = text[text.index('\nENTRY') :]
    assert all(line in before_the_loop for line in moved)


TPU_STEPS = """
import dataclasses, pathlib
import jax.numpy as jnp
from llama_jax.preflight import compile as ahead
from llama_jax.preflight.topology import Topology
ahead.isolate_process()
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.preflight.decode import decode_arguments, decode_step
from llama_jax.preflight.report import device_bytes
config = dataclasses.replace(PRESETS['llama2_70b'], num_layers=4)
chips = ('v5e:4x4', 'auto'), ('v5p:2x2x4', 'auto'), ('v6e:4x4', 'auto'), ('v5e:4x4', 'int8')
for number, (name, of_cache) in enumerate(chips):
    mesh = make_mesh({'data': 2, 'tensor': 8}, ahead.topology_devices(Topology.parse(name)))
    partitioner = Partitioner(mesh)
    model = LlamaForCausalLM(config, dtype=jnp.bfloat16, partitioner=partitioner, cache_dtype=of_cache)
    params, cache, tokens = decode_arguments(model, 16, 4096, 'int8')
    compiled = decode_step(model).lower(params, cache, tokens).compile()
    sizes = compiled.memory_analysis().temp_size_in_bytes, device_bytes(params)
    pathlib.Path(f'FOLDER/{number}').write_text(f'{sizes[0]} {sizes[1]}\\n{compiled.as_text()}')
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason="needs libtpu: pip install 'llama_jax[tpu]'"
)
def test_a_step_on_a_tpu_copies_no_weight(tmp_path):
    """Widths of 70B in int8 on 16 chips, 8 rows of 4,096 tokens on each: in pages, and in int8 heads first.

    What is left of those that are heads first, XLA keeps in a chip's own memory (its space 1) from the time it is
    fetched to be attended to: the new tokens are written there, and all goes back to the main memory, once, while
    others are computed. XLA takes them for free; they are a write of the cache more. Nothing of that size moves within
    the main memory, and no weight.
    """
    program = TPU_STEPS.replace('FOLDER', str(tmp_path))
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    for number in range(4):
        sizes, _, text = (tmp_path / str(number)).read_text().partition('\n')
        temporary, weights = map(int, sizes.split())
        assert temporary < 0.05 * weights
        moved = large_moves(text, 8192 * 128)
        in_pages = 'bf16[8,4096,2,128]' in text
        assert in_pages == ('ragged_paged_attention' in text) == (number < 3)
        assert len(moved) <= (0 if in_pages else 2 * 4), 'each once at most'
        for line in moved:
            back = re.search(r'= (s8\[8,1,4096,128\]\S*) copy-done\((%[\w.-]+)\)', line)
            assert back, line
            start = re.search(rf'{re.escape(back[2])} = \((\S+), (\S+), .*copy-start', text)
            assert start and start[1] == back[1] and 'S(1)' in start[2] and 'S(' not in start[1], line


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
    compiled = compiled_steps(1, 'float32', Scanned)
    assert len(large_moves(compiled.as_text(), limit_of(1))) >= 7 + 2
    assert compiled.memory_analysis().temp_size_in_bytes > 0.05 * 4 * PRESET.num_params


def test_a_step_is_of_the_live_tokens_and_not_of_the_context(monkeypatch):
    """A model that could hold four times as many tokens reads as much of them: the same program, in the same room."""
    programs, decode = [], decoding.decode

    def record(*args):
        programs.append((args[2].cache.max_len, decode.lower(*args).as_text()))
        return decode(*args)

    monkeypatch.setattr(decoding, 'decode', record)
    monkeypatch.setattr(decoding, 'LEAST_ROOM', 16)
    model = toy.make_model()
    params = toy.make_params(model)
    for context in (64, 256):
        larger = model.clone(config=dataclasses.replace(model.config, max_seq_len=context))
        generate_tokens(
            larger, params, [[1] * 40], max_new_tokens=context - 40, sampler=Sampler(), stop_ids=(),
            is_complete=lambda _, made: len(made) > 3,
        )  # fmt: skip
    (room, program), *others = programs
    assert room == 64 and len(others) == 1 and all(other == (room, program) for other in others)


STEP_TIMES = """
import dataclasses, statistics, time
import jax, jax.numpy as jnp
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.presets import PRESETS
from llama_jax.models.unstacked import unstack
preset = PRESETS['stories_110m']
models = [
    LlamaForCausalLM(dataclasses.replace(preset, max_seq_len=context), dtype=jnp.float32) for context in (1024, 4096)
]
params = unstack(init_params(models[0], jax.random.key(0)), delete=True)
seconds = [[], []]
for turn in range(5):
    for model, times in zip(models, seconds):
        ends = []
        for number in (1, 21):
            start = time.perf_counter()
            generate_tokens(model, params, [[7] * 1000], max_new_tokens=number, sampler=Sampler(), stop_ids=())
            ends.append(time.perf_counter() - start)
        times.append((ends[1] - ends[0]) / 20)
print(*(1e3 * statistics.median(times[1:]) for times in seconds))  # the first turn compiles
"""


@pytest.mark.long
def test_a_step_takes_the_same_time_in_a_cache_of_four_times_the_size():
    """1,000 live tokens, contexts of 1,024 and 4,096, in turns, compiled for use; figures: docs/performance.md."""
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    done = subprocess.run(
        [sys.executable, '-c', STEP_TIMES], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    in_small, in_large = map(float, done.stdout.split())
    assert in_large < 1.1 * in_small
