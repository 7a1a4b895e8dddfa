"""The Llama 3 tokenizer: byte-level BPE ranks in a text file, then special tokens that code names."""

import base64
import binascii
import hashlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llama_jax.errors import InputError
from llama_jax.tokenizer.library_errors import refused
from llama_jax.tokenizer.protocol import Spelling
from llama_jax.tokenizer.sentencepiece_model import MAX_TOKEN
from llama_jax.tokenizer.splitters import LLAMA3_PATTERN
from llama_jax.tokenizer.text_pieces import checked_ids, chunks, split_at, without_surrogates
from llama_jax.tokenizer.vocabulary import Ended, Ends

_NUM_SPECIAL = 256
RANK_LINE = re.compile(rb'[A-Za-z0-9+/]+={0,2} [0-9]+\r?(\n|$)')


class TiktokenTokenizer(Ended):
    """Byte-level BPE ranks, then special tokens.

    Attributes:
      ends: how texts begin and end.
      special_tokens: name to id.
      file_bytes: the whole file.
    """

    def __init__(self, path: str, data: bytes, special_names: Sequence[str] = (), ends: Ends | None = None):
        """Reads a rank file; raises InputError naming the first line that is wrong.

        Args:
          path: the file that `data` was made from.
          data: lines of `base64(token) rank`.
          special_names: of the tokens after the ranks; by default `llama3_special_names()`.
          ends: as another file states them; None: those of Meta's code.
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
        if ends is None:
            bos_id, eos_id = self.special_tokens['<|begin_of_text|>'], self.special_tokens['<|end_of_text|>']
            ends = Ends(bos_id, eos_id, meta_stop_ids(eos_id, self.special_tokens))
        self.ends = ends
        with refused(f'{path} is not a rank file that tiktoken can use'):
            self._encoding = tiktoken.Encoding(
                'llama3', pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_tokens
            )

    def id_of(self, name: str) -> int | None:
        """Of a special token; None where there is none of this name."""
        return self.special_tokens.get(name)

    def encode(self, text: str, bos: bool = False, eos: bool = False, special: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for; `special`: names of tokens in it are those."""
        ids: list[int] = []
        for part, id in split_at(text, self.special_tokens if special else {}):
            ids += self._encode(part).tolist() if id is None else [id]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[np.ndarray]:
        """Ids of many texts, without BOS and EOS, in so many threads; 0: as many as there are cores."""
        with ThreadPoolExecutor(num_threads or os.cpu_count() or 1) as pool:  # tiktoken lets go of the GIL
            return list(pool.map(self._encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens appear by name, as in Meta's wrapper."""
        return self._encoding.decode(checked_ids(ids, self.vocab_size))

    def spelling(self) -> Spelling:
        """Of a new row."""
        return Spelling(self._encoding.decode_single_token_bytes)

    def _encode(self, text: str) -> np.ndarray:
        pieces = list(chunks(without_surrogates(text)))
        with refused(f'{self.path} cannot encode {text[:40]!r}'):
            ids = [self._encoding.encode_to_numpy(chunk, disallowed_special=()) for chunk in pieces]
        return ids[0] if len(ids) == 1 else np.concatenate([np.zeros(0, np.uint32), *ids])


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


def meta_stop_ids(eos_id: int, special_tokens: Mapping[str, int]) -> tuple[int, ...]:
    """EOS and the ends of a message and of a turn: llama-models/models/llama3/tokenizer.py, stop_tokens."""
    names = ('<|end_of_text|>', '<|eom_id|>', '<|eot_id|>')
    return tuple(sorted({eos_id, *(special_tokens[name] for name in names if name in special_tokens)}))
