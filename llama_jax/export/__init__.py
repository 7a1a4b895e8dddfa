"""save(), verify(): a checkpoint written in any format, and read back to be compared with its source."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from llama_jax.checkpoint.model_file import CHECKPOINTS, save_config
from llama_jax.checkpoint.weights import save_params
from llama_jax.convert import gguf, gguf_adapter, huggingface, meta, peft
from llama_jax.convert.adapter import Adapter
from llama_jax.convert.mapping import Leaf, LeafMatrix, Source, leaf_shape, rounded, weights_of
from llama_jax.convert.tensors import Tensor, row_blocks, same_bits
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.placement import cast
from llama_jax.quantize.files import Quantizing
from llama_jax.quantize.forms import choose_forms
from llama_jax.storage import new_folder, parents_made, system_failures
from llama_jax.tokenizer.conversion import comparable_probes, model_file, own_files
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.protocol import required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import LazyArray

FLOAT_DTYPES = ('float32', 'bfloat16', 'float16')
GGUF_DTYPES = tuple(gguf.WRITTEN_TYPES)


def save(
    path: epath.PathLike,
    source: Source,
    tokenizer: Tokenizer | None,
    *,
    to: str,
    dtype: str = '',
    model_parallel: int = 1,
    chat_template: str = '',
    files: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Writes a checkpoint in any format, a few blocks of it in memory at a time; it appears whole or not at all.

    Args:
      path: the folder to make (for GGUF the file), on a local disk; ours may be `gs://...`.
      source: of an opened checkpoint, or `native_source` for weights in memory.
      tokenizer: written along; None writes none, but GGUF needs one.
      to: 'orbax', 'meta', 'huggingface' or 'gguf'.
      dtype: 'float32', 'bfloat16' or 'float16', for GGUF also 'q8_0' or 'q4_0'; '' keeps the source's, of weights
        that are worked out that of what they are made of.
      model_parallel: number of files of Meta's format.
      chat_template: Jinja, kept in all formats but Meta's, which has no place for it.
      files: to carry along into a Hugging Face folder; see `huggingface.carried_files`.
      progress: called with the bytes of each block written.

    Raises:
      InputError: something is at the path already, it cannot be written, or the model has no place in that format.
    """
    folder = epath.Path(path)
    allowed = GGUF_DTYPES if to == 'gguf' else FLOAT_DTYPES
    if dtype and dtype not in allowed:
        raise InputError(f'dtype {dtype} is not one that {to} holds: {", ".join(allowed)}')
    source = source if dtype else rounded(source)
    if source.config.scalar_head and to in ('meta', 'gguf'):
        raise InputError(
            f'{source.origin} is a reward model, and {to} has no place for its score; write huggingface or orbax'
        )
    held = {tensor.dtype.name for layers in source.tensors.values() for tensor in layers}
    if to in ('meta', 'gguf') and not dtype and (wide := held - set(FLOAT_DTYPES)):
        raise InputError(f'{source.origin} holds {min(wide)}, which {to} does not; give dtype float32')
    if model_parallel != 1 and to != 'meta':
        raise InputError(f'model_parallel is {model_parallel}; only files of meta are split so, not {to}')
    if to != 'orbax' and '://' in os.fspath(path):
        raise InputError(f'{path} is not on a local disk; write {to} to one, then copy it')
    float_dtype = jnp.dtype(dtype) if dtype in FLOAT_DTYPES else None
    if to == 'gguf':
        if folder.exists():
            raise InputError(f'{folder} exists; give a new file, or remove it first')
        vocabulary = gguf_vocabulary(required(tokenizer), chat_template, source.config.vocab_size)
        with _refused_in_one_line(path), parents_made(folder):
            gguf.write(
                source, folder, dtype=dtype, vocabulary=vocabulary, name=folder.stem, progress=progress,
            )  # fmt: skip
        return
    with _refused_in_one_line(path), new_folder(folder) as target:
        if to == 'huggingface':
            huggingface.write(
                source, target, dtype=float_dtype, progress=progress,
                **_with_tokenizer(tokenizer, chat_template, source, files),
            )  # fmt: skip
            return
        if to == 'meta':
            if tokenizer:
                (target / 'tokenizer.model').write_bytes(model_file(tokenizer))
            meta.write(source, target, model_parallel=model_parallel, dtype=float_dtype, progress=progress)
            return
        for name, data in own_files(tokenizer, chat_template).items() if tokenizer else ():
            (target / name).write_bytes(data)
        leaves = {w.path: Leaf(source, w, float_dtype) for w in weights_of(source.config)}
        save_params(target / CHECKPOINTS, leaves, progress)
        save_config(target, source.config, base_checkpoint='', converted_from=source.origin)


def save_adapter(
    path: epath.PathLike,
    adapter: Adapter,
    config: LlamaConfig,
    *,
    to: str,
    base: str,
    dtype: str = '',
    files: Mapping[str, bytes] = MappingProxyType({}),
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Writes an adapter without its base; it appears whole or not at all.

    Args:
      path: the folder to make (for GGUF the file), on a local disk.
      adapter: what was trained.
      config: of its base.
      to: 'peft' or 'gguf_adapter'.
      base: the base's place, which PEFT's folder names.
      dtype: 'float32', 'bfloat16' or 'float16', in GGUF not bfloat16; '' keeps the adapter's, in GGUF float32.
      files: to carry along into a folder of PEFT, such as the tokenizer's.
      progress: called with the bytes of each block written.

    Raises:
      InputError: something is at the path already, it cannot be written, or the format cannot say what was trained.
    """
    place = epath.Path(path)
    allowed = gguf_adapter.DTYPES if to == 'gguf_adapter' else FLOAT_DTYPES
    if dtype and dtype not in allowed:
        raise InputError(f'dtype {dtype} is not one that {to} holds: {", ".join(allowed)}')
    if '://' in os.fspath(path):
        raise InputError(f'{path} is not on a local disk; write {to} to one, then copy it')
    if to == 'gguf_adapter':
        if place.exists():
            raise InputError(f'{place} exists; give a new file, or remove it first')
        with _refused_in_one_line(path), parents_made(place):
            gguf_adapter.write(adapter, config, place, dtype=dtype, name=place.stem)
        return
    with _refused_in_one_line(path), new_folder(place) as target:
        wanted = jnp.dtype(dtype) if dtype else None
        peft.write(adapter, config, target, base=base, dtype=wanted, files=files, progress=progress)


def save_quantized(
    path: epath.PathLike,
    source: Source,
    tokenizer: Tokenizer | None,
    dtype: str,
    group: int | None = None,
    *,
    chat_template: str = '',
    progress: Callable[[int], Any] = lambda _: None,
) -> dict[str, Any]:
    """Writes a checkpoint of ours with its matrices and tables in integers; it appears whole or not at all.

    Args:
      path: the folder to make, local or `gs://...`.
      source: of an opened checkpoint; a few blocks of it are in memory at a time, and the scales of a few layers.
      tokenizer: written along; None writes none.
      dtype: 'int8' or 'int4'; see `quantize.forms.choose_forms`.
      group: as there.
      chat_template: Jinja, written along.
      progress: called with the bytes of each block written.

    Returns:
      What also stands in the folder's quantization.json: bytes, and the form and relative error of every weight.

    Raises:
      InputError: something is at the path already, it cannot be written, or the weights cannot be quantised so.
    """
    weights = weights_of(source.config)
    shapes = {w.path: leaf_shape(w, source.config) for w in weights}
    forms, reasons = choose_forms(shapes, dtype, group)
    plain = {w.path: Leaf(source, w) for w in weights}
    made = {path: Quantizing(path, plain[path], form) for path, form in forms.items()}
    leaves: dict[str, LazyArray] = {path: leaf for path, leaf in plain.items() if path not in made}
    for name, leaf in made.items():
        leaves |= {f'{name}/qvalue': leaf.codes, f'{name}/scale': leaf.scale}
    sizes = {name: math.prod(leaf.shape) * leaf.dtype.itemsize for name, leaf in leaves.items()}
    with _refused_in_one_line(path), new_folder(epath.Path(path)) as target:
        for name, data in own_files(tokenizer, chat_template).items() if tokenizer else ():
            (target / name).write_bytes(data)
        save_params(target / CHECKPOINTS, leaves, progress)
        report = {
            'dtype': dtype,
            'bytes': sum(sizes.values()),
            'bytes_before': sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plain.values()),
            'weights': {
                name: {
                    'form': str(forms[name]),
                    'bytes': leaf.num_bytes,
                    'relative_error': leaf.relative_error,
                    **({'reason': reasons[name]} if name in reasons else {}),
                }
                for name, leaf in made.items()
            },
        }
        (target / 'quantization.json').write_text(json.dumps(report, indent=2) + '\n')
        description = {name: dataclasses.asdict(form) for name, form in forms.items()}
        save_config(
            target, source.config, base_checkpoint='', converted_from=source.origin, quantization=description
        )
    return report


def _with_tokenizer(
    tokenizer: Tokenizer | None, chat_template: str, source: Source, files: Mapping[str, bytes]
) -> dict[str, Any]:
    """What `huggingface.write` is given because of a tokenizer."""
    if not tokenizer:
        return {'files': files}
    own = {}
    if not files.keys() & {
        'tokenizer.json',
        'tokenizer.model',
    }:  # these are carried along with all that is beside them
        own = huggingface_files(tokenizer, chat_template=chat_template, max_seq_len=source.config.max_seq_len)
    ends = getattr(tokenizer, 'ends', None)
    bos_id = tokenizer.bos_id if ends is None else ends.bos_id
    return {'bos_id': bos_id, 'eos_ids': tokenizer.stop_ids, 'files': {**own, **files}}


@contextlib.contextmanager
def _refused_in_one_line(path: epath.PathLike) -> Iterator[None]:
    """What the system says against writing there, such as that the disk is full."""
    try:
        with system_failures(f'{path} cannot be written'):
            yield
    except OSError as error:  # about the path itself
        raise InputError(f'{path} cannot be written: {error}') from error


def verify(
    written: Source, source: Source, *, dtype: str = '', progress: Callable[[int], Any] = lambda _: None
) -> None:
    """Compares every value of a checkpoint that was written with its source's, cast or quantised alike.

    Without `dtype` nothing may have been cast: a matrix has its source's type, but where a format holds all layers as
    one array, or vectors as float32, one that holds the same values.

    Args:
      written: the new checkpoint, opened.
      source: what was given to `save`.
      dtype: as given to `save`.
      progress: called with the bytes of each block compared.

    Raises:
      InputError: a weight differs; it is named.
    """
    source = source if dtype else rounded(source)
    differing = {
        field.name: (getattr(written.config, field.name), value)
        for field in dataclasses.fields(source.config)
        if getattr(written.config, field.name) != (value := getattr(source.config, field.name))
    }
    if differing:
        raise InputError(f'{written.origin} was written wrong: {differing} (read back, original)')
    for weight in weights_of(source.config):
        pairs = zip(source.tensors[weight.path], written.tensors[weight.path], strict=True)
        for layer, (original, copy) in enumerate(pairs):
            for rows in row_blocks(tuple(original.shape), original.dtype, multiple=source.config.head_dim):
                expected, found = original.read(rows), copy.read(rows)
                if not dtype and not _keeps_type(expected, found, copy):
                    raise InputError(
                        f'{written.origin} was written wrong: weight {weight.path}, layer {layer} is '
                        f'{found.dtype}, in {source.origin} it is {expected.dtype}'
                    )
                if dtype and dtype not in FLOAT_DTYPES:
                    expected = gguf.as_read_back(expected, dtype, weight.path)
                else:
                    expected = cast(expected, found.dtype, weight.path)
                if not same_bits(expected, found):
                    raise InputError(
                        f'{written.origin} was written wrong: weight {weight.path}, layer {layer}, rows '
                        f'{rows.start} to {rows.stop} differ from {source.origin}'
                    )
                progress(found.nbytes)


def verify_tokenizer(written: Tokenizer | None, original: Tokenizer | None, origin: str) -> None:
    """Compares a tokenizer that was written with its source's, by texts made of its own added tokens among others.

    Args:
      written: of the new checkpoint.
      original: what was given to `save`.
      origin: the new checkpoint, for messages.

    Raises:
      InputError: a text has other ids, or texts begin or end otherwise.
    """
    if original is None:
        return
    if written is None:
        raise InputError(f'{origin} was written wrong: it has no tokenizer')
    for text in comparable_probes(original):
        if (found := written.encode(text)) != (expected := original.encode(text)):
            raise InputError(
                f'{origin} was written wrong: {text!r} has the ids {found}, in the source {expected}'
            )
    for name in ('bos_id', 'add_bos', 'stop_ids'):
        found: Any = getattr(written, name, True)
        expected: Any = getattr(original, name, True)
        is_kept = set(expected) <= set(found) if name == 'stop_ids' else found == expected
        if not is_kept:
            raise InputError(f'{origin} was written wrong: its {name} is {found}, in the source {expected}')


def _keeps_type(original: np.ndarray, copy: np.ndarray, tensor: Tensor) -> bool:
    """Whether a copy's type is the original's, or a wider one where its format has no other."""
    if original.dtype == copy.dtype:
        return True
    widened = jnp.promote_types(original.dtype, copy.dtype) == copy.dtype
    return bool(widened) and (isinstance(tensor, LeafMatrix) or original.ndim == 1)
