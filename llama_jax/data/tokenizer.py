"""Text to token ids and back: LLaMA 1/2's sentencepiece and Llama 3's tiktoken files behind one protocol.

BOS and EOS come from flags only. Text that spells a special token is encoded as ordinary characters, so no
input can smuggle one in.
"""

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from etils import epath

from llama_jax.runtime import enable_bucket, write_atomically
from llama_jax.types import InputError


@runtime_checkable
class Tokenizer(Protocol):
    """What the code base asks of a tokenizer.

    Attributes:
      vocab_size: number of ids, special ones included.
      bos_id: begins every document.
      eos_id: ends every document.
      path: the file it was read from.
      sha256: hash of that file, in hexadecimal; two tokenizers with one hash are the same.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
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
    """Opens a tokenizer file; the content, never the name, tells sentencepiece from tiktoken.

    Args:
      path: the file, or a directory that holds `tokenizer.model` or exactly one `*.model`.

    Raises:
      InputError: nothing is there, several files fit, or the file is neither format.
    """
    enable_bucket(path)
    file = epath.Path(path)
    if file.is_dir():
        models = sorted(p for p in file.iterdir() if p.name.endswith('.model'))
        named = [p for p in models if p.name == 'tokenizer.model']
        if len(named or models) != 1:
            found = ', '.join(p.name for p in models) or 'no *.model file'
            raise InputError(
                f'no tokenizer in {path}: looked for tokenizer.model or a single *.model, found {found}; '
                'give the file itself'
            )
        file = (named or models)[0]
    if _TIKTOKEN_LINE.match(_read(file)[:4096]):
        return TiktokenTokenizer(os.fspath(file))
    return SentencePieceTokenizer(os.fspath(file))


class SentencePieceTokenizer:
    """The LLaMA 1 and Llama 2 tokenizer: sentencepiece BPE with byte fallback."""

    def __init__(self, path: str):
        """Reads the model at `path`; raises InputError where it is not one, or lacks BOS or EOS."""
        import sentencepiece

        data = _read(epath.Path(path))
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise InputError(
                f'{path} is not a tokenizer: neither a sentencepiece model nor a tiktoken rank file '
                f'({len(data)} bytes); give the tokenizer.model that came with the weights'
            ) from error
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = self._processor.GetPieceSize()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(
                f'{path} defines no BOS or EOS (ids {self.bos_id}, {self.eos_id}); Llama needs both'
            )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        ...
        ids = self._processor.Encode(_without_surrogates(text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, on all cores."""
        texts = [_without_surrogates(text) for text in texts]
        return self._processor.Encode(texts, return_type='numpy', num_threads=os.cpu_count() or 1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, without control tokens and the dummy-prefix space, as in Meta's wrapper."""
        return self._processor.Decode(_checked_ids(ids, self.vocab_size))


# Meta's split pattern: llama3/llama/tokenizer.py, Tokenizer.pat_str.
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_NUM_SPECIAL = 256
_TIKTOKEN_LINE = re.compile(rb'[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)')
_MAX_CHUNK = 400_000  # characters given to tiktoken at once: it panics on much more
_MAX_RUN = 25_000  # longest run of all-space or no-space characters: its regex engine overflows on much more
_SPACE, _NON_SPACE, _RUN = re.compile(r'\s'), re.compile(r'\S'), re.compile(r'\s+|\S+')


class TiktokenTokenizer:
    """The Llama 3 tokenizer: byte-level BPE ranks, then 256 special tokens.

    Attributes:
      special_tokens: name to id. The ids hold for every release; the names are those of Llama 3.1 and later
        (3.0 calls some of them reserved).
    """

    def __init__(self, path: str):
        """Reads the rank file at `path`; raises InputError naming the first line that is wrong."""
        import tiktoken

        data = _read(epath.Path(path))
        ranks = _parse_ranks(data, path)
        self.path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.special_tokens = {name: len(ranks) + i for i, name in enumerate(_special_names())}
        self.vocab_size = len(ranks) + _NUM_SPECIAL
        self.bos_id = self.special_tokens['<|begin_of_text|>']
        self.eos_id = self.special_tokens['<|end_of_text|>']
        self._encoding = tiktoken.Encoding(
            'llama3', pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
        )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        ...
        return [self.bos_id] * bos + self._encode(text).tolist() + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, on all cores."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # tiktoken lets go of the GIL
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name, as in Meta's wrapper."""
        return self._encoding.decode(_checked_ids(ids, self.vocab_size))

    def _encode(self, text: str) -> np.ndarray:
        chunks = list(_chunks(_without_surrogates(text)))
        ids = [self._encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in chunks]
        return ids[0] if len(ids) == 1 else np.concatenate([np.zeros(0, np.uint32), *ids])


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> None:
    """Trains a tokenizer with the settings of Llama 2's own `trainer_spec` and writes it to `path`.

    Trains on at most 4 MiB of lines spread evenly over the texts, so that it takes seconds on any corpus. The
    same texts give the same file, which appears whole or not at all.

    Args:
      texts: documents, read once.
      vocab_size: number of ids, with 259 for unknown, BOS, EOS and the 256 bytes.
      path: file to write, usually `tokenizer.model`.

    Raises:
      InputError: the texts are too few for `vocab_size`, which must also have room for bytes and characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(_sample_lines(texts, max_chars=4 << 20)),
            model_writer=model,
            model_type='bpe',
            vocab_size=vocab_size,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=16,
            max_sentence_length=_MAX_LINE * 4,
            normalization_rule_name='identity',
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=os.cpu_count() or 1,
            minloglevel=4,  # silence
        )
    except RuntimeError as error:
        raise InputError(_why_training_failed(str(error), vocab_size)) from error
    write_atomically(epath.Path(path), model.getvalue())


_MAX_LINE = 1_000  # characters; sentencepiece silently drops a sentence over its limit, which is in bytes


def _sample_lines(texts: Iterable[str], max_chars: int) -> list[str]:
    """Every n-th line of the texts, n a power of two doubled whenever the sample outgrows `max_chars`."""
    lines: list[str] = []
    stride, size, index = 1, 0, -1
    for line in _training_lines(texts):
        index += 1
        if index % stride:
            continue
        lines.append(line)
        size += len(line)
        if size > max_chars and len(lines) > 1:
            stride *= 2
            lines = lines[::2]
            size = sum(map(len, lines))
    return lines


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, the longest ones cut; a newline itself is left to its byte token, as in Llama's vocabulary."""
    for text in texts:
        for line in _without_surrogates(text).replace('\0', '').split('\n'):
            if len(line) <= _MAX_LINE:
                if line:
                    yield line
            else:
                yield from (line[i : i + _MAX_LINE] for i in range(0, len(line), _MAX_LINE))


def _why_training_failed(message: str, vocab_size: int) -> str:
    if largest := re.search(r'too high .*<= (\d+)', message):
        return (
            f'vocab_size {vocab_size} is too large for these texts: they give at most {largest[1]} pieces; '
            f'set it to {largest[1]} or lower, or train on more text'
        )
    if smallest := re.search(r'required_chars\. \d+ vs (\d+)', message):
        return (
            f'vocab_size {vocab_size} is too small: these texts need {smallest[1]} ids for the bytes and '
            f'their characters; set it to more than {smallest[1]}'
        )
    return (
        f'no tokenizer of vocab_size {vocab_size} could be trained on these texts: {message.splitlines()[0]}'
    )


def _read(file: epath.Path) -> bytes:
    try:
        data = file.read_bytes()
        reason = 'the file is empty'
    except OSError as error:
        data, reason = b'', error.strerror or type(error).__name__
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


def _special_names() -> list[str]:
    """Names of the 256 special tokens in id order, as Llama 3.1 to 3.3 have them."""
    named = {
        0: 'begin_of_text',
        1: 'end_of_text',
        4: 'finetune_right_pad_id',
        5: 'step_id',
        6: 'start_header_id',
        7: 'end_header_id',
        8: 'eom_id',
        9: 'eot_id',
        10: 'python_tag',
        11: 'image',
    }
    names, reserved = [], 0
    for i in range(_NUM_SPECIAL):
        if i not in named:
            named[i] = f'reserved_special_token_{reserved}'
            reserved += 1
        names.append(f'<|{named[i]}|>')
    return names


def _chunks(text: str) -> Iterator[str]:
    """Cuts what is too much for tiktoken, as Meta's wrapper does; only tokens at a cut change."""
    for start in range(0, len(text), _MAX_CHUNK):
        chunk = text[start : start + _MAX_CHUNK]
        # A run over the limit covers at least one whole window of half the limit.
        windows = (chunk[i : i + _MAX_RUN // 2] for i in range(0, len(chunk) - _MAX_RUN, _MAX_RUN // 2))
        if all(_SPACE.search(window) and _NON_SPACE.search(window) for window in windows):
            yield chunk
            continue
        begin = 0
        for run in _RUN.finditer(chunk):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def _without_surrogates(text: str) -> str:
    r"""Replaces lone surrogates (JSON can spell them, as in "\ud800") by U+FFFD: UTF-8 cannot hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    return text


def _checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InputError(f'token id {wrong} is outside the vocabulary, 0 to {vocab_size - 1}')
    return ids
