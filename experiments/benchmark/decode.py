"""Completing prompts of one length with random weights: a step's time beside that of copying what it must read.

A step reads all weights but the embedding's, and what the cache holds, whatever the batch is; so no step is faster than
the memory. Its bandwidth is that of a copy, measured here. Time is of `generate_tokens`, with many new tokens less with
one; the median of some turns.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmark.profile import show_kernels
from experiments.settings import find_preset
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.ops.quantized import CODE_MAX, quantize_array
from llama_jax.train.throughput import peak_flops_per_device, training_flops_per_token
from llama_jax.types import InputError, Params

_MODEL = flags.DEFINE_string('decode_model', 'stories_15m', 'a preset')
_BATCHES = flags.DEFINE_list('decode_batches', '1,32', 'prompts at a time, several by commas')
_PROMPT = flags.DEFINE_integer('decode_prompt', 64, 'tokens of a prompt', lower_bound=1)
_TOKENS = flags.DEFINE_integer('decode_tokens', 64, 'new tokens', lower_bound=2)
_ROUNDS = flags.DEFINE_integer('decode_rounds', 3, 'turns', lower_bound=1)
_WEIGHTS = flags.DEFINE_enum(
    'decode_weights', 'auto', ['auto', *CODE_MAX], 'their type; auto: of the computation'
)
_PROFILE = flags.DEFINE_boolean('decode_profile', False, 'show the kernels that take most of a completion')


def main() -> dict[str, Any]:
    """Milliseconds of a step, its share of the memory's bandwidth, tokens/s of it and of the prompts; in a table."""
    config = find_preset(_MODEL.value)
    prompt, tokens = _PROMPT.value, _TOKENS.value
    if prompt + tokens > config.max_seq_len:
        raise InputError(
            f'--decode_prompt={prompt} and --decode_tokens={tokens} are more than the {config.max_seq_len} tokens that '
            f'{_MODEL.value} reads'
        )
    if not all(batch.isdecimal() and int(batch) for batch in _BATCHES.value):
        raise InputError(f'--decode_batches={",".join(_BATCHES.value)} must be whole numbers, as in 1,32')
    dtype = jnp.dtype('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    model = LlamaForCausalLM(config, dtype=dtype)
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), init_params(model, key)))(
        jax.random.key(0)
    )
    if _WEIGHTS.value in CODE_MAX:
        params = quantized(params, _WEIGHTS.value)
    table = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    filled = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (prompt + tokens / 2)
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - table * dtype.itemsize
    # Of a prompt, whose last token alone meets the head; a third of what training takes is the forward pass.
    head = 2 * config.vocab_size * config.embed_dim * (prompt - 1)
    prompt_flops = prompt * training_flops_per_token(config, prompt)[0] / 3 - head
    peak = peak_flops_per_device() * jax.device_count()
    bandwidth = copy_bandwidth(_ROUNDS.value)
    figures: dict[str, Any] = {'model': _MODEL.value, 'dtype': dtype.name, 'copy_bandwidth': bandwidth}
    print(f'{_MODEL.value}, {dtype.name}, {prompt} + {tokens} tokens, copies at {bandwidth / 1e9:,.0f} GB/s')
    print(
        f'{"prompts":>8}{"step ms":>10}{"of bandwidth":>14}{"tokens/s":>12}{"prompt tokens/s":>17}{"MFU":>7}'
    )
    for batch in map(int, _BATCHES.value):
        ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, prompt)).tolist()

        def complete(number: int, ids: list[list[int]] = ids) -> float:
            start = time.perf_counter()
            generate_tokens(model, params, ids, max_new_tokens=number, sampler=Sampler(), stop_ids=(-1,))
            return time.perf_counter() - start

        first, _ = complete(tokens), complete(1)
        one, many = (median(lambda n=n: complete(n), _ROUNDS.value) for n in (1, tokens))
        step = (many - one) / (tokens - 1)
        num_bytes = weight_bytes + dtype.itemsize * batch * filled
        found = {
            'step_ms': 1e3 * step, 'bandwidth_share': num_bytes / step / bandwidth, 'tokens_per_second': batch / step,
            'prompt_tokens_per_second': batch * prompt / max(one - step, 1e-9),
            'prompt_mfu': prompt_flops * batch / max(one - step, 1e-9) / peak, 'first_seconds': first,
        }  # fmt: skip
        figures |= {f'batch_{batch}_{name}': value for name, value in found.items()}
        ms, share, rate, read, mfu, _ = found.values()
        print(f'{batch:8}{ms:10.3f}{share:14.1%}{rate:12,.0f}{read:17,.0f}{mfu:7.1%}', flush=True)
        if _PROFILE.value:
            kernels = show_kernels(lambda: complete(tokens), many)
            figures |= {f'batch_{batch}_{rank}': kernel for rank, kernel in kernels.items()}
    return figures


def quantized(params: Params, dtype: str) -> Params:
    """The layers' matrices and the head in codes, a scale for each output channel."""

    @functools.partial(jax.jit, static_argnums=1)
    def codes(weight, summed):
        return quantize_array(weight, dtype, summed)

    blocks = {
        name: {key: codes(weight, (1, 2) if key == 'o' else (1,)) for key, weight in part.items()}
        if isinstance(part, dict)
        else part
        for name, part in params['blocks'].items()
    }
    head = {'head': codes(params['head'], (1,))} if 'head' in params else {}
    return params | head | {'blocks': blocks}


def copy_bandwidth(rounds: int) -> float:
    """Bytes/s read and written by an update of an array, in place, that no cache holds."""
    x = jnp.ones(2**26 if jax.default_backend() == 'cpu' else 2**29, jnp.float32)
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = update(x).block_until_ready()

    def once() -> float:
        nonlocal x
        start = time.perf_counter()
        x = update(x).block_until_ready()
        return time.perf_counter() - start

    return 2 * x.nbytes / median(once, rounds)


def median(measure: Callable[[], float], rounds: int) -> float:
    """Of the seconds of so many turns."""
    return statistics.median(measure() for _ in range(rounds))
