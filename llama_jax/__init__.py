"""llama_jax: a functional Flax implementation of Meta's Llama, from one chip to pods.

The names below are the library's face. They are imported when first used, so that `import llama_jax` costs little.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.inference.generate import generate as generate
    from llama_jax.models.config import LlamaConfig as LlamaConfig
    from llama_jax.models.config import RopeScaling as RopeScaling
    from llama_jax.models.kv_cache import KVCache as KVCache
    from llama_jax.models.llama import LlamaForCausalLM as LlamaForCausalLM
    from llama_jax.models.llama import init_params as init_params
    from llama_jax.models.presets import PRESETS as PRESETS
    from llama_jax.partitioning import Partitioner as Partitioner
    from llama_jax.partitioning import make_mesh as make_mesh
    from llama_jax.pretrained import load as load
    from llama_jax.pretrained import load_tokenizer as load_tokenizer
    from llama_jax.types import InputError as InputError

_HOME = {
    'generate': 'inference.generate',
    'LlamaConfig': 'models.config',
    'RopeScaling': 'models.config',
    'KVCache': 'models.kv_cache',
    'LlamaForCausalLM': 'models.llama',
    'init_params': 'models.llama',
    'PRESETS': 'models.presets',
    'Partitioner': 'partitioning',
    'make_mesh': 'partitioning',
    'load': 'pretrained',
    'load_tokenizer': 'pretrained',
    'InputError': 'types',
}

__all__ = sorted(_HOME)
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
