"""Groups of answers that teach nothing are replaced by those to the prompts behind, where an algorithm wants it."""

import types

import numpy as np
import pytest

from configs import grpo
from experiments.policy.drawing import Drawing, Drawn
from llama_jax.rl.rewards import Rewarded
from llama_jax.rl.rollout import Rollout

# What the answers to each prompt are worth, by its number in the run.
WORTH = [
    (1.0, 1.0),
    (0.0, 1.0),
    (0.5, 0.5),
    (1.0, 0.3),
    (0.0, 0.0),
    (0.2, 0.1),
    (7.0, 7.0),
    (0.0, -1.0),
    (1.0, 0.0),
]


class Known(Drawing):
    """Draws answers whose worth is known, from a run without weights."""

    def __init__(self, refill):
        self._config, self._refill = grpo.get_config('tiny,dapo'), refill
        self._config.rollout.update(batch_size=8, samples=2)
        self._prompts, self.asked = types.SimpleNamespace(taken=lambda number: number), []

    def answers(self, state, taken, numbers, *, samples=0):
        self.asked.append(list(numbers))
        found = [Rollout(one, k, (1,), (2,), (), True, '') for one in numbers for k in range(2)]
        total = np.array([worth for one in numbers for worth in WORTH[one]])
        return Drawn(found, Rewarded(total, {'mine': total}))


@pytest.mark.parametrize('refill', [True, False])
def test_groups_that_are_all_worth_the_same_are_replaced(refill):
    drawing = Known(refill)
    drawn, cursor, refills = drawing.draw(None, 0)
    kept = [1, 3, 5, 7] if refill else [0, 1, 2, 3]
    assert [(one.record, one.sample) for one in drawn.rollouts] == [(n, k) for n in kept for k in range(2)]
    assert drawn.rewarded.total.tolist() == [worth for n in kept for worth in WORTH[n]]
    assert drawn.rewarded.parts['mine'].tolist() == drawn.rewarded.total.tolist()
    # As many as are missing are asked, of the prompts behind: none stands in two iterations.
    assert drawing.asked == ([[0, 1, 2, 3], [4, 5], [6], [7]] if refill else [[0, 1, 2, 3]])
    assert (cursor, refills) == ((8, 3) if refill else (4, 0))
