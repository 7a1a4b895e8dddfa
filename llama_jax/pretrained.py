"""load(): any checkpoint of a Llama as (config, params, tokenizer), placed on a mesh."""

import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from llama_jax.checkpoint.weights import latest_step, restore_params
from llama_jax.data.tokenizer import Tokenizer, load_tokenizer
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.runtime import enable_bucket, write_atomically
from llama_jax.types import InputError, Params

MODEL_FILE = 'model.json'
CHECKPOINTS = 'checkpoints'


def load(
    path: epath.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    tokenizer: str = '',
) -> tuple[LlamaConfig, Params, Tokenizer]:
    """Reads a run's workdir: the newest weights, the architecture and the tokenizer.

    Args:
      path: a workdir that `experiments.pretrain` wrote, local or `gs://...`.
      mesh: where the weights are placed, by `partitioning.DEFAULT_RULES`; by default whole on the first device.
      dtype: that floating-point weights are cast to.
      tokenizer: file to use instead of the workdir's own.

    Raises:
      InputError: the path is no workdir, or what it holds is damaged.
    """
    enable_bucket(path)
    folder = epath.Path(path)
    config = load_config(folder)
    partitioner = Partitioner(mesh or make_mesh({}, jax.devices()[:1]))
    model = LlamaForCausalLM(config)
    shapes = abstract_params(model)
    shardings = partitioner.tree_shardings(shapes, param_axes(model))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)
    params = restore_params(latest_step(folder / CHECKPOINTS), target)
    return config, params, load_tokenizer(tokenizer or str(folder))


def load_config(folder: epath.Path) -> LlamaConfig:
    """The architecture that a workdir's `model.json` holds."""
    file = folder / MODEL_FILE
    if not file.exists():
        raise InputError(
            f'{folder} is not a checkpoint: a workdir has a {MODEL_FILE}, a tokenizer and {CHECKPOINTS}/'
        )
    try:
        return LlamaConfig.from_dict(json.loads(file.read_text())['config'])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f'{file} does not describe a model: {str(error).splitlines()[0]}') from error


def save_config(folder: epath.Path, config: LlamaConfig, **provenance: Any) -> None:
    """Writes `model.json`: the architecture, and where the weights started from."""
    text = json.dumps({'config': config.to_dict(), **provenance}, indent=2)
    write_atomically(folder / MODEL_FILE, text + '\n')
