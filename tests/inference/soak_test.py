"""Calls of every kind, one after the other: programs and memory stay bounded."""

import gc
import itertools
import pathlib

import numpy as np
import pytest

from llama_jax import runtime
from llama_jax.inference.generate import generate
from tests import toy
from tests.inference.generate_test import Letters

_PAGE_BYTES = 4096
_LONGEST = 40
_FIRST = 100


def resident_bytes() -> int:
    gc.collect()
    return _PAGE_BYTES * int(pathlib.Path('/proc/self/statm').read_text().split()[1])


def lengths_of_shape(number: int, length: int | None) -> list[int]:
    """Of prompts that are read together, all of one width; None: each alone, as the next is of another."""
    return [length or (8, _LONGEST)[index % 2] for index in range(number)]


@pytest.mark.long
def test_thousands_of_calls_of_every_kind_take_no_more_programs_or_memory_than_the_first_hundred():
    model = toy.make_model()
    params, compiled, rng = toy.make_params(model), [], np.random.default_rng(0)

    # What shapes depend on: whether logits are adjusted, the numbers of stop ids and of prompts, the width of these. Of
    # each combination comes one, which is 80 calls; then any, so that all programs are there after the first hundred.
    kinds = itertools.product((False, True), (7, 15), (1, 2, 4, 8), (8, 16, 32, _LONGEST, None))

    def call():
        if kind := next(kinds, None):
            adjusts, num_stops, *shape = kind
            lengths = lengths_of_shape(*shape)
        else:
            adjusts, num_stops = bool(rng.random() < 0.5), int(rng.integers(16))
            lengths = rng.integers(1, rng.integers(2, _LONGEST + 2), size=int(rng.integers(1, 9))).tolist()
            lengths = lengths[:1] * len(lengths) if rng.random() < 0.3 else lengths
        prompts = [rng.integers(1, 60, size=size).tolist() for size in lengths]
        settings = {
            'temperature': float(rng.choice([0.0, rng.uniform(0.1, 2)])), 'top_k': int(rng.integers(0, 20)),
            'top_p': float(rng.uniform(0.3, 1)), 'min_p': float(rng.choice([0.0, 0.1])), 'seed': int(rng.integers(1e6)),
            'repetition_penalty': float(rng.choice([1.0, 1.3])) if adjusts else 1.0,
            'logit_bias': {int(rng.integers(64)): 2.0} if adjusts else {},
            'stop': ['a'] if rng.random() < 0.3 else [],
            'stop_ids': rng.choice(np.arange(3, 64), num_stops, replace=False).tolist(),
        }  # fmt: skip
        generate(model, params, Letters(), prompts, max_new_tokens=int(rng.integers(1, 20)), **settings)

    counts, sizes = [], []
    with runtime.hears_compilations(compiled.append):
        for index in range(1, 2001):
            call()
            if index in (_FIRST, 300, 500, 1000, 1500, 2000):
                counts.append(len(compiled))
                sizes.append(resident_bytes())
                print(f'after {index} calls {counts[-1]} programs, {sizes[-1] / 1e6:.0f} MB', flush=True)
    assert counts[-1] == counts[0] < 160
    assert max(sizes) < 1.03 * sizes[0]
