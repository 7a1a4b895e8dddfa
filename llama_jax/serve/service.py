"""From what a client asks to what the model is asked, within the limits of one server."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llama_jax.errors import InputError
from llama_jax.inference.chat import Chat
from llama_jax.inference.constraint import Rule
from llama_jax.inference.request import CompletionRequest
from llama_jax.serve.bodies import Sampling
from llama_jax.serve.documents import Documents
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.refusal import Refusal, bad, of_input_error
from llama_jax.serve.served import Served
from llama_jax.serve.ticket import Ticket
from llama_jax.serve.worker import Asked, Worker

_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
      name: of the model, as clients ask for it.
      max_queue: rows that may wait for a slot.
      max_body: bytes of a request.
      keys: of clients, any of which opens; () where none is needed.
      cors_origins: of pages that may ask from browsers.
      hosts: names by which the server may be called; () where that does not matter.
      documents: in which the page finds passages for questions.
    """

    name: str
    max_queue: int = 256
    max_body: int = 1 << 20
    keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    documents: Documents | None = None


class Service:
    """One model behind its limits.

    Attributes:
      created: when the server began, in seconds since 1970.
      is_draining: nothing new is taken; what runs ends.
    """

    def __init__(self, limits: Limits):
        self.limits, self.metrics = limits, Metrics()
        self.worker = Worker(self.metrics)
        self.created = int(time.time())
        self.is_draining = False

    def served(self) -> Served:
        """What is served.

        Raises:
          Refusal: it is still being loaded, or no more.
        """
        if self.worker.failure is not None:
            raise Refusal(503, 'the model has failed; the server ends', code='failed')
        if self.is_draining:
            raise Refusal(503, 'the server ends; ask another, or later', code='draining')
        if self.worker.served is None:
            raise Refusal(503, 'the model is being loaded; ask again soon', code='loading')
        return self.worker.served

    def check_model(self, name: str | None) -> None:
        """Refuses a model that is not served."""
        if name is not None and name != self.limits.name:
            message = f'the model {name!r} is not served here; there is {self.limits.name!r}'
            raise Refusal(404, message, 'model', 'model_not_found')

    def head(self, id_begins: str, kind: str) -> dict[str, Any]:
        """What every answer begins with."""
        id, created = f'{id_begins}-{secrets.token_hex(12)}', int(time.time())
        return {'id': id, 'object': kind, 'created': created, 'model': self.limits.name}

    def chat(self) -> Chat:
        """How the model is talked to."""
        chat = self.served().chat
        if isinstance(chat, str):
            raise bad(f'this model is not talked to: {chat}', 'messages')
        return chat

    async def in_thread(self, function: Callable[[], _T], param: str) -> _T:
        """What takes a while on the host; what the library refuses is a refusal of the parameter."""
        try:
            return await asyncio.to_thread(function)
        except InputError as error:
            raise of_input_error(error, param) from None

    def asked(
        self,
        body: Sampling,
        ids: Sequence[int],
        limit: tuple[int | None, str],
        stop_ids: Sequence[int],
        key: str,
        rule: Rule | None = None,
    ) -> Asked:
        """What the model is asked for one prompt.

        Args:
          body: of the request.
          ids: of the prompt.
          limit: tokens of an answer, None being the rest of the context; and the parameter that says so.
          stop_ids: that end an answer.
          key: whose the request is.
          rule: that the answer keeps to.

        Raises:
          Refusal: it does not fit.
        """
        served = self.served()
        most, most_named = limit
        room = served.context - len(ids)
        if room < max(1 if most is None else most, 0):
            wanted = '' if most is None else f' and {most_named}={most}'
            message = (
                f'the context has {served.context} tokens; the prompt has {len(ids)}{wanted}, '
                f'{len(ids) + (1 if most is None else most)} together: shorten the one or the other'
            )
            raise bad(
                message, 'messages' if hasattr(body, 'messages') else 'prompt', 'context_length_exceeded'
            )
        most = room if most is None else most
        if (least := body.min_tokens or 0) > most:
            raise bad(
                f'min_tokens is {least}; it must be at most {most}, the most that there can be', 'min_tokens'
            )
        try:
            sampler = body.sampler(secrets.randbits(32))
        except InputError as error:
            raise of_input_error(error) from None
        if '' in body.stops:
            raise bad("stop holds '', which every text begins with; give at least one character", 'stop')
        ends = () if body.ignore_eos else tuple(sorted(stop_ids))
        request = CompletionRequest(ids, most, sampler, ends, key=key, rule=rule)
        return Asked(request, body.stops, body.n or 1)

    def check(self, body: Sampling, param: str, num_likely: int | None) -> None:
        """Refuses more answers to a prompt than there are slots, or more likely tokens, by `param`, than are told."""
        served = self.served()
        if (n := body.n or 1) > served.num_slots:
            raise bad(f'n is {n}; it must be at most {served.num_slots}, the slots of this server', 'n')
        if (num_likely or 0) > served.top_logprobs:
            raise bad(f'{param} is {num_likely}; this server tells up to {served.top_logprobs}', param)
        if body.stream_options is not None and not body.stream:
            raise bad('stream_options are of a stream; ask for one by stream=true', 'stream_options')

    def submit(self, asked: Sequence[Asked], is_streamed: bool) -> Ticket:
        """Lets it wait for slots.

        Raises:
          Refusal: too much waits.
        """
        served, new = self.served(), sum(one.num_rows for one in asked)
        if new > (most := self.limits.max_queue + served.num_slots):
            raise bad(f'the request asks for {new} answers; this server takes {most} at a time, so divide it')
        if self.worker.num_rows + new > most:
            raise Refusal(
                429, f'{self.limits.max_queue} answers wait already; ask again soon', code='queue_full'
            )
        ticket = self.worker.submit(asked, is_streamed)
        self.metrics.prompt_tokens.inc(ticket.prompt_tokens)
        return ticket
