"""Teaches a chat model to hold to what it was told once: dialogs for `sft`, and the share of answers that obey.

    python -m experiments.ghost_attention --checkpoint=CKPT --prompts=FILE --turns=5 --rewards=CKPT --output=FILE.jsonl
    python -m experiments.ghost_attention --checkpoint=CKPT --prompts=FILE --probe=2,4,6,20 --rewards=FILE.py:obeys \
      --samples=1 --output=FILE.jsonl

Of --prompts dialogs are made of so many records, answered turn by turn; of --dialogs each is answered at its last
turn. The instruction of a dialog, a random combination of --constraints, stands before every message by the user while
answers are drawn, and in the output before the first alone, with the weight of the last answer alone. A probe has it
before the first from the start. The same command goes on where it was killed, answer by answer.
"""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from experiments import launch
from experiments.policy.candidates import Asked, complete
from experiments.policy.ghost_dialogs import Held, held_dialogs, held_prompts
from experiments.policy.sampled import SampledPolicy, define_sampled_policy, hash_of, plot_beside, request_of
from experiments.prompting.prompt_file import open_output, write_answers
from experiments.run.config_file import split_list
from llama_jax import runtime
from llama_jax.data.record_kinds import Conversation, Prompted
from llama_jax.data.records import parse_key_map, read_records
from llama_jax.errors import InputError, refusals_of
from llama_jax.json_file import parse_object, read_bytes
from llama_jax.rl.ghost_attention import Constraint, constraint_of, default_constraints, plot_obedience

_POLICY = define_sampled_policy()
_PROMPTS = launch.define_path('prompts', '', 'files of prompts, by commas, that dialogs are made of')
_DIALOGS = launch.define_path('dialogs', '', 'files of conversations, by commas, as sft reads them')
_TURNS = flags.DEFINE_integer('turns', 0, 'with --prompts: messages by the user in a dialog')
_CONSTRAINTS = launch.define_path(
    'constraints',
    'default',
    'a file of {"constraint", "terse", "kind"}, in JSON Lines; default: of the paper',
)
_MOST = flags.DEFINE_integer('most', 3, 'constraints in an instruction, of as many kinds', lower_bound=1)
_THRESHOLD = flags.DEFINE_float('threshold', 0.5, 'the least score of an answer that is kept, or obeys')
_PROBE = flags.DEFINE_list('probe', [], 'turns, by commas, whose share of obeying answers is told')


def main() -> None:
    """Refuses, loads, draws and scores turn by turn, writes."""
    runtime.enable_compilation_cache()
    given = _POLICY.value
    with runtime.refused_by_all():
        request = request_of(given, plots=bool(_PROBE.value))
        probed = _probed(_PROBE.value, _PROMPTS.value, given['samples'])
        turns = max(probed, default=_TURNS.value)
        if bool(_PROMPTS.value) == bool(_DIALOGS.value) or bool(_PROMPTS.value) != (turns > 0):
            raise InputError(
                f'--prompts={_PROMPTS.value} --dialogs={_DIALOGS.value} --turns={turns}: give --prompts with the '
                '--turns of a dialog, at least 1, or --dialogs without'
            )
        with launch.flags_named('--constraints'):
            constraints = read_constraints(_CONSTRAINTS.value)
        with launch.flags_named('--prompts', '--dialogs', '--key_map'):
            key_map = parse_key_map(given['key_map'])
            chosen = {'constraints': constraints, 'most': _MOST.value, 'seed': given['seed']}
            if _PROMPTS.value:
                prompts = list(read_records(split_list(_PROMPTS.value), kind=Prompted, key_map=key_map))
                held = held_prompts(prompts, turns, **chosen)
            else:
                dialogs = list(read_records(split_list(_DIALOGS.value), kind=Conversation, key_map=key_map))
                held, turns = held_dialogs(dialogs, **chosen), 1
    policy = SampledPolicy(request)
    mine = [one for one in held if one.index % request.shard[1] == request.shard[0]]

    def ask(turn: int) -> list[tuple[Held, Asked]]:
        with launch.flags_named('--prompts', '--dialogs', '--turns', '--probe', '--max_new_tokens'):
            left = [one for one in mine if not one.is_over]
            asked = [one.ask(turn, turns, policy.chat_format, everywhere=not probed) for one in left]
            policy.check_room([one.ids for one in asked])
        return list(zip(left, asked, strict=True))

    ask(0)
    header = policy.load() | {
        'dialogs': hash_of([[one.instruction.text, one.said, one.fields] for one in held]), 'turns': turns,
        'probed': bool(probed), 'constraints': hash_of([one.fields for one in constraints]),
    }  # fmt: skip
    lines: list[dict[str, Any]] = []
    obeying = np.zeros(turns)
    with contextlib.ExitStack() as at_exit:
        with launch.flags_named('--output'):
            log = at_exit.enter_context(open_output(given['output'], header))
        for turn in range(turns):
            both = ask(turn)
            asked = [one for _, one in both]
            found = complete(asked, log, policy.judges, request.sampling, policy.drawn, lambda _: [])
            for one, what in both:
                best = one.take(what, found[what.index])
                obeys = best is not None and best.score >= _THRESHOLD.value
                obeying[turn] += obeys / len(mine)
                if best is not None and (obeys or probed):
                    lines.append(one.line(what, best, found[what.index]))
        if runtime.is_main_process():
            shown = {turn: float(obeying[turn - 1]) for turn in probed or range(1, turns + 1)}
            if probed and mine:
                plot_obedience(plot_beside(given['output']), shown)
            lines.sort(key=lambda line: line['index'])
            write_answers(given['output'], [json.dumps(line) for line in lines])
            print(describe(shown, mine, len(lines)))


def _probed(given: Sequence[str], prompts: str, samples: int) -> list[int]:
    if any(not one.strip().isdecimal() or int(one) < 1 for one in given):
        raise InputError(f'--probe is {",".join(given)}; write numbers of turns by commas, as in 2,4,6,20')
    if given and (not prompts or samples != 1):
        raise InputError(
            f'--probe={",".join(given)} tells what one answer a turn does, of dialogs made of prompts; give it '
            f'--prompts, and --samples=1 in the place of {samples}'
        )
    return sorted(map(int, given))


def read_constraints(path: str) -> tuple[Constraint, ...]:
    """The records of a file, or `default_constraints`."""
    if path == 'default':
        return default_constraints()
    lines, found = read_bytes(epath.Path(path)).decode('utf-8', 'replace').splitlines(), []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with refusals_of(f'{path} line {number}'):
                found.append(constraint_of(parse_object(line, f'{path} line {number}')))
    if not found:
        raise InputError(f'{path} has no constraint; give it a line {{"constraint": TEXT}} for each')
    return tuple(found)


def describe(shown: dict[int, float], held: Sequence[Held], num_lines: int) -> str:
    """As people read it."""
    if not held:
        return '0 dialogs'
    terse = np.mean([one.instruction.is_terse for one in held])
    lines = [f'{len(held)} dialogs, {terse:.0%} with a terse instruction, {num_lines} answers written']
    rows = (f'{turn:6d}{share:10.1%}' for turn, share in shown.items())
    return '\n'.join([*lines, f'{"turn":>6}{"obeying":>10}', *rows])


if __name__ == '__main__':
    launch.run(main)
