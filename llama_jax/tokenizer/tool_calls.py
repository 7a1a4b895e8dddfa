"""Functions that a Llama may call, and its calls, in words: as Llama 3.1 was trained on them.

Source: llama-models/models/llama3_1/prompt_format.md, "JSON based tool calling". Such a call ends the turn.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError
from llama_jax.tokenizer.chat_format import Message

_TOOLS = (
    'Given the following functions, please respond with a JSON for a function call with its proper arguments that best '
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    'name and its value}. Do not use variables.\n\n'
)


def spell_call(name: str, arguments: Mapping[str, Any]) -> str:
    """What the assistant says to have a function called."""
    return json.dumps({'name': name, 'parameters': arguments}, ensure_ascii=False)


def describe_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """The messages with the functions in front of what the user says first.

    Raises:
      InputError: the user says nothing.
    """
    first = next((i for i, message in enumerate(messages) if message.role == 'user'), None)
    if first is None:
        raise InputError('there are tools and no message by the user; one must ask for them')
    texts = ''.join(json.dumps(tool, indent=4, ensure_ascii=False) + '\n\n' for tool in tools)
    asked = dataclasses.replace(messages[first], content=_TOOLS + texts + messages[first].content)
    return (*messages[:first], asked, *messages[first + 1 :])
