"""`generate --prompts`: what a line may be, which rows go together, going on from any kill, what is refused."""

import json

import pytest

from experiments.prompting.prompt_file import (
    answer_lines,
    complete_items,
    open_output,
    parse_shard,
    read_items,
    write_answers,
)
from llama_jax.errors import InputError
from llama_jax.inference.sampling import Sampler


def write(path, *lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return str(path)


def test_a_line_names_its_settings_and_keeps_what_is_not_ours(tmp_path):
    lines = [
        {'prompt': 'a', 'id': 'x'},
        {'messages': [{'role': 'user', 'content': 'Hi'}], 'temperature': 0.5, 'seed': 7},
        {'prompt': 'b', 'top_k': 3, 'logit_bias': {'5': -1}},
    ]
    given = Sampler(temperature=0.8, seed=3)
    items, digest = read_items(write(tmp_path / 'a.jsonl', *lines), given)
    assert [item.line for item in items] == lines and [item.index for item in items] == [0, 1, 2]
    assert [item.sampler.temperature for item in items] == [0.8, 0.5, 0.8]
    assert items[1].sampler.seed == 7 and items[2].sampler.top_k == 3
    assert dict(items[2].sampler.logit_bias) == {5: -1}
    # Seeds are of the line's number and the given one, so a shard's lines are drawn as in the whole.
    assert len({items[0].sampler.seed, items[2].sampler.seed, given.seed}) == 3
    assert read_items(str(tmp_path / 'a.jsonl'), Sampler(seed=4))[0][0].sampler.seed != items[0].sampler.seed
    shards = [read_items(str(tmp_path / 'a.jsonl'), given, (part, 2)) for part in range(2)]
    assert [item for found, _ in shards for item in found] == [items[0], items[2], items[1]]
    assert {found for _, found in shards} == {digest}


@pytest.mark.parametrize(
    ('lines', 'says'),
    [
        (['{"prompt": "a"}', '{"prompt": "a", "messages": []}'], 'line 2 has prompt and messages'),
        (['{"text": "a"}'], "line 1 has ['text']; it must have a prompt or messages"),
        (['[1]'], 'line 1 is a JSON list, it must be an object'),
        (['{"prompt": 3}'], 'line 1: its prompt is 3; it must be a text'),
        (['{"prompt": "a", "completion": "b"}'], "line 1 has the key 'completion', which its answer has too"),
        (['{"prompt": "a", "temperature": -1}'], 'line 1: temperature is -1'),
        (['{"prompt": "a", "temperature": "hot"}'], 'line 1: '),
        (['{"messages": [{"role": "user"}]}'], 'line 1: message 0 is'),
        (['{"prompt": "a"'], 'line 1'),
        ([], 'is empty'),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(tmp_path, lines, says):
    path = tmp_path / 'a.jsonl'
    path.write_text('\n'.join(lines))
    with pytest.raises(InputError) as error:
        read_items(str(path), Sampler())
    assert says in str(error.value) and '\n' not in str(error.value)


def test_files_and_shards_that_are_none(tmp_path):
    with pytest.raises(InputError, match='cannot be read: No such file'):
        read_items(str(tmp_path / 'no.jsonl'), Sampler())
    assert parse_shard('3/4') == (3, 4)
    for text in ('4/4', '1', 'a/2', '-1/2', '0/0'):
        with pytest.raises(InputError, match='it must be a part and their number'):
            parse_shard(text)


def test_killed_anywhere_the_file_is_the_same(tmp_path):
    lines = [{'prompt': 'ab' * (index % 3), 'id': index} for index in range(7)]
    items, digest = read_items(write(tmp_path / 'a.jsonl', *lines), Sampler())
    prompts = [[1] * (1 + len(item.prompt)) for item in items]

    def run(output, dies_after=100):
        asked = []

        def complete(prompts, samplers):
            asked.extend(map(len, prompts))
            as_they_end = sorted(range(len(prompts)), key=lambda number: samplers[number].seed)
            for finished, number in enumerate(as_they_end):
                if finished == dies_after:
                    raise KeyboardInterrupt
                text = f'{samplers[number].seed} {len(prompts[number])}'
                yield number, {'completion': text, 'stopped': samplers[number].seed % 2 == 0}

        with open_output(str(output), {'prompts': digest}) as log:
            completions = complete_items(items, prompts, log, complete)
            write_answers(str(output), answer_lines(items, completions))
        return asked

    assert run(tmp_path / 'whole.jsonl') == [5, 5, 3, 3, 1, 1, 1]  # the longest first
    output, partial = tmp_path / 'cut.jsonl', tmp_path / 'cut.jsonl.partial'
    for dies_after in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            run(output, dies_after)
        assert not output.exists()
    kept = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b''.join(kept[:-1]) + kept[-1][:9])  # the last line is cut off
    with (
        pytest.raises(InputError, match='of another run: prompts was'),
        open_output(str(output), {'prompts': 'other'}),
    ):
        pass
    assert len(run(output)) == 7 - 2 - 3 + 1
    assert output.read_bytes() == (tmp_path / 'whole.jsonl').read_bytes() and not partial.exists()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(answer['index'], answer['id']) for answer in answers] == [(index, index) for index in range(7)]
    assert {answer['stopped'] for answer in answers} == {True, False}
    with pytest.raises(InputError, match='is there already'):
        run(output)
