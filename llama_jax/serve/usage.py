"""What an answer took, as clients are told it."""

import dataclasses
from typing import Any

from llama_jax.serve.ticket import Piece


@dataclasses.dataclass
class Usage:
    """Tokens of one request.

    Attributes:
      prompt_tokens: of all its prompts, each once.
      cached_tokens: of them that were not read again.
      completion_tokens: of all its answers.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0

    def take(self, piece: Piece) -> None:
        """One more."""
        self.completion_tokens += piece.num_tokens
        self.cached_tokens += piece.cached_tokens

    def to_json(self) -> dict[str, Any]:
        """As completions and chats have it."""
        return {
            'prompt_tokens': self.prompt_tokens,
            'completion_tokens': self.completion_tokens,
            'total_tokens': self.prompt_tokens + self.completion_tokens,
            'prompt_tokens_details': {'cached_tokens': self.cached_tokens},
        }
