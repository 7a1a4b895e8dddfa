"""Functions that a client offers: how the model hears of them, and which of its words are a call of one."""

import json
import secrets
from collections.abc import Collection
from typing import Any

from llama_jax.errors import InputError
from llama_jax.serve.bodies import ChatBody, ChatMessage, NamedTool
from llama_jax.serve.refusal import bad
from llama_jax.tokenizer.dialog import Message
from llama_jax.tokenizer.tool_calls import describe_tools, spell_call

# What Llama 3.1 may begin a call with.
_TAG = '<|python_tag|>'


def offered(body: ChatBody) -> list[str]:
    """Names of the functions that the answer may call.

    Raises:
      Refusal: one that must be called is not among them, or two have one name.
    """
    choice, names = body.tool_choice, [tool.function.name for tool in body.tools or []]
    if len(set(names)) < len(names):
        raise bad(f'tools name {", ".join(names)}; each name may be there once', 'tools')
    if choice is not None and choice != 'none' and not names:
        raise bad('tool_choice is given, and no tools', 'tool_choice')
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad(
            f'tool_choice names {choice.function.name!r}; the tools are {", ".join(names)}', 'tool_choice'
        )
    return [] if choice == 'none' else names


def dialog(body: ChatBody, with_tools: bool) -> list[Message]:
    """The conversation as the family's format takes it, with the functions where the model is to hear of them.

    Raises:
      Refusal: it has what the format does not.
    """
    messages = [_message(given, f'messages[{number}]') for number, given in enumerate(body.messages)]
    if with_tools:
        described = [tool.model_dump(exclude_none=True, exclude={'strict'}) for tool in body.tools or []]
        try:
            return list(describe_tools(messages, described))
        except InputError as error:
            raise bad(str(error), 'tools') from None
    return messages


def _message(given: ChatMessage, place: str) -> Message:
    role = 'system' if given.role == 'developer' else given.role
    if not given.tool_calls:
        if given.content is None:
            raise bad(f'{place} has no content', f'{place}.content')
        return Message(role, given.text)
    if len(given.tool_calls) > 1 or given.role != 'assistant':
        raise bad(f'{place} may be the assistant with one call; a call ends its turn', f'{place}.tool_calls')
    called = given.tool_calls[0].function
    try:
        arguments = json.loads(called.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        message = f'{place} has arguments that are no JSON object: {called.arguments[:60]!r}'
        raise bad(message, f'{place}.tool_calls[0].function.arguments')
    return Message(role, spell_call(called.name, arguments))


def plain(body: ChatBody) -> list[dict[str, Any]]:
    """The conversation as a checkpoint's own template takes it."""
    found = []
    for given in body.messages:
        role = 'system' if given.role == 'developer' else given.role
        message: dict[str, Any] = {'role': role, 'content': given.text}
        if given.tool_calls:
            message['tool_calls'] = [call.model_dump(exclude_none=True) for call in given.tool_calls]
        if given.tool_call_id is not None:
            message['tool_call_id'] = given.tool_call_id
        found.append(message)
    return found


class Words:
    """One answer, of which what may be a call is held back until it is one or is not."""

    def __init__(self, names: Collection[str]):
        """Args: names: of the functions that may be called; () where none may."""
        self._names, self._held, self._may_call = names, '', bool(names)

    def push(self, text: str) -> str:
        """What may be shown of the answer, with some more of it."""
        if not self._may_call:
            return text
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun.startswith(('{', _TAG)) or _TAG.startswith(begun):
            return ''
        self._may_call = False
        return self._held

    def end(self) -> tuple[str, dict[str, Any] | None]:
        """The rest, or the call that the answer is."""
        if not self._may_call:
            return '', None
        call = parse_call(self._held, self._names)
        return ('', call) if call else (self._held, None)


def parse_call(text: str, names: Collection[str]) -> dict[str, Any] | None:
    """The call of one of these functions that a text is, as chats have it, if it is one."""
    text = text.strip().removeprefix(_TAG)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get('name') not in names:
        return None
    arguments = value.get('parameters', value.get('arguments', {}))
    if not isinstance(arguments, dict):
        return None
    function = {'name': value['name'], 'arguments': json.dumps(arguments, ensure_ascii=False)}
    return {'id': f'call_{secrets.token_hex(12)}', 'type': 'function', 'function': function}
