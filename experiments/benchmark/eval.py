"""Evaluation beside lm-evaluation-harness with Hugging Face's Llama: items of HellaSwag a second, on the same weights.

Both start from the items and end with the accuracies, which must agree: prompts, tokens, model, scores. The peer is the
harness's own model class on the files of the same task, in batches of 64 requests. Turns alternate, so that a machine
whose speed drifts is unkind to both; the figure of each is its median, our first turn, which compiles, apart.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags

from experiments import launch
from experiments.benchmark.turns import has_peer
from llama_jax import export, pretrained
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine
from llama_jax.eval.harness import evaluate, prepare
from llama_jax.eval.tasks import find_task
from llama_jax.models.llama import LlamaForCausalLM

_CHECKPOINT = launch.define_path('eval_checkpoint', '', 'suite eval: anything that is a Llama')
_DATA_DIR = launch.define_path('eval_data_dir', '', 'suite eval: folder of the benchmarks')
_ITEMS = flags.DEFINE_integer('eval_items', 1000, 'suite eval: the first so many items', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('eval_rounds', 3, 'suite eval: turns that each contender takes', lower_bound=1)
_BATCH_TOKENS = flags.DEFINE_integer(
    'eval_batch_tokens', 2048, 'suite eval: tokens in one of our batches', lower_bound=1
)

Contender = Callable[[], dict[str, float]]  # one evaluation; its accuracies


def main() -> dict[str, Any]:
    """Items a second of each contender and their ratio; prints a table."""
    checkpoint, data_dir, num_items = _CHECKPOINT.value, _DATA_DIR.value, _ITEMS.value
    if not checkpoint or not data_dir:
        raise InputError('--suite=eval needs --eval_checkpoint=CKPT and --eval_data_dir=DIR')
    with tempfile.TemporaryDirectory() as scratch:
        contenders = {'llama_jax': ours(checkpoint, data_dir, num_items, _BATCH_TOKENS.value)}
        if has_peer('lm_eval_huggingface', 'torch', 'transformers', 'lm_eval', 'accelerate'):
            contenders['lm_eval_huggingface'] = huggingface(checkpoint, data_dir, num_items, Path(scratch))
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        found: dict[str, dict[str, float]] = {}
        for _ in range(1 + _ROUNDS.value):
            for name, contender in contenders.items():
                start = time.perf_counter()
                found[name] = contender()
                seconds[name].append(time.perf_counter() - start)
    figures: dict[str, Any] = {'eval_checkpoint': checkpoint, 'eval_items': num_items}
    print(f'\nHellaSwag, first {num_items:,} items, {checkpoint}')
    print(f'{"":24}{"items/s":>10}{"min":>10}{"max":>10}{"first turn s":>14}{"acc":>8}{"acc_norm":>10}')
    for name, times in seconds.items():
        first, *times = times
        rate = num_items / statistics.median(times)
        figures |= {f'{name}_items_per_second': rate, f'{name}_first_turn_seconds': first}
        figures |= {f'{name}_{metric}': value for metric, value in found[name].items()}
        low, high = num_items / max(times), num_items / min(times)
        accuracies = f'{found[name]["acc"]:8.3f}{found[name]["acc_norm"]:10.3f}'
        print(f'{name:24}{rate:10.1f}{low:10.1f}{high:10.1f}{first:14.1f}{accuracies}')
    if len(contenders) == 2:
        mine, theirs = seconds.values()
        ratios = [their / my for my, their in zip(mine[1:], theirs[1:], strict=True)]
        figures['ratio_to_lm_eval_huggingface'] = statistics.median(ratios)
        figures['ratio_with_compilation'] = theirs[0] / mine[0]
        print(
            f'ratio {statistics.median(ratios):.2f} (turn by turn {min(ratios):.2f} to {max(ratios):.2f}; '
            f'first turn, with compilation, {theirs[0] / mine[0]:.2f})'
        )
    return figures


def ours(checkpoint: str, data_dir: str, num_items: int, batch_tokens: int) -> Contender:
    """Our harness, in float32."""
    config, params, tokenizer = pretrained.load(checkpoint)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    engine = Engine(model, params, tokenizer, batch_tokens=batch_tokens)

    def once() -> dict[str, float]:
        prepared = prepare(find_task('hellaswag'), data_dir, limit=num_items)
        found = evaluate(prepared, engine, progress=False)
        return {metric: found[metric] for metric in ('acc', 'acc_norm')}

    return once


def huggingface(checkpoint: str, data_dir: str, num_items: int, scratch: Path) -> Contender:
    """lm-evaluation-harness's HellaSwag on the same items, with its model of transformers, in float32."""
    os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(scratch / 'cache'), 'TQDM_DISABLE': '1'}
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    opened = pretrained.open(checkpoint)
    export.save(scratch / 'model', opened.source, opened.tokenizer, to='huggingface', dtype='float32')
    items = prepare(find_task('hellaswag'), data_dir, limit=num_items).documents
    file = scratch / 'hellaswag.jsonl'
    file.write_text('\n'.join(map(json.dumps, items)))
    task = {
        'task': 'hellaswag', 'dataset_path': 'json', 'validation_split': 'validation',
        'dataset_kwargs': {'data_files': {'validation': str(file)}}, 'output_type': 'multiple_choice',
        'doc_to_text': '{{ctx}}', 'doc_to_choice': '{{endings}}', 'doc_to_target': '{{label}}',
        'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
    }  # fmt: skip
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere):
        model = HFLM(pretrained=str(scratch / 'model'), device='cpu', batch_size=64, dtype='float32')

    def once() -> dict[str, float]:
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere):
            found: Any = lm_eval.simple_evaluate(
                model, tasks=[dict(task)], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
            )
        return {metric: found['results']['hellaswag'][f'{metric},none'] for metric in ('acc', 'acc_norm')}

    return once
