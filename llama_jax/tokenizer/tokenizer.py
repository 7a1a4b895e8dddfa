"""Text to token ids and back: LLaMA 1/2's sentencepiece, Llama 3's tiktoken and Hugging Face's files, one protocol.

BOS and EOS come from flags only. Text that spells a special token is encoded as ordinary characters, so no
input can smuggle one in.
"""

import base64
import binascii
import codecs
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath

from llama_jax.json_file import MAX_BYTES, parse_object, read_at_most, read_object, show_json
from llama_jax.storage import enable_bucket
from llama_jax.tokenizer.library_errors import refused
from llama_jax.tokenizer.sentencepiece_model import MAX_TOKEN, check_pieces
from llama_jax.tokenizer.text_pieces import chunks, without_surrogates
from llama_jax.types import InputError


@runtime_checkable
class Tokenizer(Protocol):
    """What the code base asks of a tokenizer.

    Attributes:
      vocab_size: number of ids, special ones included.
      bos_id: begins every document.
      eos_id: ends every document.
      stop_ids: any of these ends what a model generates: EOS, and in a chat the end of a message or turn.
      path: the file it was read from.
      sha256: hash of that file, in hexadecimal; two tokenizers with one hash are the same.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    path: str
    sha256: str

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts (int32 or uint32, no BOS, no EOS), on all cores."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        ...


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens a tokenizer file; the content, never the name, tells sentencepiece, tiktoken and JSON apart.

    Args:
      path: the file, or a directory that holds `tokenizer.model`, `tokenizer.json` (the first of them is taken) or
        exactly one `*.model`.

    Raises:
      InputError: nothing is there, several files fit, or the file is none of the three.
    """
    enable_bucket(path)
    file = epath.Path(path)
    if file.is_dir():
        models = sorted(p for p in file.iterdir() if p.name.endswith('.model') or p.name == 'tokenizer.json')
        named = [p for p in models if p.name == 'tokenizer.model'] or [
            p for p in models if p.name == 'tokenizer.json'
        ]
        if len(named or models) != 1:
            found = ', '.join(p.name for p in models) or 'no *.model file'
            raise InputError(
                f'no tokenizer in {path}: looked for tokenizer.model, tokenizer.json or a single *.model, '
                f'found {found}; give the file itself'
            )
        file = (named or models)[0]
    return parse_tokenizer(os.fspath(file), _read(file))


def parse_tokenizer(path: str, data: bytes) -> Tokenizer:
    """The tokenizer of a file's content; `path` names it in errors. Raises InputError where it is of no kind."""
    if _TIKTOKEN_LINE.match(data[:4096]):
        return TiktokenTokenizer(path, data)
    if data[:4096].lstrip().startswith(b'{'):
        return HuggingFaceTokenizer(path, data)
    return SentencePieceTokenizer(path, data)


class SentencePieceTokenizer:
    """The LLaMA 1 and Llama 2 tokenizer: sentencepiece BPE with byte fallback.

    Attributes:
      file_bytes: the whole file.
    """

    def __init__(self, path: str, data: bytes):
        """Reads `data`, made from the file at `path`; InputError where it is no model, or lacks BOS or EOS."""
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, UnicodeDecodeError) as error:  # the second of what it would say
            raise InputError(
                f'{path} is not a tokenizer: neither a sentencepiece model nor a tiktoken rank file nor a '
                f'tokenizer.json ({len(data)} bytes); give the tokenizer.model that came with the weights'
            ) from error
        check_pieces(data, path)
        self.path = path
        self.file_bytes = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._processor.GetPieceSize()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(
                f'{path} defines no BOS or EOS (ids {self.bos_id}, {self.eos_id}); Llama needs both'
            )
        self.stop_ids = (self.eos_id,)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        ids = self._processor.Encode(without_surrogates(text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, on all cores."""
        texts = [without_surrogates(text) for text in texts]
        return self._processor.Encode(texts, return_type='numpy', num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without control tokens and the dummy-prefix space, as in Meta's wrapper."""
        ids = _checked_ids(ids, self.vocab_size)
        with refused(f'{self.path} cannot decode {ids[:10]}'):
            return self._processor.Decode(ids)


# Meta's split pattern: llama3/llama/tokenizer.py, Tokenizer.pat_str.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_NUM_SPECIAL = 256
_TIKTOKEN_LINE = re.compile(rb'[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)')


class TiktokenTokenizer:
    """The Llama 3 tokenizer: byte-level BPE ranks, then special tokens.

    Attributes:
      special_tokens: name to id.
      file_bytes: the whole file.
    """

    def __init__(self, path: str, data: bytes, special_names: Sequence[str] = ()):
        """Reads a rank file; raises InputError naming the first line that is wrong.

        Args:
          path: the file that `data` was made from.
          data: lines of `base64(token) rank`.
          special_names: of the tokens after the ranks; by default `llama3_special_names()`.
        """
        import tiktoken

        ranks = _parse_ranks(data, path)
        self.path = path
        self.file_bytes = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        names = special_names or llama3_special_names()
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(names)}
        self.vocab_size = len(ranks) + len(names)
        for name in ('<|begin_of_text|>', '<|end_of_text|>'):
            if name not in self.special_tokens or len(self.special_tokens) != len(names):
                raise InputError(f'{path}: its {len(names)} special tokens lack {name} or repeat a name')
        self.bos_id = self.special_tokens['<|begin_of_text|>']
        self.eos_id = self.special_tokens['<|end_of_text|>']
        self.stop_ids = _stop_ids(self.eos_id, self.special_tokens)
        with refused(f'{path} is not a rank file that tiktoken can use'):
            self._encoding = tiktoken.Encoding(
                'llama3', pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        return [self.bos_id] * bos + self._encode(text).tolist() + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, on all cores."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # tiktoken lets go of the GIL
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name, as in Meta's wrapper."""
        return self._encoding.decode(_checked_ids(ids, self.vocab_size))

    def _encode(self, text: str) -> np.ndarray:
        pieces = list(chunks(without_surrogates(text)))
        with refused(f'{self.path} cannot encode {text[:40]!r}'):
            ids = [self._encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in pieces]
        return ids[0] if len(ids) == 1 else np.concatenate([np.zeros(0, np.uint32), *ids])


class HuggingFaceTokenizer:
    """A `tokenizer.json`, through the library `tokenizers`; BOS and EOS are named in the files beside it.

    Attributes:
      special_tokens: name to id.
      file_bytes: the whole file.
    """

    def __init__(self, path: str, data: bytes):
        """Reads `data`, the JSON of the file at `path`; InputError where it is damaged or lacks BOS or EOS."""
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(f"{path} needs the package tokenizers: pip install 'llama_jax[hf]'") from error
        definition = parse_object(data, path)
        if (growth := _growth(definition.get('normalizer'))) > _MAX_GROWTH:
            raise InputError(
                f'{path} makes texts {growth} times as long; at most {_MAX_GROWTH} times is allowed'
            )
        with refused(f'{path} is not a tokenizer.json that tokenizers can read'):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            for text in _PROBES:  # a pattern may fail at some text only
                self._tokenizer.encode(text)
        self._tokenizer.encode_special_tokens = True  # in text they are ordinary characters
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path = path
        self.file_bytes = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id = self._named('bos_token', ('<|begin_of_text|>', '<s>'))
        self.eos_id = self._named('eos_token', ('<|end_of_text|>', '</s>', '<|eot_id|>'))
        # Not all files say that these two are special; a text that spells one would become it.
        names = [self._tokenizer.id_to_token(id) for id in (self.bos_id, self.eos_id)]
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(n, normalized=False) for n in names])
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in sorted(added.items()) if token.special}
        self.stop_ids = _stop_ids(self.eos_id, self.special_tokens)
        self._unk_id = self._tokenizer.token_to_id(definition['model'].get('unk_token') or '')
        decoder = json.dumps(definition.get('decoder'))
        self._byte_level = 'ByteLevel' in decoder
        self._strips = 'Strip' in decoder or 'Metaspace' in decoder

    def __reduce__(self):  # pickled, the library's own object forgets encode_special_tokens
        return HuggingFaceTokenizer, (self.path, self.file_bytes)

    def _named(self, key: str, usual: Sequence[str]) -> int:
        """The id of the token that a file beside this one names, else of the first usual name there is."""
        names = list(usual)
        for file in ('special_tokens_map.json', 'tokenizer_config.json'):
            beside = epath.Path(self.path).parent / file
            if beside.exists():
                name = read_object(beside).get(key)
                name = name.get('content') if isinstance(name, dict) else name
                names[:0] = [name] if isinstance(name, str) else []
        for name in names:
            if (id := self._tokenizer.token_to_id(name)) is not None:
                return id
        wanted = show_json(', '.join(names))[1:-1]
        raise InputError(f'{self.path} holds none of {wanted} for its {key}; Llama needs one')

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        with refused(f'{self.path} cannot encode {text[:40]!r}'):
            ids = self._tokenizer.encode(without_surrogates(text), add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, on all cores."""
        texts = [without_surrogates(text) for text in texts]
        with refused(f'{self.path} cannot encode one of {len(texts)} texts'):
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name if the vocabulary is of bytes (Llama 3), else not at all."""
        ids = _checked_ids(ids, self.vocab_size)
        if self._byte_level:
            with refused(f'{self.path} cannot decode {ids[:10]}'):
                return self._tokenizer.decode(ids, skip_special_tokens=False)
        special = set(self.special_tokens.values()) - {self._unk_id}
        pieces = [
            ' \u2047 ' if i == self._unk_id else self._tokenizer.id_to_token(i) or ''
            for i in ids
            if i not in special
        ]
        if self._strips and pieces and pieces[0].startswith('▁'):
            pieces[0] = pieces[0][1:]
        # As sentencepiece does it; the library would drop the good bytes beside a bad one.
        data = b''.join(
            bytes.fromhex(piece[3:5]) if _BYTE_PIECE.fullmatch(piece) else piece.replace('▁', ' ').encode()
            for piece in pieces
        )
        return data.decode(errors='llama_jax.each_byte')


_PROBES = ('Hello world! 12', *(letter * 40 + '!x' for letter in 'a1 -\né'))
_MAX_GROWTH = 100  # times; a Llama's own puts one letter for another


def _growth(normalizer: Any) -> int:
    """By how much the parts of a normalizer, one after another, can lengthen a text."""
    if not isinstance(normalizer, dict):
        return 1
    parts = normalizer.get('normalizers')
    growth = math.prod(map(_growth, parts)) if isinstance(parts, list) else 1
    texts = [value for key in ('content', 'prepend') if isinstance(value := normalizer.get(key), str)]
    return growth * max(1, *map(len, texts), 1)


_BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')
codecs.register_error('llama_jax.each_byte', lambda e: ('\ufffd', e.start + 1))  # pyright: ignore


def _stop_ids(eos_id: int, special_tokens: dict[str, int]) -> tuple[int, ...]:
    """EOS and the ends of a message and of a turn: llama-models/models/llama3/tokenizer.py, stop_tokens."""
    names = ('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>')
    return tuple(sorted({eos_id, *(special_tokens[name] for name in names if name in special_tokens)}))


def _read(file: epath.Path) -> bytes:
    try:
        with file.open('rb') as opened:
            data = read_at_most(opened, MAX_BYTES + 1)
        reason = 'the file is empty'
    except OSError as error:
        data, reason = b'', error.strerror or type(error).__name__
    if len(data) > MAX_BYTES:
        raise InputError(f'{file} has more than {MAX_BYTES >> 20} MiB; no tokenizer is that large')
    if not data:
        raise InputError(f'no tokenizer at {file}: {reason}; give a tokenizer.model or its directory')
    return data


def _parse_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Reads `base64(token) rank` lines: ranks 0, 1, 2, ... that hold every single byte."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            token, rank = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f'{path} line {number}: {line[:40]!r} is not a base64 token and its rank'
            ) from error
        if len(token) > MAX_TOKEN:
            raise InputError(
                f'{path} line {number}: a token of {len(token)} bytes; at most {MAX_TOKEN} are read'
            )
        if rank != len(ranks) or token in ranks:
            raise InputError(
                f'{path} line {number}: rank {rank} where a new token of rank {len(ranks)} belongs'
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise InputError(
            f'{path} lacks {len(missing)} of the 256 single-byte tokens, the first one {missing[0]}'
        )
    return ranks


def llama3_special_names(huggingface: bool = False) -> list[str]:
    """Names of the 256 special tokens in id order, since Llama 3.1; in 3.0 some of these ids were still reserved.

    Args:
      huggingface: as Hugging Face's files have them; else as Meta's (llama-models/models/llama3/tokenizer.py).
    """
    named = {
        0: 'begin_of_text', 1: 'end_of_text', 4: 'finetune_right_pad_id', 6: 'start_header_id', 7: 'end_header_id',
        8: 'eom_id', 9: 'eot_id', 10: 'python_tag',
    }  # fmt: skip
    if not huggingface:
        named |= {5: 'step_id', 11: 'image'}
    reserved = itertools.count()
    return [f'<|{named.get(i) or f"reserved_special_token_{next(reserved)}"}|>' for i in range(_NUM_SPECIAL)]


def _checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f'token id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}')
    return ids
