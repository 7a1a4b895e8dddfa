"""/v1/chat/completions: conversations, by the family's own format or the checkpoint's template, and calls of tools."""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llama_jax.inference.scoring import TokenScore
from llama_jax.serve import log_probabilities
from llama_jax.serve.answering import stream, unless_gone
from llama_jax.serve.bodies import ChatBody
from llama_jax.serve.constraints import rule_of
from llama_jax.serve.refusal import bad
from llama_jax.serve.service import Service
from llama_jax.serve.tools import Words, call_deltas, dialog, offered, plain
from llama_jax.serve.usage import Usage
from llama_jax.serve.worker import Asked


async def chat(service: Service, body: ChatBody, request: Request, key: str) -> Response:
    """Answers a request.

    Raises:
      Refusal: it is wrong, or cannot be answered.
    """
    answer = await Answer.of(service, body, key)
    if body.stream:
        return await stream(request, answer.chunks())
    return JSONResponse(await unless_gone(request, answer.whole()))


class Answer:
    """To one conversation, in as many choices as are asked for.

    Attributes:
      usage: what it took so far.
    """

    def __init__(self, service: Service, body: ChatBody, asked: Asked, names: list[str]):
        """See `of`."""
        self._service, self._body, self._asked, self._names = service, body, asked, names
        self.usage = Usage(len(asked.request.tokens))

    @classmethod
    async def of(cls, service: Service, body: ChatBody, key: str) -> 'Answer':
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

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            'id': f'chatcmpl-{secrets.token_hex(12)}', 'object': kind, 'created': int(time.time()),
            'model': self._service.limits.name,
        }  # fmt: skip

    def _logprobs(self, scores: list[TokenScore], stop_ids: tuple[int, ...]) -> dict[str, Any] | None:
        """Of the tokens of a message; the one that ended it is none of them."""
        if not self._body.logprobs:
            return None
        if scores and scores[-1].token in stop_ids:
            scores = scores[:-1]
        return log_probabilities.of_chat(scores, self._body.top_logprobs or 0, self._service.texts())

    async def whole(self) -> dict[str, Any]:
        """All choices."""
        rows = range(self._asked.num_rows)
        texts, finish = [''] * len(rows), ['stop'] * len(rows)
        scores: list[list[TokenScore]] = [[] for _ in rows]
        stop_ids = tuple(self._asked.request.stop_ids)
        with contextlib.closing(self._service.submit([self._asked], is_streamed=False)) as ticket:
            async for piece in ticket.pieces():
                texts[piece.row] += piece.text
                scores[piece.row] += piece.scores
                finish[piece.row] = piece.finish or 'stop'
                self.usage.take(piece)
        choices = []
        for row in rows:
            words = Words(self._names)
            shown = words.push(texts[row])
            rest, call = words.end()
            message = {'role': 'assistant', 'content': None if call else shown + rest, 'refusal': None}
            if call:
                message['tool_calls'] = [call.to_json()]
            choices.append(
                {
                    'index': row,
                    'message': message,
                    'logprobs': self._logprobs(scores[row], stop_ids),
                    'finish_reason': 'tool_calls' if call else finish[row],
                }
            )
        return {**self._head('chat.completion'), 'choices': choices, 'usage': self.usage.to_json()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The choices as they are made."""
        head = self._head('chat.completion.chunk')
        empty = {'usage': None} if self._body.tells_usage else {}
        stop_ids = tuple(self._asked.request.stop_ids)
        words = {row: Words(self._names) for row in range(self._asked.num_rows)}

        def chunk(row: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None):
            choice = {'index': row, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish}
            return {**head, 'choices': [choice], **empty}

        begun = set()
        with contextlib.closing(self._service.submit([self._asked], is_streamed=True)) as ticket:
            async for piece in ticket.pieces():
                self.usage.take(piece)
                row, scores = piece.row, list(piece.scores)
                if row not in begun:
                    begun.add(row)
                    yield chunk(row, {'role': 'assistant', 'content': '', 'refusal': None})
                text, call = words[row].push(piece.text), None
                if piece.finish:
                    rest, call = words[row].end()
                    text += rest
                logprobs = self._logprobs(scores, stop_ids) if scores else None
                if text or (logprobs and logprobs['content']):
                    yield chunk(row, {'content': text}, logprobs)
                for delta in call_deltas(call) if call else ():
                    yield chunk(row, {'tool_calls': [delta]})
                if piece.finish:
                    yield chunk(row, {}, None, 'tool_calls' if call else piece.finish)
        if self._body.tells_usage:
            yield {**head, 'choices': [], 'usage': self.usage.to_json()}
