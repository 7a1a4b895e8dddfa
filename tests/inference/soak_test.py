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


def resident_bytes() -> int:
    gc.collect()
    return _PAGE_BYTES * int(pathlib.Path('/proc/self/statm').read_text().split()[1])


@pytest.mark.long
def test_thousands_of_calls_of_every_kind_take_no_more_programs_or_memory_than_the_first():
    model = toy.make_model()
    params, compiled, rng = toy.make_params(model), [], np.random.default_rng(0)

    # What shapes depend on: the number of prompts, their lengths, whether logits are adjusted. Each once, then any.
    kinds = itertools.product((False, True), (1, 2, 4, 8), (4, 8, 12, 16, 24, 32, 36, 40), (True, False))

    def call():
        adjusts, number, length, is_even = next(kinds, None) or (
            bool(rng.random() < 0.5), int(rng.integers(1, 9)), int(rng.integers(1, 41)), bool(rng.random() < 0.3),
        )  # fmt: skip
        lengths = [length if is_even else int(rng.integers(1, length + 1)) for _ in range(number)]
        prompts = [rng.integers(1, 60, size=size).tolist() for size in lengths]
        settings = {
            'temperature': float(rng.choice([0.0, rng.uniform(0.1, 2)])), 'top_k': int(rng.integers(0, 20)),
            'top_p': float(rng.uniform(0.3, 1)), 'min_p': float(rng.choice([0.0, 0.1])), 'seed': int(rng.integers(1e6)),
            'repetition_penalty': float(rng.choice([1.0, 1.3])) if adjusts else 1.0,
            'logit_bias': {int(rng.integers(64)): 2.0} if adjusts else {},
            'stop': ['a'] if rng.random() < 0.3 else [],
            'stop_ids': rng.integers(64, size=int(rng.integers(9))).tolist(),
        }  # fmt: skip
        generate(model, params, Letters(), prompts, max_new_tokens=int(rng.integers(1, 20)), **settings)

    counts, sizes = [], []
    with runtime.hears_compilations(compiled.append):
        for index in range(1, 2001):
            call()
            if index in (128, 500, 1000, 1500, 2000):
                counts.append(len(compiled))
                sizes.append(resident_bytes())
    print(f'programs {counts}, MB {[round(size / 1e6) for size in sizes]}')
    assert counts[-1] < 160
    # The few shapes that the first 500 calls did not have cost what a program takes, some 10 MB each.
    assert sizes[-1] < 1.03 * sizes[1]
