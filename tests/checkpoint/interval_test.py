"""How often to save: beside the best of a search, and of failures drawn one by one."""

import numpy as np
import pytest

from llama_jax.checkpoint.interval import best_interval, state_bytes, training_share
from llama_jax.errors import InputError
from llama_jax.models.presets import PRESETS


@pytest.mark.parametrize(('save', 'failure'), [(10.0, 86_400.0), (60.0, 7200.0), (300.0, 3600.0)])
def test_the_interval_is_the_best_there_is(save, failure):
    intervals = np.geomspace(save / 10, failure * 3, 20_000)
    shares = [training_share(interval, save, failure, 0.0) for interval in intervals]
    best = intervals[np.argmax(shares)]
    # Daly's estimate is a series; at save / failure = 1/12 it is off by half a per cent.
    np.testing.assert_allclose(best_interval(save, failure), best, rtol=0.01)
    if save < failure / 1000:
        np.testing.assert_allclose(best, np.sqrt(2 * save * failure), rtol=0.03)  # Young's


def test_the_share_is_that_of_drawn_failures():
    interval, save, failure, restart = 600.0, 30.0, 3600.0, 120.0
    rng, spent, segments = np.random.default_rng(0), 0.0, 20_000
    for _ in range(segments):
        while (left := rng.exponential(failure)) < interval + save:
            spent += left
            while (until := rng.exponential(failure)) < restart:  # a restart fails as well
                spent += until
            spent += restart
        spent += interval + save
    # 20,000 segments, some 4,000 failures: the mean is known to about 0.3 %.
    np.testing.assert_allclose(
        training_share(interval, save, failure, restart), segments * interval / spent, rtol=0.01
    )


def test_a_checkpoint_is_the_weights_and_two_moments():
    assert state_bytes(PRESETS['llama2_70b']) == 12 * 68_976_648_192
    with pytest.raises(InputError, match='failure_seconds is 0'):
        best_interval(1.0, 0.0)


def test_the_command_says_how_often_and_what_fits(commands):
    options = ['--model=llama2_70b', '--bandwidth=32', '--hours_between_failures=24']
    shown = (
        commands.run('checkpoint_interval', *options, '--step_seconds=9.6', '--grace=15').succeeded().stdout
    )
    first, second = shown.strip().split('\n')
    # sqrt(2 * 25.87 * 86400) = 2114 s, and Daly's 17 s less: 218.4 steps
    assert first == (
        'llama2_70b: 827.7 GB in 25.9 s; --config.checkpoint.every=218 (34.9 minutes); 97.2% of the time trains'
    )
    assert second == '15 s at 32 GB/s: the largest that is saved in it is code_llama_13b, 156.2 GB'
    assert '--bandwidth' in commands.run('checkpoint_interval', '--help').succeeded().stdout
    refused = commands.run('checkpoint_interval', *options[:2], '--hours_between_failures=0')
    assert refused.error() == 'error: --hours_between_failures=0.0: it must be more than 0'
