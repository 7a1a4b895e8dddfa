"""How single tokens are written where their log-probabilities are told."""

import functools

from llama_jax.tokenizer.protocol import Tokenizer, bytes_within


class TokenTexts:
    """The tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        """Nothing is spelled yet."""
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
