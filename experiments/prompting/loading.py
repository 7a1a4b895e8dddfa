"""--checkpoint on its devices, for commands that generate: with its tokenizer, and who proposes tokens."""

import jax.numpy as jnp

from experiments import launch
from experiments.prompting.checkpoint import DTYPES, dtype_name, open_with_tokenizer
from experiments.prompting.draft import make_proposer, open_draft
from llama_jax import pretrained, runtime
from llama_jax.inference.proposers import Proposer
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.types import Params


def load_model(
    checkpoint_path: str,
    tokenizer_file: str,
    given_dtype: str,
    partitioner: Partitioner | None,
    keep_quantized: bool,
    draft_name: str,
    draft_tokens: int,
) -> tuple[LlamaForCausalLM, Params, Tokenizer | None, str, Proposer | None]:
    """The model on its devices, its weights, tokenizer and chat template, and who proposes its tokens."""
    runtime.enable_compilation_cache()
    dtype = DTYPES[dtype_name(given_dtype)]
    with launch.flags_named('--checkpoint', '--tokenizer'):
        checkpoint = open_with_tokenizer(checkpoint_path, tokenizer_file)
    draft = open_draft(draft_name, checkpoint, tokenizer_file)
    model = LlamaForCausalLM(checkpoint.config, dtype=dtype, partitioner=partitioner)
    if partitioner is not None:
        with launch.flags_named('--mesh', '--axis_rules'):
            partitioner.tree_shardings(*abstract_params_and_axes(model))  # before anything is loaded
    with launch.flags_named('--checkpoint', '--tokenizer', '--keep_quantized'):
        _, params, tokenizer = pretrained.load(
            checkpoint, partitioner=partitioner, dtype=jnp.dtype(dtype), tokenizer=tokenizer_file,
            keep_quantized=keep_quantized,
        )  # fmt: skip
    proposer = make_proposer(draft_name, draft_tokens, draft, model, params)
    return model, params, tokenizer, checkpoint.template, proposer
