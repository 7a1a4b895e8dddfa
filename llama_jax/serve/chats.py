"""/v1/chat/completions: conversations, by the family's own format or the checkpoint's template, and calls of tools."""

import contextlib
from collections.abc import Sequence
from typing import Any

from llama_jax.inference.scoring import TokenScore
from llama_jax.serve import log_probabilities
from llama_jax.serve.answering import Chunks
from llama_jax.serve.bodies import ChatBody
from llama_jax.serve.constraints import rule_of
from llama_jax.serve.refusal import bad
from llama_jax.serve.service import Service
from llama_jax.serve.tools import Words, dialog, offered, plain
from llama_jax.serve.worker import Asked


async def answer(service: Service, body: ChatBody, key: str) -> Chunks:
    """What is said to a conversation, in as many choices as are asked for.

    Raises:
      Refusal: the request is wrong.
    """
    service.check(body, 'top_logprobs', body.top_logprobs)
    conversation, names = service.chat(), offered(body)
    if body.top_logprobs and not body.logprobs:
        raise bad('top_logprobs is given without logprobs=true', 'top_logprobs')
    if (last := body.messages[-1].role) not in ('user', 'tool'):
        raise bad(f'the last message is by {last}; it must be by user or tool', 'messages')
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
    limit = body.max_completion_tokens, 'max_completion_tokens'
    if limit[0] is None:
        limit = body.max_tokens, 'max_tokens'
    rule = await rule_of(service, body)
    return _chunks(service, body, service.asked(body, ids, limit, conversation.stop_ids, key, rule), names)


async def _chunks(service: Service, body: ChatBody, asked: Asked, names: Sequence[str]) -> Chunks:
    head = service.head('chatcmpl', 'chat.completion.chunk')
    empty = {'usage': None} if body.tells_usage else {}

    def chunk(row: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None):
        choice = {'index': row, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish}
        return {**head, 'choices': [choice], **empty}

    def told(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        """Of the tokens of a message; the one that ended it is none of them."""
        if not body.logprobs:
            return None
        scores = [score for score in scores if score.token not in asked.request.stop_ids]
        return log_probabilities.of_chat(scores, body.top_logprobs or 0, service.served().texts)

    words: dict[int, Words] = {}
    with contextlib.closing(service.submit([asked], bool(body.stream))) as ticket:
        async for piece in ticket.pieces():
            row = piece.row
            if row not in words:
                words[row] = Words(names)
                yield chunk(row, {'role': 'assistant', 'content': '', 'refusal': None}, told(()))
            text, call = words[row].push(piece.text), None
            if piece.finish:
                rest, call = words[row].end()
                text += rest
            logprobs = told(piece.scores)
            if text or (logprobs and logprobs['content']):
                yield chunk(row, {'content': text}, logprobs)
            if call:
                yield chunk(row, {'tool_calls': [{'index': 0, **call}]})
            if piece.finish:
                yield chunk(row, {}, None, 'tool_calls' if call else piece.finish)
    if body.tells_usage or not body.stream:
        yield {**head, 'choices': [], 'usage': ticket.usage()}
