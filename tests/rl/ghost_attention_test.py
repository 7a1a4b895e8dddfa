"""An instruction that is given once: which it is, where it stands, and what alone is learnt behind it."""

import collections
import itertools

import pytest

from llama_jax.data.examples import Encoder
from llama_jax.data.record_kinds import Conversation
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.rl.context_distillation import with_preprompt
from llama_jax.rl.ghost_attention import (
    constraint_of,
    default_constraints,
    dialogs_of,
    instruction_of,
    learnt,
)
from llama_jax.tokenizer.chat_format import FORMATS, Message, chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer

TALK = (
    Message('system', 'Be.'), Message('user', 'Hi'), Message('assistant', 'Yes?'), Message('user', 'Go', input='on'),
)  # fmt: skip


def test_while_answers_are_drawn_it_stands_before_every_message_by_the_user():
    found = with_preprompt(TALK, 'In French.', everywhere=True)
    assert [message.content for message in found] == ['Be.', 'In French.\n\nHi', 'Yes?', 'In French.\n\nGo']
    with pytest.raises(InputError, match='no message by the user'):
        with_preprompt(TALK[:1], 'In French.', everywhere=True)
    with pytest.raises(InputError, match='no message by the user'):
        learnt(TALK[2:3], 'In French.', 'Oui')


def test_what_is_learnt_has_it_once_and_the_weight_of_the_last_answer_alone():
    found = learnt(TALK, 'In French.', 'Oui')
    assert [(one['content'], one['weight']) for one in found] == [
        ('Be.', 0), ('In French.\n\nHi', 0), ('Yes?', 0), ('Go\n\non', 0), ('Oui', 1),
    ]  # fmt: skip


@pytest.mark.parametrize('name', [name for name in FORMATS if name != 'llama3'])
def test_no_token_of_an_earlier_answer_is_learnt(shared_data, tmp_path, name):
    """As `sft` reads the file: all that counts is the last answer with its stop token."""
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    chat = chat_format_for(tokenizer, name)
    talk = (
        Message('user', 'Hi'),
        Message('assistant', 'One'),
        Message('user', 'So'),
        Message('assistant', 'Two'),
    )
    (tmp_path / 'a.json').write_text(
        str([{'messages': learnt((*talk, talk[0]), 'Be.', 'Three')}]).replace("'", '"')
    )
    (record,) = read_records([str(tmp_path / 'a.json')], kind=Conversation)
    example = Encoder(chat, 511).encode(record)
    assert example is not None
    counted = example.tokens[example.counts].tolist()
    assert tokenizer.decode(counted[:-1]).strip() == 'Three' and counted[-1] in chat.stop_ids
    assert example.counts[-len(counted) :].all(), 'they are the last'


def test_instructions_combine_kinds_and_every_second_one_is_terse():
    constraints = default_constraints()
    found = [instruction_of(constraints, 3, 5, index) for index in range(600)]
    assert found[7] == instruction_of(constraints, 3, 5, 7) != instruction_of(constraints, 3, 6, 7)
    assert sum(one.is_terse for one in found) == 300
    for one in found:
        kinds = [constraint.kind for constraint in one.constraints]
        assert len(set(kinds)) == len(kinds) <= 3
        texts = [c.terse if one.is_terse else c.text for c in one.constraints]
        assert one.text == (', ' if one.is_terse else ' ').join(texts)
    sizes = collections.Counter(len(one.constraints) for one in found)
    assert all(abs(sizes[size] - 200) < 4 * (600 * 2 / 9) ** 0.5 for size in (1, 2, 3)), (
        'to 4 standard errors'
    )
    assert {one.constraints[0] for one in found} == set(constraints)
    orders = {tuple(c.kind for c in one.constraints) for one in found if len(one.constraints) == 3}
    assert orders == set(itertools.permutations({one.kind for one in constraints}))
    assert len(instruction_of(constraints, 1, 5, 2).constraints) == 1


def test_every_prompt_stands_once_at_every_turn_and_never_twice_in_a_dialog():
    found = dialogs_of(7, 5, seed=3)
    assert all(sorted(turn) == list(range(7)) for turn in zip(*found, strict=True))
    assert all(len(set(dialog)) == 5 for dialog in found)
    assert [len(dialog) for dialog in dialogs_of(2, 5, seed=3)] == [5, 5]
    assert found != dialogs_of(7, 5, seed=4)


@pytest.mark.parametrize(
    ('record', 'message'),
    [
        ({}, 'constraint is None; it must be a text'),
        ({'constraint': ' '}, "constraint is ' '; it must be a text"),
        ({'constraint': 'Be.', 'terse': 3}, 'terse is 3; it must be a text'),
    ],
)
def test_constraints_that_say_nothing_are_refused(record, message):
    with pytest.raises(InputError, match=message):
        constraint_of(record)


def test_a_constraint_hands_all_its_keys_to_what_judges():
    found = constraint_of({'constraint': ' Moo. ', 'word': 'moo'})
    assert (found.text, found.terse, found.kind) == ('Moo.', 'Moo.', 'Moo.') and found.fields['word'] == 'moo'
