"""Completes prompts with a checkpoint of any format.

    python -m experiments.generate --checkpoint=DIR --prompt='Once upon a time' --max_new_tokens=100 --temperature=0

Standard output is the completion alone, or with --format=jsonl one object {"prompt", "completion"} a prompt.
"""

import json
import logging

import jax.numpy as jnp
from absl import flags

from experiments import launch
from experiments.checkpoint import DTYPES, dtype_name, open_with_tokenizer
from llama_jax import pretrained, runtime
from llama_jax.inference.generate import generate
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.types import InputError

_CHECKPOINT = launch.define_path(
    'checkpoint',
    None,
    'anything that is a Llama: a workdir, a folder of Meta or Hugging Face, a .gguf, hf://...',
    required=True,
)
_TOKENIZER = launch.define_path('tokenizer', '', "tokenizer file, instead of the checkpoint's own")
_PROMPT = flags.DEFINE_multi_string(
    'prompt', None, 'text to complete; give it several times for several', required=True
)
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'at most this many tokens a prompt')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, '0 takes the most likely token; LLaMA samples at 0.6 to 0.8'
)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'draw from this many of the most likely tokens; 0: from all')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'draw from the fewest tokens whose probabilities reach this')
_SEED = flags.DEFINE_integer('seed', 0, 'of the draws')
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU')
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'jsonl'], 'of standard output')

logger = logging.getLogger('llama_jax.generate')


def main() -> None:
    """Loads, generates, prints."""
    with launch.flags_named('--max_new_tokens', '--temperature', '--top_k', '--top_p'):
        if _MAX_NEW_TOKENS.value < 1:
            raise InputError(f'max_new_tokens is {_MAX_NEW_TOKENS.value}; it must be at least 1')
        Sampler(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
    if _TEMPERATURE.value == 0 and (idle := [f for f in (_TOP_K, _TOP_P, _SEED) if f.present]):
        names = ', '.join(f'--{flag.name}' for flag in idle)
        logger.warning('%s: without effect at --temperature=0, which takes the most likely token', names)
    runtime.enable_compilation_cache()
    dtype = DTYPES[dtype_name(_DTYPE.value)]
    with launch.flags_named('--checkpoint', '--tokenizer'):
        checkpoint = open_with_tokenizer(_CHECKPOINT.value, _TOKENIZER.value)
        config, params, tokenizer = pretrained.load(
            checkpoint, dtype=jnp.dtype(dtype), tokenizer=_TOKENIZER.value
        )
    completions = generate(
        LlamaForCausalLM(config, dtype=dtype), params, tokenizer, _PROMPT.value,
        max_new_tokens=_MAX_NEW_TOKENS.value, temperature=_TEMPERATURE.value, top_k=_TOP_K.value,
        top_p=_TOP_P.value, seed=_SEED.value,
    )  # fmt: skip
    for prompt, completion in zip(_PROMPT.value, completions, strict=True):
        text = (
            json.dumps({'prompt': prompt, 'completion': completion})
            if _FORMAT.value == 'jsonl'
            else completion
        )
        print(text)


if __name__ == '__main__':
    launch.run(main)
