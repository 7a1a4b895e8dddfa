"""What a request is given while it is answered, from the thread of the model to the one of the web."""

import asyncio
import collections
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from llama_jax.inference.completion import FinishReason
from llama_jax.inference.scoring import TokenScore
from llama_jax.serve.refusal import Refusal

# What may wait for a client that reads too slowly: with what the connection holds, 64 KB in Uvicorn and as much in the
# socket, 256 KB.
_MAX_BYTES = 128 << 10
SOCKET_BYTES = 64 << 10
# About what a piece becomes in JSON, besides its text, and each log-probability in it.
_PIECE_BYTES, _SCORE_BYTES = 256, 96


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one row was given since the last.

    Attributes:
      row: which of the request's.
      text: that is certain now.
      num_tokens: new ones.
      scores: of these, and of the stop token that ended the row.
      finish: how it ended; None while it goes on.
      cached_tokens: of its prompt that were not read again; of the last piece of the first row of each prompt.
    """

    row: int
    text: str
    num_tokens: int
    scores: Sequence[TokenScore] = ()
    finish: FinishReason | None = None
    cached_tokens: int = 0

    @property
    def size(self) -> int:
        """Bytes that it becomes, about."""
        scores = sum(1 + len(score.candidates) for score in self.scores)
        return _PIECE_BYTES + len(self.text.encode()) + _SCORE_BYTES * scores


class Ticket:
    """One request's pieces, in the order in which they are made; it belongs to one event loop, and is to be closed."""

    def __init__(self, num_rows: int, cancel: Callable[[], None], is_streamed: bool, prompt_tokens: int):
        """Of a request.

        Args:
          num_rows: that it has.
          cancel: ends them.
          is_streamed: to a client that may read too slowly.
          prompt_tokens: of all its prompts, each once.
        """
        self.loop, self.prompt_tokens = asyncio.get_running_loop(), prompt_tokens
        self._cached_tokens = self._completion_tokens = 0
        self._num_open, self._cancel = num_rows, cancel
        self._limit = _MAX_BYTES if is_streamed else None
        self._waiting: collections.deque[Piece | Refusal] = collections.deque()
        self._num_bytes = 0
        self._has_come = asyncio.Event()

    def put(self, items: Sequence[Piece | Refusal]) -> None:
        """Some more, in the thread of the event loop; too much may not wait from before."""
        if self._limit is not None and self._num_bytes > self._limit:
            self._cancel()
            items = [Refusal(408, 'the answer was read too slowly, and has ended', code='slow_reader')]
            self._limit = None
        self._num_bytes += sum(item.size for item in items if isinstance(item, Piece))
        self._waiting.extend(items)
        self._has_come.set()

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until all rows have ended.

        Raises:
          Refusal: the request cannot be answered, or no further.
        """
        while self._num_open:
            while not self._waiting:
                self._has_come.clear()
                await self._has_come.wait()
            item = self._waiting.popleft()
            if isinstance(item, Refusal):
                self._num_open = 0
                raise item
            self._num_bytes -= item.size
            self._num_open -= item.finish is not None
            self._completion_tokens += item.num_tokens
            self._cached_tokens += item.cached_tokens
            yield item

    def usage(self) -> dict[str, Any]:
        """The tokens that were read for it and taken from it so far, as completions and chats have it."""
        return {
            'prompt_tokens': self.prompt_tokens,
            'completion_tokens': self._completion_tokens,
            'total_tokens': self.prompt_tokens + self._completion_tokens,
            'prompt_tokens_details': {'cached_tokens': self._cached_tokens},
        }

    def close(self) -> None:
        """Ends the rows that have not ended."""
        if self._num_open:
            self._num_open = 0
            self._cancel()
