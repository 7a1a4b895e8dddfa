"""The keys that records of conversations have -> messages, and which of them are to be learnt."""

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import InputError
from llama_jax.json_file import parse_object, show_json
from llama_jax.tokenizer.chat_format import Message
from llama_jax.tokenizer.tool_calls import describe_tools, spell_call

# What data sets call the four who speak.
_ROLES = {
    **dict.fromkeys(('system', 'developer'), 'system'),
    **dict.fromkeys(('user', 'human', 'prompter'), 'user'),
    **dict.fromkeys(('assistant', 'gpt', 'model', 'bot', 'chatgpt', 'function_call'), 'assistant'),
    **dict.fromkeys(('tool', 'function', 'ipython', 'observation', 'function_response'), 'tool'),
}
_HH_TURN = re.compile(r'\n\n(Human|Assistant):')
CONVERSATION_KEYS = 'messages, conversations, instruction with output, or prompt with completion'

Counted = tuple[tuple[Message, ...], tuple[bool, ...]]


def read_conversation(item: Mapping[str, Any]) -> Counted:
    """(messages, which of them count) of a record, by the keys that it has.

    Raises:
      InputError: it has others, or they hold what is no conversation.
    """
    if 'messages' in item:
        found = read_messages(item['messages'], 'messages')
    elif 'conversations' in item:
        found = read_messages(item['conversations'], 'conversations')
    elif 'instruction' in item and 'output' in item:
        found = _of_instruction(item)
    elif 'prompt' in item and 'completion' in item:
        prompt = one_or_more_messages(item['prompt'], 'prompt', role='user')
        completion = one_or_more_messages(item['completion'], 'completion')
        found = prompt + completion, (False,) * len(prompt) + tuple(m.role == 'assistant' for m in completion)
    else:
        keys = show_json(', '.join(item))[1:-1] or 'none'
        raise InputError(f'its keys are {keys}; it needs {CONVERSATION_KEYS}, or a key map to these')
    return _with_system(found, item)


def prompt_messages(item: Mapping[str, Any]) -> tuple[Message, ...]:
    """What comes before an answer; () where no key of its own holds it."""
    for key in ('prompt', 'conversations', 'messages', 'instruction'):
        if item.get(key):
            is_alpaca = key == 'instruction' and isinstance(item[key], str) and not _HH_TURN.match(item[key])
            messages = _instruction(item) if is_alpaca else one_or_more_messages(item[key], key, role='user')
            return with_beside(messages, item)
    return ()


def one_or_more_messages(value: Any, key: str, role: str = 'assistant') -> tuple[Message, ...]:
    """A text by `role`, a text with the turns of hh-rlhf, a message or several."""
    if isinstance(value, str):
        return split_hh(value) if _HH_TURN.match(value) else (Message(role, value),)
    return read_messages([value] if isinstance(value, Mapping) else value, key)[0]


def split_hh(text: str) -> tuple[Message, ...]:
    r"""'\n\nHuman: a\n\nAssistant: b' as messages."""
    _, *parts = _HH_TURN.split(text)
    roles = {'Human': 'user', 'Assistant': 'assistant'}
    return tuple(
        Message(roles[role], content.strip()) for role, content in zip(parts[::2], parts[1::2], strict=True)
    )


def read_messages(value: Any, key: str) -> Counted:
    """Messages with the keys of OpenAI (role, content) or ShareGPT (from, value).

    Raises:
      InputError: `value` is no list of such.
    """
    if not isinstance(value, list) or not value:
        raise InputError(f'{key} is {show_json(value)}; it must be a list of messages, at least one')
    read = [_message(message, f'{key}: message {number}') for number, message in enumerate(value)]
    return tuple(message for message, _ in read), tuple(count for _, count in read)


def _message(given: Any, where: str) -> tuple[Message, bool]:
    if not isinstance(given, Mapping):
        raise InputError(f'{where} is {show_json(given)}; it must be an object with role and content')
    said = given.get('role', given.get('from'))
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = ', '.join(sorted(_ROLES))
        raise InputError(f'{where} is by {show_json(said)} (role, or from); those known are {known}')
    content = given.get('content', given.get('value'))
    calls = given.get('tool_calls') or ([given['function_call']] if given.get('function_call') else [])
    if calls:
        if role != 'assistant':
            raise InputError(f'{where} by the {role} calls a tool; only the assistant does')
        if not isinstance(calls, list) or len(calls) > 1 or content:
            raise InputError(
                f'{where} makes {len(calls)} calls{" beside a text" if content else ""}; Llama 3 makes one at a time, '
                'alone in its message'
            )
        content = _call(calls[0], where)
    weight = given.get('weight', given.get('train', role == 'assistant'))
    if weight not in (0, 1):
        raise InputError(f'{where}: weight is {show_json(weight)}; it is 0 or 1')
    return Message(role, _text(content, where)), bool(weight) and role == 'assistant'


def _text(content: Any, where: str) -> str:
    """A text, or the text of parts that are texts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    if parts and all(isinstance(part, Mapping) and isinstance(part.get('text'), str) for part in parts):
        return ''.join(part['text'] for part in parts)
    raise InputError(f'{where}: content is {show_json(content)}; it must be a text')


def _call(call: Any, where: str) -> str:
    called = call.get('function', call) if isinstance(call, Mapping) else {}
    name, arguments = (
        called.get(key) if isinstance(called, Mapping) else None for key in ('name', 'arguments')
    )
    if isinstance(arguments, str):
        arguments = parse_object(arguments, f'{where}: arguments')
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise InputError(f'{where} calls {show_json(call)}; a call has a name and arguments, a JSON object')
    return spell_call(name, arguments)


def _of_instruction(item: Mapping[str, Any]) -> Counted:
    if not isinstance(output := item['output'], str):
        raise InputError(f'output is {show_json(output)}; it must be a text')
    messages = (*_instruction(item), Message('assistant', output))
    return messages, tuple(message.role == 'assistant' for message in messages)


def _instruction(item: Mapping[str, Any]) -> tuple[Message, ...]:
    """Alpaca's question with the text that it is about, behind the questions and answers before it."""
    for key in ('instruction', 'input'):
        if not isinstance(text := item.get(key, ''), str):
            raise InputError(f'{key} is {show_json(text)}; it must be a text')
    messages: list[Message] = []
    for turn in item.get('history') or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise InputError(f'history holds {show_json(turn)}; it is a list of [question, answer]')
        messages += [Message('user', turn[0]), Message('assistant', turn[1])]
    return (*messages, Message('user', item['instruction'], input=item.get('input', '')))


def _with_system(found: Counted, item: Mapping[str, Any]) -> Counted:
    """With the system message and the tools that stand beside the messages."""
    messages, counts = found
    system = item.get('system')
    if system:
        if not isinstance(system, str):
            raise InputError(f'system is {show_json(system)}; it must be a text')
        if messages[0].role == 'system':
            raise InputError('it has a key system and a system message; give one of them')
        messages, counts = (Message('system', system), *messages), (False, *counts)
    if tools := item.get('tools'):
        if isinstance(tools, str):
            tools = parse_object(f'{{"tools": {tools}}}', 'tools')['tools']
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise InputError(f'tools is {show_json(tools)}; it must be a list of objects')
        messages = describe_tools(messages, tools)
    return messages, counts


def with_end(messages: tuple[Message, ...], item: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """The messages, the last of which is cut where the record says that nothing stopped it."""
    stopped = item.get(key, True)
    if not isinstance(stopped, bool):
        raise InputError(f'{key} is {show_json(stopped)}; it is true or false')
    return (*messages[:-1], dataclasses.replace(messages[-1], is_cut=not stopped))


def with_beside(messages: tuple[Message, ...], item: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages with the system message and the tools that stand beside them."""
    return _with_system((messages, (False,) * len(messages)), item)[0]


def first_difference(
    prompt: tuple[Message, ...], other: tuple[Message, ...], name: str, other_name: str
) -> str:
    """Where two prompts that must be the same part."""
    for number, (message, theirs) in enumerate(itertools.zip_longest(prompt, other[:-1])):
        if theirs == message:
            continue
        if not theirs or not message or theirs.role != message.role:
            roles = [f'by the {given.role}' if given else 'missing' for given in (message, theirs)]
            return f'the prompts differ at message {number}: {roles[0]} in {name}, {roles[1]} in {other_name}'
        place = len(os.path.commonprefix([message.content, theirs.content]))
        ours, other_text = (show_json(given.content[place : place + 40]) for given in (message, theirs))
        where = f'message {number}, letter {place}'
        return f'the prompts differ at {where}: {ours} in {name}, {other_text} in {other_name}'
    raise AssertionError('they do not differ')
