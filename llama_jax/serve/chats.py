"""/v1/chat/completions: conversations, by the family's own format or the checkpoint's template, and calls of tools."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from llama_jax.inference.scoring import TokenScore
from llama_jax.serve import log_probabilities
from llama_jax.serve.bodies import ChatBody
from llama_jax.serve.constraints import rule_of
from llama_jax.serve.refusal import bad
from llama_jax.serve.service import Service
from llama_jax.serve.tools import Words, call_deltas, dialog, offered, plain
from llama_jax.serve.worker import Asked


class Chat:
    """An answer to one conversation, in as many choices as are asked for."""

    def __init__(self, service: Service, body: ChatBody, asked: Asked, names: list[str]):
        """See `of`."""
        self._service, self._body, self._asked, self._names = service, body, asked, names
        self._stop_ids = tuple(asked.request.stop_ids)

    @classmethod
    async def of(cls, service: Service, body: ChatBody, key: str) -> 'Chat':
        """Raises Refusal where the request is wrong."""
        service.check_n(body)
        conversation, names = service.chat(), offered(body)
        if body.top_logprobs and not body.logprobs:
            raise bad('top_logprobs is given without logprobs=true', 'top_logprobs')
        if (number := body.top_logprobs or 0) > (most := service.served().top_logprobs):
            raise bad(f'top_logprobs is {number}; this server tells up to {most}', 'top_logprobs')
        if body.messages[-1].role not in ('user', 'tool'):
            raise bad(
                f'the last message is by {body.messages[-1].role}; it must be by user or tool', 'messages'
            )
        if names and not conversation.knows_tools:
            raise bad(
                'this model was taught no tools; Llama 3.1 and later were', 'tools', 'unsupported_parameter'
            )
        if conversation.is_by_template:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or []] if names else None
            said = plain(body)
            ids = await service.in_thread(lambda: conversation.encode_prompt(said, tools), 'messages')
        else:
            messages = dialog(body, bool(names))
            ids = await service.in_thread(lambda: conversation.encode_prompt(messages), 'messages')
        most, named = body.max_completion_tokens, 'max_completion_tokens'
        if most is None:
            most, named = body.max_tokens, 'max_tokens'
        rule = await rule_of(service, body)
        return cls(
            service, body, service.asked(body, ids, (most, named), conversation.stop_ids, key, rule), names
        )

    def _logprobs(self, scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """Of the tokens of a message; the one that ended it is none of them."""
        if not self._body.logprobs:
            return None
        if scores and scores[-1].token in self._stop_ids:
            scores = scores[:-1]
        return log_probabilities.of_chat(scores, self._body.top_logprobs or 0, self._service.served().texts)

    async def whole(self) -> dict[str, Any]:
        """All choices."""
        with contextlib.closing(self._service.submit([self._asked], is_streamed=False)) as ticket:
            rows = await ticket.whole()
        choices = []
        for row in rows:
            words = Words(self._names)
            shown = words.push(row.text)
            rest, call = words.end()
            message = {'role': 'assistant', 'content': None if call else shown + rest, 'refusal': None}
            if call:
                message['tool_calls'] = [call]
            choices.append(
                {
                    'index': row.row,
                    'message': message,
                    'logprobs': self._logprobs(row.scores),
                    'finish_reason': 'tool_calls' if call else row.finish,
                }
            )
        head = self._service.head('chatcmpl', 'chat.completion')
        return {**head, 'choices': choices, 'usage': ticket.usage.to_json()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The choices as they are made."""
        head = self._service.head('chatcmpl', 'chat.completion.chunk')
        empty = {'usage': None} if self._body.tells_usage else {}
        words = {row: Words(self._names) for row in range(self._asked.num_rows)}

        def chunk(row: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None):
            choice = {'index': row, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish}
            return {**head, 'choices': [choice], **empty}

        begun = set()
        with contextlib.closing(self._service.submit([self._asked], is_streamed=True)) as ticket:
            async for piece in ticket.pieces():
                row = piece.row
                if row not in begun:
                    begun.add(row)
                    yield chunk(row, {'role': 'assistant', 'content': '', 'refusal': None})
                text, call = words[row].push(piece.text), None
                if piece.finish:
                    rest, call = words[row].end()
                    text += rest
                logprobs = self._logprobs(piece.scores) if piece.scores else None
                if text or (logprobs and logprobs['content']):
                    yield chunk(row, {'content': text}, logprobs)
                for delta in call_deltas(call) if call else ():
                    yield chunk(row, {'tool_calls': [delta]})
                if piece.finish:
                    yield chunk(row, {}, None, 'tool_calls' if call else piece.finish)
        if self._body.tells_usage:
            yield {**head, 'choices': [], 'usage': ticket.usage.to_json()}
