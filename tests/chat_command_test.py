"""The chat in the terminal: what may be typed, and the command through a terminal of its own."""

import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest

from experiments.prompting.conversation import Conversation
from llama_jax.inference.chat_session import ChatSession
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from llama_jax.serve.documents import Documents
from tests import toy
from tests.command_line import wait_for as until
from tests.serve.serving import make_tokenizer


@pytest.fixture(scope='module')
def make_session():
    config = dataclasses.replace(toy.CONFIG, vocab_size=512, max_seq_len=2048, num_layers=1)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    params = unstack(toy.make_params(model), model.dtype)
    return lambda messages: ChatSession(model, params, make_tokenizer(), '', messages)


class Screen:
    def __init__(self, make_session, documents=None, **settings):
        self.text, self.on_show = '', lambda: None
        settings = {'max_new_tokens': 12, 'temperature': 0} | settings
        self.conversation = Conversation(make_session, settings, documents, self.show)

    def show(self, text):
        self.text += text
        self.on_show()

    def type(self, line):
        self.text = ''
        assert self.conversation.take(line)
        return self.text

    @property
    def messages(self):
        return self.conversation._session.messages


def test_what_may_be_typed(make_session, tmp_path):
    screen = Screen(make_session)
    first = screen.type('Hi')
    assert screen.type('/undo') == '' and screen.messages == []
    assert screen.type('Hi') == first
    assert 'tokens in' in screen.type('/stats')
    screen.type('/system Be brief.')
    assert [message['role'] for message in screen.messages] == ['system', 'user', 'assistant']
    file = tmp_path / 'talk.json'
    assert screen.type(f'/save {file}') == ''
    assert json.loads(file.read_text()) == screen.messages
    assert 'is there already' in screen.type(f'/save {file}')
    after = screen.type('And then?')
    other = Screen(make_session)
    other.type(f'/load {file}')
    assert other.type('And then?') == after
    screen.type('/reset')
    assert [message['role'] for message in screen.messages] == ['system']
    screen.type('/system')
    assert screen.messages == []
    for line, words in (
        ('/undo', 'no answer to take back'), ('/rest', 'did you mean reset'), ('/save', 'needs a file'),
        ('/save /proc/talk.json', '/proc/talk.json cannot be written: '),
        ('/load nothing.json', 'nothing.json'), (f'/save {tmp_path}/no/talk.json', 'there is no folder'),
    ):  # fmt: skip
        assert words in screen.type(line)
    outgrown = screen.type('x' * 3000)
    assert (
        outgrown.startswith('the conversation would have') and 'by /undo, or begin anew by /reset' in outgrown
    )
    assert not screen.conversation.take('/quit')


def test_what_cannot_be_gone_on_from_is_not_loaded(make_session, tmp_path):
    screen = Screen(make_session)
    screen.type('Hi')
    file = tmp_path / 'talk.json'
    file.write_text('[{"role": "robot", "content": "x"}]')
    assert "role is 'robot'" in screen.type(f'/load {file}')
    assert 'no file has such a name' in screen.type('/load a\0b') + screen.type('/save a\0b')
    assert [message['role'] for message in screen.messages] == ['user', 'assistant']
    file.write_text('[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]')
    assert screen.type(f'/load {file}') == '' == screen.type(f'/save {tmp_path}/again.json')
    assert json.loads((tmp_path / 'again.json').read_text())[0]['content'] == '\ufffd'


def test_ctrl_c_stops_an_answer_and_not_the_program(make_session):
    screen = Screen(make_session, max_new_tokens=500)

    def interrupt():
        screen.on_show = lambda: None
        os.kill(os.getpid(), signal.SIGINT)

    screen.on_show = interrupt
    shown = screen.type('Hi')
    assert len(screen.messages) == 2 and screen.messages[1]['content'] == shown.removesuffix('\n')
    assert screen.conversation._session.num_made < 100
    assert screen.type('Go on')


def test_passages_are_read_and_cited(make_session, tmp_path):
    (tmp_path / 'owls.txt').write_text('Owls hunt mice.\n')
    screen = Screen(make_session, Documents(str(tmp_path)))
    assert screen.type('What do owls hunt?').endswith('\n[1] owls.txt:1\n')
    assert '[1] owls.txt:1\nOwls hunt mice.' in screen.messages[0]['content']


@pytest.mark.slow
def test_the_command_talks_through_a_terminal(shared_data, tmp_path):
    here, there = pty.openpty()
    weights = shared_data / 'weights/stories260K/stories260K.gguf'
    command = [
        sys.executable, '-m', 'experiments.chat', f'--checkpoint={weights}', '--temperature=0', '--max_new_tokens=100'
    ]  # fmt: skip
    process = subprocess.Popen(
        ['setsid', '--ctty', '--wait', *command], stdin=there, stdout=there, stderr=there
    )
    os.close(there)
    seen = []

    def read():
        try:
            while data := os.read(here, 4096):
                seen.append(data.decode(errors='replace'))
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()

    def wait_for(count, seconds=120):
        end = time.monotonic() + seconds
        while ''.join(seen).count('> ') < count:
            assert time.monotonic() < end and process.poll() is None, ''.join(seen)
            time.sleep(0.1)

    def type(line):
        """What is shown until the next line may be typed, but for the log."""
        before = ''.join(seen)
        os.write(here, f'{line}\n'.encode())
        wait_for(before.count('> ') + 1)
        return re.sub(r'\d\d:\d\d:\d\d .*\r\n', '', ''.join(seen)[len(before) :])

    try:
        wait_for(1)
        type('Once upon a time')
        type(f'/save {tmp_path}/talk.json')
        after = type('And then')
        assert len(after) > 20
        type('/reset')
        other = type('And then')
        type(f'/load {tmp_path}/talk.json')
        assert type('And then') == after != other
        before = ''.join(seen)
        os.write(here, b'Why\n')
        until(lambda: len(''.join(seen)) > len(f'{before}Why\r\n'))  # it answers
        os.write(here, b'\x03')
        wait_for(before.count('> ') + 1)
        assert int(re.search(r'(\d+) tokens in', type('/stats'))[1]) < 100
        os.write(here, b'\x04')
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert 'tokens in' in ''.join(seen) and 'Traceback' not in ''.join(seen)
