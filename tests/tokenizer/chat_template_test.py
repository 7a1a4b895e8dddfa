"""Chat templates: as transformers renders them, and none of them can harm whoever renders it."""

# ruff: noqa: E501

import concurrent.futures
import json
import resource
import subprocess
import sys
import time

import pytest
from etils import epath

from llama_jax.errors import InputError
from llama_jax.tokenizer import chat_template
from llama_jax.tokenizer.chat_format import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE
from llama_jax.tokenizer.chat_template import ChatTemplate, template_beside
from tests.command_line import REPOSITORY
from tests.tokenizer.hostile_templates import ENDLESS, LARGE, WRONG

MESSAGES = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': ' Hello é \ud83d\ude00'},
    {'role': 'assistant', 'content': 'So ', 'tool_calls': [{'function': {'name': 'f', 'arguments': {'x': [1, '<']}}}]},
    {'role': 'user', 'content': 'and\n'},
    {'role': 'assistant', 'content': ' then '},
]  # fmt: skip
TEMPLATES = {
    'llama2': LLAMA2_TEMPLATE,
    'llama3': LLAMA3_TEMPLATE,
    'spaces': """{%- for m in messages %}
        {{- '<|' + m['role'] + '|>\\n' + m['content'] | trim + '\\n' }}
    {%- endfor %}
    {% if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
    {% endif %}""",
    'tools': """{%- set ns = namespace(seen=0) %}{{ bos_token }}{{ eos_token }}
{%- if tools is not none %}{% for tool in tools %}{{ tool | tojson(indent=2) }}{{ tool.function.name }}{% endfor %}{% endif %}
{%- if documents %}{{ documents[0].text }}{% endif %}
{%- macro show(m) %}{{ m.role }}{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endmacro %}
{%- for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.seen = ns.seen + 1 %}
{{ show(m) }}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{% if ns.seen > 3 %}{% break %}{% endif %}
{%- endfor %}{{ x is defined }}{{ missing is defined }}{{ strftime_now('%Y') | length }}{{ dict(a=1) | items | list }}
{{- messages | map(attribute='role') | join(',') }}{{ messages[1:] | length }}{{ 'é<"' | tojson }}{{ ns.seen is number }}""",
}
TOOLS = [{'type': 'function', 'function': {'name': 'f', 'parameters': {'é': None, 'n': 1.5}}}]


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_template_renders_as_in_transformers(name):
    transformers = pytest.importorskip(
        'transformers.utils.chat_template_utils', reason="needs transformers: pip install 'llama_jax[parity]'"
    )
    chat = ChatTemplate(TEMPLATES[name])
    plain = [{'role': m['role'], 'content': m['content'].encode('utf-16', 'surrogatepass').decode('utf-16')} | {
        k: v for k, v in m.items() if k == 'tool_calls'} for m in MESSAGES]  # fmt: skip
    for messages, prompt in ((plain[:2], True), (plain[:4], True), (plain, False)):
        names = dict(bos_token='<s>', eos_token='</s>', tools=TOOLS, documents=[{'text': 'a'}])
        (wanted,), _ = transformers.render_jinja_template(
            [messages], names['tools'], names['documents'], TEMPLATES[name], add_generation_prompt=prompt,
            bos_token='<s>', eos_token='</s>', continue_final_message=not prompt,
        )  # fmt: skip
        found = chat.render(messages, add_generation_prompt=prompt, continue_last=not prompt, **names)
        assert found == wanted


@pytest.fixture(scope='module')
def chat():
    return ChatTemplate('', cpu_seconds=0.2)


def refusal(chat, template):
    chat.text = template
    with pytest.raises(InputError) as caught:
        chat.render(MESSAGES, bos_token='<s>')
    message = str(caught.value)
    assert '\n' not in message and len(message) < 300
    assert message.startswith('the chat template cannot render 5 messages: ')
    return message


def test_a_wrong_template_is_refused_in_one_line(chat):
    assert len(WRONG) + len(LARGE) + len(ENDLESS) > 200
    for template in WRONG:
        refusal(chat, template)
    assert refusal(chat, "{{ raise_exception('no') }}").endswith('messages: no')
    assert 'ZeroDivisionError' in refusal(chat, '{{ 1 / 0 }}')
    line = "{% for i in range(20) %}{{ 'a' * 1000000 }}{% endfor %}"
    assert f'writes more than {chat_template._MAX_TEXT} characters' in refusal(chat, line)


def check_limits(templates):
    """In a small process: a child's peak begins with that of the process that forks it."""
    chat = ChatTemplate('', cpu_seconds=0.2)
    for template in templates:
        start = time.monotonic()
        message = refusal(chat, template)
        assert any(
            words in message for words in ('computes for more than 0.2 s', 'Error', 'more than', 'process')
        ), message
        assert time.monotonic() - start < 60, template[:80]
    large = "{% set x = 'a' * 400000000 %}{% set y = x ~ x %}"
    assert 'MemoryError' in refusal(ChatTemplate('', cpu_seconds=10), large)  # with time for it
    # Python, the limit, and nothing beyond.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= 500 << 10
    chat.text = '{{ messages[0].content }}'
    assert chat.render(MESSAGES) == 'Be brief.'  # the next conversation is not the worse for it


@pytest.mark.parametrize('steps', [(16, 10), pytest.param((1, 1), marks=pytest.mark.slow)])
def test_limits_of_time_and_memory_hold(steps):
    code = (
        'from tests.tokenizer.chat_template_test import ENDLESS, LARGE, check_limits\n'
        f'check_limits([*LARGE[::{steps[0]}], *ENDLESS[::{steps[1]}]])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert not done.returncode, done.stderr


def test_threads_take_turns(chat):
    chat.text = '{{ messages[0].content }}'
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: chat.render([{'role': 'user', 'content': str(i)}]), range(40))
        assert list(found) == [str(i) for i in range(40)]


def test_a_process_that_neither_answers_nor_computes_is_given_up(chat, monkeypatch):
    monkeypatch.setattr(chat_template, '_SECONDS', 0.1)
    monkeypatch.setattr(chat_template, '_PROGRAM', '/dev/stdin')  # a Python that waits for its program
    idle = ChatTemplate('')
    assert 'the process that renders it ended (status -9)' in refusal(idle, 'a')


def test_what_is_no_conversation_is_refused(chat):
    chat.text = '{{ messages | length }}'
    with pytest.raises(InputError, match='no plain values'):
        chat.render([{'role': 'user', 'content': {1, 2}}])
    with pytest.raises(InputError, match='cannot be continued'):
        chat.render([{'role': 'user', 'content': 'Hi'}], add_generation_prompt=False, continue_last=True)
    with pytest.raises(InputError, match='at most 1048576'):
        ChatTemplate(' ' * (1 << 21))


def test_the_template_beside_a_tokenizer(tmp_path):
    folder = epath.Path(tmp_path)
    assert template_beside(folder) == ''
    file = folder / 'tokenizer_config.json'
    named = [{'name': 'tool_use', 'template': 'a'}, {'name': 'default', 'template': 'b'}]
    for value, wanted in ((None, ''), ('x', 'x'), (named, 'b')):
        file.write_text(json.dumps({'chat_template': value}))
        assert template_beside(folder) == wanted
    file.write_text('{"chat_template": 3}')
    with pytest.raises(InputError, match='chat_template is 3; it must be a text'):
        template_beside(folder)
    (folder / 'chat_template.jinja').write_text('own')
    assert template_beside(folder) == 'own'
