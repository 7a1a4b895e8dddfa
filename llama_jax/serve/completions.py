"""/v1/completions: texts or ids to go on from, gaps to fill, and what the model makes of a prompt's own tokens."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from llama_jax.inference.scoring import TokenScore
from llama_jax.serve.bodies import CompletionBody
from llama_jax.serve.constraints import rule_of
from llama_jax.serve.log_probabilities import OfCompletion
from llama_jax.serve.refusal import bad
from llama_jax.serve.service import Service
from llama_jax.serve.ticket import Piece, Ticket
from llama_jax.serve.worker import Asked
from llama_jax.tokenizer.infill_format import InfillFormat
from llama_jax.tokenizer.protocol import printable, prompt_ids


class Completion:
    """What comes after the prompts of one request, and what is told of them."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[list[int]], asked: list[Asked]):
        self._service, self._body, self._prompts, self._asked = service, body, prompts, asked
        self._n, self._head = body.n or 1, service.head('cmpl', 'text_completion')

    @classmethod
    async def of(cls, service: Service, body: CompletionBody, key: str) -> 'Completion':
        """Raises Refusal where the request is wrong."""
        service.check_n(body)
        tokenizer, given = service.served().tokenizer, list(body.prompts)
        if not given:
            raise bad('prompt holds none; give a text or its ids', 'prompt')
        if (number := body.logprobs or 0) > (most := service.served().top_logprobs):
            raise bad(f'logprobs is {number}; this server tells up to {most}', 'logprobs')
        stop_ids = tokenizer.stop_ids
        if body.suffix is None:
            prompts = await service.in_thread(
                lambda: [prompt_ids(tokenizer, one) if isinstance(one, str) else list(one) for one in given],
                'prompt',
            )
        else:
            if body.echo or not all(isinstance(one, str) for one in given):
                raise bad(
                    'suffix is given, and a prompt that is no text, or echo; a gap is between texts', 'suffix'
                )
            gap = await service.in_thread(lambda: InfillFormat(tokenizer), 'suffix')
            suffix, stop_ids = body.suffix, (*stop_ids, *gap.stop_ids)
            prompts = await service.in_thread(
                lambda: [gap.encode_prompt(one, suffix) for one in given if isinstance(one, str)], 'prompt'
            )
        if body.max_tokens == 0 and not body.echo:
            raise bad('max_tokens is 0; that is for a prompt that is echoed', 'max_tokens')
        for prompt in prompts:
            if not prompt:
                raise bad('prompt holds one without a token; begin it with the BOS token', 'prompt')
            if max(prompt) >= (rows := service.served().vocab_size):
                raise bad(f'prompt holds token {max(prompt)}; the model has {rows}', 'prompt')
        rule = await rule_of(service, body)
        asked = [
            service.asked(body, prompt, (body.max_tokens, 'max_tokens'), stop_ids, key, rule)
            for prompt in prompts
        ]
        return cls(service, body, prompts, asked)

    async def _begin(self, is_streamed: bool) -> tuple[Ticket, list[list[TokenScore]]]:
        """What is being made, and what the model makes of the prompts' tokens, where that is asked for."""
        scores: list[list[TokenScore]] = [[] for _ in self._prompts]
        if self._body.echo and self._body.logprobs is not None:
            for place, prompt in enumerate(self._prompts):
                scores[place] = await asyncio.wrap_future(self._service.worker.score(prompt))
        if self._body.max_tokens == 0:
            return Ticket(0, lambda: None, is_streamed, sum(map(len, self._prompts))), scores
        return self._service.submit(self._asked, is_streamed), scores

    def _told(self, place: int) -> tuple[str, OfCompletion | None]:
        """What a prompt's completions begin with, and their log-probabilities."""
        served, prompt, given = self._service.served(), self._prompts[place], self._body.prompts[place]
        echoed = ''
        if self._body.echo:
            shown = printable(served.tokenizer, prompt)
            text = served.tokenizer.decode(shown[1:] if shown[:1] == [served.tokenizer.bos_id] else shown)
            echoed = given if isinstance(given, str) else text
        if self._body.logprobs is None:
            return echoed, None
        before = () if self._body.echo else prompt
        return echoed, OfCompletion(
            served.tokenizer, self._service.served().texts, self._body.logprobs, before
        )

    def _choice(self, row: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {'index': row, 'text': text, 'logprobs': logprobs, 'finish_reason': finish}

    async def whole(self) -> dict[str, Any]:
        """All completions."""
        ticket, prompt_scores = await self._begin(is_streamed=False)
        with contextlib.closing(ticket):
            rows = await ticket.whole()
        if self._body.max_tokens == 0:
            rows = [Piece(row, '', 0, (), 'length') for row in range(len(self._prompts) * self._n)]
        choices = []
        for row in rows:
            place = row.row // self._n
            echoed, told = self._told(place)
            logprobs = told.of([*prompt_scores[place], *row.scores]) if told else None
            choices.append(self._choice(row.row, echoed + row.text, logprobs, row.finish))
        return {**self._head, 'choices': choices, 'usage': ticket.usage.to_json()}

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The completions as they are made."""
        empty = {'usage': None} if self._body.tells_usage else {}
        told: dict[int, OfCompletion | None] = {}
        ticket, prompt_scores = await self._begin(is_streamed=True)
        with contextlib.closing(ticket):
            for row in range(len(self._prompts) * self._n):
                echoed, of_row = self._told(row // self._n)
                told[row] = of_row
                if self._body.echo:
                    logprobs = of_row.of(prompt_scores[row // self._n]) if of_row else None
                    finish = 'length' if self._body.max_tokens == 0 else None
                    yield {**self._head, 'choices': [self._choice(row, echoed, logprobs, finish)], **empty}
            async for piece in ticket.pieces():
                of_row = told[piece.row]
                logprobs = of_row.of(piece.scores) if of_row else None
                if piece.text or piece.finish or logprobs:
                    choice = self._choice(piece.row, piece.text, logprobs, piece.finish)
                    yield {**self._head, 'choices': [choice], **empty}
        if self._body.tells_usage:
            yield {**self._head, 'choices': [], 'usage': ticket.usage.to_json()}
