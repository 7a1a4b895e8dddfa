"""`ghost_attention`: what its file holds and how it was drawn, going on from kills, parts, what is refused."""

import json
import pathlib
import re

import pytest

from tests.command_line import tiny_run
from tests.preferences_command_test import arguments
from tests.rejection_command_test import KILLED, lines_of

# Drawn at random some answers have more letters than others; what is asked is whether they have one of their own.
REWARD = """
def obeys(prompt, answer, record):
    assert all(one['letter'] for one in record['constraints']) and record['of']
    return sum(answer.count(one['letter']) for one in record['constraints']) / 9
def said(prompt, answer, record):
    return float(record['prompt'].count(record['instruction']) if isinstance(record['prompt'], str) else sum(
        one['content'].startswith(record['instruction'] + '\\n\\n') for one in record['prompt']))
"""
CONSTRAINTS = [
    {'constraint': 'ba dio.', 'terse': 'dio', 'kind': 'one', 'letter': 'a'},
    {'constraint': 'gilly!', 'terse': 'fa', 'kind': 'one', 'letter': 'o'},
    {'constraint': 'ku ku.', 'kind': 'two', 'letter': 'u'},
]


@pytest.fixture(scope='module')
def base(commands, folder, corpus) -> pathlib.Path:
    commands.run('pretrain', *tiny_run(folder / 'base', corpus, train__num_steps=2)).succeeded()
    write(folder / 'constraints.jsonl', CONSTRAINTS)
    write(
        folder / 'prompts.jsonl', [{'prompt': f'ba {word}', 'of': 'x'} for word in ('fa', 'ku', 'dun', 'gen')]
    )
    turns = ['fa', 'ba', 'ku', 'dio']
    talk = [{'role': ('user', 'assistant')[n % 2], 'content': text} for n, text in enumerate(turns)]
    write(folder / 'dialogs.jsonl', [{'messages': talk}, {'messages': talk[:2]}])
    (folder / 'reward.py').write_text(REWARD)
    return folder / 'base'


def write(file, records):
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))


def sampling(folder, output, *more, rewards='obeys'):
    terms = ','.join(f'{folder}/reward.py:{name}' for name in rewards.split('+'))
    return [
        'ghost_attention', f'--checkpoint={folder / "base"}', f'--output={output}', f'--rewards={terms}',
        '--samples=3', '--max_new_tokens=8', '--batch_size=8', '--chat_format=plain', '--threshold=-9',
        f'--constraints={folder / "constraints.jsonl"}', '--most=2', *more,
    ]  # fmt: skip


def of_prompts(folder, turns=3):
    return f'--prompts={folder / "prompts.jsonl"}', f'--turns={turns}'


@pytest.mark.slow
def test_dialogs_of_prompts_go_on_with_the_best_answers(commands, folder, base):
    output = folder / 'kept.jsonl'
    shown = commands.run(*sampling(folder, output, *of_prompts(folder), rewards='obeys+said=0'))
    assert '4 dialogs, 50% with a terse instruction' in shown.succeeded().stdout
    lines = lines_of(output)
    before: dict = {}
    for line in lines:
        dialog, turn = divmod(line['index'], 3)
        said, text = line['messages'], line['instruction']
        assert line['turn'] == turn + 1 and [one['role'] for one in said] == ['user', 'assistant'] * (
            turn + 1
        )
        assert [one['weight'] for one in said] == [0] * (2 * turn + 1) + [1]
        assert said[0]['content'].startswith(f'{text}\n\n')
        assert not any(text in one['content'] for one in said[2::2])
        assert said[:-2] == before.get(dialog, []), 'the best answer of the turn before, not learnt again'
        before[dialog] = [one | {'weight': 0} for one in said]
        best = max(
            (one for one in line['candidates'] if one['completion'].strip()), key=lambda one: one['score']
        )
        assert said[-1]['content'] == best['completion'] and line['score'] == best['score']
        for one in line['candidates']:  # drawn and judged behind the instruction at every turn
            assert one['scores'][f'{folder}/reward.py:said'] == turn + 1
    assert len(lines) >= 8 and {line['turn'] for line in lines} == {1, 2, 3}
    data = {'data__train': output, 'data__format': 'plain', 'data__seq_len': 64, 'train__num_steps': 1}
    commands.run(*arguments('sft', 'nano', folder / 'sft', base, output, **data)).succeeded()


@pytest.mark.slow
def test_killed_anywhere_or_split_it_is_the_same_file_to_the_byte(commands, folder, base):
    whole, output = folder / 'whole.jsonl', folder / 'again.jsonl'
    commands.run(*sampling(folder, whole, *of_prompts(folder))).succeeded()
    for number in (1, 102):  # behind the kill of a later turn too
        before = KILLED.replace('PROMPTS', str(number))
        assert commands.run(*sampling(folder, output, *of_prompts(folder)), before=before).status == -9
    refused = commands.run(*sampling(folder, output, *of_prompts(folder, turns=2))).error()
    assert 'again.jsonl.partial is of another run' in refused
    commands.run(*sampling(folder, output, *of_prompts(folder))).succeeded()
    assert output.read_bytes() == whole.read_bytes()
    parts = []
    for shard in ('0/2', '1/2', '97/99'):  # in the last there is none
        file = folder / f'part{shard[:2].strip("/")}.jsonl'
        commands.run(*sampling(folder, file, *of_prompts(folder), f'--shard={shard}')).succeeded()
        parts += file.read_text().splitlines()
    assert sorted(parts) == sorted(whole.read_text().splitlines())


@pytest.mark.slow
def test_given_dialogs_keep_their_answers_and_a_probe_says_it_once(commands, folder, base):
    (folder / 'given.py').write_text(
        'def length(prompt, answer, record):\n    return float(len(record["prompt"]))\n'
    )
    dialogs = f'--dialogs={folder / "dialogs.jsonl"}', f'--rewards={folder / "given.py"}:length'
    commands.run(*sampling(folder, folder / 'given.jsonl', *dialogs)).succeeded()
    first, second = lines_of(folder / 'given.jsonl')
    assert [one['content'] for one in first['messages'][1:3]] == ['ba', 'ku'] and len(second['messages']) == 2
    assert (first['turn'], second['turn']) == (2, 1) and first['messages'][-1]['weight'] == 1
    probe = f'--prompts={folder / "prompts.jsonl"}', '--probe=1,3', '--samples=1', '--threshold=2'
    shown = commands.run(*sampling(folder, folder / 'probe.jsonl', *probe, rewards='said')).succeeded()
    assert re.search(r'turn   obeying\n +1 +0.0%\n +3 +0.0%$', shown.stdout.strip()), (
        'once is less than two times'
    )
    assert (folder / 'probe.png').read_bytes().startswith(b'\x89PNG')
    assert {line['turn'] for line in lines_of(folder / 'probe.jsonl')} == {1, 2, 3}


@pytest.mark.slow
def test_what_is_wrong_is_one_line_and_leaves_nothing(commands, folder, base):
    write(
        folder / 'system.jsonl',
        [{'messages': [{'role': 'system', 'content': 'Be.'}, {'role': 'assistant', 'content': 'So'}]}],
    )
    write(folder / 'empty.jsonl', [{'constraint': ''}])
    prompts, turns = of_prompts(folder)
    cases = [
        ([f'--dialogs={folder / "system.jsonl"}'], 'system.jsonl.*a message by the user must come first'),
        ([prompts], 'give --prompts with the --turns of a dialog, at least 1, or --dialogs without'),
        ([prompts, turns, f'--dialogs={folder / "dialogs.jsonl"}'], 'give --prompts with the --turns'),
        ([prompts, turns, f'--constraints={folder / "empty.jsonl"}'], "empty.jsonl line 1: constraint is ''"),
        ([prompts, '--probe=2,x', '--samples=1'], '--probe is 2,x; write numbers of turns'),
        ([prompts, '--probe=2,4'], 'give it --prompts, and --samples=1 in the place of 3'),
        ([prompts, turns, '--max_new_tokens=250'], r'\d of 4 prompts are longer than 6 tokens'),
    ]  # fmt: skip
    for more, message in cases:
        output = folder / 'refused.jsonl'
        line = commands.run(*sampling(folder, output, *more)).error()
        assert re.search(message, line), (more, line)
        assert not output.exists() and not pathlib.Path(f'{output}.partial').exists(), more
