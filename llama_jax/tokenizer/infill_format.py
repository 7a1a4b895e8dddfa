"""A gap between two texts as token ids, id for id as Code Llama 7B and 13B were trained to fill it.

Source: infilling_prompt_tokens of Meta's codellama/llama/generation.py; https://arxiv.org/abs/2308.12950, section 2.3.
"""

from collections.abc import Callable

from llama_jax.errors import InputError
from llama_jax.tokenizer.protocol import Tokenizer

_PREFIX, _SUFFIX, _MIDDLE, _END = '▁<PRE>', '▁<SUF>', '▁<MID>', '▁<EOT>'
# Nothing joins this letter, so what stands behind it begins without the space of a text's beginning.
_BEFORE = '☺'


class InfillFormat:
    """How one tokenizer writes a gap.

    Attributes:
      stop_ids: end what fills it.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Takes the tokenizer of a model that was trained to fill gaps.

        Raises:
          InputError: it has no tokens for that.
        """
        id_of: Callable[[str], int | None] = getattr(tokenizer, 'id_of', lambda name: None)
        ids = {name: id_of(name) for name in (_PREFIX, _SUFFIX, _MIDDLE, _END)}
        found = [id for id in ids.values() if id is not None]
        if len(found) < len(ids):
            missing = next(name for name, id in ids.items() if id is None)
            raise InputError(
                f'{tokenizer.path} has no token {missing}, so its model fills no gaps; Code Llama 7B and 13B do'
            )
        self._tokenizer = tokenizer
        self._prefix, self._suffix, self._middle, end = found
        self.stop_ids = (end,)

    def encode_prompt(self, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
        """Ids of a gap that waits to be filled.

        Args:
          prefix: the text before it.
          suffix: the text behind it.
          suffix_first: suffix, prefix, middle: the other order that the models know, in which a prefix that ends within
            a word is gone on from. Else prefix, suffix, middle.
        """
        before = self._tokenizer.encode(prefix)
        behind = self._tokenizer.encode(_BEFORE + suffix)[len(self._tokenizer.encode(_BEFORE)) :]
        if suffix_first:
            ids = [self._prefix, self._suffix, *behind, self._middle, *before]
        else:
            ids = [self._prefix, *before, self._suffix, *behind, self._middle]
        return [self._tokenizer.bos_id, *ids]
