"""/v1/responses, of which nothing is kept: texts and calls of functions, told in the words of the newer clients."""

import contextlib
import itertools
import re
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llama_jax.serve import chats
from llama_jax.serve.answering import Chunks
from llama_jax.serve.bodies import ChatBody, FreeJson, Function, NamedFunction, OfFunction, Part, TextPart
from llama_jax.serve.refusal import Refusal, bad, of_validation
from llama_jax.serve.service import Service

# What chats call what is asked for here.
_NAMES = {
    'messages': 'input', 'max_completion_tokens': 'max_output_tokens', 'response_format': 'text.format',
}  # fmt: skip


class Item(Part):
    """Of a conversation: a message, a call, or what came of one."""

    type: Literal['message', 'function_call', 'function_call_output'] = 'message'
    role: Literal['system', 'developer', 'user', 'assistant'] | None = None
    content: str | list[TextPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[TextPart] | None = None


class FlatFunction(Function, OfFunction):
    """That the model may call."""


class FlatChoice(NamedFunction, OfFunction):
    """This function."""


class Format(Part):
    """Of a text."""

    type: Literal['text', 'json_object', 'json_schema'] = 'text'
    name: str | None = None
    schema_: Annotated[FreeJson | None, Field(alias='schema')] = None
    strict: bool | None = None


class Text(Part):
    """What an answer's text is to be."""

    format: Format | None = None


class ResponseBody(Part):
    """Of /v1/responses."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: FreeJson | None = None
    text: Text | None = None
    tools: list[FlatFunction] | None = None
    tool_choice: Literal['none', 'auto', 'required'] | FlatChoice | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


def _renamed(refusal: Refusal) -> Refusal:
    param = refusal.param
    for name, here in _NAMES.items():
        param = re.sub(rf'^{name}\b', here, param) if param else param
    return Refusal(refusal.status, str(refusal), param, refusal.code)


def _chat_body(body: ResponseBody) -> ChatBody:
    """The same, as a chat is asked for."""
    items = [Item(role='user', content=body.input)] if isinstance(body.input, str) else body.input
    system = [{'role': 'system', 'content': body.instructions}] if body.instructions else []
    form, choice = body.text and body.text.format, body.tool_choice
    if form and form.type == 'json_schema' and form.schema_ is None:
        raise bad('text.format is a json_schema without a schema', 'text.format.schema')
    schema = form and form.schema_ is not None and {'name': form.name, 'schema': form.schema_}
    asked = {
        'model': body.model, 'stream': True, 'stream_options': {'include_usage': True}, 'top_p': body.top_p,
        'temperature': body.temperature, 'max_completion_tokens': body.max_output_tokens,
        'messages': [*system, *(_message(item, f'input[{number}]') for number, item in enumerate(items))],
        'tools': body.tools and [
            {'type': 'function', 'function': tool.model_dump(exclude_none=True, exclude={'type'})}
            for tool in body.tools
        ],
        'tool_choice': (
            {'type': 'function', 'function': {'name': choice.name}} if isinstance(choice, FlatChoice) else choice
        ),
        'response_format': form and {'type': form.type, 'json_schema': schema or None},
    }  # fmt: skip
    return ChatBody.model_validate(asked)


# What an item of each type needs.
_FIELDS = {
    'message': ('content',),
    'function_call': ('name', 'arguments'),
    'function_call_output': ('output',),
}


def _message(item: Item, place: str) -> dict[str, Any]:
    """An item as a message of a chat."""
    for field in _FIELDS[item.type]:
        if getattr(item, field) is None:
            raise bad(f'{place} has no {field}', f'{place}.{field}')
    if item.type == 'function_call':
        function = {'name': item.name, 'arguments': item.arguments}
        call = {'id': item.call_id, 'type': 'function', 'function': function}
        return {'role': 'assistant', 'content': None, 'tool_calls': [call]}
    if item.type == 'function_call_output':
        return {'role': 'tool', 'content': item.output, 'tool_call_id': item.call_id}
    return {'role': item.role or 'user', 'content': item.content}


async def answer(service: Service, body: ResponseBody, key: str) -> Chunks:
    """The events of a chat's answer, as one response that grows.

    Raises:
      Refusal: the request is wrong.
    """
    try:
        chunks = await chats.answer(service, _chat_body(body), key)
    except ValidationError as error:
        raise _renamed(of_validation(error)) from None
    except Refusal as refusal:
        raise _renamed(refusal) from None
    return _events(_Response(body, service.limits.name), chunks)


async def last(events: Chunks) -> dict[str, Any]:
    """The whole response, with which its events end."""
    *_, event = [event async for event in events]
    return event['response']


class _Response:
    """As it is told at any time."""

    def __init__(self, body: ResponseBody, model: str):
        self._id, choice = secrets.token_hex(12), body.tool_choice
        self._head: dict[str, Any] = {
            'id': f'resp_{self._id}', 'object': 'response', 'created_at': int(time.time()), 'model': model,
            'error': None, 'instructions': body.instructions, 'metadata': {}, 'parallel_tool_calls': False,
            'temperature': 1.0 if body.temperature is None else body.temperature,
            'top_p': 1.0 if body.top_p is None else body.top_p, 'max_output_tokens': body.max_output_tokens,
            'tools': [{'parameters': None, 'strict': None, **tool.model_dump()} for tool in body.tools or []],
            'tool_choice': choice.model_dump() if isinstance(choice, FlatChoice) else choice or 'auto',
            'store': False, 'previous_response_id': None, 'truncation': 'disabled',
        }  # fmt: skip

    def whole(self, status: str, output: list[Any], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        """With all that is there."""
        is_cut = status == 'incomplete'
        return {
            **self._head, 'status': status, 'output': output,
            'incomplete_details': {'reason': 'max_output_tokens'} if is_cut else None,
            'usage': usage and {
                'input_tokens': usage['prompt_tokens'],
                'input_tokens_details': {**usage['prompt_tokens_details'], 'cache_write_tokens': 0},
                'output_tokens': usage['completion_tokens'],
                'output_tokens_details': {'reasoning_tokens': 0},
                'total_tokens': usage['total_tokens'],
            },
        }  # fmt: skip

    def text(self, text: str | None, status: str) -> dict[str, Any]:
        """The message that it holds; None: that is begun."""
        content = [] if text is None else [_part(text)]
        return {
            'type': 'message', 'id': f'msg_{self._id}', 'role': 'assistant', 'status': status, 'content': content,
        }  # fmt: skip

    def call(self, call: dict[str, Any], status: str) -> dict[str, Any]:
        """The call that it holds, which chats tell so."""
        return {
            'type': 'function_call', 'id': f'fc_{self._id}', 'call_id': call['id'], 'status': status,
            **call['function'],
        }  # fmt: skip


def _part(text: str) -> dict[str, Any]:
    return {'type': 'output_text', 'text': text, 'annotations': [], 'logprobs': []}


async def _events(response: _Response, chunks: Chunks) -> Chunks:
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {'type': f'response.{kind}', 'sequence_number': next(numbers), **fields}

    text, call, finish, usage = '', None, None, None
    place = {'item_id': response.text(None, '')['id'], 'output_index': 0, 'content_index': 0}

    def begin_text() -> tuple[dict[str, Any], ...]:
        item = response.text(None, 'in_progress')
        return (
            event('output_item.added', output_index=0, item=item),
            event('content_part.added', **place, part=_part('')),
        )

    async with contextlib.aclosing(chunks):
        chunk = await anext(chunks)  # what is refused is so before anything is told
        for kind in ('created', 'in_progress'):
            yield event(kind, response=response.whole('in_progress', []))
        while chunk is not None:
            usage = chunk['usage']
            for choice in chunk['choices']:
                finish, delta = choice['finish_reason'], choice['delta']
                (call,) = delta.get('tool_calls', (call,))
                if piece := delta.get('content'):
                    for one in () if text else begin_text():
                        yield one
                    text += piece
                    yield event('output_text.delta', **place, delta=piece, logprobs=[])
            chunk = await anext(chunks, None)
    status = 'incomplete' if finish == 'length' else 'completed'
    item = response.call(call, status) if call else response.text(text, status)
    if call:
        place, arguments = {'item_id': item['id'], 'output_index': 0}, item['arguments']
        begun = item | {'arguments': '', 'status': 'in_progress'}
        yield event('output_item.added', output_index=0, item=begun)
        yield event('function_call_arguments.delta', **place, delta=arguments)
        yield event('function_call_arguments.done', **place, name=item['name'], arguments=arguments)
    else:
        for one in () if text else begin_text():  # an answer of no text is one too
            yield one
        yield event('output_text.done', **place, text=text, logprobs=[])
        yield event('content_part.done', **place, part=_part(text))
    yield event('output_item.done', output_index=0, item=item)
    yield event(status, response=response.whole(status, [item], usage))
