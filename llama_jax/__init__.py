"""llama_jax: a functional Flax implementation of Meta's Llama, from one chip to pods.

    checkpoints   load, save, load_tokenizer
    models        LlamaForCausalLM, LlamaConfig, RopeScaling, PRESETS, init_params, KVCache, unstack
    text          generate, complete, stream, infill, Sampler, ChatSession
    training      trainer, pretrain_dataset, metrics
    insight       describe, inspect, hidden_states, token_log_probabilities, figures
    devices       Partitioner, make_mesh, preflight
    errors        InputError

help(llama_jax.NAME) tells of one. They are imported when first used, so that `import llama_jax` costs little.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from llama_jax import figures as figures
    from llama_jax import preflight as preflight
    from llama_jax.data.datasets import pretrain_dataset as pretrain_dataset
    from llama_jax.errors import InputError as InputError
    from llama_jax.export.params import save as save
    from llama_jax.inference.chat_session import ChatSession as ChatSession
    from llama_jax.inference.generate import complete as complete
    from llama_jax.inference.generate import generate as generate
    from llama_jax.inference.generate import stream as stream
    from llama_jax.inference.hidden_states import hidden_states as hidden_states
    from llama_jax.inference.infill import infill as infill
    from llama_jax.inference.sampling import Sampler as Sampler
    from llama_jax.models.config import LlamaConfig as LlamaConfig
    from llama_jax.models.config import RopeScaling as RopeScaling
    from llama_jax.models.description import describe as describe
    from llama_jax.models.inspect import inspect as inspect
    from llama_jax.models.inspect import token_log_probabilities as token_log_probabilities
    from llama_jax.models.kv_cache import KVCache as KVCache
    from llama_jax.models.llama import LlamaForCausalLM as LlamaForCausalLM
    from llama_jax.models.llama import init_params as init_params
    from llama_jax.models.presets import PRESETS as PRESETS
    from llama_jax.models.unstacked import unstack as unstack
    from llama_jax.partitioning import Partitioner as Partitioner
    from llama_jax.partitioning import make_mesh as make_mesh
    from llama_jax.pretrained import load as load
    from llama_jax.pretrained import load_tokenizer as load_tokenizer
    from llama_jax.train.metrics import metrics as metrics
    from llama_jax.train.trainer import trainer as trainer

_FACE = sorted({name for name in globals()['__dir__']() if not name.startswith('_')})
__version__ = '0.1.0'


def __dir__() -> list[str]:
    """The face alone. There is no `__all__`, for which `help(llama_jax)` would print each class, on 2,000 lines."""
    return _FACE
