"""The LLaMA 1 and Llama 2 tokenizer: a sentencepiece model, BPE or Unigram."""

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from llama_jax.errors import InputError, error_line
from llama_jax.tokenizer.library_errors import refused
from llama_jax.tokenizer.protocol import Spelling
from llama_jax.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, checked_model
from llama_jax.tokenizer.text_pieces import EACH_BYTE, checked_ids, split_at, without_surrogates
from llama_jax.tokenizer.vocabulary import Ended, Ends

_SPECIAL = (UNKNOWN, CONTROL)
_BEHIND_A_WORD = re.compile('(?<=[^ ▁]) (?=.)', re.DOTALL)
_CUT_CHARS = 1 << 20  # of a text that merges in pieces: the time of a merge grows with what waits for one


class SentencePieceTokenizer(Ended):
    """Sentencepiece with byte fallback.

    Attributes:
      ends: how texts begin and end.
      special_tokens: name to id.
      file_bytes: the whole file.
    """

    def __init__(self, path: str, data: bytes, ends: Ends | None = None):
        """Reads `data`, made from the file at `path`.

        Args:
          path: for messages.
          data: the file.
          ends: as another file states them; None: the model's own BOS and EOS.

        Raises:
          InputError: it is no model, or lacks EOS.
        """
        import sentencepiece

        model = checked_model(data, path)  # before the library, which believes what a file says
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, UnicodeDecodeError) as error:  # the second of what it would say
            raise InputError(
                f'{path} is not a tokenizer that sentencepiece can use: {error_line(error)}'
            ) from error
        self.path = path
        self.file_bytes = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._processor.GetPieceSize()
        self.special_tokens = {
            text: id for id, (text, _, kind) in enumerate(model.pieces) if kind in _SPECIAL
        }
        # No piece goes on with a space behind anything else, so merges before such a space and behind it do not touch,
        # and the space is what every text is read with before it.
        is_plain = not (model.is_unigram or model.charsmap or model.remove_extra_whitespaces)
        runs_on = any(re.search('[^▁]▁', text) for text, _, _ in model.pieces)
        self._may_be_cut = is_plain and model.add_dummy_prefix and not runs_on
        self._rewrites = model.rewrites
        self._drops_every_space = model.remove_extra_whitespaces  # that stands first
        self._drops_a_space = model.add_dummy_prefix or model.remove_extra_whitespaces
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        if ends is None:
            if eos_id < 0:
                raise InputError(f'{path} defines no EOS (id {eos_id}); Llama needs one')
            ends = Ends(None if bos_id < 0 else bos_id, eos_id, (eos_id,), bos_id >= 0)
        self.ends = ends

    def id_of(self, name: str) -> int | None:
        """Of a piece; None where there is none of this name."""
        id = self._processor.PieceToId(without_surrogates(name))
        return id if self._processor.IdToPiece(id) == name else None

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for; `special`: names of tokens in it are those."""
        ids: list[int] = []
        for part, id in split_at(without_surrogates(text), self.special_tokens if special else {}):
            ids += self._processor.Encode(part) if id is None else [id]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, in so many threads; 0: as many as there are cores."""
        parts = [list(self._cut(without_surrogates(text))) for text in texts]
        ids = iter(
            self._processor.Encode(
                list(itertools.chain(*parts)),
                return_type='numpy',
                num_threads=num_threads or os.cpu_count() or 1,
            )
        )
        found = [[next(ids) for _ in own] for own in parts]
        return [own[0] if len(own) == 1 else np.concatenate(own) for own in found]

    def _cut(self, text: str) -> Iterator[str]:
        """A long text in pieces whose ids, one after the other, are its own."""
        begin = 0
        while self._may_be_cut and len(text) - begin > _CUT_CHARS:
            space = _BEHIND_A_WORD.search(text, begin + _CUT_CHARS)
            if space is None:
                break
            yield text[begin : space.start()]
            begin = space.end()
        yield text[begin:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without control tokens and the dummy-prefix space, as in Meta's wrapper."""
        ids = checked_ids(ids, self.vocab_size)
        with refused(f'{self.path} cannot decode {ids[:10]}'):
            return self._processor.Decode(ids)

    def spelling(self) -> Spelling | None:
        """Of a new row; None where the model rewrites the text of ids as a whole.

        Source: sentencepiece/src/sentencepiece_processor.cc, `Decode`.
        """
        if self._rewrites:
            return None
        surfaces, unknown = self._surfaces, self._processor.unk_id()
        drops = self._drops_a_space

        def spell(id: int) -> bytes | None:
            nonlocal drops
            surface = surfaces[id]
            if drops and surface:
                begins = id != unknown and self._processor.IdToPiece(id).startswith('▁')
                drops = begins and self._drops_every_space and surface == b' '
                return surface[1:] if begins else surface
            return surface

        return Spelling(spell, EACH_BYTE)

    @functools.cached_property
    def _surfaces(self) -> list[bytes | None]:
        """What each id is within a text; None for a control token, at which a run of bytes ends."""
        library, ids = self._processor, list(range(self.vocab_size))
        surfaces: list[bytes | None] = [
            bytes.fromhex(piece[3:5]) if is_byte else piece.replace('▁', ' ').encode()
            for piece, is_byte in zip(library.IdToPiece(ids), library.IsByte(ids), strict=True)
        ]
        surfaces[library.unk_id()] = library.Decode([library.unk_id()]).encode()
        for id in filter(library.IsControl, self.special_tokens.values()):
            surfaces[id] = None
        return surfaces
