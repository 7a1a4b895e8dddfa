"""The same completions by Hugging Face's Llama and by llama.cpp: what users would otherwise take.

Each is a function of the number of new tokens to seconds; it has read its weights and warms up at its first call.
"""

import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.benchmark.huggingface import random_llama
from llama_jax.convert import gguf
from llama_jax.convert.mapping import native_source
from llama_jax.models.config import LlamaConfig
from llama_jax.types import Params

Complete = Callable[[int], float]

_opened: list[Any] = []  # in llama.cpp's process

# Kinds of token in GGUF.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def huggingface(config: LlamaConfig, ids: Sequence[Sequence[int]]) -> Complete:
    """Greedy `generate` in float32, or bfloat16 on a GPU, of random weights."""
    import torch

    model, device = random_llama(config)
    model = model.to(dtype=torch.float32 if device == 'cpu' else torch.bfloat16).eval()
    tokens = torch.tensor(ids, dtype=torch.long, device=device)
    mask = torch.ones_like(tokens)

    def complete(number: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=number)  # pyright: ignore
        assert found.shape[1] == tokens.shape[1] + number
        return time.perf_counter() - start

    return complete


@contextmanager
def llama_cpp(config: LlamaConfig, params: Params, ids: Sequence[int], dtype: str) -> Iterator[Complete]:
    """Greedy completion of one prompt on all cores, of these weights as GGUF.

    Args:
      config: of the model.
      params: float32.
      ids: of the prompt.
      dtype: a key of `gguf.WRITTEN_TYPES`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(config, params, folder, dtype)
        # In a process of its own, which it may end: on some machines by an instruction that they do not have.
        context = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(1, context, _open_llama_cpp, (path, config.max_seq_len)) as process:
            yield lambda number: process.submit(_complete_by_llama_cpp, list(ids), number).result()


def write_gguf(config: LlamaConfig, params: Params, folder: str, dtype: str) -> str:
    """The file of such weights, with tokens without meaning; arguments as for `llama_cpp`."""
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator='/'): _InMemory(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    path = epath.Path(folder) / 'model.gguf'
    source = native_source(config, leaves, 'random weights')
    gguf.write(source, path, dtype=dtype, vocabulary=_vocabulary(config.vocab_size))
    return str(path)


def _open_llama_cpp(path: str, context: int) -> None:
    import llama_cpp

    cores, options = len(os.sched_getaffinity(0)), {'n_ctx': context, 'verbose': False}
    _opened.append(llama_cpp.Llama(path, n_threads=cores, n_threads_batch=cores, **options))


def _complete_by_llama_cpp(ids: list[int], number: int) -> float:
    start = time.perf_counter()
    _opened[0].reset()  # it would keep what it has read of the same prompt, and read one token of it alone
    drawn = _opened[0].generate(ids, temp=0.0, top_k=1)
    for _ in range(number):
        next(drawn)
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """An array where a file's is expected."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.values[index]


def _vocabulary(size: int) -> dict[str, str | int | list[str] | list[int] | list[float]]:
    """Tokens without meaning, of which llama.cpp asks for every byte."""
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
    tokens += [f't{number}' for number in range(size - len(tokens))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * (size - 259)]
    return {
        'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.tokens': tokens, 'tokenizer.ggml.token_type': kinds,
        'tokenizer.ggml.scores': [0.0] * size, 'tokenizer.ggml.bos_token_id': 1, 'tokenizer.ggml.eos_token_id': 2,
        'tokenizer.ggml.unknown_token_id': 0,
    }  # fmt: skip
