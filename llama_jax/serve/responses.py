"""/v1/responses, of which nothing is kept: texts and calls of functions, told in the words of the newer clients."""

import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llama_jax.serve.bodies import ChatBody, FreeJson, Function, NamedFunction, OfFunction, Part, TextPart
from llama_jax.serve.chats import Chat
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
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({'role': 'system', 'content': body.instructions})
    items = [Item(role='user', content=body.input)] if isinstance(body.input, str) else body.input
    messages += [_message(item, f'input[{number}]') for number, item in enumerate(items)]
    asked: dict[str, Any] = {
        'model': body.model,
        'messages': messages,
        'stream': True,
        'stream_options': {'include_usage': True},
        'max_completion_tokens': body.max_output_tokens,
        'temperature': body.temperature,
        'top_p': body.top_p,
    }
    if body.tools:
        of_function = {'type'}
        asked['tools'] = [
            {'type': 'function', 'function': tool.model_dump(exclude_none=True, exclude=of_function)}
            for tool in body.tools
        ]
    choice = body.tool_choice
    is_named = isinstance(choice, FlatChoice)
    asked['tool_choice'] = {'type': 'function', 'function': {'name': choice.name}} if is_named else choice
    form = body.text.format if body.text else None
    if form is not None and form.type == 'json_schema':
        if form.schema_ is None:
            raise bad('text.format is a json_schema without a schema', 'text.format.schema')
        asked['response_format'] = {
            'type': form.type,
            'json_schema': {'name': form.name, 'schema': form.schema_},
        }
    elif form is not None:
        asked['response_format'] = {'type': form.type}
    return ChatBody.model_validate(asked)


def _message(item: Item, place: str) -> dict[str, Any]:
    """An item as a message of a chat."""

    def text_of(content: str | list[TextPart] | None, field: str) -> str:
        if content is None:
            raise bad(f'{place} has no {field}', f'{place}.{field}')
        return content if isinstance(content, str) else ''.join(part.text for part in content)

    if item.type == 'function_call':
        function = {'name': text_of(item.name, 'name'), 'arguments': text_of(item.arguments, 'arguments')}
        call = {'id': item.call_id, 'type': 'function', 'function': function}
        return {'role': 'assistant', 'content': None, 'tool_calls': [call]}
    if item.type == 'function_call_output':
        return {'role': 'tool', 'content': text_of(item.output, 'output'), 'tool_call_id': item.call_id}
    return {'role': item.role or 'user', 'content': text_of(item.content, 'content')}


class InEvents:
    """The answer of a chat, as one response that grows."""

    def __init__(self, body: ResponseBody, model: str, chat: Chat):
        """See `of`."""
        self._chat, self._id = chat, f'resp_{secrets.token_hex(12)}'
        choice = body.tool_choice
        self._head: dict[str, Any] = {
            'id': self._id, 'object': 'response', 'created_at': int(time.time()), 'model': model, 'error': None,
            'instructions': body.instructions, 'metadata': {}, 'parallel_tool_calls': False,
            'temperature': 1.0 if body.temperature is None else body.temperature,
            'top_p': 1.0 if body.top_p is None else body.top_p, 'max_output_tokens': body.max_output_tokens,
            'tools': [{'parameters': None, 'strict': None, **tool.model_dump()} for tool in body.tools or []],
            'tool_choice': choice.model_dump() if isinstance(choice, FlatChoice) else choice or 'auto',
            'store': False, 'previous_response_id': None, 'truncation': 'disabled',
        }  # fmt: skip

    @classmethod
    async def of(cls, service: Service, body: ResponseBody, key: str) -> 'InEvents':
        """Raises Refusal where the request is wrong."""
        try:
            return cls(body, service.limits.name, await Chat.of(service, _chat_body(body), key))
        except ValidationError as error:
            raise _renamed(of_validation(error)) from None
        except Refusal as refusal:
            raise _renamed(refusal) from None

    def _whole(self, output: list[Any], finish: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        """The response: in progress where nothing has ended it."""
        is_cut = finish == 'length'
        status = 'in_progress' if finish is None else 'incomplete' if is_cut else 'completed'
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

    def _text(self, text: str, status: str) -> dict[str, Any]:
        content = [self._part(text)] if status != 'in_progress' else []
        return {
            'type': 'message',
            'id': f'msg_{self._id[5:]}',
            'role': 'assistant',
            'status': status,
            'content': content,
        }

    def _part(self, text: str) -> dict[str, Any]:
        return {'type': 'output_text', 'text': text, 'annotations': [], 'logprobs': []}

    def _call(self, call: dict[str, Any], status: str) -> dict[str, Any]:
        function = call['function']
        return {
            'type': 'function_call', 'id': f'fc_{self._id[5:]}', 'call_id': call['id'], 'status': status,
            'name': function['name'], 'arguments': function['arguments'],
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """All of it, with which its events end."""
        *_, last = [event async for event in self.chunks()]
        return last['response']

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Its events."""
        number = 0

        def event(kind: str, **fields: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {'type': f'response.{kind}', 'sequence_number': number - 1, **fields}

        text, call, finish, usage = '', None, None, None
        of_text = {'item_id': f'msg_{self._id[5:]}', 'output_index': 0, 'content_index': 0}
        of_call = {'item_id': f'fc_{self._id[5:]}', 'output_index': 0}
        async with contextlib.aclosing(self._chat.chunks()) as chunks:
            chunk = await anext(chunks)  # what is refused is so before anything is told
            yield event('created', response=self._whole([], None, None))
            yield event('in_progress', response=self._whole([], None, None))
            while chunk is not None:
                usage = chunk['usage']
                for choice in chunk['choices']:
                    delta, finish = choice['delta'], choice['finish_reason']
                    if piece := delta.get('content'):
                        if not text:
                            yield event(
                                'output_item.added', output_index=0, item=self._text('', 'in_progress')
                            )
                            yield event('content_part.added', **of_text, part=self._part(''))
                        text += piece
                        yield event('output_text.delta', **of_text, delta=piece, logprobs=[])
                    for new in delta.get('tool_calls', ()):
                        if call is None:
                            call = new
                            yield event(
                                'output_item.added', output_index=0, item=self._call(call, 'in_progress')
                            )
                        else:
                            piece = new['function']['arguments']
                            call['function']['arguments'] += piece
                            yield event('function_call_arguments.delta', **of_call, delta=piece)
                chunk = await anext(chunks, None)
        status = 'incomplete' if finish == 'length' else 'completed'
        if call is not None:
            item = self._call(call, status)
            done = {'name': item['name'], 'arguments': item['arguments']}
            yield event('function_call_arguments.done', **of_call, **done)
        else:
            item = self._text(text, status)
            if text:
                yield event('output_text.done', **of_text, text=text, logprobs=[])
                yield event('content_part.done', **of_text, part=self._part(text))
        if text or call is not None:
            yield event('output_item.done', output_index=0, item=item)
        yield event(status, response=self._whole([item], finish, usage))
