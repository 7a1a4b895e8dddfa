"""What comes of a prompt: the result that `complete` gives, beside `generate` which gives texts alone."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from llama_jax.inference.batcher import Ended
from llama_jax.inference.detokenizer import Detokenizer
from llama_jax.inference.request import Progress
from llama_jax.inference.scoring import TokenScore
from llama_jax.tokenizer.protocol import Tokenizer

FinishReason = Literal['stop', 'length', 'cancelled']
# What stands in JSON, which has no infinity, for a logarithm that is none (OpenAI's service and its kin).
FLOOR = -9999.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completion of one prompt.

    Attributes:
      text: of the tokens, up to the text that ended it.
      tokens: new ones, without the one that ended it; those of a text that ended it are among them.
      prompt_tokens: what they follow.
      finish_reason: something ended it, it has all tokens that it may have, or nobody wanted it any more.
      stopped_by: the token or the text that ended it; None where the caller did, or nothing.
      scores: of each new token, and of the one that ended it behind them; () where they were not asked for.
      prompt_scores: of each token of the prompt, for `echo`; else ().
      cached_tokens: of the prompt that were not read again.
      first_seconds: from the call to its first token.
      seconds: from the call to its end.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    finish_reason: FinishReason
    stopped_by: int | str | None = None
    scores: tuple[TokenScore, ...] = ()
    prompt_scores: tuple[TokenScore, ...] = ()
    cached_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Of plain values, all numbers finite: what a line of JSON shows."""
        shown: dict[str, Any] = {
            'completion': self.text,
            'tokens': list(self.tokens),
            'finish_reason': self.finish_reason,
            'stopped_by': self.stopped_by,
            'prompt_tokens': len(self.prompt_tokens),
            'cached_tokens': self.cached_tokens,
        }
        for name, scores in (('scores', self.scores), ('prompt_scores', self.prompt_scores)):
            if scores:
                shown[name] = [_score_json(score) for score in scores]
        return shown


@dataclasses.dataclass
class Row:
    """What a row was given so far, on the host.

    Attributes:
      began: when it was asked for, by `time.perf_counter`.
      tokens: without a stop token.
      stop_id: the stop token that ended it.
      scores: of the tokens and the stop token.
      first_seconds: from `began` to the first token.
      seconds: to the last one so far.
      ended: how; None while it goes on.
    """

    began: float = dataclasses.field(default_factory=time.perf_counter)
    tokens: list[int] = dataclasses.field(default_factory=list)
    stop_id: int | None = None
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    first_seconds: float = 0.0
    seconds: float = 0.0
    ended: Ended | None = None

    def take(self, progress: Progress) -> None:
        """What it was given since the last."""
        self.seconds = time.perf_counter() - self.began
        self.first_seconds = self.first_seconds or self.seconds
        self.tokens += progress.tokens
        self.scores += progress.scores
        self.stop_id, self.ended = progress.stop_id, progress.ended


class Watch:
    """Looks at a row while it grows: its text, and what ends it besides a stop token.

    However often it looks, and at how much at once, the row ends at the same token.

    Attributes:
      end: tokens that the row has in the end; None while nothing has ended it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        is_enough: Callable[[list[int]], bool] | None = None,
    ):
        """Of one row.

        Args:
          tokenizer: makes the text; None: there is none.
          prompt: ids before the row's.
          stop: see `Detokenizer`.
          is_enough: (tokens so far) -> whether they are.
        """
        self.end: int | None = None
        self._prompt, self._is_enough = prompt, is_enough
        self._detokenizer = Detokenizer(tokenizer, prompt, stop) if tokenizer else None
        self._looks_at_each = bool(stop or is_enough)
        self._num_seen, self._text, self._num_shown = 0, '', 0

    def look(self, tokens: list[int]) -> bool:
        """Whether a row that has `tokens` so far needs no more."""
        while self.end is None and self._num_seen < len(tokens):
            seen = self._num_seen + 1 if self._looks_at_each else len(tokens)
            if self._detokenizer:
                self._text += self._detokenizer.push(tokens[self._num_seen : seen])
            self._num_seen = seen
            if self._stopped_by or (self._is_enough and self._is_enough(tokens[:seen])):
                self.end = seen
        return self.end is not None

    def new_text(self, at_end: bool = False) -> str:
        """What the text has more than it had when this was asked before; at the end all of it."""
        if at_end and self._detokenizer:
            self._text += self._detokenizer.flush()
        new, self._num_shown = self._text[self._num_shown :], len(self._text)
        return new

    @property
    def _stopped_by(self) -> str | None:
        return self._detokenizer.stopped_by if self._detokenizer else None

    def completion(self, row: Row, prompt_scores: Sequence[TokenScore] = ()) -> Completion:
        """Of a row that gets no more."""
        self.look(row.tokens)
        self.new_text(at_end=True)
        end = len(row.tokens) if self.end is None else self.end
        by_token = self.end is None and self._stopped_by is None and row.stop_id is not None
        stopped_by = row.stop_id if by_token else self._stopped_by
        reason: FinishReason = 'length' if row.ended is None else row.ended.reason
        if self.end is not None or stopped_by is not None:
            reason = 'stop'
        return Completion(
            text=self._text,
            tokens=tuple(row.tokens[:end]),
            prompt_tokens=tuple(self._prompt),
            finish_reason=reason,
            stopped_by=stopped_by,
            scores=tuple(row.scores[: end + by_token]),
            prompt_scores=tuple(prompt_scores),
            cached_tokens=row.ended.cached_tokens if row.ended else 0,
            first_seconds=row.first_seconds,
            seconds=row.seconds,
        )


def _score_json(score: TokenScore) -> dict[str, Any]:
    shown = {'token': score.token, 'log_probability': finite(score.log_probability)}
    if score.filtered_log_probability is not None:
        shown['filtered_log_probability'] = finite(score.filtered_log_probability)
    if score.candidates:
        shown['candidates'] = [[token, finite(value)] for token, value in score.candidates]
    return shown


def finite(log_probability: float | None) -> float | None:
    """As JSON shows it: `FLOOR` for what is no finite number."""
    return log_probability if log_probability is None or math.isfinite(log_probability) else FLOOR
