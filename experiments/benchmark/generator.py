"""What sharing saves where many prompts are completed: ratios of one run, contenders in turns, with random weights.

Slots that are filled again, beside batches that wait for their longest row; prompts whose beginning is known, beside
those read whole; prompts read in pieces of a block, beside those read at once.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.run.settings import find_preset
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.unstacked import unstack

_MODEL = flags.DEFINE_string('generator_model', 'stories_110m', 'a preset')
_SLOTS = flags.DEFINE_integer('generator_slots', 8, 'rows that are decoded together', lower_bound=1)
_PROMPTS = flags.DEFINE_integer('generator_prompts', 64, 'that share them', lower_bound=1)
_LENGTH = flags.DEFINE_integer(
    'generator_length', 32, 'new tokens in the mean, geometrically distributed', lower_bound=1
)
_PIECE = flags.DEFINE_integer(
    'generator_piece', 256, 'tokens of a piece; a long prompt has four', lower_bound=8
)
_ROUNDS = flags.DEFINE_integer('generator_rounds', 5, 'turns', lower_bound=1)


def main() -> dict[str, Any]:
    """Seconds of both of each pair, and their ratio, in a table."""
    slots, piece = _SLOTS.value, _PIECE.value
    long = 4 * piece
    model = LlamaForCausalLM(dataclasses.replace(find_preset(_MODEL.value), max_seq_len=2 * long))
    model = model.clone(dtype=jnp.dtype('float32' if jax.default_backend() == 'cpu' else 'bfloat16'))
    init = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(model.dtype), init_params(model, key)))
    params = unstack(init(jax.random.key(0)), model.dtype, delete=True)
    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        'slots': share_slots(model, params, slots, _PROMPTS.value, _LENGTH.value),
        'prefix': know_beginnings(model, params, long),
        'pieces': read_in_pieces(model, params, long),
    }
    told = {
        'slots': f'batches of {slots}, slots that are filled again',
        'prefix': f'{long} tokens of a prompt, {3 * piece} of them known',
        'pieces': f'{long} tokens at once, in pieces of {piece}',
    }
    figures: dict[str, Any] = {'model': _MODEL.value, 'dtype': jnp.dtype(model.dtype).name}
    print(f'{"seconds":>8}{"":>8}{"ratio":>7}')
    for name, (before, after) in pairs.items():
        times = in_turns((before, after), _ROUNDS.value)
        ratios = [b / a for b, a in zip(*times, strict=True)]
        first, second = map(statistics.median, times)
        figures |= {f'{name}_seconds': second, f'{name}_ratio': statistics.median(ratios)}
        spread = f'{min(ratios):.2f} to {max(ratios):.2f}'
        print(
            f'{first:8.3f}{second:8.3f}{statistics.median(ratios):7.2f}  {told[name]} ({spread})', flush=True
        )
    return figures


def in_turns(contenders: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each by turn, after one turn that compiles."""
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 1):
        for contender, of_one in zip(contenders, times, strict=True):
            start = time.perf_counter()
            contender()
            of_one += [time.perf_counter() - start] if turn else []
    return times


def random_prompts(model: LlamaForCausalLM, length: int) -> Iterator[list[int]]:
    """Of ids, without end."""
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(model.config.vocab_size, size=length).tolist()


def complete(sharer: Generator, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
    """Nothing ends a completion but its length."""
    for prompt, length in zip(prompts, lengths, strict=True):
        sharer.submit(CompletionRequest(prompt, length, stop_ids=()))
    made = sum(len(progress.tokens) for progress in sharer.run())
    assert made == sum(lengths)


def share_slots(
    model: LlamaForCausalLM, params: Any, slots: int, number: int, mean_length: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Completions of geometric lengths: a batch at a time, and all through the same slots."""
    prompts = [prompt for prompt, _ in zip(random_prompts(model, 16), range(number), strict=False)]
    drawn = np.random.default_rng(1).geometric(1 / mean_length, size=number)
    lengths = np.minimum(drawn, model.config.max_seq_len - 16).tolist()

    def through(at_once: int) -> None:
        for start in range(0, number, at_once):
            part = slice(start, start + at_once)
            sharer = Generator(model, params, num_slots=slots, is_watched=False)
            complete(sharer, prompts[part], lengths[part])

    return (lambda: through(slots)), (lambda: through(number))


def know_beginnings(
    model: LlamaForCausalLM, params: Any, long: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """To the first token of a prompt; of the second kind three quarters were read before."""
    prompts = random_prompts(model, long)
    kept_bytes = long * 2 * model.config.num_layers * model.config.num_kv_heads * model.config.head_dim * 4
    known = Generator(model, params, num_slots=1, prefix_bytes=(2 * kept_bytes, 0), widths=(long // 4,))
    unknown = Generator(model, params, num_slots=1, widths=(long // 4,))
    first = next(prompts)
    complete(known, [first], [1])
    beginning = first[: 3 * long // 4]
    return (
        lambda: complete(unknown, [next(prompts)], [1]),
        lambda: complete(known, [[*beginning, *next(prompts)[len(beginning) :]]], [1]),
    )


def read_in_pieces(
    model: LlamaForCausalLM, params: Any, long: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """To the first token of a prompt."""
    prompts = random_prompts(model, long)
    at_once, pieces = (Generator(model, params, num_slots=1, widths=(width,)) for width in (long, long // 4))
    return (lambda: complete(at_once, [next(prompts)], [1])), (lambda: complete(pieces, [next(prompts)], [1]))
