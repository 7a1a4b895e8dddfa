"""--checkpoint on its devices: with its tokenizer and, for commands that generate, who proposes tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments import launch
from experiments.prompting.checkpoint import DTYPES, dtype_name, open_with_tokenizer
from experiments.prompting.draft import make_proposer, open_draft
from experiments.run.settings import partitioner_of_flags
from llama_jax import pretrained, runtime
from llama_jax.errors import InputError
from llama_jax.inference.proposers import Proposer
from llama_jax.inference.speculative import MAX_PROPOSED
from llama_jax.models.kv_cache import CACHE_DTYPES
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.types import Params

flags.disclaim_key_flags()  # they are those of the command that asks for them


def define_model() -> launch.Flags:
    """--checkpoint and what else says which model generates, in one process; see `load_model`."""
    return launch.Flags(**_define_flags_of_a_model())


def define_shared_model() -> launch.Flags:
    """The same for commands that several processes run together, and in which a draft may propose tokens."""
    launch.define_processes()
    return launch.Flags(
        **_define_flags_of_a_model(),
        mesh=flags.DEFINE_list(
            'mesh', [], 'sizes of the axes data, fsdp, tensor; -1: all other devices; none: one device'
        ),
        axis_rules=flags.DEFINE_string(
            'axis_rules', '', "with --mesh: overrides such as 'kv_heads=' (replicate)"
        ),
        draft=launch.define_path(
            'draft', '', 'who proposes several tokens a step, for the model to verify: lookup (the text itself), int4 '
            '(the model in four bits), or a smaller checkpoint of the same tokenizer',
        ),
        draft_tokens=flags.DEFINE_integer(
            'draft_tokens', 4, 'with --draft: tokens that it proposes a step', 1, MAX_PROPOSED
        ),
    )  # fmt: skip


def define_spread_model() -> launch.Flags:
    """The same for commands that use all devices of all processes from the start; see `make_model`."""
    launch.define_processes()
    return launch.Flags(**_define_flags_of_a_model(), **define_spread())


def define_spread() -> dict[str, Any]:
    """--mesh of all devices, and --axis_rules."""
    return {
        'mesh': flags.DEFINE_list(
            'mesh', ['fsdp=-1'], 'sizes of the axes data, fsdp, context, tensor; -1: all other devices'
        ),
        'axis_rules': flags.DEFINE_string(
            'axis_rules', '', "overrides such as 'kv_heads=' (replicate)"
        ),
    }  # fmt: skip


def define_reading() -> dict[str, Any]:
    """--tokenizer of a checkpoint, and --dtype that it computes in."""
    return {
        'tokenizer': launch.define_path('tokenizer', '', "tokenizer file, instead of the checkpoint's own"),
        'dtype': flags.DEFINE_enum(
            'dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU'
        ),
    }


def _define_flags_of_a_model() -> dict[str, Any]:
    return {
        'checkpoint': launch.define_path(
            'checkpoint', None,
            'anything that is a Llama: a workdir, a folder of Meta or Hugging Face, a .gguf, hf://...', required=True,
        ),
        **define_reading(),
        'cache_dtype': flags.DEFINE_enum(
            'cache_dtype', 'auto', CACHE_DTYPES, 'of keys and values; auto: of the computation'
        ),
        'keep_quantized': flags.DEFINE_bool(
            'keep_quantized', False, 'compute with the integers of a .gguf in Q8_0 or Q4_0, as they are'
        ),
    }  # fmt: skip


def shared_partitioner(given: dict[str, Any]) -> Partitioner | None:
    """Of the flags of `define_shared_model` by name; None for one device.

    Raises:
      InputError: there is no such mesh, or none for several processes.
    """
    if given['mesh']:
        return partitioner_of_flags(given['mesh'], given['axis_rules'])
    if jax.process_count() > 1:
        raise InputError(
            '--mesh is required where several processes generate together, as in --mesh=tensor=-1'
        )
    return None


def load_model(
    given: dict[str, Any], partitioner: Partitioner | None = None
) -> tuple[LlamaForCausalLM, Params, Tokenizer | None, str, Proposer | None]:
    """The model on its devices, its weights, tokenizer and chat template, and who proposes its tokens.

    Args:
      given: the flags of `define_model` or `define_shared_model` by name.
      partitioner: places the weights.
    """
    runtime.enable_compilation_cache()
    opened, draft_name = open_model(given), given.get('draft', '')
    draft = open_draft(draft_name, opened, given['tokenizer'])
    model = make_model(opened, given, partitioner)
    params, tokenizer = load_weights(opened, given, model)
    proposer = make_proposer(draft_name, given.get('draft_tokens', 0), draft, model, params)
    return model, params, tokenizer, opened.template, proposer


def open_model(given: dict[str, Any]) -> pretrained.Checkpoint:
    """What the flags of `define_model` name, with its tokenizer; the weights are still in their files."""
    with launch.flags_named('--checkpoint', '--tokenizer'):
        return open_with_tokenizer(given['checkpoint'], given['tokenizer'])


def make_model(
    opened: pretrained.Checkpoint,
    given: dict[str, Any],
    partitioner: Partitioner | None,
    make: Callable[..., Any] = LlamaForCausalLM,
) -> Any:
    """The model of a checkpoint, nothing of which is loaded.

    Args:
      opened: by `open_model`.
      given: the flags of `define_model` by name; those for its cache may be none of a command's.
      partitioner: places the weights.
      make: the model of a configuration.

    Raises:
      InputError: it is another kind of model, or has no place there.
    """
    if opened.config.scalar_head and make is LlamaForCausalLM:
        raise InputError(
            f'--checkpoint={opened.path} is a reward model, which gives scores and no text; give a language model'
        )
    model = make(
        opened.config, dtype=DTYPES[dtype_name(given['dtype'])], partitioner=partitioner,
        cache_dtype=given.get('cache_dtype', 'auto'),
    )  # fmt: skip
    if partitioner is not None:
        with launch.flags_named('--checkpoint'):
            shapes_and_axes = abstract_params_and_axes(model)
        with launch.flags_named('--mesh', '--axis_rules'):
            partitioner.tree_shardings(*shapes_and_axes)
    return model


def load_weights(
    opened: pretrained.Checkpoint, given: dict[str, Any], model: Any
) -> tuple[Params, Tokenizer | None]:
    """The weights on their devices, and the tokenizer.

    Args:
      opened: by `open_model`.
      given: the flags of `define_model` by name; --keep_quantized may be none of a command's.
      model: by `make_model`.
    """
    with launch.flags_named('--checkpoint', '--tokenizer', '--keep_quantized'):
        _, params, tokenizer = pretrained.load(
            opened, partitioner=model.partitioner, dtype=jnp.dtype(model.dtype), tokenizer=given['tokenizer'],
            keep_quantized=given.get('keep_quantized', False),
        )  # fmt: skip
    return params, tokenizer
