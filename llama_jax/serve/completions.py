"""/v1/completions: texts or ids to go on from, gaps to fill, and what the model makes of a prompt's own tokens."""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from llama_jax.inference.scoring import TokenScore
from llama_jax.serve.answering import Chunks
from llama_jax.serve.bodies import CompletionBody
from llama_jax.serve.constraints import rule_of
from llama_jax.serve.log_probabilities import OfCompletion
from llama_jax.serve.refusal import bad
from llama_jax.serve.service import Service
from llama_jax.serve.ticket import Ticket
from llama_jax.serve.worker import Asked
from llama_jax.tokenizer.infill_format import InfillFormat
from llama_jax.tokenizer.protocol import printable, prompt_ids


async def answer(service: Service, body: CompletionBody, key: str) -> Chunks:
    """What comes after the prompts of a request, and what is told of them.

    Raises:
      Refusal: the request is wrong.
    """
    service.check(body, 'logprobs', body.logprobs)
    served = service.served()
    prompts, stop_ids = await _prompts(service, body)
    if body.max_tokens == 0 and not body.echo:
        raise bad('max_tokens is 0; that is for a prompt that is echoed', 'max_tokens')
    for prompt in prompts:
        if not prompt:
            raise bad('prompt holds one without a token; begin it with the BOS token', 'prompt')
        if max(prompt) >= served.vocab_size:
            raise bad(f'prompt holds token {max(prompt)}; the model has {served.vocab_size}', 'prompt')
    rule = await rule_of(service, body)
    limit = body.max_tokens, 'max_tokens'
    return _chunks(
        service, body, [service.asked(body, prompt, limit, stop_ids, key, rule) for prompt in prompts]
    )


async def _prompts(service: Service, body: CompletionBody) -> tuple[list[list[int]], Sequence[int]]:
    """The ids of each, and those that end what comes after."""
    tokenizer, given = service.served().tokenizer, list(body.prompts)
    if not given:
        raise bad('prompt holds none; give a text or its ids', 'prompt')
    if (suffix := body.suffix) is None:
        ids = await service.in_thread(
            lambda: [prompt_ids(tokenizer, one) if isinstance(one, str) else list(one) for one in given],
            'prompt',
        )
        return ids, tokenizer.stop_ids
    texts = [one for one in given if isinstance(one, str)]
    if body.echo or len(texts) < len(given):
        raise bad('suffix is given, and a prompt that is no text, or echo; a gap is between texts', 'suffix')
    gap = await service.in_thread(lambda: InfillFormat(tokenizer), 'suffix')
    ids = await service.in_thread(lambda: [gap.encode_prompt(text, suffix) for text in texts], 'prompt')
    return ids, (*tokenizer.stop_ids, *gap.stop_ids)


async def _chunks(service: Service, body: CompletionBody, asked: Sequence[Asked]) -> Chunks:
    """Each row begins with its prompt, where that is echoed."""
    served, n, is_streamed = service.served(), body.n or 1, bool(body.stream)
    prompts = [one.request.tokens for one in asked]
    head, empty = service.head('cmpl', 'text_completion'), {'usage': None} if body.tells_usage else {}
    told = [
        OfCompletion(served.tokenizer, served.texts, body.logprobs, () if body.echo else prompts[row // n])
        if body.logprobs is not None
        else None
        for row in range(n * len(prompts))
    ]

    def chunk(row: int, text: str, scores: Sequence[TokenScore], finish: str | None) -> dict[str, Any]:
        of_row = told[row]
        logprobs = None if of_row is None else of_row.of(scores)
        choice = {'index': row, 'text': text, 'logprobs': logprobs, 'finish_reason': finish}
        return {**head, 'choices': [choice], **empty}

    scores: list[list[TokenScore]] = [[] for _ in prompts]
    if body.echo and body.logprobs is not None:
        scores = [await asyncio.wrap_future(service.worker.score(prompt)) for prompt in prompts]
    if body.max_tokens == 0:
        ticket = Ticket(0, lambda: None, is_streamed, sum(map(len, prompts)))
    else:
        ticket = service.submit(asked, is_streamed)
    with contextlib.closing(ticket):
        for row in range(n * len(prompts)) if body.echo else ():
            ids, given = printable(served.tokenizer, prompts[row // n]), body.prompts[row // n]
            text = served.tokenizer.decode(ids[1:] if ids[:1] == [served.tokenizer.bos_id] else ids)
            finish = 'length' if body.max_tokens == 0 else None
            yield chunk(row, given if isinstance(given, str) else text, scores[row // n], finish)
        async for piece in ticket.pieces():
            if piece.text or piece.finish or (piece.scores and body.logprobs is not None):
                yield chunk(piece.row, piece.text, piece.scores, piece.finish)
    if body.tells_usage or not is_streamed:
        yield {**head, 'choices': [], 'usage': ticket.usage()}
