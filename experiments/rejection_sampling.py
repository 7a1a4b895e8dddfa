"""Draws several answers to each prompt, scores them, and keeps the best: what `sft` and `dpo` read.

    python -m experiments.rejection_sampling --checkpoint=CKPT --prompts=FILE --rewards=CKPT --output=FILE.jsonl

A record of --prompts has prompt, messages or what else `sft` reads before an answer; what more it holds is handed to
the rewards (`experiments.policy.rewards`). A line of the output has prompt and completion, of --keep=pair chosen and
rejected too; the first line of a prompt has all its candidates with their scores. Beside it FILE.png shows what more
samples, or hotter ones, bring. The same command goes on where it was killed, prompt by prompt.
"""

import contextlib
import json
import logging
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from experiments import launch
from experiments.policy.candidates import Asked, asked_of, complete, from_pool, read_pool
from experiments.policy.sampled import SampledPolicy, define_sampled_policy, hash_of, plot_beside, request_of
from experiments.prompting.prompt_file import open_output, write_answers
from experiments.run.config_file import split_list
from llama_jax import runtime
from llama_jax.data.record_kinds import Prompted
from llama_jax.data.records import parse_key_map, read_records
from llama_jax.errors import InputError
from llama_jax.json_file import read_bytes
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
from llama_jax.rl.rollout import Rollout

_POLICY = define_sampled_policy()
_PROMPTS = launch.define_path('prompts', None, 'files of records to answer, by commas', required=True)
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

logger = logging.getLogger('llama_jax.rejection_sampling')


def main() -> None:
    """Refuses, loads, draws and scores prompt by prompt, writes."""
    runtime.enable_compilation_cache()
    given = _POLICY.value
    with runtime.refused_by_all():
        request = request_of(given)
        with launch.flags_named('--threshold'):
            keep = Keep(_KEEP.value, _THRESHOLD.value)
        with launch.flags_named('--prompts', '--key_map'):
            key_map = parse_key_map(given['key_map'])
            records = list(read_records(split_list(_PROMPTS.value), kind=Prompted, key_map=key_map))
        with launch.flags_named('--pool'):
            pool = read_pool(split_list(_POOL.value))
        with launch.flags_named('--preprompts'):
            preprompts = read_preprompts(_PREPROMPTS.value)
        if preprompts and (keep.kind == 'threshold' or pool):
            raise InputError(
                f'--preprompts={_PREPROMPTS.value} keeps what scores above the answers without them; give neither '
                '--keep=threshold nor --pool beside it'
            )
    policy = SampledPolicy(request)
    with launch.flags_named('--prompts', '--preprompts'):
        asked = asked_of(records, policy.chat_format, request.shard, preprompts)
    with launch.flags_named('--prompts', '--max_new_tokens'):
        policy.check_room([ids for one in asked for ids in (one.ids, *(ids for _, ids in one.behind))])
    header = policy.load() | {
        'prompts': hash_of([[*map(vars, one.messages)] for one in records]),
        'records': hash_of([one.fields for one in records]), 'pool': hash_of(sorted(pool.items())),
        'preprompts': list(preprompts),
    }  # fmt: skip
    with contextlib.ExitStack() as at_exit:
        with launch.flags_named('--output'):
            log = at_exit.enter_context(open_output(given['output'], header))

        def joined(one: Asked) -> list[tuple[Rollout, str]]:
            first = len(request.sampling.temperatures) * (1 + len(one.behind))
            return from_pool(one, pool.get(one.key, []), policy.chat_format, first)

        found = complete(asked, log, policy.judges, request.sampling, policy.drawn, joined)
        if runtime.is_main_process():
            write(found, asked, keep, given['output'])


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
        plot_curves(plot_beside(output), curve)
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
        f'{num_without} prompts without any'
    ]
    if not everyone:
        return lines[0]
    lines += [
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
