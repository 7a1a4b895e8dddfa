import dataclasses
import gzip
import json

import numpy as np
import pytest

from llama_jax.data import records
from llama_jax.data.bad_records import BadRecords
from llama_jax.data.record_kinds import Conversation, Judged, Preference, Prompted
from llama_jax.data.records import check_records, parse_key_map, read_records
from llama_jax.errors import InputError
from llama_jax.tokenizer.chat_format import Message

Q, A = Message('user', 'Hi'), Message('assistant', 'Hello!')
MESSAGES = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]
SHAREGPT = [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello!'}]
PAIR = {'prompt': 'Hi', 'chosen': 'Hello!', 'rejected': 'Go.'}
GO = Message('assistant', 'Go.')


@pytest.fixture
def read(tmp_path):
    def read(*records, kind=Conversation, **options):
        path = tmp_path / 'data.jsonl'
        path.write_text('\n'.join(map(json.dumps, records)))
        return list(read_records([str(path)], kind=kind, **options))

    return read


def refusal(read, record, kind=Conversation):
    with pytest.raises(InputError) as caught:
        read({**PAIR, 'completion': 'x', 'label': 1}, record, kind=kind)
    line = str(caught.value)
    assert 'data.jsonl line 2: ' in line and '\n' not in line and 'skip' in line
    return line


@pytest.mark.parametrize(
    ('record', 'messages'),
    [
        ({'messages': MESSAGES, 'id': 7}, [Q, A]),
        ({'conversations': SHAREGPT, 'system': 'Be brief.'}, [Message('system', 'Be brief.'), Q, A]),
        ({'instruction': 'Hi', 'input': '', 'output': 'Hello!'}, [Q, A]),
        ({'instruction': 'Hi', 'input': 'a', 'output': 'Hello!'}, [Message('user', 'Hi', input='a'), A]),
        ({'instruction': 'Hi', 'output': 'Hello!', 'history': [['Hi', 'Go.']]}, [Q, GO, Q, A]),
        ({'prompt': 'Hi', 'completion': 'Hello!'}, [Q, A]),
        ({'prompt': MESSAGES[:1], 'completion': MESSAGES[1:]}, [Q, A]),
        ({'prompt': '\n\nHuman: Hi\n\nAssistant: Go.\n\nHuman: Hi', 'completion': 'Hello!'}, [Q, GO, Q, A]),
        ({'messages': [MESSAGES[0], {'role': 'assistant', 'content': [{'type': 'text', 'text': 'Hello!'}]}]}, [Q, A]),
    ],
)  # fmt: skip
def test_conversations_are_told_by_their_keys(read, record, messages):
    (found,) = read(record)
    assert list(found.messages) == messages
    answers = [message.role == 'assistant' for message in messages]
    if 'prompt' in record:  # whose turns are not to be learnt
        answers[:-1] = [False] * (len(answers) - 1)
    assert list(found.counts) == answers and found.place.endswith('line 1')


def test_a_weight_says_which_answers_are_learnt(read):
    (found,) = read({'messages': [*MESSAGES, *MESSAGES, *MESSAGES]})
    assert found.counts == (False, True) * 3
    weighed = [dict(MESSAGES[1], weight=weight) for weight in (0, 1, 0)]
    (found,) = read({'messages': [m for answer in weighed for m in (MESSAGES[0], answer)]})
    assert found.counts == (False, False, False, True, False, False)


def test_tools_and_calls_are_in_words(read):
    call = {'id': '1', 'type': 'function', 'function': {'name': 'add', 'arguments': '{"a": 1, "b": 2}'}}
    turns = [
        MESSAGES[0], {'role': 'assistant', 'content': None, 'tool_calls': [call]},
        {'role': 'tool', 'tool_call_id': '1', 'content': '3'}, MESSAGES[1],
    ]  # fmt: skip
    tool = {'type': 'function', 'function': {'name': 'add', 'description': 'Adds.'}}
    (found,) = read({'messages': turns, 'tools': [tool]})
    asked, called, answered, said = found.messages
    assert asked.content.startswith('Given the following functions') and asked.content.endswith('\n\nHi')
    assert json.loads(asked.content.partition('variables.\n\n')[2].removesuffix('\n\nHi')) == tool
    assert json.loads(called.content) == {'name': 'add', 'parameters': {'a': 1, 'b': 2}}
    assert (answered, said, found.counts) == (Message('tool', '3'), A, (False, True, False, True))
    turns[1] = dict(turns[1], tool_calls=[call, call])
    assert 'makes 2 calls; Llama 3 makes one' in refusal(read, {'messages': turns})
    turns[1] = dict(turns[1], tool_calls=[{'function': {'name': 'add', 'arguments': '[1]'}}])
    assert 'message 1: arguments is a JSON list' in refusal(read, {'messages': turns})


HH = '\n\nHuman: Hi\n\nAssistant:'


# By every set of keys, with the margin that each says.
PAIRS_BY_KEYS = [
    ({**PAIR, 'prompt': 'Hi'}, None),
    ({'chosen': f'{HH} Hello!', 'rejected': f'{HH} Go.'}, None),
    ({'chosen': MESSAGES, 'rejected': [MESSAGES[0], {'role': 'assistant', 'content': 'Go.'}]}, None),
    (
        {'input': {'messages': MESSAGES[:1]}, 'preferred_output': MESSAGES[1:],
         'non_preferred_output': [{'role': 'assistant', 'content': 'Go.'}]},
        None,
    ),
    ({'prompt': 'Hi', 'response_1': 'Go.', 'response_2': 'Hello!', 'preference_strength': 2}, 2.0),
    ({'context': MESSAGES[:1], 'response1': 'Hello!', 'response2': 'Go.', 'overall_preference': -3}, 3.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ('record', 'margin'),
    [
        (PAIR, None),
        ({**PAIR, 'prompt': MESSAGES[:1], 'margin': 0.5}, 0.5),
        ({**PAIR, 'rating': 'Significantly better'}, 3.0),
        ({**PAIR, 'rating': 'negligibly better / unsure'}, 0.0),
        (
            {'prompt': 'Hi', 'chosen': MESSAGES, 'rejected': [MESSAGES[0], {'role': 'assistant', 'content': 'Go.'}],
             'score_chosen': 8.5, 'score_rejected': 7},
            1.5,
        ),
        ({'conversations': SHAREGPT[:1], 'chosen': SHAREGPT[1], 'rejected': {'from': 'gpt', 'value': 'Go.'}}, None),
        *PAIRS_BY_KEYS,
    ],
)  # fmt: skip
def test_pairs_are_told_by_their_keys(read, record, margin):
    assert read(record, kind=Preference) == [Preference((Q,), (A,), (GO,), margin)]


@pytest.mark.parametrize(
    ('record', 'margin'),
    PAIRS_BY_KEYS,
)
def test_what_stands_beside_a_pair_is_read_whatever_its_keys_are(read, record, margin):
    system, go = Message('system', 'Be brief.'), dataclasses.replace(GO, is_cut=True)
    beside = {'system': 'Be brief.', 'rejected_stopped': False, 'chosen_safe': True}
    assert read({**record, **beside}, kind=Preference) == [
        Preference((system, Q), (A,), (go,), margin, (True, None))
    ]
    (found,) = read({**record, 'tools': [{'name': 'add'}]}, kind=Preference)
    assert '"add"' in found.prompt[0].content
    # What it says by a key of its own goes before what follows from scores.
    for own in ({'margin': 0.5}, {'rating': 'slightly better'}):
        (found,) = read({**record, 'score_chosen': 9, 'score_rejected': 2, **own}, kind=Preference)
        assert found.margin == (0.5 if 'margin' in own else 1.0)
    assert 'rejected_stopped is 1' in refusal(read, {**record, 'rejected_stopped': 1}, Preference)
    assert 'chosen_safe and rejected_safe are' in refusal(read, {**record, 'rejected_safe': 1}, Preference)


@pytest.mark.parametrize('kind', [Preference, Prompted])
def test_what_an_instruction_is_about_is_part_of_any_prompt(read, kind):
    asked = {'instruction': 'Add.', 'input': '1, 2', 'history': [['Hi', 'Hello!']]}
    answers = {'chosen': '3', 'rejected': '4'}
    (found,) = read({**asked, **answers}, kind=kind)
    wanted = (Q, A, Message('user', 'Add.', input='1, 2'))
    assert (found.messages if kind is Prompted else found.prompt) == wanted
    assert 'input is 3; it must be a text' in refusal(read, {**asked, **answers, 'input': 3}, kind)


def test_judged_answers_and_a_key_map(read):
    assert read({'prompt': 'Hi', 'completion': 'Go.', 'label': False}, kind=Judged) == [
        Judged((Q,), (GO,), False)
    ]
    named = {'data': {'question': 'Hi'}, 'answer': 'Hello!', 'system': 'Be brief.'}
    keys = parse_key_map('prompt = data.question, completion=answer')
    assert read(named, key_map=keys) == [Conversation((Q, A), (False, True))]  # what is not named is not read
    with pytest.raises(InputError, match='write OURS=THEIRS'):
        parse_key_map('prompt')


@pytest.mark.parametrize(
    ('record', 'line'),
    [
        (
            {'text': 'Hi', 'n': 1},
            'its keys are text, n; it needs messages, conversations, instruction with output',
        ),
        ({'messages': MESSAGES[:1]}, 'ends with the user'),
        ({'messages': MESSAGES[1:]}, 'begins with the assistant'),
        ({'messages': [{'role': 'system', 'content': 'a'}, MESSAGES[1]]}, 'begins with the assistant'),
        (
            {'messages': [MESSAGES[0], dict(MESSAGES[1], content=' ')]},
            'message 1, an answer to learn, is empty',
        ),
        ({'messages': [MESSAGES[0], dict(MESSAGES[1], weight=0)]}, 'no answer of it is to be learnt'),
        ({'messages': [MESSAGES[0], dict(MESSAGES[1], weight=2)]}, 'weight is 2; it is 0 or 1'),
        ({'messages': [{'role': 'narrator', 'content': 'a'}]}, "message 0 is by 'narrator'"),
        ({'messages': [{'role': 'user', 'content': 3}]}, 'content is 3; it must be a text'),
        ({'messages': []}, 'messages is []; it must be a list of messages'),
        ({'instruction': 'Hi', 'output': 3}, 'output is 3; it must be a text'),
        (PAIR, 'it holds a pair to compare'),
    ],
)
def test_what_is_no_conversation_is_named(read, record, line):
    assert line in refusal(read, record)


@pytest.mark.parametrize(
    ('record', 'line'),
    [
        ({'prompt': 'Hi', 'chosen': 'a'}, 'rejected is missing among the keys'),
        ({**PAIR, 'rejected': ''}, 'rejected is empty'),
        ({**PAIR, 'rejected': 'Hello!'}, 'the same answer'),
        (
            {'chosen': f'{HH} a', 'rejected': f'{HH.replace("Hi", "Ho")} b'},
            "message 0, letter 1: 'i' in chosen, 'o'",
        ),
        (
            {'chosen': f'{HH} a', 'rejected': f'{HH} b{HH} c'},
            'message 1: missing in chosen, by the assistant in rej',
        ),
        (
            {'prompt': 'Ho', 'chosen': MESSAGES, 'rejected': MESSAGES},
            "letter 1: 'o' in the prompt, 'i' in chosen",
        ),
        ({'chosen': 'a', 'rejected': 'b'}, 'it has no prompt'),
        ({**PAIR, 'margin': 'huge'}, "the margin is 'huge'; it is a number, or one of significantly better"),
        (
            {'prompt': 'Hi', 'response_1': 'a', 'response_2': 'b', 'preference_strength': 0},
            'a pair needs a loser',
        ),
        ({**PAIR, 'prompt': [*MESSAGES]}, 'the prompt ends with the assistant'),
    ],
)
def test_what_is_no_pair_is_named(read, record, line):
    assert line in refusal(read, record, Preference)


def test_an_answer_without_a_judgement_is_named(read):
    assert 'it needs prompt, completion and label' in refusal(
        read, {'prompt': 'Hi', 'completion': 'a'}, Judged
    )
    assert "label is 'good'" in refusal(read, {'prompt': 'Hi', 'completion': 'a', 'label': 'good'}, Judged)


def test_bad_records_are_counted_and_the_first_five_named(read, caplog):
    bad = BadRecords('skip')
    good, wrong = {'messages': MESSAGES}, {'text': 'Hi'}
    assert len(read(good, *[wrong] * 7, good, on_error=bad)) == 2
    assert (
        bad.count == 7
        and [f'line {n}:' in line for n, line in zip(range(2, 9), bad.named, strict=False)] == [True] * 5
    )
    bad.log()
    assert 'left out 7 bad records, the first: ' in caplog.text
    with pytest.raises(InputError, match="on_error is 'ignore'"):
        BadRecords('ignore')


def write_containers(folder, items):
    """The same records in every kind of file."""
    import pyarrow
    from array_record.python import array_record_module
    from pyarrow import parquet

    lines = '\n'.join(map(json.dumps, items)).encode()
    (folder / 'a.jsonl').write_bytes(lines)
    (folder / 'a.json').write_text('\ufeff ' + json.dumps(items, indent=2))
    (folder / 'a.json.gz').write_bytes(gzip.compress(json.dumps(items).encode()))
    with pyarrow.CompressedOutputStream(str(folder / 'a.jsonl.zst'), 'zstd') as file:
        file.write(lines)
    parquet.write_table(pyarrow.Table.from_pylist(items), folder / 'a.parquet')
    writer = array_record_module.ArrayRecordWriter(str(folder / 'a.array_record'), 'group_size:1')
    for record in items:
        writer.write(json.dumps(record).encode())
    writer.close()
    return sorted(file for file in folder.iterdir() if file.is_file())


def test_every_kind_of_file_holds_the_same_records(tmp_path):
    hard = ['"', '\\', ']}', '{"', 'é\n😀', '\\"]', ',']
    records = [
        {'messages': [{'role': 'user', 'content': text}, MESSAGES[1]], 'id': i} for i, text in enumerate(hard)
    ]
    files = write_containers(tmp_path, records)
    assert len(files) == 6
    for file in files:
        check_records([str(file)])
        found = list(read_records([str(file)], kind=Conversation))
        assert [record.messages for record in found] == [(Message('user', text), A) for text in hard], file
        assert len({record.place for record in found}) == len(hard) and str(file) in found[0].place


def test_a_tfds_data_set_of_conversations(monkeypatch):
    """TFDS gives a sequence of objects as an object of arrays, and texts as bytes."""
    turns = {'from': np.array([b'human', b'gpt'], object), 'value': np.array([b'Hi', b'Hello!'], object)}
    monkeypatch.setattr(
        records, 'open_tfds', lambda source: ([{'conversations': turns, 'n': np.int64(3)}], [])
    )
    (found,) = read_records(['tfds:talks'], kind=Conversation)
    assert found.messages == (Q, A) and found.place == 'tfds:talks example 0'


@pytest.mark.parametrize('name', ['a.json', 'a.json.gz', 'a.jsonl.zst', 'a.parquet', 'a.array_record'])
def test_a_file_cut_short_is_named(tmp_path, name):
    rng = np.random.default_rng(0)  # letters that hardly compress
    items = [
        {
            'messages': [
                {'role': 'user', 'content': ''.join(map(chr, rng.integers(97, 123, 500)))},
                MESSAGES[1],
            ]
        }
        for _ in range(40)
    ]
    write_containers(tmp_path, items)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 3])
    with pytest.raises(InputError, match='cut short') as caught:
        list(read_records([str(file)], kind=Conversation))
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)


def test_what_is_no_file_of_records_is_refused(tmp_path):
    (tmp_path / 'a.csv').write_text('a,b')
    with pytest.raises(InputError, match=r'a\.csv is no file of records'):
        check_records([str(tmp_path / 'a.csv')])
    with pytest.raises(InputError, match='no file'):
        check_records([str(tmp_path / 'b.jsonl')])
    for text, line in (
        ('[]', 'holds no record'),
        ('[{"a": 1}] 7', 'goes on behind its array'),
        ('[1]', 'is a JSON int'),
    ):
        (tmp_path / 'a.json').write_text(text)
        with pytest.raises(InputError, match=line):
            list(
                read_records(
                    [str(tmp_path / 'a.json')], kind=Conversation, on_error='skip' if '7' in text else 'stop'
                )
            )


def test_the_demo_files_are_read_whole(shared_data):
    folder = shared_data / 'finetune'
    alpaca = list(read_records([f'{folder}/alpaca_en_demo.json'], kind=Conversation))
    assert len(alpaca) == 999 and sum(bool(record.messages[0].input) for record in alpaca) == 412
    assert len(list(read_records([f'{folder}/dpo_en_demo.json'], kind=Preference))) == 300
    bad = BadRecords('skip')
    pairs = list(read_records([f'{folder}/hh_*.jsonl.gz'], kind=Preference, on_error=bad))
    # Four empty answers, five whose answer is a second message in a row, so that prompts differ.
    assert (len(pairs), bad.count) == (2303, 9)
    assert sum('chosen is empty' in line for line in bad.named) == 4 and 'prompts differ' in bad.named[4]
