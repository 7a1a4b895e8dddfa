"""`rejection_sampling`: what its file holds and who reads it, going on from kills, pools, what is refused."""

import json
import pathlib
import re
import shutil

import numpy as np
import pytest

from experiments.policy.candidates import read_pool
from experiments.policy.rewards import Term, parse_rewards, task_reward
from experiments.policy.sampled import check_plot, plot_beside
from llama_jax.errors import InputError
from llama_jax.eval.task import Graders
from llama_jax.grading.sandbox import CodeExecution
from llama_jax.rl.rollout import Rollout
from tests.command_line import tiny_run
from tests.killed import kill_ten_times
from tests.preferences_command_test import arguments

WORDS = ('bad', 'ban', 'balla', 'dio', 'dun', 'fa', 'farst', 'gen', 'gilly', 'ku')
MINE = 'def score(prompt, answer, record):\n    return answer.count(record.get("of", "a")) / 7\n'
# Kills the process behind so many scored prompts; from 100 on before that one is kept.
KILLED = """
import os, llama_jax.item_log as log
add, count = log.ItemLog.add, iter(range(100))
def adds(self, item):
    number = next(count)
    if number == PROMPTS - 100:
        os.kill(os.getpid(), 9)
    add(self, item)
    if number == PROMPTS:
        os.kill(os.getpid(), 9)
log.ItemLog.add = adds
"""


# Where it is killed, and how many calls of each there are in the whole.
MOMENTS = {
    'llama_jax.inference.generator:Generator.advance': 8, 'experiments.policy.candidates:judge': 8,
    'llama_jax.item_log:ItemLog.add': 8, 'experiments.prompting.prompt_file:write_answers': 1,
}  # fmt: skip


def rollout(text, record=0):
    return Rollout(record, 0, (1,), (2, 3), (), True, text)


def test_rewards_are_named_with_their_weights():
    found = parse_rewards(
        'runs/a=b,helpfulness:h=2,safety:s=2,task:gsm8k,f.py:g=-.5,missing_stop=1e-1,overlong:8'
    )
    assert found == [
        Term('model', 'runs/a=b'), Term('helpfulness', 'h', 2.0), Term('safety', 's', 2.0), Term('task', 'gsm8k'),
        Term('function', 'f.py:g', -0.5), Term('missing_stop', 'missing_stop', 0.1), Term('overlong', '8'),
    ]  # fmt: skip
    assert [term.name for term in found][3:5] == ['task:gsm8k', 'f.py:g']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'rewards are empty; name at least one'),
        ('a,b=2,a=3', 'rewards name a twice'),
        ('helpfulness:a', 'name helpfulness 1 times and safety 0 times; they are one reward'),
        ('helpfulness:a,safety:b=2', 'the weights of helpfulness and safety are 1 and 2'),
        ('task:', "the reward 'task:' names nothing behind task:"),
        ('a,b=nan', 'the weight of b is nan; it must be finite'),
    ],
)
def test_lists_of_rewards_that_are_none_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_rewards(text)


def test_a_folder_whose_name_ends_as_a_weight_does_is_a_folder(tmp_path):
    """Unless that would be a weight of another that is there too."""
    whole = tmp_path / 'lr=1e-3'
    whole.mkdir()
    assert parse_rewards(f'{whole},safety:{whole}=2,helpfulness:{whole}=2') == [
        Term('model', str(whole)), Term('safety', str(whole), 2.0), Term('helpfulness', str(whole), 2.0)
    ]  # fmt: skip
    other = tmp_path / 'lr'
    assert parse_rewards(f'{other}=1e-2') == [Term('model', str(other), 0.01)]
    other.mkdir()
    message = (
        f"the reward '{whole}' is a path, and '{other}' is one too, .*; write {whole}=1 or {other}/=1e-3"
    )
    with pytest.raises(InputError, match=message):
        parse_rewards(str(whole))
    assert parse_rewards(f'{whole}=1') == [Term('model', str(whole))]
    assert parse_rewards(f'{other}/=1e-3') == [Term('model', f'{other}/', 1e-3)]


def test_a_plot_replaces_neither_its_output_nor_a_file_of_others(tmp_path):
    assert plot_beside(f'{tmp_path}/x.y.jsonl') == tmp_path / 'x.y.png'
    check_plot(f'{tmp_path}/x.jsonl')
    with pytest.raises(InputError, match=r'x\.png is where the plot goes .* name .* as \S+x\.jsonl'):
        check_plot(f'{tmp_path}/x.png')
    (tmp_path / 'x.png').write_bytes(b'mine')
    with pytest.raises(
        InputError, match=r'x\.png is there already, where the plot of \S+x\.jsonl goes; remove'
    ):
        check_plot(f'{tmp_path}/x.jsonl')
    (tmp_path / 'x.jsonl.partial').write_text('')  # killed between the plot and the answers
    check_plot(f'{tmp_path}/x.jsonl')


def test_what_a_pool_holds_keeps_how_it_ended(tmp_path):
    file = tmp_path / 'pool.jsonl'
    lines = [
        {'prompt': 'a', 'completion': 'b', 'candidates': [{'completion': 'b', 'stopped': False}]},
        {'prompt': 'a', 'completion': 'c', 'stopped': False}, {'prompt': 'a', 'completion': 'd'},
    ]  # fmt: skip
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (found,) = read_pool([str(file)]).values()
    assert [(text, stopped) for text, stopped, _ in found] == [('b', False), ('c', False), ('d', True)]


def test_a_task_of_eval_grades_answers_as_it_does_in_an_evaluation():
    record = {'prompt': 'What is 2 + 3?', 'question': 'What is 2 + 3?', 'answer': '2 + 3 = 5 #### 5'}
    texts = [' It is 5. #### 5', ' #### 6', ' 5', ' none\nQuestion: #### 5']
    answers = [rollout(text, number) for number, text in enumerate(texts)]
    assert task_reward('gsm8k', Graders())(answers, [record] * 4).tolist() == [1.0, 0.0, 0.0, 0.0]
    found = task_reward('gsm8k:exact_match_flexible', Graders())(answers, [record] * 4)
    assert found.tolist() == [1.0, 0.0, 1.0, 0.0], (
        'what stands behind the text that ends an answer is none of it'
    )
    program = {
        'text': 'Add.', 'code': 'def add(a, b):\n    return a + b', 'test_setup_code': '',
        'test_list': ['assert add(1, 2) == 3', 'assert add(0, 0) == 0', 'assert add(-1, 1) == 0'],
    }  # fmt: skip
    with pytest.raises(InputError, match='task mbpp executes generated code, which is off'):
        task_reward('mbpp', Graders())
    codes = ['def add(a, b):\n    return a + b\n[DONE]', 'def add(a, b):\n    return 3']
    reward = task_reward('mbpp', Graders(CodeExecution(allowed=True)))
    assert reward([rollout(code) for code in codes], [program] * 2).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ('name', 'record', 'message'),
    [
        ('gsm8k', {'question': 'So?'}, r"task gsm8k cannot grade record 0, answer 0 .*KeyError \('answer'\)"),
        ('gsm8k:acc', {'question': 'So?', 'answer': '#### 5'}, "no metric 'acc'; it has exact_match, "),
        (
            'piqa',
            {'goal': 'a', 'sol1': 'b', 'sol2': 'c', 'label': 0},
            'task piqa compares given texts; a reward is',
        ),
        ('gsm9k', {}, "unknown task 'gsm9k'; did you mean gsm8k"),
    ],
)
def test_a_task_that_cannot_grade_says_why(name, record, message):
    with pytest.raises(InputError, match=message):
        task_reward(name, Graders())([rollout('5')], [record])


@pytest.fixture(scope='module')
def base(commands, folder, corpus) -> pathlib.Path:
    """A language model of a few steps."""
    commands.run('pretrain', *tiny_run(folder / 'base', corpus, train__num_steps=2)).succeeded()
    return folder / 'base'


@pytest.fixture(scope='module')
def judge(commands, folder, base) -> pathlib.Path:
    """A reward model of two steps."""
    rng, lines = np.random.default_rng(0), []
    for number in range(20):
        better, worse = (' '.join(rng.choice(half, size=4)) for half in (WORDS[:5], WORDS[5:]))
        lines.append({'prompt': f'{number}', 'chosen': better, 'rejected': worse, 'chosen_safe': True})
    (folder / 'pairs.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    run = arguments(
        'reward_model', 'nano,helpfulness', folder / 'judge', base, folder / 'pairs.jsonl', train__num_steps=2
    )
    commands.run(*run).succeeded()
    return folder / 'judge'


@pytest.fixture(scope='module')
def prompts(folder) -> pathlib.Path:
    (folder / 'mine.py').write_text(MINE)
    records: list[dict] = [
        {'prompt': f'{word} {other}', 'of': 'ab'[n % 2]}
        for n, (word, other) in enumerate(zip(WORDS, WORDS[3:], strict=False))
    ]
    records.append({'messages': [{'role': 'user', 'content': 'ba'}, {'role': 'assistant', 'content': 'ku'},
                                 {'role': 'user', 'content': 'fa'}]})  # fmt: skip
    (folder / 'prompts.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return folder / 'prompts.jsonl'


def sampling(base, judge, prompts, output, *more):
    return [
        'rejection_sampling', f'--checkpoint={base}', f'--prompts={prompts}', f'--output={output}',
        f'--rewards={judge},{prompts.parent}/mine.py:score=0.5,missing_stop=0.25', '--samples=3',
        '--temperatures=0.8,1.2', '--max_new_tokens=12', '--batch_size=8', '--chat_format=plain', *more,
    ]  # fmt: skip


@pytest.fixture(scope='module')
def kept(commands, folder, base, judge, prompts):
    """The file of pairs, and what was printed."""
    shown = commands.run(*sampling(base, judge, prompts, folder / 'kept.jsonl', '--keep=pair')).succeeded()
    return folder / 'kept.jsonl', shown.stdout


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_file_holds_every_score_and_sft_and_dpo_read_it(commands, folder, base, judge, kept):
    file, shown = kept
    lines = lines_of(file)
    assert [line['index'] for line in lines] == sorted(line['index'] for line in lines) and len(lines) >= 6
    for line in lines:
        assert [one['temperature'] for one in line['candidates']] == [0.8] * 3 + [1.2] * 3
        scores = [one['score'] for one in line['candidates']]
        for one in line['candidates']:
            own, mine, stop = one['scores'].values()
            assert one['score'] == own + 0.5 * mine + 0.25 * stop and stop == (
                0.0 if one['stopped'] else -1.0
            )
            assert list(one['scores']) == [str(judge), f'{folder}/mine.py:score', 'missing_stop']
        assert line['score'] == line['score_chosen'] == max(scores) > line['score_rejected']
        assert line['completion'] == line['chosen'] != line['rejected']
    assert 'KL at most' in shown and file.with_suffix('.png').read_bytes().startswith(b'\x89PNG')
    assert not pathlib.Path(f'{file}.partial').exists()
    data = {'data__train': file, 'data__format': 'plain', 'data__seq_len': 64, 'train__num_steps': 1}
    commands.run(*arguments('dpo', 'nano', folder / 'dpo', base, file, **data)).succeeded()
    commands.run(*arguments('sft', 'nano', folder / 'sft', base, file, **data)).succeeded()


@pytest.mark.slow
def test_killed_anywhere_or_split_it_is_the_same_file_to_the_byte(
    commands, folder, base, judge, prompts, kept
):
    output = folder / 'again.jsonl'
    for number in (0, 100, 1, 102):
        killed = commands.run(
            *sampling(base, judge, prompts, output, '--keep=pair'),
            before=KILLED.replace('PROMPTS', str(number)),
        )
        assert killed.status == -9 and not output.exists()
    waiting = pathlib.Path(f'{output}.partial')
    whole = waiting.read_bytes()
    waiting.write_bytes(whole[:-9])  # as of a kill within a line
    refused = commands.run(*sampling(base, judge, prompts, output, '--keep=pair', '--seed=1')).error()
    assert 'again.jsonl.partial is of another run: seed was 0 and is 1' in refused
    commands.run(*sampling(base, judge, prompts, output, '--keep=pair')).succeeded()
    assert output.read_bytes() == kept[0].read_bytes()
    assert output.with_suffix('.png').exists() and not waiting.exists()
    parts = []
    for shard in ('0/2', '1/2', '8/9'):  # in the last there is none
        file = folder / f'part{shard[0]}.jsonl'
        commands.run(*sampling(base, judge, prompts, file, '--keep=pair', f'--shard={shard}')).succeeded()
        parts += file.read_text().splitlines()
    assert sorted(parts) == sorted(kept[0].read_text().splitlines())
    refused = commands.run(*sampling(base, judge, prompts, output, '--keep=best')).error()
    assert 'again.jsonl is there already; remove it, or write to another place' in refused


@pytest.mark.long
def test_killed_at_ten_random_moments_it_is_the_same_file(commands, folder, base, judge, prompts, kept):
    def check(output):
        assert output.read_bytes() == kept[0].read_bytes()
        assert output.with_suffix('.png').exists() and not pathlib.Path(f'{output}.partial').exists()

    kill_ten_times(
        commands, folder / 'often.jsonl',
        lambda output: sampling(base, judge, prompts, output, '--keep=pair'), MOMENTS, check,
    )  # fmt: skip


@pytest.mark.slow
def test_earlier_candidates_join_and_are_scored_anew(commands, folder, base, judge, prompts, kept):
    output = folder / 'second.jsonl'
    found = sampling(
        base, judge, prompts, output, f'--pool={kept[0]}', '--seed=5', '--keep=threshold', '--threshold=-99'
    )
    commands.run(*found).succeeded()
    earlier = {line['index']: line['candidates'] for line in lines_of(kept[0])}
    lines = [line for line in lines_of(output) if 'candidates' in line]
    of = [json.loads(record).get('of', 'a') for record in prompts.read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        drawn = [one for one in line['candidates'] if not one['origin']]
        others = {one['completion']: one for one in line['candidates'] if one['origin']}
        assert [one['temperature'] for one in drawn] == [0.8] * 3 + [1.2] * 3
        assert others.keys() == {
            one['completion'] for one in earlier.get(line['index'], []) if one['completion'].strip()
        }
        for text, one in others.items():
            own, mine, stop = one['scores'].values()
            assert one['origin'] == str(kept[0]) and mine == text.count(of[line['index']]) / 7
            assert one['score'] == own + 0.5 * mine + 0.25 * stop
        assert line['score'] == max(one['score'] for one in line['candidates'] if one['completion'].strip())
    assert sum(bool(one['origin']) for line in lines for one in line['candidates']) > 20


@pytest.mark.slow
def test_what_is_wrong_is_one_line_and_leaves_nothing(commands, folder, base, judge, prompts, shared_data):
    stories = shared_data / 'weights/stories260K/stories260K.gguf'
    (folder / 'nan.py').write_text('def score(prompt, answer, record):\n    return float("nan")\n')
    (folder / 'raises.py').write_text('def score(prompt, answer, record):\n    return record["gold"]\n')
    cases = [
        ([f'--rewards={base}'], 'the reward model .* has no score: it is a language model; .*set by --rewards'),
        ([f'--rewards=helpfulness:{judge},safety:{judge}'],
         'was trained without the loss of safe and unsafe answers'),
        ([f'--rewards={folder}/nan.py:score'], 'the reward .*nan.py:score is nan for record '),
        ([f'--rewards={folder}/raises.py:score'], r"raises.py:score raised KeyError \('gold'\) for record "),
        ([f'--rewards={folder}/nan.py:scores'], 'nan.py has no function scores; it has score'),
        ([f'--rewards={folder}/none.py:score'], 'no file .*none.py'),
        (['--rewards=task:mbpp'], 'task mbpp executes generated code, which is off'),
        ([f'--checkpoint={stories}'], f'the reward model {judge} .*tokenizer'),
        ([f'--checkpoint={judge}'], f'--checkpoint={judge} is a reward model, which gives scores and no text'),
        (['--max_new_tokens=251'], r'\d of 8 prompts are longer than 5 tokens, which is the context of 256 less'),
        (['--temperatures=0'], "--temperatures are '0'; write different numbers above 0"),
        (['--temperatures=1,1'], "--temperatures are '1,1'; write different numbers"),
        (['--samples=0'], '--samples is 0; it must be from 1 to 1,048,576'),
        ([f'--output={folder}/out.png'], r'out\.png is where the plot goes that is drawn beside it'),
        (['--keep=threshold'], '--threshold is None'),
        (['--threshold=1'], '--threshold is 1.0, and what is kept is the best'),
        (['--shard=2/2'], "--shard is '2/2'"),
        ([f'--pool={prompts}'], 'line 1 holds no candidates; a pool is what'),
    ]  # fmt: skip
    for more, message in cases:
        output = folder / 'refused' / 'out.jsonl'
        line = commands.run(*sampling(base, judge, prompts, output, *more)).error()
        assert re.search(message, line), (more, line)
        assert not output.exists() and not pathlib.Path(f'{output}.partial').exists(), more
        shutil.rmtree(folder / 'refused', ignore_errors=True)


@pytest.mark.slow
def test_answers_behind_a_preprompt_are_learnt_without_it(commands, folder, base, judge, prompts, kept):
    (folder / 'preprompts.txt').write_text('ba gen\n\nku dun fa\n')
    output, more = folder / 'distilled.jsonl', (f'--preprompts={folder}/preprompts.txt',)
    killed = commands.run(
        *sampling(base, judge, prompts, output, *more), before=KILLED.replace('PROMPTS', '2')
    )
    assert killed.status == -9
    commands.run(*sampling(base, judge, prompts, output, *more)).succeeded()
    whole = folder / 'distilled_whole.jsonl'
    commands.run(*sampling(base, judge, prompts, whole, *more)).succeeded()
    assert output.read_bytes() == whole.read_bytes()
    plain = {line['index']: line for line in lines_of(kept[0])}
    lines = lines_of(output)
    assert 0 < len(lines) < 8 or any(line['index'] in plain for line in lines)
    for line in lines:
        groups = [
            [one for one in line['candidates'] if one['preprompt'] == said]
            for said in ('', 'ba gen', 'ku dun fa')
        ]
        assert [len(group) for group in groups] == [6, 6, 6]
        assert (
            line['score']
            > line['score_original']
            == max(one['score'] for one in groups[0] if one['completion'].strip())
        )
        assert line['preprompt'] in ('ba gen', 'ku dun fa') and line['preprompt'] not in json.dumps(
            line['prompt']
        )
        if line['index'] in plain:  # what is drawn without is what is drawn where there is no preprompt
            for one, same in zip(groups[0], plain[line['index']]['candidates'], strict=True):
                assert one['completion'] == same['completion'] and one['temperature'] == same['temperature']
                assert abs(one['score'] - same['score']) < 1e-4
    refused = commands.run(
        *sampling(base, judge, prompts, folder / 'no.jsonl', *more, '--keep=threshold', '--threshold=1')
    )
    assert (
        '--preprompts=' in refused.error() and 'give neither --keep=threshold nor --pool' in refused.error()
    )
    (folder / 'twice.txt').write_text('so\nso\n')
    line = commands.run(
        *sampling(base, judge, prompts, folder / 'no.jsonl', f'--preprompts={folder}/twice.txt')
    ).error()
    assert 'twice.txt has 2 preprompts; give different texts' in line and not (folder / 'no.jsonl').exists()


@pytest.mark.slow
def test_two_processes_write_what_one_does(commands, folder, base, judge, prompts):
    for name, num_processes in (('one', 1), ('two', 2)):
        arguments = sampling(
            base, judge, prompts, folder / f'{name}.jsonl', '--keep=pair', '--mesh=data=2,tensor=2'
        )
        finished = commands.run_processes(
            *arguments, num_processes=num_processes, num_devices=4 // num_processes
        )
        for process in finished:
            process.succeeded()
    assert (folder / 'two.jsonl').read_bytes() == (folder / 'one.jsonl').read_bytes()
    assert 'KL at most' in finished[0].stdout and not finished[1].stdout
