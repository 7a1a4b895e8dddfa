"""Of pairs of answers: their rows, their losses."""

from tests.planted_faults.fault import Fault, faults_in

_ALONE = 'data/preferences_test.py::test_log_probabilities_and_scores_are_those_of_each_answer_alone'
_FORMULA = 'losses/dpo_test.py::test_each_loss_is_its_papers_formula_in_float64'
_JUDGED = (
    'losses/pairs_test.py::test_answers_that_were_judged_alone_are_compared_with_answers_to_other_prompts'
)
_BATCH = 'losses/pairs_test.py::test_a_batch_is_the_formula_over_its_pairs'

# fmt: off
FAULTS: tuple[Fault, ...] = (
    *faults_in('llama_jax/data/preferences.py',
        ('pairs: log-probability one place off', _ALONE,
         "row['loss_mask'][first : slot - 1] = answer.counts", "row['loss_mask'][first + 1 : slot] = answer.counts"),
        ('pairs: score one past the stop token', _ALONE,
         'place_of[number] = segment, slot - 1', 'place_of[number] = segment, slot'),
        ('pairs: the prompt counts',
         'data/preferences_test.py::test_every_pair_that_fits_stands_once_with_its_own_tokens',
         "row['loss_mask'][first : slot - 1] = answer.counts",
         "row['loss_mask'][start : slot - 1] = True"),
        ('pairs: a shared prompt ends the positions', _ALONE,
         'len(unit.prompt) - len(own), segment)', '0, segment)')),
    *faults_in('llama_jax/data/preferences.py',
        ('KTO: the answer is to the same prompt',
         'data/preferences_test.py::test_an_answer_to_another_prompt_is_beside_each_prompt',
         'if texts[i % number] != texts[(i + 1) % number]:', 'if True:')),
    *faults_in('llama_jax/ops/attention_shared_prefix.py',
        ('shared prompts: of the first of the row alone', _ALONE,
         'SHARED - segment_ids // _MOST', 'SHARED + 0 * segment_ids')),
    *faults_in('llama_jax/ops/cross_entropy.py',
        ('answers: log-probabilities are left in the order of the pieces',
         'ops/cross_entropy_test.py::test_where_no_target_is_wanted_nothing_is_projected',
         'jnp.take_along_axis(values, back, axis=1)', 'values'),
        ('answers: prompts are projected too',
         'ops/cross_entropy_test.py::test_where_no_target_is_wanted_nothing_is_projected',
         'jax.lax.cond(jnp.any(wanted)', 'jax.lax.cond(jnp.bool_(True)')),
    *faults_in('llama_jax/losses/dpo.py',
        ('IPO by sums', _FORMULA, 'jnp.square(_difference(mean_ratios)', 'jnp.square(_difference(ratios)'),
        ('DPO: smoothing for robustness', _FORMULA, 'return biased / (1 - 2 * e)', 'return biased'),
        ('KTO: an answer alone is a pair', _JUDGED,
         'jnp.sum(batch.weights * jnp.mean(present, axis=-1))', 'jnp.sum(batch.weights)'),
        ('DPO: means of the parts are averaged', 'losses/pairs_test.py::test_four_microbatches_are_the_batch',
         'return jnp.sum(batch.weights * losses), weight, jax.lax.stop_gradient(totals)',
         'return jnp.sum(batch.weights * losses) / weight, jnp.float32(1), {n: t / weight for n, t in totals.items()}'),
        ('KTO: empty rows count in the baseline', _JUDGED,
         'jnp.sum(present, dtype=jnp.float32)', 'jnp.float32(present.size)'),
        ('DPO: form is compared', _BATCH,
         'batch.loss_mask & ~batch.format_mask if loss.mask_format', 'batch.loss_mask if loss.mask_format'),
        ('DPO: the reference is the policy',
         'losses/pairs_test.py::'
         'test_the_first_loss_is_log_2_beside_adapters_whose_dropout_the_reference_never_sees',
         'jax.lax.stop_gradient(frozen), batch, num_chunks', 'jax.lax.stop_gradient(params), batch, num_chunks')),
    *faults_in('llama_jax/losses/reward.py',
        ('reward: the margin is added', 'losses/reward_test.py::test_ranking_losses_are_the_formula_in_float64',
         'better - worse - margins', 'better - worse + margins'),
        ('reward: means of the parts are averaged',
         'losses/pairs_test.py::test_four_microbatches_are_the_batch',
         'jnp.sum(batch.weights * losses), jnp.sum(batch.weights), sums',
         'jnp.sum(batch.weights * losses) / (number := jnp.sum(batch.weights)), jnp.float32(1.0), '
         '{name: total / number for name, total in sums.items()}')),
    *faults_in('llama_jax/eval/preferences.py',
        ('preferences: pairs in the order of rows',
         'eval/preferences_test.py::test_figures_come_back_to_their_pairs_however_rows_hold_them',
         'found[pairs] = figures[place, : len(pairs)]',
         'found[row : row + len(pairs)] = figures[place, : len(found[row : row + len(pairs)])]')),
)
