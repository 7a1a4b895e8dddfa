"""Log-probabilities as OpenAI's clients read them: those of completions and those of chats differ."""

import functools
from collections.abc import Sequence
from typing import Any

from llama_jax.inference.completion import finite
from llama_jax.inference.detokenizer import Detokenizer
from llama_jax.inference.scoring import TokenScore
from llama_jax.tokenizer.protocol import Tokenizer, bytes_within


class TokenTexts:
    """How single tokens are written where their log-probabilities are told."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = {id: name for name, id in getattr(tokenizer, 'special_tokens', {}).items()}
        self.bytes_of = functools.lru_cache(1 << 16)(self._spell)

    def _spell(self, id: int) -> bytes:
        """What a token adds to a text that has begun; the name of one that adds none."""
        if id in self._names:
            return self._names[id].encode()
        if id >= self._tokenizer.vocab_size:
            return b''
        return bytes_within(self._tokenizer, id)

    def text_of(self, id: int) -> str:
        """As OpenAI's service writes it: bytes that are no text by their numbers."""
        spelled = self.bytes_of(id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in spelled)

    def name_of(self, id: int) -> str | None:
        """Of a special token."""
        return self._names.get(id)


def of_chat(scores: Sequence[TokenScore], number: int, texts: TokenTexts) -> dict[str, Any]:
    """Of a message's tokens, each with so many likely ones at its place."""

    def entry(token: int, value: float | None) -> dict[str, Any]:
        spelled = texts.bytes_of(token)
        return {'token': texts.text_of(token), 'logprob': finite(value), 'bytes': list(spelled)}

    content = [
        entry(score.token, score.log_probability)
        | {'top_logprobs': [entry(*candidate) for candidate in score.candidates[:number]]}
        for score in scores
    ]
    return {'content': content, 'refusal': None}


class OfCompletion:
    """Of one completion, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, texts: TokenTexts, number: int, prompt: Sequence[int]):
        """Of its first tokens on.

        Args:
          tokenizer: of the tokens.
          texts: how they are written.
          number: likely tokens that are told of each place; the token itself is always among them.
          prompt: ids before the first that will be told, whose text begins at 0.
        """
        self._texts, self._number, self._offset, self._bos_id = texts, number, 0, tokenizer.bos_id
        self._row = Detokenizer(tokenizer, prompt)

    def of(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """Of the next tokens."""
        offsets, likely = [], []
        for score in scores:
            offsets.append(self._offset)
            if score.log_probability is not None or score.token != self._bos_id:  # BOS is in no text
                self._offset += len(self._row.push([score.token]))
            likely.append(self._likely(score))
        return {
            'tokens': [self._texts.text_of(score.token) for score in scores],
            'token_logprobs': [finite(score.log_probability) for score in scores],
            'top_logprobs': likely,
            'text_offset': offsets,
        }

    def _likely(self, score: TokenScore) -> dict[str, float | None] | None:
        if score.log_probability is None:
            return None
        found: dict[str, float | None] = {}
        # Of several tokens with one text the likeliest is told.
        for token, value in (*score.candidates[: self._number], (score.token, score.log_probability)):
            found.setdefault(self._texts.text_of(token), finite(value))
        return found
