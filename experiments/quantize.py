"""Writes a Llama of any format with its weights in integers: a quarter or an eighth of float32's memory.

    python -m experiments.quantize --input=CKPT --output=DIR --dtype=int8 --eval=FILE

DIR is a checkpoint as any other: generate, evaluate and `llama_jax.load` open it. Its quantization.json tells bytes,
the form and the relative error of every weight, and with --eval the perplexity of a file's text before and after.
"""

import json
import math

import jax.numpy as jnp
from absl import flags
from etils import epath
from tqdm import tqdm

from experiments import launch
from experiments.prompting.checkpoint import open_with_tokenizer
from experiments.run.workdir import hold_folder
from llama_jax import export, pretrained, runtime, storage
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine
from llama_jax.eval.harness import PreparedTask, evaluate, prepare
from llama_jax.eval.tasks.perplexity import perplexity
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.quantize.forms import DTYPES

_INPUT = launch.define_path('input', None, 'checkpoint of any format, in floating point', required=True)
_OUTPUT = launch.define_path('output', None, 'folder to make, local or gs://...', required=True)
_DTYPE = flags.DEFINE_enum('dtype', None, list(DTYPES), 'of the integers', required=True)
_GROUP = flags.DEFINE_integer(
    'group', None, 'weights that share a scale; 0: an output channel. By default 0 for int8, 32 for int4'
)
_EVAL = launch.define_path('eval', '', 'text file: its perplexity before and after; loads both models')
_TOKENIZER = launch.define_path('tokenizer', '', "tokenizer file or folder, instead of the input's own")


def main() -> None:
    """Opens, writes, measures."""
    runtime.enable_compilation_cache()
    runtime.free_memory_at_once()
    storage.check_place(_OUTPUT.value, folder=True)
    with launch.flags_named('--output'):
        storage.check_new(epath.Path(_OUTPUT.value))
    with launch.flags_named('--eval'):
        prepared = prepare(perplexity(_EVAL.value), '') if _EVAL.value else None
    with launch.flags_named('--input', '--tokenizer'):
        opened = open_with_tokenizer if prepared else lambda path, _: pretrained.open(path)
        checkpoint = opened(_INPUT.value, _TOKENIZER.value)
        tokenizer = pretrained.load_tokenizer(_TOKENIZER.value) if _TOKENIZER.value else checkpoint.tokenizer
        if checkpoint.format == 'orbax' and checkpoint.forms:
            raise InputError(f'{_INPUT.value} is quantised already; give the checkpoint that it was made of')
        source = checkpoint.source
    hold_folder(epath.Path(_OUTPUT.value), beside=True)
    before = measure(checkpoint, prepared, _TOKENIZER.value) if prepared else {}
    total = sum(math.prod(t.shape) for tensors in source.tensors.values() for t in tensors)
    with (
        launch.flags_named('--output', '--dtype', '--group'),
        tqdm(total=total, desc='writing', unit='B', unit_scale=True, disable=None, mininterval=0.5) as bar,
    ):
        report = export.save_quantized(
            _OUTPUT.value, source, tokenizer, _DTYPE.value, _GROUP.value, chat_template=checkpoint.template,
            progress=bar.update,
        )  # fmt: skip
    if prepared:
        after = measure(pretrained.open(_OUTPUT.value), prepared, _TOKENIZER.value)
        report['perplexity'] = {'before': before, 'after': after}
        text = json.dumps(report, indent=2) + '\n'
        storage.write_atomically(epath.Path(_OUTPUT.value) / 'quantization.json', text)
    print(summary(_OUTPUT.value, report))


def measure(
    checkpoint: pretrained.Checkpoint, prepared: PreparedTask, tokenizer_file: str
) -> dict[str, float]:
    """Perplexity per token, word and byte, computed in float32."""
    config, params, tokenizer = pretrained.load(checkpoint, tokenizer=tokenizer_file)
    engine = Engine(LlamaForCausalLM(config, dtype=jnp.float32), params, tokenizer)
    return evaluate(prepared, engine)


def summary(output: str, report: dict) -> str:
    """One line on bytes, one on perplexity, one for each weight that has another form than was asked for."""
    before, after = report['bytes_before'], report['bytes']
    lines = [f'{output}: {after:,} bytes of weights as {report["dtype"]}, {after / before:.3f} of {before:,}']
    lines += [f'{name} is {w["reason"]}' for name, w in report['weights'].items() if 'reason' in w]
    if 'perplexity' in report:
        (old, new), key = (report['perplexity'][when] for when in ('before', 'after')), 'token_perplexity'
        lines.append(
            f'perplexity per token {old[key]:.4f} before, {new[key]:.4f} after ({new[key] / old[key] - 1:+.2%})'
        )
    return '\n'.join(lines)


if __name__ == '__main__':
    launch.run(main)
