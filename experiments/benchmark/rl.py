"""What answers drawn from a policy, their scores and an iteration of GRPO take, beside Hugging Face's libraries.

Contenders take turns, as in the suite `finetune`; all have random weights of one shape. `--rl_parts` chooses among

    rollouts  new tokens a second of 8 samples to each of 8 prompts: ours, `generate` of transformers
    prefix    the same with prompts four times as long as answers: a prompt read once, or for each of its answers
    scoring   answers a second that a reward model scores: ours, transformers' sequence classification of padded rows
    grpo      iterations a second of GRPO: ours, TRL's `GRPOTrainer`; and the share of one that the sampler's copy takes
    memory    the peak of processes with adapters: PPO (policy, reference, values, judge on one base) beside SFT
    phases    of an iteration of GRPO with adapters, in bf16 where there is an accelerator: seconds of each, the rollout
              beside plain decoding of the same answers, the update beside SFT's; not among the default ones
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import launch
from experiments.benchmark import rl_peers as peers
from experiments.benchmark import rl_turns as turns
from experiments.benchmark.rl_phases import measure_phases
from experiments.benchmark.rl_turns import Size
from experiments.benchmark.turns import Contender, compare, of, ratio
from experiments.run.config_file import split_list
from experiments.run.settings import find_preset
from llama_jax.errors import InputError

_MODEL = flags.DEFINE_string('rl_model', 'stories_15m', 'a preset')
_PARTS = flags.DEFINE_string('rl_parts', 'rollouts,prefix,scoring,grpo,memory', 'what is measured, in order')
_LAYERS = flags.DEFINE_integer('rl_layers', 0, "of the model in `phases`; 0: the preset's", lower_bound=0)
_ROUNDS = flags.DEFINE_integer('rl_rounds', 3, 'turns that each contender takes', lower_bound=1)
_PROMPT = flags.DEFINE_integer('rl_prompt', 64, 'tokens of a prompt', lower_bound=8)
_ANSWER = flags.DEFINE_integer('rl_answer', 64, 'tokens of an answer', lower_bound=4)
_PROMPTS = flags.DEFINE_integer('rl_prompts', 8, 'prompts of an iteration', lower_bound=1)
_SAMPLES = flags.DEFINE_integer('rl_samples', 8, 'answers to each', lower_bound=2)
_SCRATCH = launch.define_path('rl_scratch', '', "folder for its files; '': the system's")


def main() -> Iterator[dict[str, Any]]:
    """The figures, more with each part."""
    chosen = split_list(_PARTS.value)
    if unknown := [part for part in chosen if part not in PARTS]:
        raise InputError(f'--rl_parts has {unknown[0]!r}; there are {", ".join(PARTS)}')
    if _LAYERS.value and {*chosen} != {'phases'}:
        raise InputError(
            f'--rl_layers is of --rl_parts=phases alone, not of {_PARTS.value}: others have the preset as it is'
        )
    config = find_preset(_MODEL.value)
    config = dataclasses.replace(config, num_layers=_LAYERS.value or config.num_layers)
    size = Size(config, _PROMPTS.value, _SAMPLES.value, _PROMPT.value, _ANSWER.value)
    figures: dict[str, Any] = {'model': _MODEL.value, **dataclasses.asdict(size), 'rounds': _ROUNDS.value}
    del figures['config']
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value or None) as folder:
        for part in chosen:
            figures |= PARTS[part](size, _MODEL.value, _ROUNDS.value, Path(folder))
            yield figures


def rollouts(size: Size, model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """New tokens a second, and how many times transformers'."""
    del model, folder
    contenders = {
        'ours': Contender(functools.partial(turns.drawing, size), size.new_tokens),
        'transformers': Contender(functools.partial(peers.drawing, size), size.new_tokens, is_peer=True),
    }
    rates = compare('rollouts', 'new tokens/s', contenders, rounds)
    figures = of('rollouts', rates)
    return figures | (
        ratio('rollouts_to_transformers', rates, 'ours', 'transformers') if 'transformers' in rates else {}
    )


def prefix(size: Size, model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """New tokens a second behind long prompts, which are read once or for each answer."""
    del model, folder
    long = dataclasses.replace(size, prompt=4 * size.answer)
    contenders = {
        'once': Contender(functools.partial(turns.drawing, long), long.new_tokens),
        'each': Contender(functools.partial(turns.drawing, long, together=False), long.new_tokens),
    }
    rates = compare('prefix', 'new tokens/s', contenders, rounds)
    return of('prefix', rates) | ratio('prefix_once_to_each', rates, 'once', 'each')


def scoring(size: Size, model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Answers a second."""
    del model, folder
    answers = turns.random_answers(size)
    contenders = {
        'ours': Contender(functools.partial(turns.scoring, size, answers), len(answers)),
        'transformers': Contender(
            functools.partial(peers.scoring, size, answers), len(answers), is_peer=True
        ),
    }
    rates = compare('scoring', 'answers/s', contenders, rounds)
    figures = of('scoring', rates)
    return figures | (
        ratio('scoring_to_transformers', rates, 'ours', 'transformers') if 'transformers' in rates else {}
    )


def grpo(size: Size, model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Iterations a second of one update each."""
    seconds: list[float] = []
    contenders = {
        'ours': Contender(functools.partial(turns.grpo, size, model, folder / 'grpo', seconds), 1),
        'trl': Contender(functools.partial(peers.grpo, size, folder / 'trl'), 1, is_peer=True),
    }
    rates = compare('grpo', 'iterations/s', contenders, rounds)
    share = sum(seconds[1:]) * rates['ours'][-1].clock / max(1, len(seconds) - 1)
    print(f"the sampler's copy takes {share:.1%} of an iteration", flush=True)
    figures = of('grpo', rates) | {'grpo_share_of_copy': share}
    return figures | (ratio('grpo_to_trl', rates, 'ours', 'trl') if 'trl' in rates else {})


def memory(size: Size, model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Peaks of two commands."""
    del rounds
    peaks = turns.peaks(size, model, folder / 'memory')
    print(', '.join(f'{name}: peak {peak / 1e6:,.0f} MB' for name, peak in peaks.items()), flush=True)
    figures: dict[str, Any] = {f'memory_{name}_mb': round(peak / 1e6) for name, peak in peaks.items()}
    return figures | {'memory_ppo_to_sft': peaks['ppo'] / peaks['sft']}


def phases(size: Size, model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """See `rl_phases`."""
    del model
    return measure_phases(size, rounds, folder)


PARTS: dict[str, Callable[[Size, str, int, Path], dict[str, Any]]] = {
    'rollouts': rollouts, 'prefix': prefix, 'scoring': scoring, 'grpo': grpo, 'memory': memory,
    'phases': phases,
}  # fmt: skip
