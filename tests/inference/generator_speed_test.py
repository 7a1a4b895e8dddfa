"""What sharing slots and beginnings of prompts saves: ratios of one run, each of turns in turns."""

import dataclasses
import statistics
import time

import jax
import numpy as np
import pytest

from llama_jax.inference import generator as generators
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.presets import PRESETS
from llama_jax.models.unstacked import unstack

pytestmark = pytest.mark.long
NEVER = ()  # stop ids


@pytest.fixture(scope='module')
def model():
    return LlamaForCausalLM(dataclasses.replace(PRESETS['stories_110m'], max_seq_len=2048))


@pytest.fixture(scope='module')
def weights(model):
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return unstack(params, delete=True)


def random_prompts(count, length):
    return np.random.default_rng(0).integers(3, 32000, size=(count, length)).tolist()


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(functions, rounds=3):
    """Seconds of each, the median of some turns, after one that compiles."""
    found = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, times in zip(functions, found, strict=True):
            times.append(seconds(function) if turn else function() or 0.0)
    return [statistics.median(times[1:]) for times in found]


def test_slots_that_are_filled_again_beat_batches_that_wait_for_their_longest_row(model, weights):
    """64 prompts, whose completions have geometric lengths of 32 in the mean, through 8 slots."""
    prompts = random_prompts(64, 16)
    lengths = np.minimum(np.random.default_rng(1).geometric(1 / 32, size=64), 256)

    def complete(batch_size):
        for start in range(0, 64, batch_size):
            generator = Generator(model, weights, num_slots=8, is_watched=False)
            for prompt, length in zip(
                prompts[start : start + batch_size], lengths[start : start + batch_size], strict=True
            ):
                generator.submit(CompletionRequest(prompt, int(length), stop_ids=NEVER))
            assert sum(len(progress.tokens) for progress in generator.run()) == sum(
                lengths[start : start + batch_size]
            )

    fixed, shared = in_turns([lambda: complete(8), lambda: complete(64)])
    print(f'batches of 8: {fixed:.2f} s, slots filled again: {shared:.2f} s, {fixed / shared:.2f} times')
    assert fixed > 1.5 * shared


def first_token(generator, prompt):
    generator.submit(CompletionRequest(prompt, 1, stop_ids=NEVER))
    for _ in generator.run():
        pass


def test_a_known_beginning_of_768_of_1024_tokens_takes_a_third_of_the_time(model, weights):
    first, *others = random_prompts(8, 1024)
    known = Generator(model, weights, num_slots=1, prefix_bytes=(2**30, 0))
    unknown = Generator(model, weights, num_slots=1)
    first_token(known, first)
    beginnings = [[*first[:768], *other[768:]] for other in others]
    whole, rest = iter(others), iter(beginnings)
    without, beside = in_turns(
        [lambda: first_token(unknown, next(whole)), lambda: first_token(known, next(rest))]
    )
    print(f'1,024 tokens: {without:.3f} s, 768 of them known: {beside:.3f} s, {beside / without:.2f} of it')
    assert beside < without / 3


def test_pieces_of_256_tokens_take_little_longer_than_one(monkeypatch, model, weights):
    (prompt,) = random_prompts(1, 1024)
    pieces = Generator(model, weights, num_slots=1)
    monkeypatch.setattr(generators, '_WIDTHS', {'cpu': (256, 512, 1024)})
    whole = Generator(model, weights, num_slots=1)
    assert (pieces.batcher.grid, whole.batcher.grid) == (256, 1024)
    by_pieces, at_once = in_turns([lambda: first_token(pieces, prompt), lambda: first_token(whole, prompt)])
    print(f'in pieces of 256: {by_pieces:.3f} s, at once: {at_once:.3f} s, {by_pieces / at_once:.2f} times')
    assert by_pieces < 1.15 * at_once
