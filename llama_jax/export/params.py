"""save(): a model that is in memory, written in any format."""

import contextlib
import logging
from collections.abc import Iterator

from etils import epath

from llama_jax import export
from llama_jax.convert.memory import memory_source
from llama_jax.errors import InputError, checked_names, did_you_mean
from llama_jax.models.config import LlamaConfig
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params, float_dtype

FORMATS = ('orbax', 'meta', 'huggingface', 'gguf')


@checked_names()
def save(
    path: epath.PathLike,
    config: LlamaConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    *,
    to: str = 'orbax',
    dtype: str = '',
    model_parallel: int = 1,
    chat_template: str = '',
) -> None:
    """Writes a model that is in memory, on one device or a mesh, block by block; it appears whole or not at all.

        llama_jax.save('my_model', config, params, tokenizer, to='huggingface')

    Args:
      path: see `export.save`, as for all that follows.
      config: the architecture.
      params: its weights.
      tokenizer: written along; None writes none, but GGUF needs one.
      to: 'orbax', 'meta', 'huggingface' or 'gguf'.
      dtype: '' keeps the weights' own.
      model_parallel: number of files of Meta's format.
      chat_template: Jinja, kept in all formats but Meta's.

    Raises:
      InputError: something is at the path already, the params are not those of the config, or the format has no place.
    """
    if to not in FORMATS:
        raise InputError(f'to is {to!r}, which is no format; {did_you_mean(to, FORMATS)}')
    if not isinstance(config, LlamaConfig) or not isinstance(params, dict):
        given = f'{type(config).__name__} and {type(params).__name__}'
        raise InputError(
            f'config and params are {given}; give what load returned: save(path, config, params, tokenizer)'
        )
    if dtype and dtype not in export.GGUF_DTYPES:
        dtype = float_dtype(dtype).name
    if epath.Path(path).exists():
        raise InputError(f'{path} exists; give a new path, or remove it first')
    with _without_narration():
        export.save(
            path, memory_source(config, params), tokenizer, to=to, dtype=dtype, model_parallel=model_parallel,
            chat_template=chat_template,
        )  # fmt: skip


@contextlib.contextmanager
def _without_narration() -> Iterator[None]:
    """Orbax warns of what is as it should be here: that no array of JAX is among what it writes."""
    log = logging.getLogger('absl')
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
