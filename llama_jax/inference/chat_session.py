"""A conversation that goes on: the cache of all that was read stays from turn to turn."""

import logging
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax

from llama_jax.errors import InputError, checked_names
from llama_jax.inference import decoding
from llama_jax.inference.chat import Chat, check_messages
from llama_jax.inference.completion import Watch
from llama_jax.inference.prompts import check_prompts
from llama_jax.inference.request import CompletionRequest, check_number, ends_of
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.slots import Begun, Piece, Slots
from llama_jax.inference.steps import Steps
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.model_check import check_model
from llama_jax.tokenizer.chat_format import Dialog
from llama_jax.tokenizer.protocol import required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params

_log = logging.getLogger(__name__)

# Tokens that are read at once, at least and at most: a power of two, so that there are few programs.
_PIECES = 8, 512
# Tokens of an answer that are made before they are shown, once the first are.
_STEPS = 8


class ContextFull(InputError):
    """What is said finds no room behind the conversation."""


class ChatSession:
    """A user and a model in turns, of whose words only the new ones are read.

        session = llama_jax.ChatSession(model, params, tokenizer)
        for piece in session.say('Who wrote Faust?', max_new_tokens=64):
            print(piece, end='', flush=True)

    What is answered is what `generate` makes of the whole conversation. Where its ids do not go on from those that were
    read (an answer may be written in other tokens than it was drawn in, a template may drop something), all from the
    first that differs on is read again.

    Attributes:
      messages: the conversation so far.
      num_cached: tokens of the last prompt that were not read again.
      num_made: tokens of the last answer.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        params: Params,
        tokenizer: Tokenizer | None,
        template: str = '',
        messages: Dialog = (),
    ):
        """Nothing is read yet.

        Args:
          model: see `generate`.
          params: its weights.
          tokenizer: that they were trained with.
          template: the checkpoint's own in Jinja; '' for the format of its family.
          messages: of a conversation so far; what the system says, say.

        Raises:
          InputError: the messages are none that a user could go on from, or the checkpoint is not known to talk.
        """
        check_model(model, params)
        self._tokenizer = required(tokenizer)
        self._chat = Chat(self._tokenizer, template)
        self._config, self._num_rows = model.config, decoding.rows_of(1, model.partitioner)
        self._slots = Slots(model, params, 0, None)
        self.messages = check_messages(messages) if messages else []
        if messages:
            self._chat.encode_prompt([*self.messages, {'role': 'user', 'content': '?'}])
        self.num_cached = self.num_made = 0
        self._held: list[int] = []  # tokens that the cache holds
        self._answering: Generator[str, None, None] = (piece for piece in ())

    @checked_names(Sampler)
    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        **settings: Any,
    ) -> Iterator[str]:
        """What is answered, in pieces; where no more of them are asked for, the answer breaks off.

        Args:
          text: of the user.
          max_new_tokens: see `generate`, as the two that follow.
          stop: texts that end the answer.
          stop_ids: tokens that do, besides those that end a turn.
          settings: of a `Sampler`.

        Raises:
          ContextFull: the conversation leaves no room in the context; nothing is said.
          InputError: a setting is out of range; nothing is said.
        """
        self._answering.close()  # one that nobody listens to any more is broken off
        messages = [*self.messages, {'role': 'user', 'content': text}]
        ids = self._chat.encode_prompt(messages)
        if len(ids) >= (most := self._config.max_seq_len):
            raise ContextFull(
                f'the conversation would have {len(ids)} tokens; the model reads {most}, so shorten it to at most '
                f'{most - 1}'
            )
        check_prompts([ids], self._config)
        check_number('max_new_tokens', max_new_tokens)
        stop, stop_ids = ends_of(stop, stop_ids)
        ends = tuple(sorted({*self._chat.stop_ids, *stop_ids}))
        asked = CompletionRequest(ids, max_new_tokens, Sampler(**settings), ends)
        watch = Watch(self._tokenizer, ids, stop)
        self._slots.expect(asked)
        self._answering = self._answer(messages, asked, watch)
        return self._answering

    def stop(self) -> None:
        """Breaks the answer off, if it goes on; what was shown of it stays in the conversation."""
        self._answering.close()

    def _answer(
        self, messages: list[dict[str, Any]], asked: CompletionRequest, watch: Watch
    ) -> Generator[str, None, None]:
        made, shown, at_once = [], '', 1
        try:
            steps = self._begin(asked)
            while True:
                found = jax.device_get(steps)
                made += found.tokens[0, : found.count[0]].tolist()
                self.num_made = len(made)
                # All but the last of them were read.
                self._held = [*asked.tokens, *made[:-1]]
                tokens = made[:-1] if made[-1] in asked.stop_ids else made
                is_over = watch.look(tokens) or not found.running[0]
                if piece := watch.new_text(at_end=is_over):
                    shown += piece
                    yield piece
                if is_over:
                    room = self._config.max_seq_len - len(asked.tokens)
                    if tokens is made and len(made) == room < asked.max_new_tokens:
                        _log.warning(
                            'the answer ended where the context of %d tokens does, before max_new_tokens, %d: begin a '
                            'new conversation', self._config.max_seq_len, asked.max_new_tokens,
                        )  # fmt: skip
                    return
                self._fit(len(self._held) + at_once)
                steps, at_once = self._slots.decode([0], at_once), min(2 * at_once, _STEPS)
        finally:
            self.messages = [*messages, {'role': 'assistant', 'content': shown}]

    def _begin(self, asked: CompletionRequest) -> Steps:
        """The new part of the conversation read, and the first token of the answer."""
        ids = list(asked.tokens)
        cached = self.num_cached = min(len(os.path.commonprefix([self._held, ids])), len(ids) - 1)
        self._held, last = ids[:cached], None
        width = min(max(decoding.power_of_two(len(ids) - cached), _PIECES[0]), _PIECES[1])
        pieces = range(cached, len(ids), width)
        allowed = min(asked.max_new_tokens, self._config.max_seq_len - len(ids))
        self._fit(pieces[-1] + width)
        for start in pieces:
            last = self._slots.read([Piece(0, start, ids[start : start + width])], width)
        assert last is not None
        self._held = ids
        return self._slots.first(last, [Begun(0, asked, allowed)])

    def _fit(self, num_tokens: int) -> None:
        least = min(decoding.LEAST_ROOM, decoding.power_of_two(self._config.max_seq_len))
        self._slots.fit(self._num_rows, max(decoding.power_of_two(num_tokens), least))
