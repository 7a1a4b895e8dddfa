"""Completing prompts of one length with random weights: a step's time beside that of copying what it must read.

A step reads all weights but the embedding's, and what the cache holds, whatever the batch is; so no step is faster than
the memory. Its bandwidth is that of a copy, measured here. Time is of `generate_tokens`: a prompt's with one new token,
which its last token gives without a step; that of steps with many, less with one. Medians of some turns.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmark import decode_peers
from experiments.benchmark.profile import show_kernels
from experiments.benchmark.turns import has_peer
from experiments.run.settings import find_preset
from llama_jax.errors import InputError, error_line
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.unstacked import unstack
from llama_jax.ops.quantized import CODE_MAX
from llama_jax.quantize.params import quantize
from llama_jax.train.throughput import peak_flops_per_device, training_flops_per_token
from llama_jax.types import Params

_MODEL = flags.DEFINE_string('decode_model', 'stories_15m', 'a preset')
_BATCHES = flags.DEFINE_list('decode_batches', '1,32', 'prompts at a time, several by commas')
_PROMPT = flags.DEFINE_integer('decode_prompt', 64, 'tokens of a prompt', lower_bound=1)
_TOKENS = flags.DEFINE_integer('decode_tokens', 64, 'new tokens', lower_bound=2)
_ROUNDS = flags.DEFINE_integer('decode_rounds', 3, 'turns', lower_bound=1)
_WEIGHTS = flags.DEFINE_list(
    'decode_weights',
    'auto',
    f'their type: auto (that of the computation), bfloat16, {", ".join(CODE_MAX)}; several by commas take turns, '
    'and the first is compared with the others',
)
_PEER = flags.DEFINE_boolean(
    'decode_peer', False, 'measure Hugging Face and llama.cpp beside, where they are installed'
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
    kinds = [name.strip() for name in _WEIGHTS.value]
    allowed = 'auto', 'bfloat16', *CODE_MAX
    if not kinds or len({*kinds}) < len(kinds) or not {*kinds} <= {*allowed}:
        raise InputError(f'--decode_weights={",".join(kinds)} must be of {", ".join(allowed)}, each once')
    if _PEER.value and kinds[0] != 'auto':
        raise InputError(
            f'--decode_peer has weights of its own, not --decode_weights={kinds[0]}; leave out one, or begin with auto'
        )
    dtype = jnp.dtype('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    model = LlamaForCausalLM(config, dtype=dtype)
    whole = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), init_params(model, key)))(
        jax.random.key(0)
    )
    params = weights_of(whole, kinds[0])
    others = {name: unstack(weights_of(whole, name), dtype) for name in kinds[1:]}
    filled = 2 * config.num_layers * config.num_kv_heads * config.head_dim * (prompt + tokens / 2)
    # Of the embedding a step reads a row a prompt, unless it is the head too.
    parts_read = {name: part for name, part in params.items() if name != 'embed' or config.tie_embeddings}
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(parts_read))
    # Of a prompt, whose last token alone meets the head; a third of what training takes is the forward pass.
    head = 2 * config.vocab_size * config.embed_dim * (prompt - 1)
    prompt_flops = prompt * training_flops_per_token(config, prompt)[0] / 3 - head
    peak = peak_flops_per_device() * jax.device_count()
    bandwidth = copy_bandwidth(_ROUNDS.value)
    product_bandwidth = product_read_bandwidth(config)
    figures: dict[str, Any] = {
        'model': _MODEL.value, 'dtype': dtype.name, 'copy_bandwidth': bandwidth, 'product_bandwidth': product_bandwidth,
    }  # fmt: skip
    print(
        f'{_MODEL.value}, {dtype.name}, {prompt} + {tokens} tokens, copies at {bandwidth / 1e9:,.0f} GB/s, products of '
        f'a row with matrices read {product_bandwidth / 1e9:,.1f}'
    )
    print(
        f'{"prompts":>8}{"step ms":>10}{"of bandwidth":>14}{"tokens/s":>12}{"prompt tokens/s":>17}{"MFU":>7}'
    )
    for batch in map(int, _BATCHES.value):
        ids = np.random.default_rng(0).integers(config.vocab_size, size=(batch, prompt)).tolist()

        def complete(number: int, params: Params = params, ids: list[list[int]] = ids) -> float:
            start = time.perf_counter()
            generate_tokens(model, params, ids, max_new_tokens=number, sampler=Sampler(), stop_ids=())
            return time.perf_counter() - start

        with contextlib.ExitStack() as at_exit:
            contenders: dict[str, Callable[[int], float]] = {'llama_jax': complete}
            contenders |= {name: functools.partial(complete, params=own) for name, own in others.items()}
            if _PEER.value:
                contenders |= find_peers(config, params, ids, at_exit)
            seconds = take_turns(contenders, tokens, _ROUNDS.value)
        ours = seconds['llama_jax']
        first, step, one = ours.first, ours.step, statistics.median(ours.ones)
        num_bytes = weight_bytes + dtype.itemsize * batch * filled
        found = {
            'step_ms': 1e3 * step, 'bandwidth_share': num_bytes / step / bandwidth, 'tokens_per_second': batch / step,
            'product_share': num_bytes / step / product_bandwidth,
            'prompt_tokens_per_second': batch * prompt / one, 'prompt_mfu': prompt_flops * batch / one / peak,
            'first_seconds': first,
        }  # fmt: skip
        figures |= {f'batch_{batch}_{name}': value for name, value in found.items()}
        ms, share, rate, _, read, mfu, _ = found.values()
        print(f'{batch:8}{ms:10.3f}{share:14.1%}{rate:12,.0f}{read:17,.0f}{mfu:7.1%}', flush=True)
        for name, times in list(seconds.items())[1:]:
            rate, their_read = batch / times.step, batch * prompt / statistics.median(times.ones)
            of_steps, of_prompts = by_turn(times.steps, ours.steps), by_turn(times.ones, ours.ones)
            figures |= {
                f'batch_{batch}_{name}_tokens_per_second': rate, f'batch_{batch}_ratio_to_{name}': times.step / step,
                f'batch_{batch}_{name}_prompt_tokens_per_second': their_read,
                f'batch_{batch}_prompt_ratio_to_{name}': statistics.median(of_prompts),
            }  # fmt: skip
            who = kinds[0] if name in others else 'ours'
            print(
                f'{"":8}{1e3 * times.step:10.3f}{"":14}{rate:12,.0f}{their_read:17,.0f}{"":9}{name}: {who} is '
                f'{times.step / step:.2f} times as fast, {min(of_steps):.2f} to {max(of_steps):.2f}; reads '
                f'{statistics.median(of_prompts):.2f}, {min(of_prompts):.2f} to {max(of_prompts):.2f}',
                flush=True,
            )
        if _PROFILE.value:
            kernels = show_kernels(lambda: complete(tokens), one + step * (tokens - 1))
            figures |= {f'batch_{batch}_{rank}': kernel for rank, kernel in kernels.items()}
    return figures


def weights_of(params: Params, kind: str) -> Params:
    """Those of the computation's type as `kind`, a value of --decode_weights."""
    if kind in CODE_MAX:
        return quantize(params, kind)
    return unstack(params, kind) if kind != 'auto' else params


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one contender.

    Attributes:
      first: of its first completion, which compiles.
      ones: of reading the prompts and one token, by turn.
      steps: of a step, by turn.
    """

    first: float
    ones: Sequence[float]
    steps: Sequence[float]

    @property
    def step(self) -> float:
        """Seconds of a step, the median."""
        return statistics.median(self.steps)


def take_turns(
    contenders: Mapping[str, Callable[[int], float]], tokens: int, rounds: int
) -> dict[str, Times]:
    """A turn is a completion of one token and one of `tokens`, whose difference is that of the steps between.

    A peer that cannot run here, or whose steps are lost in the noise of the machine, is left out and said so.

    Raises:
      InputError: our own are.
    """
    first = {}
    for name, complete in contenders.items():
        try:
            first[name] = complete(tokens)
        except Exception as error:  # it must not hide our own figure
            if not first:
                raise
            print(f'{name}: left out, {type(error).__name__}: {error_line(error)}')
    contenders = {name: complete for name, complete in contenders.items() if name in first}
    ones: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for complete in contenders.values():
        complete(1)
    for _ in range(rounds):
        for name, complete in contenders.items():
            ones[name].append(complete(1))
            steps[name].append((complete(tokens) - ones[name][-1]) / (tokens - 1))
    times = {name: Times(first[name], ones[name], steps[name]) for name in contenders}
    for index, name in enumerate(contenders):
        if times[name].step <= 0:
            told = f'{tokens} tokens took no longer than one; give more'
            if index == 0:
                raise InputError(f'--decode_tokens={tokens}: {told}')
            print(f'{name}: left out, {told}')
            del times[name]
    return times


def by_turn(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast we were in each turn: what slows a machine for a while slows both."""
    return [their / our for their, our in zip(theirs, ours, strict=True)]


def find_peers(
    config: LlamaConfig, params: Params, ids: list[list[int]], at_exit: contextlib.ExitStack
) -> dict[str, Callable[[int], float]]:
    """Those that are installed; llama.cpp, which is of one prompt here, on a CPU alone."""
    found: dict[str, Callable[[int], float]] = {}
    if has_peer('huggingface', 'torch', 'transformers'):
        found['huggingface'] = decode_peers.huggingface(config, ids)
    if len(ids) == 1 and jax.default_backend() == 'cpu' and has_peer('llama_cpp', 'llama_cpp'):
        for dtype in ('float32', 'q8_0'):
            peer = decode_peers.llama_cpp(config, params, ids[0], dtype)
            found[f'llama_cpp_{dtype}'] = at_exit.enter_context(peer)
    return found


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


def product_read_bandwidth(config: LlamaConfig) -> float:
    """Bytes/s of float32 that the best product of one row with a matrix of the model's reads: of an MLP, or the head.

    The matrices are many, so that no cache holds the next; the best of some turns.
    """
    rates, row = [], jnp.ones(config.embed_dim, jnp.float32)
    for equation, size in (('d,df->f', config.mlp_dim), ('d,fd->f', config.vocab_size)):
        shape = (config.embed_dim, size) if equation == 'd,df->f' else (size, config.embed_dim)
        matrices = [jnp.ones(shape, jnp.float32) for _ in range(max(1, (1 << 26) // math.prod(shape)))]
        multiply = jax.jit(
            lambda matrices, equation=equation: [jnp.einsum(equation, row, matrix) for matrix in matrices]
        )

        def once(multiply: Any = multiply, matrices: list[jax.Array] = matrices) -> float:
            start = time.perf_counter()
            jax.block_until_ready(multiply(matrices))
            return time.perf_counter() - start

        once()
        rates.append(sum(matrix.nbytes for matrix in matrices) / min(once() for _ in range(7)))
    return max(rates)


def median(measure: Callable[[], float], rounds: int) -> float:
    """Of the seconds of so many turns."""
    return statistics.median(measure() for _ in range(rounds))
