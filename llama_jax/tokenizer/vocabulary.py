"""One description of a vocabulary that loses nothing: what every format is read into and written from.

Three families: sentencepiece BPE (LLaMA 1 and 2), whose pieces carry scores; sentencepiece Unigram; and byte-level BPE
(Llama 3), whose merges are listed. The first and the last merge the neighbours that make the best token, so that a list
of pairs says the same as scores do.
"""

import copy
import dataclasses
from typing import Literal, TypeVar

from llama_jax.errors import InputError
from llama_jax.table import html_of
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    MAX_TOKEN,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

MAX_TOKENS = 1 << 20  # ids that a vocabulary may have; of real ones the largest have a quarter of a million
Family = Literal['sentencepiece', 'unigram', 'byte-level']


@dataclasses.dataclass(frozen=True)
class Ends:
    """How texts begin and end.

    Attributes:
      bos_id: begins a document; None where there is no such token.
      eos_id: ends it.
      stop_ids: any of these ends what a model generates: EOS among them.
      add_bos: whether BOS stands before what a model is given to read.
      add_eos: whether EOS is put behind it, as by tokenizers of other tasks; generation never does.
      pad_id: fills rows; None where nothing says so.
    """

    bos_id: int | None
    eos_id: int
    stop_ids: tuple[int, ...]
    add_bos: bool = True
    add_eos: bool = False
    pad_id: int | None = None


class Ended:
    """What tokenizers of every kind answer about how texts begin and end.

    Attributes:
      ends: all that is known of it.
    """

    ends: Ends
    vocab_size: int
    path: str

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}({", ".join(f"{name}: {value}" for name, value in self._shown().items())})'
        )

    def _repr_html_(self) -> str:
        return html_of(type(self).__name__, self._shown())

    def _shown(self) -> dict[str, object]:
        stops = ', '.join(map(str, self.stop_ids))
        return {'ids': self.vocab_size, 'begins with': self.bos_id, 'stops at': stops, 'from': self.path}

    @property
    def bos_id(self) -> int:
        """Begins every document; EOS where there is no BOS."""
        return self.ends.eos_id if self.ends.bos_id is None else self.ends.bos_id

    @property
    def eos_id(self) -> int:
        """Ends every document."""
        return self.ends.eos_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Any of these ends what a model generates."""
        return self.ends.stop_ids

    @property
    def add_bos(self) -> bool:
        """Whether BOS stands before what a model is given to read."""
        return self.ends.add_bos


_Kind = TypeVar('_Kind', bound=Ended)


def with_ends(tokenizer: _Kind, ends: Ends) -> _Kind:
    """The same vocabulary, of which another file says how texts begin and end."""
    other = copy.copy(tokenizer)
    other.ends = ends
    return other


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer knows.

    Attributes:
      family: which of the three.
      tokens: by id; sentencepiece's pieces, or GPT-2's spelling of bytes; names of added tokens as they are. An
        id without a token has `[PADn]` of type UNUSED, as llama.cpp writes it.
      types: by id.
      ends: how texts begin and end.
      scores: by id, the best has the highest; empty if byte-level.
      pairs: the merges of a byte-level vocabulary, the best first; empty: as the ids' order has them.
      add_dummy_prefix: whether a text is read as if a space came before it (sentencepiece).
      remove_extra_whitespaces: whether outer spaces go and inner ones are squeezed; not so in Llama (sentencepiece).
      charsmap: sentencepiece's compiled normalizer of characters; empty for none, as in Llama.
      splitter: name in `splitters.SPLITTERS` of what cuts texts into words (byte-level).
      unk_id: stands for what no token spells (sentencepiece).
    """

    family: Family
    tokens: list[str]
    types: list[int]
    ends: Ends
    scores: list[float] = dataclasses.field(default_factory=list)
    pairs: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    charsmap: bytes = b''
    splitter: str = ''
    unk_id: int | None = None

    def merges(self) -> list[tuple[str, str]]:
        """Every pair of tokens that makes a token, the best first."""
        if self.pairs:
            return self.pairs
        order = [i for i, kind in enumerate(self.types) if kind == NORMAL]
        if self.scores:
            order.sort(key=lambda i: -self.scores[i])
        ids = {self.tokens[i]: i for i in order}
        pairs = []
        for token in map(self.tokens.__getitem__, order):
            cuts = (cut for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids)
            found = [(token[:cut], token[cut:]) for cut in cuts]
            pairs += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]])) if len(found) > 1 else found
        return pairs

    def added(self) -> dict[str, int]:
        """Names of the tokens that are read whole, special or not, with their ids."""
        return {self.tokens[i]: i for i, kind in enumerate(self.types) if kind in (CONTROL, USER_DEFINED)}

    def special_ids(self) -> dict[str, int]:
        """Names of the tokens that a text, read as it is, never holds, with their ids."""
        return {self.tokens[i]: i for i, kind in enumerate(self.types) if kind in (CONTROL, UNKNOWN)}


_MAX_MERGE_WORK = 1 << 28  # squared lengths of all tokens together; Llama 3's are 10 million


def check_tokens(tokens: list[str], path: str) -> None:
    """Refuses what would take too long: the time to find a token's merges grows with the square of its length.

    Raises:
      InputError: a token is longer than any real one, or too many are long.
    """
    longest = max(tokens, key=len, default='')
    if len(longest) > MAX_TOKEN:
        raise InputError(f'{path} holds a token of {len(longest)} characters; at most {MAX_TOKEN} are read')
    if sum(len(token) ** 2 for token in tokens) > _MAX_MERGE_WORK:
        mean = sum(map(len, tokens)) / len(tokens)
        raise InputError(
            f'{path} holds {len(tokens)} tokens of {mean:.0f} characters on average; no vocabulary does'
        )


def spelling() -> dict[int, int]:
    """GPT-2's letter for each byte (gpt-2/src/encoder.py): itself where it prints, else one from U+0100 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printing]
    return {byte: byte for byte in printing} | {byte: 256 + i for i, byte in enumerate(rest)}


SPELLING = spelling()
BYTES = {letter: byte for byte, letter in SPELLING.items()}
KINDS = range(NORMAL, BYTE + 1)


def is_hole(token: str, kind: int, id: int) -> bool:
    """Whether it stands for an id that has no token."""
    return kind == UNUSED and token == f'[PAD{id}]'
