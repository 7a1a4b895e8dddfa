"""What bad input of generation in the loop gets: one line of what is wrong, what is allowed and what to do.

A row of the table is a case or some, in the order in which policy gradients meet them; each goes through what refuses
it. The commands say the same, with status 2 and nothing written: `configs_test.py` (keys, meshes),
`ppo_command_test.py` (judges without a score, prompts without room, refilling, another run),
`rejection_command_test.py` (rewards of all kinds, tokenizers, safety that was not trained), `ghost_command_test.py`
(dialogs); `losses/policy_test.py` and `rl/rewards_test.py` have what else is none.
"""

import dataclasses
import json
import re
import shutil
import types

import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from configs import grpo, ppo, reward_model
from experiments.policy import rewards
from experiments.policy.beginning import begin_policy
from experiments.policy.drawing import Drawing, Drawn
from experiments.policy.ghost_dialogs import held_dialogs
from experiments.policy.objective import check_policy, sampler_partitioner
from experiments.run import settings, workdir
from llama_jax.checkpoint.model_file import save_config
from llama_jax.checkpoint.weights import save_params
from llama_jax.convert import huggingface
from llama_jax.data.record_kinds import Conversation
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.models.llama import abstract_params
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.rl.ghost_attention import default_constraints
from llama_jax.rl.rewards import Rewarded, Weighted, judge
from llama_jax.rl.rollout import Rollout, check_room
from llama_jax.tokenizer.chat_format import Message, chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests import toy
from tests.convert.in_memory import InMemory, random_source
from tests.rl.rollout_test import Letters


@pytest.fixture(scope='module')
def tokenizer(shared_data):
    return load_tokenizer(shared_data / 'weights/stories260K/tok512.model')


def config_of(recipe=ppo, model='tiny', **changed):
    config = recipe.get_config(model)
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changed.items()})
    return config


def one_answer_a_group_of_grpo(folder, tokenizer):
    check_policy(config_of(grpo, rollout__samples=1))


def one_answer_a_group_of_rloo(folder, tokenizer):
    check_policy(config_of(grpo, 'tiny,rloo', rollout__samples=1))


def k1_in_the_loss(folder, tokenizer):
    check_policy(config_of(algorithm__constants='divergence=k1'))


def own_reward(folder, body):
    (folder / 'mine.py').write_text(f'def score(prompt, answer, record):\n    {body}\n')
    (term,) = rewards.parse_rewards(f'{folder}/mine.py:score')
    found = rewards.open_rewards([term], tokenizer=None, max_new_tokens=4)
    judge(found.rewards, [Rollout(3, 1, (1,), (5, 2), (), True, 'so')], [{'prompt': 'a'}])


def a_reward_whose_file_is_missing(folder, tokenizer):
    rewards.check_rewards(rewards.parse_rewards(f'{folder}/mine.py:score'), allow_code=False)


def a_reward_whose_function_is_missing(folder, tokenizer):
    (folder / 'mine.py').write_text('def scores(prompt, answer, record): ...\n')
    rewards.check_rewards(rewards.parse_rewards(f'{folder}/mine.py:score'), allow_code=False)


def a_reward_that_raises(folder, tokenizer):
    own_reward(folder, 'return record["gold"]')


def a_reward_of_several_numbers(folder, tokenizer):
    own_reward(folder, 'return [0.5, 1.0]')


def a_reward_for_other_answers(folder, tokenizer):
    answers = [Rollout(3, sample, (1,), (5, 2), (), True, 'so') for sample in range(2)]
    judge([Weighted('own', lambda rollouts, records: np.ones(3))], answers, [{}, {}])


def a_reward_that_is_no_number(folder, tokenizer):
    own_reward(folder, 'return float("nan")')


def a_task_that_runs_programs(folder, tokenizer):
    begin_policy(config_of(algorithm__rewards='task:mbpp'), allow_code=False, checkpoint='')


def a_policy_from_nothing_once_programs_may_run(folder, tokenizer):
    begin_policy(config_of(algorithm__rewards='task:mbpp'), allow_code=True, checkpoint='')


@pytest.mark.parametrize(('given', 'warned'), [('missing_stop', True), ('missing_stop,task:gsm8k', False)])
def test_rewards_that_only_punish_are_said_to_reward_nothing(caplog, given, warned):
    rewards.check_rewards(rewards.parse_rewards(given), allow_code=False)
    assert ('missing_stop alone' in caplog.text) == warned


def model_in(folder, **changed):
    folder.mkdir()
    source = random_source(dataclasses.replace(toy.CONFIG, **changed))
    huggingface.write(source, epath.Path(folder), bos_id=1, eos_ids=[2])
    return rewards.parse_rewards(str(folder))


def a_judge_of_another_tokenizer(folder, tokenizer):
    terms = model_in(folder / 'judge', scalar_head=True, vocab_size=512)
    shutil.copy(tokenizer.path, folder / 'judge/tokenizer.model')
    rewards.open_rewards(terms, tokenizer=Letters(), max_new_tokens=4)


def a_judge_without_a_score(folder, tokenizer):
    rewards.check_rewards(model_in(folder / 'judge'), allow_code=False)


def a_judge_of_safety_that_learnt_no_threshold(folder, tokenizer):
    run = epath.Path(folder / 'judge')
    run.mkdir()
    architecture = dataclasses.replace(toy.CONFIG, scalar_head=True)
    shapes = traverse_util.flatten_dict(abstract_params(LlamaForRewardModel(architecture)), sep='/')
    save_params(
        run / 'checkpoints', {name: InMemory(np.zeros(one.shape, one.dtype)) for name, one in shapes.items()}
    )
    save_config(run, architecture)
    workdir.record_run(run, config_of(reward_model, reward__safety=0.0), '', 'abc')
    rewards.check_rewards(rewards.parse_rewards(f'helpfulness:{run},safety:{run}'), allow_code=False)


def prompts_without_room(folder, tokenizer):
    check_room([[1] * 5, [1] * 70, [1] * 61], max_new_tokens=4, max_seq_len=64)


class Alike(Drawing):
    """Draws answers that are all worth the same."""

    def __init__(self, config):
        self._config, self._refill = config, True
        self._prompts = types.SimpleNamespace(taken=lambda number: number)

    def answers(self, state, taken, numbers, *, samples=0):
        found = [Rollout(one, k, (1,), (2,), (), True, '') for one in numbers for k in range(2)]
        return Drawn(found, Rewarded(np.ones(len(found)), {}))


def groups_without_variance(folder, tokenizer):
    Alike(config_of(grpo, 'tiny,dapo', rollout__batch_size=8, rollout__samples=2)).draw(None, 0)


def a_batch_of_no_whole_minibatches(folder, tokenizer):
    check_policy(config_of(rollout__batch_size=60, train__batch_size=64))


def a_batch_of_no_whole_groups(folder, tokenizer):
    check_policy(config_of(grpo, rollout__batch_size=512, rollout__samples=5))


def a_mesh_that_the_devices_do_not_make(folder, tokenizer):
    config = config_of(rollout__mesh='tensor=3')
    sampler_partitioner(config, settings.make_partitioner(config))


def another_run(key, value):
    def row(folder, tokenizer):
        config, changed = config_of(grpo), config_of(grpo, **{key: value})
        workdir.record_run(epath.Path(folder), config, '', 'abc')
        workdir.check_workdir(epath.Path(folder), changed, '')

    row.__name__ = f'going_on_with_another_{key.rpartition("_")[2]}'
    return row


def a_dialog_file_without_a_user(folder, tokenizer):
    messages = [{'role': 'system', 'content': 'Be.'}, {'role': 'assistant', 'content': 'So'}]
    (folder / 'dialogs.jsonl').write_text(json.dumps({'messages': messages}))
    list(read_records([str(folder / 'dialogs.jsonl')], kind=Conversation))


def a_dialog_without_a_user(folder, tokenizer):
    dialog = Conversation(
        (Message('system', 'Be.'), Message('assistant', 'So')), (False, True), 'talk line 7'
    )
    (held,) = held_dialogs([dialog], default_constraints(), most=1, seed=0)
    held.ask(0, 1, chat_format_for(tokenizer, 'plain'), everywhere=True)


JUDGE = 'the reward model .*judge'
TABLE = {
    one_answer_a_group_of_grpo: r'rollout\.samples=1, and the advantage group_std .*name=grpo.*; draw at least 2',
    one_answer_a_group_of_rloo: r'rollout\.samples=1, and the advantage leave_one_out .*rloo.*; draw at least 2',
    k1_in_the_loss: "divergence is 'k1': in the loss the mean of its gradient is 0.*; choose reward, .* or k2",
    a_reward_whose_file_is_missing: r'no file \S+mine\.py; a reward of your own is FILE\.py:function',
    a_reward_whose_function_is_missing: r'mine\.py has no function score; it has scores',
    a_reward_that_raises: r"mine\.py:score raised KeyError \('gold'\) for record 3, answer 1 \('so'\)",
    a_reward_of_several_numbers: r"gave '\[0\.5, 1\.0\]' for record 3, answer 1 .*; it must give one number",
    a_reward_for_other_answers: r'own gave values of shape \[3\] for 2 answers, the first of record 3.*give one each',
    a_reward_that_is_no_number: r'mine\.py:score is nan for record 3, answer 1 .*; it must be a finite number',
    a_task_that_runs_programs: r'mbpp executes .*must be allowed \(set by .*rewards, --allow_code_execution\)',
    a_policy_from_nothing_once_programs_may_run: 'a policy starts from a model: give it by --checkpoint',
    a_judge_of_another_tokenizer: rf'{JUDGE} .*they have 64 and 512 ids',
    a_judge_without_a_score: rf'{JUDGE} has no score: it is a language model; train one .*reward_model',
    a_judge_of_safety_that_learnt_no_threshold: rf'{JUDGE} was trained without .*\(reward\.safety 0\).*train',
    prompts_without_room: '2 of 3 prompts are longer than 60 tokens, .*: the longest has 70; leave them out',
    groups_without_variance: r'10 times others were drawn, and still 4 of 4 groups .*samples=2 .*too easy or too hard',
    a_batch_of_no_whole_minibatches: r'batch_size=60 answers do not divide into --config\.train\.batch_size=64',
    a_batch_of_no_whole_groups: r'batch_size=512 answers do not divide into --config\.rollout\.samples=5; make it',
    a_mesh_that_the_devices_do_not_make: r'impossible mesh .*tensor=3\): there are 8 devices.*config\.rollout\.mesh',
    another_run('algorithm__name', 'rloo'): r"--config\.algorithm\.name was 'grpo' and is 'rloo'",
    another_run('algorithm__rewards', 'runs/r'): r"--config\.algorithm\.rewards was .* and is 'runs/r'",
    another_run('rollout__samples', 4): r'--config\.rollout\.samples was 8 and is 4',
    a_dialog_file_without_a_user: r'dialogs\.jsonl line 1: .*a message by the user must come first',
    a_dialog_without_a_user: 'talk line 7: the conversation has no message by the user',
}  # fmt: skip


@pytest.mark.parametrize('row', TABLE, ids=lambda row: row.__name__)
def test_a_row_of_the_table(row, tmp_path, tokenizer):
    with pytest.raises(InputError, match=TABLE[row]) as refusal:
        row(tmp_path, tokenizer)
    assert not re.search(r'\n', str(refusal.value))


@pytest.mark.parametrize('name', ['top_p', 'top_k', 'min_new_tokens'])
def test_the_command_has_no_key_that_cuts_what_is_drawn_from(commands, tmp_path, name):
    """The ratio would be that of another distribution than answers come from."""
    run = '--config=configs/ppo.py:tiny', f'--workdir={tmp_path / "run"}', f'--config.rollout.{name}=1'
    assert f'unknown config key --config.rollout.{name}; ' in commands.run('ppo', *run).error()
    assert not list(tmp_path.iterdir())
