"""Of policy gradients: what peers get wrong, and what would not be seen."""

from tests.planted_faults.fault import Fault, faults_in

_LOSS = 'losses/policy_test.py::test_each_presets_loss_and_gradient_are_its_papers_in_float64'
_REWARD = 'rl/advantages_test.py::test_a_reward_lands_on_the_last_token_as_it_is'
_WHITE = 'rl/advantages_test.py::test_whitening_is_over_all_answers'
_PLACES = 'rl/iteration_test.py::test_an_answers_numbers_stand_where_its_tokens_are_predicted'

# fmt: off
FAULTS: tuple[Fault, ...] = (
    *faults_in('llama_jax/rl/advantages.py',
        ('rewards become whole numbers', _REWARD,
         'rewards = -beta * np.asarray(one, np.float64)', 'rewards = (-beta * np.asarray(one)).astype(np.int32)'),
        ('the score lands on the first token', _REWARD, 'rewards[-1] += score', 'rewards[0] += score'),
        ('whitened advantages keep their mean', _WHITE,
         'return [(one - mean) / std for one in values]',
         'return [(one - mean) / std + mean for one in values]'),
        ('advantages are whitened by device', _WHITE,
         'whiten(found) if algorithm.whiten', '[*whiten(found[:4]), *whiten(found[4:])] if algorithm.whiten'),
        ('values are fitted through the origin',
         'rl/advantages_test.py::test_a_slope_is_that_of_the_least_squares_line_and_explains_no_less_than_nothing',
         'expected = expected - expected.mean()', 'expected = expected - 0.0'),
        ('equal scores are divided by their rounding',
         'rl/advantages_test.py::test_equal_scores_in_a_group_teach_exactly_nothing',
         'number < 2 or np.all(of_group == of_group[0])', 'number < 2'),
        ('something is expected behind the last token', 'rl/advantages_test.py::test_advantages_are_sums_of_errors',
         'np.append(values[1:], 0.0)', 'np.append(values[1:], values[-1])')),
    *faults_in('llama_jax/losses/policy.py',
        ('the ratio is 1 by construction', 'losses/policy_test.py::test_a_policy_that_has_moved_is_clipped',
         'jnp.where(counted, log_p - batch.old, 0.0)',
         'jnp.where(counted, log_p - jax.lax.stop_gradient(log_p), 0.0)'),
        ('drawn at 0.7, scored at 1',
         'losses/policy_test.py::test_a_policy_that_has_not_moved_has_ratio_one',
         '            temperature, batch.weights > 0,\n        )  # fmt: skip\n        losses',
         '            1.0, batch.weights > 0,\n        )  # fmt: skip\n        losses'),
        ('the larger of both is taken', _LOSS, 'gain = jnp.minimum(ratios', 'gain = jnp.maximum(ratios'),
        ('k3 the other way round', _LOSS,
         'jnp.expm1(-jnp.maximum(away, -30.0)) + away', 'jnp.expm1(jnp.minimum(away, 30.0)) - away'),
        ("an answer's ratio is a mean", _LOSS,
         "mean = algorithm.ratio == 'sequence_mean'", 'mean = True')),
    *faults_in('llama_jax/rl/iteration.py',
        ('answers one place off', _PLACES,
         'slots = slice(start + len(prompt) - 1, end)', 'slots = slice(start + len(prompt), end + 1)'),
        ('every answer counts as its tokens', _PLACES,
         "1.0 / len(answer) if algorithm.weights == 'sequence' else 1.0", '1.0')),
)
