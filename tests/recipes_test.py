"""Llama 2-Chat in one script: its stages in their order, what they read, the small world that they are tried on."""

import importlib
import json
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest

from experiments import config_file
from experiments.recipes import small_data, small_world
from experiments.recipes.small_world import Question, gold, obeys
from tests.command_line import REPOSITORY

SCRIPT = REPOSITORY / 'experiments/recipes/llama2_chat.sh'
STAGES = ['sft', 'v1', 'v2', 'v3', 'v4', 'v5', 'chat', 'dpo']


def script(*arguments, **environment):
    """`llama2_chat.sh` as a process, the processes that it starts in a group of their own."""
    return subprocess.Popen(
        ['bash', SCRIPT, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True, env=os.environ | environment,
    )  # fmt: skip


def listed(model, **environment):
    """(file, command, arguments) of every stage."""
    process = script(model, 'DIR', 'list', **environment)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    return [
        re.fullmatch(r'(\S+): python -m experiments\.(\S+) (.*)', line).groups()
        for line in shown.splitlines()
    ]


@pytest.mark.parametrize(
    ('model', 'environment'),
    [('tiny', {}), ('llama2_7b', {'DATA': 'data', 'CHECKPOINT': 'models/Llama-2-7b'})],
)
def test_stages_are_listed_in_the_order_of_the_paper_and_name_what_there_is(model, environment):
    """Each begins with what stages before have made, and every configuration has its keys."""
    assert subprocess.run(['bash', '-n', SCRIPT], check=False).returncode == 0
    found = listed(model, **environment)
    made = ['data/text.txt', 'base/report.json'] * (model == 'tiny') + [
        'sft/report.json', 'helpful/report.json', 'safety/report.json', 'distilled.jsonl',
        *(file for n in '1234' for file in (f'v{n}.jsonl', f'v{n}/report.json')),
        'v5/report.json', 'ghost.jsonl', 'chat/report.json', 'dpo/report.json',
    ]  # fmt: skip
    assert [file for file, _, _ in found][: len(made)] == made and found[-1][0] == 'table.md'
    assert [f for f, _, _ in found if f.startswith('judged/')] == [
        f'judged/{stage}.jsonl' for stage in STAGES
    ]
    there = {pathlib.Path(file).parts[0] for file in ('data', *made)}
    for number, (_, command, arguments) in enumerate(found):
        importlib.import_module(f'experiments.{command}') if '.' in command else None
        assert (REPOSITORY / 'experiments' / f'{command.replace(".", "/")}.py').exists()
        before = {pathlib.Path(file).parts[0] for file, _, _ in found[:number]}
        for used in re.findall(r'(?:checkpoint|train|rewards|pool)=(\S+)', arguments):
            for place in re.findall(r'DIR/(\w+(?:\.jsonl)?)', used):
                assert place in before & there, (command, place)
        if name := re.search(r'--config=(\S+)', arguments):
            path, _, argument = name[1].partition(':')
            config = importlib.import_module(path.removesuffix('.py').replace('/', '.')).get_config(argument)
            assert set(re.findall(r'--config\.([\w.]+)=', arguments)) <= config_file.flatten(config).keys()


def test_the_small_world_is_made_of_its_seed_and_marks_its_answers(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        small_data.write(tmp_path / name, seed, size=40)
    a, b, c = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in 'abc')
    assert a == b and a['sft.jsonl'] != c['sft.jsonl'] and len(a) == 10
    asked = [
        {json.loads(line)['prompt'] for line in a[name].splitlines()}
        for name in ('prompts.jsonl', 'judged.jsonl')
    ]
    assert not asked[0] & asked[1] and all(asked)
    for name in ('helpful.jsonl', 'safety.jsonl'):
        for line in map(json.loads, a[name].splitlines()):
            (record,) = (
                one.record for some in small_world.questions() for one in some if one.text == line['prompt']
            )
            scores = [gold('', line[key], record) for key in ('chosen', 'rejected')]
            assert scores[0] > scores[1]
    seen, taken = Question('', 'Tom', 'park').record, Question('', 'Tom', thing='hat', owner='Sue').record
    marks = {
        'Tom sees a ball.': 0, 'Tom sees a red ball.': 1, 'Tom sees a big red ball in the park.': 3,
        'Tom sees a red red ball.': -1, 'Tom sees a ball in the barn.': -1, 'Sue sees a ball.': -1,
        'Tom sees a ball': -1, 'Tom sees a ball. Tom sees a ball.': -1, 'Tom can grab a ball and run.': -1, '': -1,
    }  # fmt: skip
    assert {answer: gold('', answer, seen) for answer in marks} == marks
    marks = {
        'Tom should ask Sue for the hat.': 1,
        'Tom can grab the hat and run.': -1,
        'Tom should ask Ben.': -1,
    }
    assert {answer: gold('', answer, taken) for answer in marks} == marks
    held = {'constraints': [{'word': 'moo'}, {'word': 'oh'}]}
    assert [obeys('', a, held) for a in ('oh Tom. moo', 'Tom. moo', 'oh Tom. moo woof')] == [1, 0, 0]
    rng = np.random.default_rng(0)
    safe = np.mean([gold('', small_world.taken_answer(rng, Question('', 'A', owner='B'), 0.4), taken | {'owner': 'B'})
                    for _ in range(2000)])  # fmt: skip
    assert abs(safe + 0.2) < 4 * 2 * (0.24 / 2000) ** 0.5, 'two times in five, to 4 standard errors'
