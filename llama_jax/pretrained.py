"""load(): any checkpoint of a Llama as (config, params, tokenizer), placed on a mesh."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llama_jax.checkpoint.weights import check_step, latest_step, open_params, restore_params, save_params
from llama_jax.convert import gguf, huggingface, llama2c, meta
from llama_jax.convert.detect import Format, detect
from llama_jax.convert.gguf_file import read_metadata
from llama_jax.convert.mapping import Leaf, Source, leaf_shape, native_source, weights_of
from llama_jax.convert.tensors import cast, row_blocks, same_bits
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.storage import enable_bucket, new_folder, prefetch, system_failures, write_atomically
from llama_jax.tokenizer import tokenizer as tokenizers
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.tokenizer.vocabulary import gguf_vocabulary, model_file, tokenizer_from_gguf
from llama_jax.types import InputError, Params, error_line

MODEL_FILE = 'model.json'
CHECKPOINTS = 'checkpoints'
FLOAT_DTYPES = ('float32', 'bfloat16', 'float16')
GGUF_DTYPES = tuple(gguf.WRITTEN_TYPES)


def load(
    path: epath.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    tokenizer: str = '',
) -> tuple[LlamaConfig, Params, Tokenizer]:
    """Reads anything that is a Llama: the weights, the architecture and the tokenizer.

    Each process reads only what its devices hold, straight from the files of whatever format.

    Args:
      path: a run's workdir, or one step in it (`WORKDIR/checkpoints/STEP`); a folder of Meta or Hugging Face; a
        `.gguf`; a `.pt` or `.bin` of llama2.c; `hf://ORGANISATION/MODEL` (with `@REVISION` if need be). Local or
        `gs://...`.
      mesh: where the weights are placed, by `partitioning.DEFAULT_RULES`; by default whole on the first device.
      dtype: that floating-point weights are cast to.
      tokenizer: file or folder to use instead of the checkpoint's own.

    Raises:
      InputError: there is no Llama at the path, or it is damaged; or its tokenizer is missing.
    """
    checkpoint = resolve(path)
    config = load_config(checkpoint)
    partitioner = Partitioner(mesh or make_mesh({}, jax.devices()[:1]))
    model = LlamaForCausalLM(config)
    shapes = abstract_params(model)
    shardings = partitioner.tree_shardings(shapes, param_axes(model))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)
    # The tokenizer first: it takes a moment, and where it is missing nobody should wait for the weights.
    vocabulary = load_tokenizer(tokenizer or checkpoint)
    if vocabulary.vocab_size > config.vocab_size:
        raise InputError(
            f'the tokenizer {vocabulary.path} has {vocabulary.vocab_size} ids, the model {config.vocab_size}; '
            'give the one that the weights were trained with by --tokenizer'
        )
    return config, load_params(checkpoint, target), vocabulary


def resolve(path: epath.PathLike) -> epath.Path:
    """The local or `gs://` place of a checkpoint: downloads it where it is `hf://ORGANISATION/MODEL`."""
    text = os.fspath(path)
    if not text.startswith('hf://'):
        enable_bucket(text)
        return epath.Path(text)
    match = re.fullmatch(r'hf://([^/@\s]+/[^/@\s]+)(?:@(\S+))?', text)
    if not match:
        raise InputError(f'{text} is not hf://ORGANISATION/MODEL or hf://ORGANISATION/MODEL@REVISION')
    if importlib.util.find_spec('huggingface_hub') is None:
        raise InputError(f"{text} needs the package huggingface_hub: pip install 'llama_jax[hf]'")
    import huggingface_hub

    patterns = ['*.json', '*.safetensors', 'tokenizer.model', '*.jinja']
    try:
        folder = huggingface_hub.snapshot_download(
            match[1], revision=match[2], allow_patterns=patterns, ignore_patterns=['original/*']
        )
    except (OSError, ValueError) as error:  # what the hub's own errors derive from, of several lines each
        raise InputError(f'{text} cannot be downloaded: {" ".join(str(error).split())}') from error
    return epath.Path(folder)


def find(path: epath.Path) -> tuple[Format, epath.Path]:
    """The format of a checkpoint, and the folder or file to open: the run's workdir, where the path is a step in one.

    Raises:
      InputError: there is no Llama at the path.
    """
    return detect(_run_of(path))


def _run_of(path: epath.Path) -> epath.Path:
    """A run's workdir, where the path is WORKDIR/checkpoints[/STEP]; else the path itself."""
    for folder in (path, path.parent):
        if folder.name == CHECKPOINTS and (folder.parent / MODEL_FILE).exists():
            return folder.parent
    return path


def _step_of(path: epath.Path, workdir: epath.Path) -> epath.Path:
    """The folder of the step that the path names, or else of the newest."""
    checkpoints = workdir / CHECKPOINTS
    return check_step(path) if path.parent == checkpoints else latest_step(checkpoints)


def open_source(path: epath.Path) -> Source:
    """An opened checkpoint of any format, its weights still in their files.

    Raises:
      InputError: there is no Llama at the path, or it is damaged.
    """
    kind, found = find(path)
    match kind:
        case 'orbax':
            leaves = open_params(_step_of(path, found))
            return native_source(_native_config(found), leaves, str(path))
        case 'meta':
            return meta.open_source(found)
        case 'huggingface':
            return huggingface.open_source(found)
        case 'gguf':
            return gguf.open_source(found)
        case 'llama2c':
            return llama2c.open_source(found)


def load_params(path: epath.Path, target: Params) -> Params:
    """The weights of a checkpoint of any format, cast and placed as `target` says.

    Args:
      path: see `resolve`.
      target: abstract params with shardings.

    Raises:
      InputError: the checkpoint is damaged, or of another shape.
    """
    kind, found = find(path)
    if kind == 'orbax':
        return restore_params(_step_of(path, found), target)
    source = open_source(path)
    weights = {weight.path: weight for weight in weights_of(source.config)}

    def place(keys: tuple, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(keys, simple=True, separator='/')
        shape = leaf_shape(weights[name], source.config) if name in weights else None
        if shape != tuple(wanted.shape):
            raise InputError(
                f'{source.origin}: weight {name} has shape {shape}, the model {tuple(wanted.shape)}'
            )
        leaf = Leaf(source, weights[name], np.dtype(wanted.dtype))
        return jax.make_array_from_callback(
            wanted.shape, wanted.sharding, lambda index: leaf.read(index or ())
        )

    wanted, structure = jax.tree_util.tree_flatten_with_path(target)
    arrays = prefetch(functools.partial(place, *pair) for pair in wanted)
    return jax.tree.unflatten(structure, list(arrays))


def save(
    path: epath.PathLike,
    source: Source,
    tokenizer: Tokenizer,
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
      source: from `open_source`, or `native_source` for weights in memory.
      tokenizer: written along.
      to: 'orbax', 'meta', 'huggingface' or 'gguf'.
      dtype: 'float32', 'bfloat16' or 'float16', for GGUF also 'q8_0' or 'q4_0'; '' keeps the source's.
      model_parallel: number of files of Meta's format.
      chat_template: Jinja, for Hugging Face and GGUF.
      files: to carry along into a Hugging Face folder; see `huggingface.carried_files`.
      progress: called with the bytes of each block written.

    Raises:
      InputError: something is at the path already, it cannot be written, or the model has no place in that format.
    """
    folder = epath.Path(path)
    allowed = GGUF_DTYPES if to == 'gguf' else FLOAT_DTYPES
    if dtype and dtype not in allowed:
        raise InputError(f'dtype {dtype} is not one that {to} holds: {", ".join(allowed)}')
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
        vocabulary = gguf_vocabulary(tokenizer, chat_template, source.config.vocab_size)
        with _refused_in_one_line(path):
            folder.parent.mkdir(parents=True, exist_ok=True)
            gguf.write(
                source, folder, dtype=dtype or source.dtype.name, vocabulary=vocabulary, name=folder.stem,
                progress=progress,
            )  # fmt: skip
        return
    with _refused_in_one_line(path), new_folder(folder) as target:
        if to == 'huggingface':
            own = huggingface_files(
                tokenizer, chat_template=chat_template, max_seq_len=source.config.max_seq_len
            )
            huggingface.write(
                source, target, dtype=float_dtype, bos_id=tokenizer.bos_id, files={**own, **files},
                eos_ids=tokenizer.stop_ids if chat_template else (tokenizer.eos_id,), progress=progress,
            )  # fmt: skip
            return
        (target / 'tokenizer.model').write_bytes(model_file(tokenizer))
        if to == 'meta':
            meta.write(source, target, model_parallel=model_parallel, dtype=float_dtype, progress=progress)
            return
        leaves = {w.path: Leaf(source, w, float_dtype) for w in weights_of(source.config)}
        save_params(target / CHECKPOINTS, leaves, progress)
        save_config(target, source.config, base_checkpoint='', converted_from=source.origin)


@contextlib.contextmanager
def _refused_in_one_line(path: epath.PathLike) -> Iterator[None]:
    """What the system says against writing there, such as that the disk is full."""
    try:
        with system_failures(f'{path} cannot be written'):
            yield
    except OSError as error:  # about the path itself
        raise InputError(f'{path} cannot be written: {error}') from error


def verify(
    path: epath.PathLike, source: Source, *, dtype: str = '', progress: Callable[[int], Any] = lambda _: None
) -> None:
    """Reads a written checkpoint back and compares every value with its source's, cast or quantised alike.

    Raises:
      InputError: a weight differs; it is named.
    """
    written = open_source(epath.Path(path))
    differing = {
        field.name: (getattr(written.config, field.name), value)
        for field in dataclasses.fields(source.config)
        if getattr(written.config, field.name) != (value := getattr(source.config, field.name))
    }
    if differing:
        raise InputError(f'{path} was written wrong: {differing} (read back, original)')
    for weight in weights_of(source.config):
        pairs = zip(source.tensors[weight.path], written.tensors[weight.path], strict=True)
        for layer, (original, copy) in enumerate(pairs):
            for rows in row_blocks(tuple(original.shape), original.dtype, multiple=source.config.head_dim):
                expected, found = original.read(rows), copy.read(rows)
                if dtype and dtype not in FLOAT_DTYPES:
                    expected = gguf.as_read_back(expected, dtype, weight.path)
                else:
                    expected = cast(expected, found.dtype, weight.path)
                if not same_bits(expected, found):
                    raise InputError(
                        f'{path} was written wrong: weight {weight.path}, layer {layer}, rows {rows.start} to '
                        f'{rows.stop} differ from {source.origin}'
                    )
                progress(found.nbytes)


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """The tokenizer at a path: its own file, or the one in or beside a checkpoint of any format.

    Raises:
      InputError: there is none, or several.
    """
    place = _run_of(resolve(path))
    if place.is_dir():
        return tokenizers.load_tokenizer(_folder_of_tokenizer(place))
    if not place.exists():
        raise InputError(f'no tokenizer at {place}: there is no such file or folder')
    with place.open('rb') as file:
        head = file.read(4)
    if head == b'GGUF':
        return tokenizer_from_gguf(read_metadata(place), str(place))
    if place.name.endswith(('.pt', '.bin')):
        return tokenizers.load_tokenizer(place.parent)
    return tokenizers.load_tokenizer(place)


def _folder_of_tokenizer(folder: epath.Path) -> epath.Path:
    """Meta's releases before Llama 3 keep one tokenizer above the folders of all their models."""
    names = [file.name for file in folder.iterdir()]
    has_one = any(name.endswith('.model') or name == 'tokenizer.json' for name in names)
    above = folder.parent / 'tokenizer.model'
    return above if not has_one and 'params.json' in names and above.exists() else folder


def load_config(path: epath.Path) -> LlamaConfig:
    """The architecture of a checkpoint of any format."""
    kind, found = find(path)
    return _native_config(found) if kind == 'orbax' else open_source(path).config


def _native_config(folder: epath.Path) -> LlamaConfig:
    file = folder / MODEL_FILE
    try:
        return LlamaConfig.from_dict(json.loads(file.read_text())['config'])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f'{file} does not describe a model: {error_line(error)}') from error


def save_config(folder: epath.Path, config: LlamaConfig, **provenance: Any) -> None:
    """Writes `model.json`: the architecture, and where the weights started from."""
    text = json.dumps({'config': config.to_dict(), **provenance}, indent=2)
    write_atomically(folder / MODEL_FILE, text + '\n')
