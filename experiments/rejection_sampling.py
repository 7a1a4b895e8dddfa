"""Draws several answers to each prompt, scores them, and keeps the best: what `sft` and `dpo` read.

    python -m experiments.rejection_sampling --checkpoint=CKPT --prompts=FILE --rewards=CKPT --output=FILE.jsonl

A record of --prompts has prompt, messages or what else `sft` reads before an answer; what more it holds is handed to
the rewards (`experiments.rewards`). A line of the output has prompt and completion, of --keep=pair chosen and rejected
too; the first line of a prompt has all its candidates with their scores. Beside it FILE.png shows what more samples, or
hotter ones, bring. The same command goes on where it was killed, prompt by prompt.
"""

import contextlib
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath

from experiments import launch
from experiments.candidates import Asked, asked_of, complete, draw_all, from_pool, read_pool
from experiments.checkpoint import DTYPES, dtype_name, open_with_tokenizer
from experiments.config_file import split_list
from experiments.prompt_file import check_output, open_output, parse_shard, write_answers
from experiments.rewards import check_rewards, open_rewards, parse_rewards
from experiments.settings import partitioner_of_flags
from llama_jax import pretrained, runtime
from llama_jax.data.records import Prompted, parse_key_map, read_records
from llama_jax.eval.engine import Engine
from llama_jax.json_file import read_bytes
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.models.unstacked import unstack
from llama_jax.rl.context_distillation import default_preprompts, distilled_lines
from llama_jax.rl.rejection import (
    KEEPS,
    Candidate,
    Curves,
    Keep,
    best_of_n_divergence,
    curves,
    lines_of,
    plot_curves,
)
from llama_jax.rl.rollout import Rollout, Sampling, check_room, rollouts_by_record
from llama_jax.tokenizer.chat_format import FORMATS, chat_format_for
from llama_jax.tokenizer.protocol import required
from llama_jax.types import InputError

_CHECKPOINT = launch.define_path(
    'checkpoint', None, 'the policy: anything that is a Llama, as for generate', required=True
)
_PROMPTS = launch.define_path('prompts', None, 'files of records to answer, by commas', required=True)
_OUTPUT = launch.define_path('output', None, 'the file of what is kept, in JSON Lines', required=True)
_REWARDS = launch.define_path(
    'rewards', None, 'what answers are scored by, each with =WEIGHT: reward models, task:NAME, FILE.py:function, '
    'helpfulness:CKPT with safety:CKPT, missing_stop, overlong:TOKENS', required=True,
)  # fmt: skip
_SAMPLES = flags.DEFINE_integer('samples', 16, 'answers to a prompt, at each temperature')
_TEMPERATURES = flags.DEFINE_list('temperatures', ['1.0'], 'of the draws, by commas')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'of an answer')
_KEEP = flags.DEFINE_enum('keep', 'best', KEEPS, 'best; best and worst as a pair; all from --threshold on')
_THRESHOLD = flags.DEFINE_float('threshold', None, 'with --keep=threshold: the least score')
_POOL = launch.define_path(
    'pool',
    '',
    'earlier outputs, by commas, of this or other checkpoints: their candidates are scored anew and join',
)
_PREPROMPTS = launch.define_path(
    'preprompts',
    '',
    'context distillation: a file of texts, a line each, or default: answers are drawn behind each and learnt without',
)
_CHAT_FORMAT = flags.DEFINE_enum(
    'chat_format',
    '',
    ['', *FORMATS],
    "how a conversation is spelled, as --config.data.format of sft; '': the family's",
)
_KEY_MAP = flags.DEFINE_string('key_map', '', 'keys of --prompts, OURS=THEIRS by commas, as prompt=question')
_SHARD = flags.DEFINE_string('shard', '0/1', 'which part of the prompts, for several commands: 0/4 to 3/4')
_SEED = flags.DEFINE_integer('seed', 0, 'of the draws')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 64, 'answers that are drawn together', lower_bound=1)
_ALLOW_CODE = flags.DEFINE_boolean(
    'allow_code_execution', False, 'task: may run generated programs, in a sandbox'
)
_TOKENIZER = launch.define_path('tokenizer', '', "tokenizer file, instead of the checkpoint's own")
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU')
_MESH = flags.DEFINE_list(
    'mesh', ['fsdp=-1'], 'sizes of the axes data, fsdp, context, tensor; -1: the other devices'
)
_AXIS_RULES = flags.DEFINE_string('axis_rules', '', "overrides such as 'kv_heads=' (replicate)")
launch.define_processes()

logger = logging.getLogger('llama_jax.rejection_sampling')


def main() -> None:
    """Refuses, loads, draws and scores prompt by prompt, writes."""
    runtime.enable_compilation_cache()
    with runtime.refused_by_all():
        names = ('samples', 'temperatures', 'max_new_tokens', 'batch_size', 'threshold', 'shard')
        with launch.flags_named(*(f'--{name}' for name in names)):
            temperatures = _temperatures(_TEMPERATURES.value)
            sampling = Sampling(
                temperatures[0], _MAX_NEW_TOKENS.value, _SAMPLES.value, _BATCH_SIZE.value, temperatures[1:]
            )
            keep, shard = Keep(_KEEP.value, _THRESHOLD.value), parse_shard(_SHARD.value)
        with launch.flags_named('--rewards', '--allow_code_execution'):
            terms = parse_rewards(_REWARDS.value)
            check_rewards(terms, _ALLOW_CODE.value)
        with launch.flags_named('--output'):
            if runtime.is_main_process():
                check_output(_OUTPUT.value)
        with launch.flags_named('--prompts', '--key_map'):
            records = list(
                read_records(split_list(_PROMPTS.value), kind=Prompted, key_map=parse_key_map(_KEY_MAP.value))
            )
        with launch.flags_named('--pool'):
            pool = read_pool(split_list(_POOL.value))
        with launch.flags_named('--preprompts'):
            preprompts = read_preprompts(_PREPROMPTS.value)
        if preprompts and (keep.kind == 'threshold' or pool):
            raise InputError(
                f'--preprompts={_PREPROMPTS.value} keeps what scores above the answers without them; give neither '
                '--keep=threshold nor --pool beside it'
            )
        partitioner = partitioner_of_flags(_MESH.value, _AXIS_RULES.value)
    dtype = DTYPES[dtype_name(_DTYPE.value)]
    with launch.flags_named('--checkpoint', '--tokenizer'):
        opened = open_with_tokenizer(_CHECKPOINT.value, _TOKENIZER.value)
        tokenizer = required(
            pretrained.load_tokenizer(_TOKENIZER.value) if _TOKENIZER.value else opened.tokenizer
        )
        model = LlamaForCausalLM(opened.config, dtype=dtype, partitioner=partitioner)
    with launch.flags_named('--mesh', '--axis_rules'):
        partitioner.tree_shardings(*abstract_params_and_axes(model))  # before anything is loaded
    with launch.flags_named('--chat_format'):
        chat_format = chat_format_for(tokenizer, _CHAT_FORMAT.value)
    with launch.flags_named('--prompts', '--preprompts'):
        asked = asked_of(records, chat_format, shard, preprompts)
    everything = [ids for one in asked for ids in (one.ids, *(ids for _, ids in one.behind))]
    with launch.flags_named('--prompts', '--max_new_tokens'):
        check_room(everything, sampling.max_new_tokens, opened.config.max_seq_len)
    with launch.flags_named('--checkpoint', '--tokenizer'):
        _, params, _ = pretrained.load(
            opened, partitioner=partitioner, dtype=jnp.dtype(dtype), tokenizer=_TOKENIZER.value
        )
    fingerprint = Engine(model, params, tokenizer).fingerprint
    weights = unstack(params, dtype, delete=True)
    with launch.flags_named('--rewards'):
        judges = open_rewards(
            terms, tokenizer=tokenizer, max_new_tokens=sampling.max_new_tokens, partitioner=partitioner, dtype=dtype,
            allow_code=_ALLOW_CODE.value, whitened=False,
        )  # fmt: skip
    stop_ids = tuple(sorted({*tokenizer.stop_ids, *chat_format.stop_ids}))
    header = {
        'model': fingerprint, 'prompts': _hash([[*map(vars, one.messages)] for one in records]),
        'records': _hash([one.fields for one in records]), 'pool': _hash(sorted(pool.items())),
        'preprompts': list(preprompts), 'shard': _SHARD.value, 'rewards': judges.identity,
        'temperatures': list(temperatures), 'samples': sampling.samples,
        'max_new_tokens': sampling.max_new_tokens, 'batch_size': sampling.num_slots, 'seed': _SEED.value,
        'chat_format': _CHAT_FORMAT.value, 'stop_ids': list(stop_ids),
    }  # fmt: skip
    with contextlib.ExitStack() as at_exit:
        with launch.flags_named('--output'):
            log = at_exit.enter_context(open_output(_OUTPUT.value, header))

        def drawn(some: Sequence[Asked]) -> Iterator[list[Rollout]]:
            draw = functools.partial(
                rollouts_by_record,
                model,
                weights,
                tokenizer,
                sampling=sampling,
                seed=_SEED.value,
                stop_ids=stop_ids,
            )
            return draw_all(some, lambda ids, numbers: draw(ids, records=numbers))

        def joined(one: Asked) -> list[tuple[Rollout, str]]:
            first = len(sampling.temperatures) * (1 + len(one.behind))
            return from_pool(one, pool.get(one.key, []), chat_format, stop_ids, first)

        found = complete(asked, log, judges, sampling, drawn, joined)
        if runtime.is_main_process():
            write(found, asked, keep, _OUTPUT.value)


def _temperatures(given: Sequence[str]) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in given)
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(1e-6 <= one < math.inf for one in found):
        raise InputError(
            f'temperatures are {",".join(given)!r}; write different numbers above 0 by commas, as in 0.7,1.0,1.3'
        )
    return found


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_preprompts(path: str) -> tuple[str, ...]:
    """The lines of a file, or `default_preprompts`; () where none is named."""
    if path in ('', 'default'):
        return default_preprompts() if path else ()
    found = tuple(
        filter(None, map(str.strip, read_bytes(epath.Path(path)).decode('utf-8', 'replace').splitlines()))
    )
    if not found or len(set(found)) < len(found):
        raise InputError(f'{path} has {len(found)} preprompts; give different texts, a line each')
    return found


def write(found: dict[int, list[Candidate]], asked: Sequence[Asked], keep: Keep, output: str) -> None:
    """The file, the plot, and what is said of them."""
    lines, num_without = [], 0
    for one in asked:
        lines_from = distilled_lines if one.behind else lines_of
        kept = lines_from(one.record['prompt'], found[one.index], keep)
        num_without += not kept
        lines += [json.dumps({'index': one.index, **line}) for line in kept]
    curve = curves([found[one.index] for one in asked])
    if curve:
        plot_curves(epath.Path(output).with_suffix('.png'), curve)
    write_answers(output, lines)
    print(describe([found[one.index] for one in asked], len(lines), num_without, curve, keep))
    if not lines:
        logger.warning('%s is empty: nothing of %d prompts is kept', output, len(asked))


def describe(
    prompts: Sequence[Sequence[Candidate]], num_lines: int, num_without: int, curve: Curves | None, keep: Keep
) -> str:
    """As people read it."""
    everyone = [one for candidates in prompts for one in candidates]
    lines = [
        f'{len(prompts)} prompts, {len(everyone)} candidates, {num_lines} kept ({keep.kind}), '
        f'{num_without} prompts without any',
        f'stopped {np.mean([one.stopped for one in everyone]):.1%}, '
        f'mean tokens {np.mean([one.num_tokens for one in everyone]):.1f}',
    ]
    for name in everyone[0].scores:
        lines.append(f'  {name}: mean {np.mean([one.scores[name] for one in everyone]):.4f}')
    if curve:
        lines.append(f'{"temperature":>12}{"N":>6}{"median":>12}{"best":>12}{"KL at most":>12}')
        lines += [
            f'{temperature:12g}{n:6d}{curve.median[row, column]:12.4f}{curve.best[row, column]:12.4f}'
            f'{best_of_n_divergence(n):12.3f}'
            for row, temperature in enumerate(curve.temperatures)
            for column, n in enumerate(curve.numbers)
        ]
    return '\n'.join(lines)


if __name__ == '__main__':
    launch.run(main)
