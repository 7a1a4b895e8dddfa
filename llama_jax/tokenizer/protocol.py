"""What the code base asks of a tokenizer, and how a model's prompt begins."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from llama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the ids of one row become bytes, one after the other: `decode` is all of these bytes, read as UTF-8.

    Attributes:
      spell: bytes that the next id adds; it remembers what was asked before. None: none, and what came before is not
        read together with what follows.
      errors: how bytes that are not UTF-8 are read, as `bytes.decode` names it.
    """

    spell: Callable[[int], bytes | None]
    errors: str = 'replace'


@runtime_checkable
class Tokenizer(Protocol):
    """What the code base asks of a tokenizer. One that puts no BOS before a text has a further `add_bos`, False.

    One whose ids become bytes one by one has a further `spelling()`, a `Spelling` of a new row; without it, or where
    that is None, a row has text once all of it is there.

    Attributes:
      vocab_size: number of ids, special ones included.
      bos_id: begins every document; EOS where there is no BOS.
      eos_id: ends every document.
      stop_ids: any of these ends what a model generates: EOS, the end of a message or turn, and what else is stated.
      path: the file it was read from.
      sha256: hash of that file, in hexadecimal; two tokenizers with one hash are the same.
    """

    vocab_size: int
    path: str
    sha256: str

    @property
    def bos_id(self) -> int:
        """The id that begins a document."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        ...

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for; `special`: names of tokens in it are those."""
        ...

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[np.ndarray]:
        """Ids of many texts (int32 or uint32, no BOS, no EOS), in so many threads; 0: as many as there are cores."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


def prompt_ids(tokenizer: Tokenizer, text: str, special: bool = False) -> list[int]:
    """What a model is given to go on from: the text's ids, BOS before them where this tokenizer puts one.

    Args:
      tokenizer: any.
      text: any.
      special: names of special tokens in the text are those tokens; BOS is then not put twice.
    """
    bos = getattr(tokenizer, 'add_bos', True)
    if not special:
        return tokenizer.encode(text, bos=bos)
    ids = tokenizer.encode(text, special=True)
    return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id] * bos + ids


def printable(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The ids that are tokens: an embedding may have more rows, which stand for no text."""
    return [int(id) for id in ids if id < tokenizer.vocab_size]


def spelling_of(tokenizer: Tokenizer) -> Spelling | None:
    """How ids of a new row become bytes; None where the tokenizer can only decode whole rows."""
    return getattr(tokenizer, 'spelling', lambda: None)()


def bytes_within(tokenizer: Tokenizer, id: int) -> bytes:
    """What a token adds to a text that has begun; b'' for one that stands for no text."""
    if (spelling := spelling_of(tokenizer)) is None:
        return tokenizer.decode([id]).encode()
    for before in tokenizer.encode('a'):  # a text's beginning may lose spaces
        spelling.spell(before)
    return spelling.spell(id) or b''


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of what reads or writes text.

    Raises:
      InputError: it is None, as that of a checkpoint without one.
    """
    if tokenizer is None:
        raise InputError(
            'text needs a tokenizer, and the checkpoint has none; give the one that the weights were trained with'
        )
    if not hasattr(tokenizer, 'stop_ids'):
        raise InputError(
            f'the tokenizer is {repr(tokenizer)[:60]}; give what load or load_tokenizer returned'
        )
    return tokenizer


def check_same_ids(tokenizer: Tokenizer, other: Tokenizer, what: str) -> None:
    """Refuses a tokenizer of other ids; what is no text (an unknown one, say) may be spelled in ways of its own.

    Args:
      tokenizer: one.
      other: the other, of any kind of file.
      what: has the other, for the message.

    Raises:
      InputError: as said, naming both.
    """
    if tokenizer.sha256 == other.sha256:
        return
    difference = ''
    if tokenizer.vocab_size != other.vocab_size:
        difference = f'they have {tokenizer.vocab_size} and {other.vocab_size} ids'
    else:
        # Twice, as a text's first space may not show.
        texts = [[each.decode([id, id]) for id in range(each.vocab_size)] for each in (tokenizer, other)]
        differ = [id for id, (one, another) in enumerate(zip(*texts, strict=True)) if one != another]
        if len(differ) > tokenizer.vocab_size / 100:
            id = differ[0]
            difference = f'twice id {id} is {texts[0][id]!r} and {texts[1][id]!r}'
    if difference:
        raise InputError(
            f'{what} has another tokenizer: {tokenizer.path} and {other.path} differ: {difference}; it must have the '
            'same ids'
        )
