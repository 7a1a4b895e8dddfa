"""A run of policy gradients in one picture."""

import pytest
from etils import epath

from llama_jax.rl.frontier import plot_frontier


@pytest.mark.parametrize(
    'lines', [[{'reward': 0.1, 'kl': 0.0}, {'loss': 1.0}, {'reward': 0.4, 'kl': 1.5}], []]
)
def test_reward_is_drawn_over_the_divergence(tmp_path, lines):
    file = epath.Path(tmp_path) / 'reward.png'
    plot_frontier(file, [{'step': step, **line} for step, line in enumerate(lines)])
    assert file.read_bytes().startswith(b'\x89PNG')
