"""Adapters in GGUF, as llama.cpp loads them beside a model: written, of low-rank adapters alone.

Of `NAME.weight` the file holds `NAME.weight.lora_a` [r, in] and `.lora_b` [out, r], and one alpha: llama.cpp multiplies
by alpha / r whatever was meant in training, so that any other scale is a part of b. Rows of b of q and k are
interleaved as their weights' are; of the embedding, whose rows are looked up, a is [V, r] and b [D, r].
Source: llama.cpp's convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

import contextlib
import os

import numpy as np
from etils import epath

from llama_jax.convert.adapter import Adapter, LowRank, check_shapes, check_written_apart
from llama_jax.convert.gguf_file import import_gguf
from llama_jax.convert.mapping import layers_of, weights_of
from llama_jax.convert.tensors import to_interleaved
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.placement import cast

DTYPES = ('float32', 'float16')


def write(
    adapter: Adapter, config: LlamaConfig, path: epath.Path, *, dtype: str = '', name: str = 'adapter'
) -> None:
    """Writes an adapter as one GGUF file. It gets its name when it is whole.

    Args:
      adapter: of which no weight is trained whole.
      config: of its base.
      path: of the file, on a local disk.
      dtype: one of `DTYPES`; '' is float32.
      name: what `general.name` says.

    Raises:
      InputError: llama.cpp could not read what was trained; or a value is beyond the type.
    """
    check_written_apart(adapter, config, 'gguf_adapter')
    if config.scalar_head or adapter.whole:
        what = 'score' if config.scalar_head else min(path for path, _ in adapter.whole)
        raise InputError(
            f'{adapter.origin}: {what} was trained whole, which an adapter in GGUF cannot hold; write the merged model'
        )
    gguf = import_gguf()
    alphas = {added.scale * added.a.shape[0] for added in adapter.low_rank.values()}
    alpha = float(np.float32(alphas.pop() if len(alphas) == 1 else 1.0)) or 1.0
    partial = path.with_name(f'{path.name}.partial')
    try:
        with contextlib.closing(gguf.GGUFWriter(os.fspath(partial), 'llama', use_temp_file=True)) as writer:
            writer.add_type('adapter')
            writer.add_name(name)
            writer.add_string('adapter.type', 'lora')
            writer.add_float32('adapter.lora.alpha', alpha)
            for weight in weights_of(config):
                for layer in layers_of(weight, config):
                    if (added := adapter.low_rank.get((weight.path, layer))) is None:
                        continue
                    check_shapes(added, weight.matrix_shape(config), adapter.origin, 'the model')
                    head_dim = config.head_dim if weight.rotary else None
                    for part, values in _parts(added, alpha, head_dim, weight.path == 'embed').items():
                        full_name = f'{weight.name("gguf", layer)}.{part}'
                        stored = cast(values, np.dtype(dtype or 'float32'), full_name)
                        writer.add_tensor(full_name, np.ascontiguousarray(stored))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _parts(added: LowRank, alpha: float, head_dim: int | None, is_embed: bool) -> dict[str, np.ndarray]:
    """lora_a and lora_b, float32."""
    a, b = (np.asarray(tensor.read(), np.float32) for tensor in (added.a, added.b))
    factor = np.float32(added.scale * len(a) / alpha)
    if is_embed:
        return {'lora_a': b, 'lora_b': a.T * factor}
    b = to_interleaved(b, head_dim) if head_dim else b
    return {'lora_a': a, 'lora_b': b * factor}
