"""Of answers that are drawn, judged and kept."""

from tests.planted_faults.fault import Fault, faults_in

_DRAWN = 'rl/rollout_test.py::test_log_probabilities_are_of_the_distribution_that_was_drawn_from'
_SAFETY = (
    'rl/rewards_test.py::test_safety_comes_first_where_a_record_is_tagged_or_its_score_is_below_the_threshold'
)
_CUT = 'rl/rejection_test.py::test_no_end_is_learnt_of_an_answer_that_was_cut'
_GHOST = 'rl/ghost_attention_test.py::test_{}'

# fmt: off
FAULTS: tuple[Fault, ...] = (
    *faults_in('llama_jax/rl/rollout.py',
        ('rollouts: scored at temperature 1', _DRAWN,
         'score.filtered_log_probability for', 'score.log_probability for'),
        ('rollouts: the same draws for every prompt',
         'rl/rollout_test.py::test_answers_stand_in_their_order_and_hold_what_ended_them',
         'json.dumps([seed, record, sample])', 'json.dumps([seed, sample])')),
    *faults_in('llama_jax/rl/rewards.py',
        ('rewards: rounded to whole numbers',
         'rl/rewards_test.py::test_rewards_are_summed_by_weight_in_float64_and_kept_apart',
         'total += term.weight * found', 'total += np.trunc(term.weight * found)'),
        ('rewards: a stop token other than EOS counts as none',
         'rl/rewards_test.py::test_an_answer_that_was_cut_is_punished_whatever_the_stop_tokens_are',
         '0.0 if one.stopped', '0.0 if one.answer[-1] == 2'),
        ('rewards: the threshold is of the score', _SAFETY,
         'safe < math.log(threshold / (1 - threshold))', 'safe < threshold'),
        ('rewards: a tag is not seen', _SAFETY, 'tagged | (safe', '(safe')),
    *faults_in('llama_jax/rl/reward_model.py',
        ('reward model: score one past the stop token',
         'rl/reward_model_test.py::test_an_answer_is_scored_as_it_is_alone',
         'found[place, end - 1]', 'found[place, end % width]'),
        ('reward model: positions of a row, not of an answer',
         'rl/reward_model_test.py::test_an_answer_is_scored_as_it_is_alone',
         'np.arange(len(prompt), len(prompt) + len(answer))', 'np.arange(start, end)')),
    *faults_in('llama_jax/rl/rejection.py',
        ('rejection: order statistics with replacement',
         'rl/rejection_test.py::test_order_statistics_are_the_means_over_all_draws',
         'math.comb(k - 1 - i, n - rank)', 'math.comb(k - i, n - rank)'),
        ('rejection: an end is learnt of an answer that was cut', _CUT,
         "'stopped': kept.stopped", "'stopped': True")),
    *faults_in('llama_jax/data/messages.py',
        ('records: of a pair the end of what was cut', _CUT,
         'is_cut=not stopped', "is_cut=not stopped and key == 'stopped'")),
    *faults_in('llama_jax/tokenizer/text_format.py',
        ('a stop token behind what was cut', _CUT, '[] if message.is_cut else [self', '[self')),
    *faults_in('llama_jax/rl/context_distillation.py',
        ('distillation: kept without a rise',
         'rl/context_distillation_test.py::test_only_what_scores_above_all_without_is_kept',
         'best[0].score <= original[0].score', 'best[0].score < original[0].score'),
        ('ghost attention: while answers are drawn the instruction stands once', _GHOST.format(
            'while_answers_are_drawn_it_stands_before_every_message_by_the_user'),
         'places if everywhere else places[:1]', 'places[:1]')),
    *faults_in('llama_jax/rl/ghost_attention.py',
        ('ghost attention: answers in between are learnt', _GHOST.format(
            'what_is_learnt_has_it_once_and_the_weight_of_the_last_answer_alone'),
         'int(number == len(said) - 1)', "int(message.role == 'assistant')"),
        ('ghost attention: two constraints of a kind', _GHOST.format(
            'instructions_combine_kinds_and_every_second_one_is_terse'),
         'kinds = [list(by_kind)[place] for place in rng.permutation(len(by_kind))[:number]]',
         'kinds = rng.choice(list(by_kind), number).tolist()'),
        ('ghost attention: a prompt stands twice in a dialog', _GHOST.format(
            'every_prompt_stands_once_at_every_turn_and_never_twice_in_a_dialog'),
         'order[(first + shifts[turn % number]) % number]', 'order[(first * turn + shifts[0]) % number]')),
)
