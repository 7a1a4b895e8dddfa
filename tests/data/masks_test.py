"""What counts of any record: whatever keys it has, however it is spelled and shortened, the answers and their ends."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.data.examples import TOO_LONG, Encoder, ExampleRows
from llama_jax.data.preference_dataset import Reading
from llama_jax.data.record_kinds import READERS, Conversation, Judged, Preference
from llama_jax.tokenizer.chat_format import FORMATS, chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer

# No signs with which a turn of some format begins, which are refused; some that tokenizers write in bytes.
NAMES = [name if name == 'llama2' else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
WORDS = ('a', 'bc', '1+1', 'é', '😀', '\n', '漢字', 'd e')
TEXTS = st.lists(st.sampled_from(WORDS), max_size=6).map(lambda words: f'a{"".join(words)}b')
TURNS = st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=3)


def by(role, content, **more):
    return {'role': role, 'content': content, **more}


def conversations(system, turns):
    """The same in every layout of keys; a weight a message is OpenAI's alone."""
    *before, (question, answer, _) = turns
    asked = [by(*message) for q, a, _ in before for message in (('user', q), ('assistant', a))]
    asked.append(by('user', question))
    weighed = [message for q, a, counts in turns for message in (
        by('user', q), by('assistant', a, weight=int(counts or a is answer)))]  # fmt: skip
    names = {'user': 'human', 'assistant': 'gpt'}
    shared = [{'from': names[m['role']], 'value': m['content']} for m in [*asked, by('assistant', answer)]]
    beside = {'system': system} if system else {}
    return [
        {'messages': weighed, **beside},
        {'conversations': shared, **beside},
        {'instruction': question, 'output': answer, 'history': [[q, a] for q, a, _ in before], **beside},
        {'prompt': asked, 'completion': answer, **beside},
    ], asked, beside  # fmt: skip


def counted_runs(ids, counts):
    return [
        [id for id, _ in run]
        for counts, run in itertools.groupby(zip(ids, counts, strict=True), key=lambda pair: pair[1])
        if counts
    ]


@pytest.fixture(scope='module')
def tokenizers(shared_data):
    files = {'llama3': 'tokenizers/llama3', '': 'weights/stories260K/tok512.model'}
    return {name: load_tokenizer(shared_data / file) for name, file in files.items()}


@pytest.mark.parametrize('name', NAMES)
@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    system=st.one_of(st.just(''), TEXTS), turns=TURNS, kind=st.integers(0, 3), room=st.integers(20, 160),
    too_long=st.sampled_from(TOO_LONG), loss_on=st.sampled_from(('all', 'last')),
)  # fmt: skip
def test_what_counts_is_answers_and_their_ends(
    tokenizers, name, system, turns, kind, room, too_long, loss_on
):
    tokenizer = tokenizers.get(name, tokenizers[''])
    chat = chat_format_for(tokenizer, name)
    record = READERS[Conversation](conversations(system, turns)[0][kind])
    example = Encoder(chat, room, loss_on, too_long).encode(record)
    if example is None:
        return
    dialog, counts = example.record.messages, example.record.counts
    whole, _ = chat.encode_dialog(dialog)
    is_cut = len(example.tokens) < len(whole)
    assert not is_cut or (too_long == 'cut' and len(example.tokens) == room + 1)
    runs = counted_runs(example.tokens.tolist(), example.counts.tolist())
    answers = [message.content for message, count in zip(dialog, counts, strict=True) if count]
    assert answers and (len(runs) == len(answers) or is_cut and runs)
    for number, (run, answer) in enumerate(zip(runs, answers, strict=False)):
        if run[-1] in chat.stop_ids:
            assert tokenizer.decode(run[:-1]).strip() == answer.strip()
            run = run[:-1]
        else:
            assert is_cut and number == len(runs) - 1
        assert not set(run) & set(chat.stop_ids)
    num_begins = sum(message.role == 'user' for message in dialog) if name == 'llama2' else 1
    begins = example.tokens.tolist().count(tokenizer.bos_id)
    assert begins == num_begins or is_cut and 1 <= begins < num_begins
    first = next(number for number, message in enumerate(dialog) if message.role == 'assistant')
    prompt = chat.encode_prompt(dialog[:first])
    assert (
        example.tokens[: len(prompt)].tolist() == prompt[: room + 1]
        and not example.counts[: len(prompt)].any()
    )
    (row,) = ExampleRows([example], room)
    assert row['tokens'][: len(example.tokens)].tolist() == example.tokens.tolist()
    assert row['counts'].sum() == example.counts.sum()


@pytest.mark.parametrize('name', NAMES)
@settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    system=st.one_of(st.just(''), TEXTS), turns=TURNS, kind=st.integers(0, 4), room=st.integers(40, 200),
    too_long=st.sampled_from(('drop', 'oldest')), share=st.booleans(),
)  # fmt: skip
def test_what_counts_of_a_pair_is_its_answers_and_their_ends(
    tokenizers, name, system, turns, kind, room, too_long, share
):
    tokenizer = tokenizers.get(name, tokenizers[''])
    chat = chat_format_for(tokenizer, name)
    _, asked, beside = conversations(system, turns)
    good, bad = turns[-1][1], f'{turns[-1][1]} c'
    both = [[*asked, by('assistant', answer)] for answer in (good, bad)]
    record = [
        {'prompt': asked, 'chosen': good, 'rejected': bad},
        {'chosen': both[0], 'rejected': both[1]},
        {'input': {'messages': asked}, 'preferred_output': both[0][-1:], 'non_preferred_output': both[1][-1:]},
        {'prompt': asked, 'response_1': good, 'response_2': bad, 'preference_strength': -1},
        {'prompt': asked, 'completion': good, 'label': True},
    ][kind] | beside  # fmt: skip
    reading = Reading(tokenizer, chat, room, too_long=too_long, share_prompt=share, judged=kind == 4)
    read = READERS[Judged if kind == 4 else Preference](record)
    pair = reading._encode(read)
    for answer, text in zip(pair.answers, (good, bad), strict=True):
        if answer is None:
            assert kind == 4
            continue
        assert answer.counts.all() and answer.tokens[-1] in chat.stop_ids
        assert tokenizer.decode(answer.tokens[:-1].tolist()).strip() == text.strip()
        assert tokenizer.bos_id not in answer.tokens
    assert len(read.prompt) == len(asked) + bool(system)
    whole = chat.encode_prompt(read.prompt)
    if too_long == 'drop':
        assert pair.prompt.tolist() == whole
    else:  # the newest turns, behind the system message
        assert pair.prompt[0] == tokenizer.bos_id and len(pair.prompt) <= len(whole)
        newest = [*read.prompt[:1]][: bool(system)] + [read.prompt[-1]]
        shortest = chat.encode_prompt(newest)
        assert len(pair.prompt) >= len(shortest)
