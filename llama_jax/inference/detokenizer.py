"""The text of a row of tokens while it grows: pieces that never change and never show what ends it."""

import codecs
import os
from collections.abc import Iterable, Sequence

from llama_jax.errors import InputError
from llama_jax.tokenizer.protocol import Spelling, Tokenizer, printable, spelling_of


class Detokenizer:
    """What a completion adds to the text of its prompt, up to the first of its stop strings.

    However the ids are divided, the pieces join to the same text: that of `decode` of prompt and completion, without
    what it has in common with that of the prompt alone. A character whose bytes are not all there, and what may become
    a stop string, are held back. A token costs the same wherever it stands.

    Where the tokenizer has no `spelling`, the text comes with `flush` or with the stop string, which each push then
    looks for from the beginning.

    Attributes:
      stopped_by: the stop string that has come; what is pushed further adds nothing.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = ()):
        """Of one row.

        Args:
          tokenizer: any.
          prompt: ids before the first that is pushed, after which that may read differently.
          stop: texts that end the completion where they begin, and are left out; of several the one that begins first.

        Raises:
          InputError: a stop string is empty.
        """
        if '' in stop:
            raise InputError("a stop text is '', which every text begins with; give at least one character")
        self.stopped_by: str | None = None
        self._vocab_size = tokenizer.vocab_size
        spelling = spelling_of(tokenizer)
        self._row = _Spelled(spelling) if spelling else _Whole(tokenizer)
        self._row.begin(printable(tokenizer, prompt))
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, stop), default=0)
        self._first_letters = {text[0] for text in stop}
        self._held = ''

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after `ids`, so far as it was not given before."""
        if self.stopped_by is not None:
            return ''
        tokens = [id for id in ids if id < self._vocab_size]  # a row of the embedding may stand for no token
        text = self._held + self._row.add(tokens)
        if not self._stop:
            return text
        if isinstance(self._row, _Whole):
            text = self._row.end()
        length = self._certain(text)
        if isinstance(self._row, _Whole) and self.stopped_by is None:
            return ''
        self._held = text[length:]
        return text[:length]

    def flush(self) -> str:
        """The rest, after the last id; an incomplete character is U+FFFD."""
        if self.stopped_by is not None:
            return ''
        text = self._held + self._row.end()
        before = before_stop(text, self._stop)
        self._held, self.stopped_by = '', self._stop_at(text, len(before))
        return before

    def _certain(self, text: str) -> int:
        """How much of a text no later one can make part of a stop string."""
        begun, before = self._begun_stop(text), len(before_stop(text, self._stop))
        # Where a stop string has come, but another that began before it may yet, all waits for that.
        self.stopped_by = self._stop_at(text, before) if before <= begun else None
        return min(begun, before)

    def _stop_at(self, text: str, place: int) -> str | None:
        return next((stop for stop in self._stop if text.startswith(stop, place)), None)

    def _begun_stop(self, text: str) -> int:
        """Where the first stop string begins that the text breaks off in; the text's length if in none."""
        for start in range(max(0, len(text) - self._longest_stop + 1), len(text)):
            if text[start] in self._first_letters:
                rest = text[start:]
                if any(len(stop) > len(rest) and stop.startswith(rest) for stop in self._stop):
                    return start
        return len(text)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class _Spelled:
    """A row whose ids become bytes one by one."""

    def __init__(self, spelling: Spelling):
        self._spell, self._errors = spelling.spell, spelling.errors
        self._decoder = codecs.getincrementaldecoder('utf-8')(spelling.errors)
        self._broken = ''

    def begin(self, prompt: list[int]) -> None:
        self.add(prompt)
        self._broken = self._decoder.getstate()[0].decode(errors=self._errors)

    def add(self, ids: list[int]) -> str:
        read = self._decoder.decode
        return self._new(''.join([read(new or b'', new is None) for new in map(self._spell, ids)]))

    def end(self) -> str:
        return self._new(self._decoder.decode(b'', final=True))

    def _new(self, text: str) -> str:
        """Without what stood in the text of the prompt already: its last character, if that stays incomplete."""
        if text and self._broken:
            text = _without_common(text, self._broken)
            self._broken = ''
        return text


class _Whole:
    """A row that only its tokenizer can decode, and only from the beginning."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def begin(self, prompt: list[int]) -> None:
        self._ids = prompt
        self._before = self._tokenizer.decode(prompt)

    def add(self, ids: list[int]) -> str:
        self._ids += ids
        return ''

    def end(self) -> str:
        return _without_common(self._tokenizer.decode(self._ids), self._before)


def _without_common(text: str, before: str) -> str:
    """What follows the beginning that it shares with `before`."""
    return text[len(before) if text.startswith(before) else len(os.path.commonprefix([text, before])) :]
