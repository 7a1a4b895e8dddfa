"""GGUF, the format of llama.cpp: read in any of its types, written in F32, F16, BF16, Q8_0 and Q4_0.

A quantised row is a sequence of blocks of 32 to 256 values that share a scale, so any rows can be read by themselves.
Keys and tensors are those that llama.cpp's convert_hf_to_gguf.py writes; the arithmetic of blocks is that of the
library `gguf`.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from etils import epath

from llama_jax.convert import gguf_file
from llama_jax.convert.gguf_file import DTYPES, F16, F32, BlockType, TensorInfo, block_type, import_gguf
from llama_jax.convert.mapping import Source, assemble, in_file_order
from llama_jax.convert.tensors import Tensor, existing, row_blocks, to_interleaved
from llama_jax.errors import InputError, refusals_of
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.ops.rope import inverse_frequencies
from llama_jax.placement import cast
from llama_jax.storage import prefetch

# What `write` makes matrices of: the number of the type in general.file_type (llama.cpp's) and of a tensor (ggml's).
WRITTEN_TYPES = {'float32': (0, 0), 'bfloat16': (32, 30), 'float16': (1, 1), 'q8_0': (7, 8), 'q4_0': (2, 2)}
_ROPE_DIVISORS = 'rope_freqs.weight'
# Divisors are worked out in fp32 by whoever wrote the file: some roundings of 6e-8 each, more where nearly equal
# numbers are subtracted. Those of another factor differ by far more than this.
_SAME_DIVISORS = 1e-5


def open_source(path: epath.PathLike, header: gguf_file.Header | None = None) -> Source:
    """Opens a GGUF file of a Llama, reading its header alone, or nothing where `header` is what was read already.

    Raises:
      InputError: it is damaged, of another architecture, or a tensor is missing, surplus or of a wrong shape.
    """
    path = existing(path)
    metadata, infos = header or gguf_file.read_header(path)
    found = {name: gguf_file.open_tensor(path, info) for name, info in infos.items()}
    with refusals_of(path):
        config = _config(metadata, found)
    found.pop(_ROPE_DIVISORS, None)
    return assemble(found, 'gguf', config, origin=str(path))


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The numbers among the key/values `llama.*`, each positive, or refused in one line."""

    metadata: Mapping[str, Any]

    def value(self, key: str, default: int | float | None) -> Any:
        value = self.metadata.get(f'llama.{key}', default)
        if value is None:
            raise InputError(f'key llama.{key} is missing; it is no complete GGUF of a Llama')
        if type(value) not in (int, float) or not 0 < value < 2**63:  # also an array, one value a layer
            raise InputError(f'llama.{key} is {str(value)[:80]!r}; a Llama has one positive number there')
        return value

    def size(self, key: str, default: int | None = None) -> int:
        if type(value := self.value(key, default)) is not int:
            raise InputError(f'llama.{key} is {value}; it must be a whole number')
        return value

    def real(self, key: str, default: float | None = None) -> float:
        if type(value := self.value(key, default)) is not float:
            raise InputError(f'llama.{key} is {value}, which is no float as llama.cpp writes it')
        return float(str(np.float32(value)))  # 1e-05, not its fp32 9.99999974e-06


def _config(metadata: Mapping[str, Any], found: Mapping[str, Tensor]) -> LlamaConfig:
    """The architecture that the key/values tell.

    Raises:
      InputError: one is missing, or of another architecture than Llama's.
    """
    _refuse_other_architectures(metadata)
    keys = _Keys(metadata)
    if 'token_embd.weight' not in found:
        raise InputError('there is no tensor token_embd.weight; a Llama needs it')
    embed_dim, num_heads = keys.size('embedding_length'), keys.size('attention.head_count')
    head_dim = keys.size('attention.key_length', embed_dim // num_heads or None)
    for key in ('attention.value_length', 'rope.dimension_count'):
        if keys.size(key, head_dim) != head_dim:
            raise InputError(
                f'llama.{key} is {keys.size(key)}, the size of a head {head_dim}; a Llama has them equal'
            )
    config = LlamaConfig(
        vocab_size=found['token_embd.weight'].shape[0],
        embed_dim=embed_dim,
        mlp_dim=keys.size('feed_forward_length'),
        num_layers=keys.size('block_count'),
        num_heads=num_heads,
        num_kv_heads=keys.size('attention.head_count_kv', num_heads),
        head_dim=head_dim,
        max_seq_len=keys.size('context_length'),
        norm_eps=keys.real('attention.layer_norm_rms_epsilon'),
        rope_theta=keys.real('rope.freq_base', 10_000.0),
        tie_embeddings='output.weight' not in found,
    )
    divisors = found.get(_ROPE_DIVISORS)
    stretched = _stretched(keys, config)
    if divisors is None:
        return stretched
    if stretched.rope_scaling is not None:
        raise InputError(
            f'it scales RoPE both by tensor {_ROPE_DIVISORS} and by llama.rope.scaling; a Llama has one of them'
        )
    return dataclasses.replace(config, rope_scaling=_rope_scaling(divisors, config))


def _stretched(keys: _Keys, config: LlamaConfig) -> LlamaConfig:
    """The architecture with the context and the scaling of RoPE that the key/values tell."""
    given = keys.metadata
    kind = given.get('llama.rope.scaling.type')
    factor = given.get('llama.rope.scaling.factor', given.get('llama.rope.scale_linear')) or 1.0
    if type(factor) is not float or not 0 < factor <= 1e6:
        raise InputError(f'llama.rope.scaling.factor is {str(factor)[:80]!r}; it must be a float above 0')
    factor = float(str(np.float32(factor)))
    if kind == 'none' or factor == 1.0:
        return config
    name = 'rope.scaling.original_context_length'
    is_stated = f'llama.{name}' in given
    original, context = keys.size(name, config.max_seq_len), config.max_seq_len
    if kind == 'yarn':
        scaling = RopeScaling(
            factor, kind='yarn', original_max_seq_len=original,
            attention_factor=_attention_of(keys, factor),
            beta_fast=keys.real('rope.scaling.yarn_beta_fast', 32.0),
            beta_slow=keys.real('rope.scaling.yarn_beta_slow', 1.0),
        )  # fmt: skip
    else:
        scaling = RopeScaling(factor, kind='linear', original_max_seq_len=original)
        context = context if is_stated else min(round(context * factor), 2**31 - 1)
    return dataclasses.replace(config, rope_scaling=scaling, max_seq_len=max(context, 1))


def _attention_of(keys: _Keys, factor: float) -> float:
    beside = keys.real('rope.scaling.attn_factor', 1.0)
    whole = beside * _yarn_attention(factor)
    return whole if beside == 1.0 else float(f'{whole:.6g}')  # beside it has the digits of float32


def _yarn_attention(factor: float) -> float:
    """By how much llama.cpp multiplies cosines and sines by itself."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaling_keys(config: LlamaConfig) -> dict[str, Any]:
    """The key/values that `_stretched` reads.

    Raises:
      InputError: llama.cpp does not scale so.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == 'llama3':  # whose divisors are a tensor
        return {}
    if scaling.kind == 'dynamic' or not scaling.truncate:
        what = 'dynamic scaling' if scaling.kind == 'dynamic' else 'yarn without rounding'
        raise InputError(f'GGUF has no {what} of RoPE, which this model has; write another format')
    keys: dict[str, Any] = {
        'type': scaling.kind, 'factor': float(scaling.factor), 'original_context_length': scaling.original_max_seq_len,
    }  # fmt: skip
    if scaling.kind == 'yarn':
        if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            raise InputError(
                f'llama.cpp has yarn with beta_fast 32 and beta_slow 1, this model has {scaling.beta_fast:g} and '
                f'{scaling.beta_slow:g}; write another format'
            )
        beside = scaling.attention_factor / _yarn_attention(scaling.factor)
        if abs(beside - 1) > _SAME_DIVISORS:
            keys['attn_factor'] = beside
    return {f'llama.rope.scaling.{key}': value for key, value in keys.items()}


def _refuse_other_architectures(metadata: Mapping[str, Any]) -> None:
    """Llamas alone, whole, and without what other models put under the same name."""
    for key, allowed, advice in (
        ('general.architecture', ('llama',), 'only Llamas are read'),
        ('split.count', (0, 1), 'join the parts: llama-gguf-split --merge FIRST OUTPUT'),
        ('llama.expert_count', (0,), 'a mixture of experts is no Llama'),
        ('llama.rope.scaling.type', ('none', 'linear', 'yarn'), 'no Llama scales RoPE otherwise'),
    ):
        value = metadata.get(key, allowed[0] if key != 'general.architecture' else None)
        if type(value) not in (int, float, str) or value not in allowed:
            raise InputError(f'{key} is {str(value)[:80]!r}, not {allowed[0]!r}; {advice}')


def _rope_divisors(config: LlamaConfig, scaling: RopeScaling) -> np.ndarray:
    """By how much each frequency is divided, fp32 [H/2]."""
    settings = dataclasses.asdict(scaling)
    del settings['attention_factor']
    return inverse_frequencies(config.head_dim, config.rope_theta) / inverse_frequencies(
        config.head_dim, config.rope_theta, **settings
    )


def _rope_scaling(tensor: Tensor, config: LlamaConfig) -> RopeScaling | None:
    """The scaling whose divisors these are: the released ones first, then others of the same form.

    Raises:
      InputError: there is none.
    """
    if tensor.shape != (config.head_dim // 2,):
        raise InputError(
            f'tensor {_ROPE_DIVISORS} has shape {tensor.shape}, the model ({config.head_dim // 2},)'
        )
    divisors = tensor.read().astype(np.float32)
    if (divisors == 1).all():
        return None
    contexts = sorted((2**power for power in range(6, 21)), key=lambda context: context != 8192)
    with np.errstate(all='ignore'):
        for context, factor in itertools.product(contexts, (8.0, 32.0, float(divisors.max()))):
            scaling = RopeScaling(factor, original_max_seq_len=context)
            if np.allclose(_rope_divisors(config, scaling), divisors, rtol=_SAME_DIVISORS, atol=0):
                return scaling
    raise InputError(
        f'tensor {_ROPE_DIVISORS} holds divisors up to {divisors.max()} that are not those of Llama 3.1, '
        'whose low_freq_factor is 1 and high_freq_factor 4; no other scaling is known'
    )


def write(
    source: Source,
    path: epath.Path,
    *,
    dtype: str,
    vocabulary: Mapping[str, Any],
    name: str = 'llama',
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes a model as one GGUF file that llama.cpp loads. It gets its name when it is whole.

    Args:
      source: where the weights come from; blocks of rows are read, converted and written one after another.
      path: of the file, on a local disk.
      dtype: of the matrices, a key of `WRITTEN_TYPES`, or '' for the type that each has; vectors are float32, and
        rows that are not whole blocks of 32 float16.
      vocabulary: the key/values `tokenizer.*`; a token for every row of the embedding, or no tokens at all.
      name: what `general.name` says.
      progress: called with the number of bytes of tensors written since its last call.

    Raises:
      InputError: a value does not fit the type, the vocabulary is not the model's, or `gguf` is missing.
    """
    gguf = import_gguf()
    tokens, rows = len(vocabulary.get('tokenizer.ggml.tokens', [])), source.config.vocab_size
    if tokens not in (0, rows):
        raise InputError(
            f'the tokenizer has {tokens} tokens, the model {rows}; llama.cpp needs as many of both'
        )
    partial = path.with_name(f'{path.name}.partial')
    try:
        with contextlib.closing(gguf.GGUFWriter(os.fspath(partial), 'llama')) as writer:
            _add_metadata(writer, source.config, dtype or source.dtype.name, name)
            for key, value in vocabulary.items():
                _add(writer, key, value)
            jobs = _add_tensors(writer, source, dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        with partial.open('ab') as file:
            for begins, block in prefetch(jobs):
                if begins:
                    _align(file)
                file.write(block.data)
                progress(block.nbytes)
            _align(file)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _align(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % gguf_file.DEFAULT_ALIGNMENT))


def _add_metadata(writer: Any, config: LlamaConfig, dtype: str, name: str) -> None:
    writer.add_type('model')
    writer.add_name(name)
    writer.add_file_type(WRITTEN_TYPES[dtype][0])
    writer.add_quantization_version(2)  # ggml's, of the layout of blocks
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in _scaling_keys(config).items():
        _add(writer, key, value)
    if config.head_dim * config.num_heads != config.embed_dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _add(writer: Any, key: str, value: Any) -> None:
    """One key/value of the vocabulary, in the type that llama.cpp looks for."""
    types = import_gguf().GGUFValueType
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        if value:  # the format has no empty array
            kinds = {str: types.STRING, float: types.FLOAT32, int: types.INT32, bool: types.BOOL}
            writer.add_key_value(key, value, types.ARRAY, kinds[type(value[0])])
    elif isinstance(value, int) and not isinstance(value, bool):
        if value >= 0:  # SentencePiece says -1 for a token that it has not
            writer.add_uint32(key, value)
    else:
        kinds = {str: types.STRING, float: types.FLOAT32, bool: types.BOOL}
        writer.add_key_value(key, value, kinds[type(value)])


def _add_tensors(writer: Any, source: Source, dtype: str) -> Iterator[Callable[[], tuple[bool, np.ndarray]]]:
    """Announces every tensor, and returns what makes their data in order: whether a tensor begins, and its bytes."""
    gguf = import_gguf()
    config = source.config
    jobs: list[Callable[[], tuple[bool, np.ndarray]]] = []

    def announce(name: str, shape: tuple[int, ...], kind: BlockType) -> None:
        size = TensorInfo(shape, kind, 0).num_bytes
        number = gguf.GGMLQuantizationType(kind.number)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=number)

    if config.rope_scaling is not None and config.rope_scaling.kind == 'llama3':
        divisors = _rope_divisors(config, config.rope_scaling)
        announce(_ROPE_DIVISORS, divisors.shape, F32)
        jobs.append(lambda: (True, divisors))
    for weight, layer in in_file_order(config):
        tensor = source.tensors[weight.path][layer]
        name = weight.name('gguf', layer)
        kind = _stored_type(weight.matrix_shape(config), dtype or tensor.dtype.name)
        announce(name, weight.matrix_shape(config), kind)
        head_dim = config.head_dim if weight.rotary else None
        jobs += [
            functools.partial(_encode, tensor, rows, kind, head_dim, f'{source.origin}: tensor {name}')
            for rows in row_blocks(tensor.shape, tensor.dtype, head_dim or 1)
        ]
    return iter(jobs)


def _stored_type(shape: tuple[int, ...], dtype: str) -> BlockType:
    if len(shape) == 1:
        return F32
    kind = block_type(WRITTEN_TYPES[dtype][1])
    assert kind is not None
    return F16 if shape[-1] % kind.size else kind


def _encode(
    tensor: Tensor, rows: slice, kind: BlockType, head_dim: int | None, name: str
) -> tuple[bool, np.ndarray]:
    """Whether these rows are the tensor's first, and their bytes in the file."""
    values = tensor.read(rows)
    if head_dim:
        values = to_interleaved(values, head_dim)
    return rows.start == 0, np.ascontiguousarray(_stored(values, kind, name)).view(np.uint8)


def _stored(values: np.ndarray, kind: BlockType, name: str) -> np.ndarray:
    """Rows as a file holds them: of the type, or the bytes of quantised blocks."""
    if kind in DTYPES:
        return cast(values, DTYPES[kind], name)
    gguf = import_gguf()
    with np.errstate(all='ignore'):
        data = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType(kind.number))
    scales = data.reshape(-1, kind.num_bytes)[:, :2].copy().view(np.float16)
    if not np.isfinite(scales).all():
        raise InputError(
            f'{name} holds a value that {kind.name} cannot: it is infinite, not a number or beyond 8e6'
        )
    return data


def as_read_back(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """What a file written in `dtype` gives for these rows."""
    kind = _stored_type(values.shape, dtype)
    data = _stored(values, kind, name)
    if kind in DTYPES:
        return data
    gguf = import_gguf()
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind.number))
