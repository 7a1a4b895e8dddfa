"""A `tokenizer.json`, as the library `tokenizers` reads it."""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.errors import InputError
from llama_jax.json_file import parse_object
from llama_jax.tokenizer.foreign_tokenizer import PROBES, check_opening
from llama_jax.tokenizer.huggingface_statements import Statements, read_statements, stating_files
from llama_jax.tokenizer.library_errors import refused
from llama_jax.tokenizer.protocol import Spelling
from llama_jax.tokenizer.text_pieces import EACH_BYTE, checked_ids, without_surrogates
from llama_jax.tokenizer.vocabulary import BYTES, MAX_TOKENS, Ended


class HuggingFaceTokenizer(Ended):
    """A `tokenizer.json`, through the library `tokenizers`; files beside it say more of its tokens.

    Attributes:
      ends: how texts begin and end.
      special_tokens: name to id.
      added_tokens: name to id of what is read whole in any text, though it is not special.
      file_bytes: the whole file.
      beside: contents of the files beside it, by name, where they say something of its tokens.
    """

    def __init__(self, path: str, data: bytes, beside: Mapping[str, bytes] | None = None):
        """Reads the JSON of a file.

        Args:
          path: of the file.
          data: its content.
          beside: contents of `STATING_FILES` by name; None: those that stand beside the path.

        Raises:
          InputError: something is damaged, or there is no EOS.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(f"{path} needs the package tokenizers: pip install 'llama_jax[hf]'") from error
        folder = epath.Path(path).parent
        self.beside = dict(stating_files(folder) if beside is None else beside)
        said = read_statements(self.beside, str(folder))
        definition = parse_object(data, path)
        if not isinstance(definition.get('model'), dict):
            raise InputError(f'{path} is not a tokenizer.json that tokenizers can read: it has no model')
        data = _with_added(definition, said, path) or data
        check_opening(definition, data, path)
        with refused(f'{path} is not a tokenizer.json that tokenizers can read'):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            for text in PROBES:
                self._tokenizer.encode(text)
            around = self._around(definition)
        self.path = path
        self.file_bytes = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        if self.vocab_size > MAX_TOKENS:
            raise InputError(
                f'{path} gives a token the id {self.vocab_size - 1}; at most {MAX_TOKENS - 1} is read'
            )
        self.ends = said.ends(
            self._tokenizer.token_to_id, path, self._special(), size=self.vocab_size, around=around
        )
        # Not all files say that these two are special; a text that spells one would become it.
        names = [self._tokenizer.id_to_token(id) for id in (self.bos_id, self.eos_id)]
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False) for name in names if name]
        )
        self._tokenizer.encode_special_tokens = True  # in text they are ordinary characters
        self.special_tokens = self._special()
        added = self._tokenizer.get_added_tokens_decoder()
        self.added_tokens = {t.content: id for id, t in sorted(added.items()) if not t.special}
        self.unk_id = self._unknown_id(definition['model'])
        decoder = json.dumps(definition.get('decoder'))
        self._byte_level = 'ByteLevel' in decoder
        self._only_bytes = set(re.findall(r'"type": "(\w+)"', decoder)) <= {'ByteLevel', 'Sequence', 'Fuse'}
        self._strips = 'Strip' in decoder or 'Metaspace' in decoder

    def __reduce__(self):  # pickled, the library's own object forgets encode_special_tokens
        return HuggingFaceTokenizer, (self.path, self.file_bytes, self.beside), {'ends': self.ends}

    def token(self, id: int) -> str | None:
        """What the vocabulary calls an id; None where it has no such token."""
        return self._tokenizer.id_to_token(id)

    def id_of(self, name: str) -> int | None:
        """Of a token; None where there is none of this name."""
        return self._tokenizer.token_to_id(name)

    def _special(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in sorted(added.items()) if token.special}

    def _unknown_id(self, model: dict[str, Any]) -> int | None:
        """Of a Unigram an id, of a BPE a name."""
        if isinstance(model.get('unk_id'), int):
            return model['unk_id']
        return self._tokenizer.token_to_id(model.get('unk_token') or '')

    def _around(self, definition: dict[str, Any]) -> tuple[list[int], list[int]]:
        """The ids that the file itself puts before and behind a text."""
        if not definition.get('post_processor'):
            return [], []
        plain = self._tokenizer.encode('a', add_special_tokens=False).ids
        whole = self._tokenizer.encode('a').ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    @functools.cached_property
    def _reading_special(self) -> Any:
        """The same, but names of special tokens in a text are those tokens."""
        other = HuggingFaceTokenizer(self.path, self.file_bytes, self.beside)._tokenizer
        other.encode_special_tokens = False
        return other

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for; `special`: names of tokens in it are those."""
        library = self._reading_special if special else self._tokenizer
        text = without_surrogates(text)
        with refused(f'{self.path} cannot encode {text[:40]!r}'):
            ids = library.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, on all cores but where RAYON_NUM_THREADS says otherwise."""
        del num_threads
        texts = [without_surrogates(text) for text in texts]
        with refused(f'{self.path} cannot encode one of {len(texts)} texts'):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name if the vocabulary is of bytes (Llama 3), else not at all."""
        ids = checked_ids(ids, self.vocab_size)
        if self._byte_level:
            with refused(f'{self.path} cannot decode {ids[:10]}'):
                return self._tokenizer.decode(ids, skip_special_tokens=False)
        # As sentencepiece does it; the library would drop the good bytes beside a bad one.
        return b''.join(map(self._spell_pieces(), ids)).decode(errors=EACH_BYTE)

    def spelling(self) -> Spelling | None:
        """Of a new row; None where the library's decoder does more than to put bytes in a row."""
        if not self._byte_level:
            return Spelling(self._spell_pieces(), EACH_BYTE)
        return Spelling(self._spell_bytes) if self._only_bytes else None

    def _spell_bytes(self, id: int) -> bytes:
        """A token spelled by GPT-2's letters of bytes; one that has others, as an added one may, stands for itself."""
        token = self._tokenizer.id_to_token(id) or ''
        try:
            return bytes([BYTES[ord(letter)] for letter in token])
        except KeyError:
            return token.encode()

    def _spell_pieces(self) -> Callable[[int], bytes]:
        special = set(self.special_tokens.values()) - {self.unk_id}
        strips = self._strips

        def spell(id: int) -> bytes:
            nonlocal strips
            if id in special:
                return b''
            piece = ' \u2047 ' if id == self.unk_id else self._tokenizer.id_to_token(id) or ''
            if strips:
                strips, piece = False, piece.removeprefix('▁')
            return (
                bytes.fromhex(piece[3:5])
                if _BYTE_PIECE.fullmatch(piece)
                else piece.replace('▁', ' ').encode()
            )

        return spell


logger = logging.getLogger(__name__)

_BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')


def _with_added(definition: dict[str, Any], said: Statements, path: str) -> bytes | None:
    """The file with the tokens that only files beside it name, as transformers adds them; None where there are none."""
    listed, model = definition.get('added_tokens') or [], definition.get('model')
    vocab = model.get('vocab') if isinstance(model, dict) else None
    if isinstance(vocab, list):  # of a Unigram
        vocab = {piece[0]: id for id, piece in enumerate(vocab) if isinstance(piece, list) and piece}
    if not said.added or not isinstance(listed, list) or not isinstance(vocab, dict):
        return None
    known = {token.get('id') for token in listed if isinstance(token, dict)} | set(vocab.values())
    names = {token.get('content') for token in listed if isinstance(token, dict)} | set(vocab)
    missing = [
        {'id': id, 'content': token.content, 'single_word': False, 'lstrip': False, 'rstrip': False,
         'normalized': False, 'special': token.special}
        for id, token in sorted(said.added.items())
        if id not in known and token.content not in names
    ]  # fmt: skip
    if not missing:
        return None
    logger.info('%s: %d added tokens are named beside it alone', path, len(missing))
    definition['added_tokens'] = [*listed, *missing]
    return json.dumps(definition, ensure_ascii=False).encode()
