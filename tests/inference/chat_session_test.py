import dataclasses

import jax
import pytest

from llama_jax.errors import InputError
from llama_jax.inference.chat import Chat
from llama_jax.inference.chat_session import ChatSession
from llama_jax.inference.generate import generate
from llama_jax.inference.slots import Slots
from llama_jax.models.llama import LlamaForCausalLM, param_axes
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.tokenizer.tokenizer import tokenizer_of_files
from tests import toy
from tests.tokenizer import kinds

SYSTEM = {'role': 'system', 'content': 'wall'}
SAID = ['green bottles', 'x', 'on']


@pytest.fixture(scope='module')
def tokenizer():
    return tokenizer_of_files('llama3', kinds.kinds()['llama3'][0])


@pytest.fixture(scope='module')
def model(tokenizer):
    config = dataclasses.replace(toy.CONFIG, vocab_size=tokenizer.vocab_size, max_seq_len=256)
    return LlamaForCausalLM(config, dtype='float32')


@pytest.fixture(scope='module')
def params(model):
    return toy.make_params(model)


@pytest.fixture
def read(monkeypatch):
    """How many tokens each piece that was read had."""
    pieces, real = [], Slots.read

    def counted(slots, read, width):
        pieces.extend(len(piece.tokens) for piece in read)
        return real(slots, read, width)

    monkeypatch.setattr(Slots, 'read', counted)
    return pieces


def test_answers_are_those_to_the_whole_conversation_of_which_only_the_new_is_read(
    model, params, tokenizer, read
):
    session, chat = ChatSession(model, params, tokenizer, messages=[SYSTEM]), Chat(tokenizer, '')
    before = []
    for text in SAID:
        read.clear()
        pieces = list(session.say(text, max_new_tokens=12))
        ids = chat.encode_prompt([*session.messages[:-1]])
        assert sum(read) == len(ids) - session.num_cached
        # All that was asked before is held; of the answer, as far as its text has the tokens that it was drawn in.
        assert session.num_cached >= len(before)
        before = ids
        read.clear()
        whole = generate(model, params, tokenizer, [ids], max_new_tokens=12, stop_ids=chat.stop_ids)
        assert [''.join(pieces)] == whole and all(pieces)
        assert session.messages[-2:] == [
            {'role': 'user', 'content': text}, {'role': 'assistant', 'content': whole[0]},
        ]  # fmt: skip
    assert session.messages[0] == SYSTEM and len(session.messages) == 7


@pytest.mark.slow
def test_a_mesh_answers_the_same(model, params, tokenizer):
    """Where it splits rows, one is among rows of nobody."""
    partitioner = Partitioner(make_mesh({'data': 2, 'tensor': 4}))
    split = jax.device_put(params, partitioner.tree_shardings(params, param_axes(model)))
    spread = ChatSession(model.clone(partitioner=partitioner), split, tokenizer, messages=[SYSTEM])
    session = ChatSession(model, params, tokenizer, messages=[SYSTEM])
    for text in SAID:
        assert ''.join(spread.say(text, max_new_tokens=12)) == ''.join(session.say(text, max_new_tokens=12))
        assert spread.num_cached == session.num_cached


def test_an_answer_that_is_broken_off_is_what_was_shown(model, params, tokenizer):
    session = ChatSession(model, params, tokenizer, messages=[SYSTEM])
    (whole,) = generate(
        model, params, tokenizer, [Chat(tokenizer, '').encode_prompt([SYSTEM, {'role': 'user', 'content': 'x'}])],
        max_new_tokens=12,
    )  # fmt: skip
    first = next(session.say('x', max_new_tokens=12))
    assert whole.startswith(first) and len(first) < len(whole)
    second = ''.join(session.say('wall', max_new_tokens=12))
    assert [message['content'] for message in session.messages] == ['wall', 'x', first, 'wall', second]
    stopped = ''.join(session.say('x', max_new_tokens=12, stop=second[1:3]))
    assert second[1:3] not in stopped and session.messages[-1]['content'] == stopped


def test_what_cannot_be_said_leaves_the_conversation_as_it_was(model, params, tokenizer):
    session = ChatSession(model, params, tokenizer)
    for text, settings, words in (
        (
            'x ' * 300,
            {},
            'the conversation would have .* tokens; the model reads 256, so shorten it to at most 255',
        ),
        ('x', {'max_new_tokens': 0}, 'max_new_tokens is 0'),
        ('x', {'temperature': -1}, 'temperature is -1'),
        ('x', {'stop': ['']}, "a stop text is ''"),
    ):
        with pytest.raises(InputError, match=words) as error:
            session.say(text, **settings)
        assert '\n' not in str(error.value) and session.messages == []
    with pytest.raises(InputError, match='text needs a tokenizer'):
        ChatSession(model, params, None)


def test_an_answer_that_the_context_ends_is_told(model, params, tokenizer, caplog):
    session = ChatSession(model, params, tokenizer)
    text = 'x ' * 220
    room = 256 - len(session._chat.encode_prompt([{'role': 'user', 'content': text}]))
    assert 1 < room < 30
    list(session.say(text, max_new_tokens=room + 1, min_new_tokens=room))
    assert session.num_made == room
    assert 'the answer ended where the context of 256 tokens does, before max_new_tokens' in caplog.text
