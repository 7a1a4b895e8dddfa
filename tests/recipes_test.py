"""Llama 2-Chat in one script: its stages in their order, what they read, the small world that they are tried on."""

import importlib
import json
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest
from etils import epath

from experiments.recipes import chat_table, small_data, small_world
from experiments.recipes.small_world import Question, gold, obeys
from experiments.run import config_file
from llama_jax.data.record_kinds import Prompted
from llama_jax.errors import InputError
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


def test_each_stage_stands_beside_what_it_was_made_from_by_its_own_judge(tmp_path):
    """R_c is the safety model's score where a prompt is tagged, and where it is below a sigmoid of 0.15."""
    folder = epath.Path(tmp_path)

    def write(name, value):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))

    def judged(*pairs):
        return ''.join(
            json.dumps({'prompt': prompt, 'candidates': [
                {'scores': {'runs/helpful': helpful, 'runs/safety': safe}, 'num_tokens': 4, 'stopped': True}
            ]}) + '\n' for prompt, helpful, safe in zip(('see', 'take', 'see'), *pairs, strict=True)
        )  # fmt: skip

    asked = [Prompted((), {'prompt': text, 'safety': text == 'take'}) for text in ('see', 'take')]
    write('judged/sft.jsonl', judged((2.0, 5.0, 7.0), (1.0, -1.0, -9.0)))
    write('judged/v1.jsonl', judged((3.0, 5.0, 1.0), (1.0, 2.0, 4.0)))
    write('sft/config.json', {'base_checkpoint': 'models/base'})
    write('v1/config.json', {'base_checkpoint': f'{folder}/sft'})
    write('helpful/report.json', {'accuracy': 0.75})
    write('distilled.jsonl', ''.join(json.dumps({'score': n, 'score_original': -n}) + '\n' for n in (1, 3)))
    rows = {stage: chat_table.row_of(folder, stage, asked) for stage in ('sft', 'v1')}
    assert rows['sft']['R_c'] == pytest.approx((2 - 1 - 9) / 3) and rows['v1']['R_c'] == (3 + 2 + 1) / 3
    assert rows['sft']['helpful'] == pytest.approx(14 / 3) and rows['sft']['length'] == 4
    rows['sft']['held-out loss'] = 0.5
    judges = {'sft': 'held-out loss', 'v1': 'R_c'}
    steps = chat_table.steps_of(folder, rows | {'base': {'held-out loss': 0.9}}, judges)
    found = [(one['stage'], one['before'], one['behind'], one['better']) for one in steps]
    assert found == [
        ('helpful', 0.5, 0.75, True), ('distilled', -2, 2, True), ('sft', 0.9, 0.5, True),
        ('v1', pytest.approx(-8 / 3), 2, True),
    ]  # fmt: skip
    rows['v1']['R_c'] = -3.0
    steps = chat_table.steps_of(folder, rows | {'base': {'held-out loss': 0.9}}, judges)
    assert '| v1 | R_c | -2.667 | -3.000 | no |' in chat_table.steps_table(steps)
    with pytest.raises(InputError, match='v1 and what it started from have no gold; they have'):
        chat_table.steps_of(folder, rows, {'v1': 'gold'})
