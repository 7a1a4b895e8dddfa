"""Writes all data that a chat model of the small world is made of (`recipes.small_world`).

    python -m experiments.recipes.small_data --output=DIR

writes text.txt to pretrain on; sft.jsonl and held_out.jsonl, conversations, the latter as .txt too; helpful.jsonl and
safety.jsonl, pairs with ratings; prompts.jsonl, adversarial.jsonl and, held out, judged.jsonl, prompts;
constraints.jsonl. All follow from the seed alone. An instruction is obeyed in the turn that it stands in, and then
forgotten.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import launch
from experiments.recipes.small_world import (
    CONSTRAINTS,
    MANNERS,
    NAMES,
    SAFE,
    SAFE_BEHIND,
    SOUNDS,
    THINGS,
    Question,
    answer_to,
    gold,
    is_held_out,
    obeying,
    questions,
    safety,
)
from llama_jax.errors import InputError
from llama_jax.rl.context_distillation import default_preprompts

_OUTPUT = launch.define_path('output', None, 'folder of the files, which must not be there', required=True)
_SEED = flags.DEFINE_integer('seed', 0, 'of all that is drawn')
_SIZE = flags.DEFINE_integer('size', 1500, 'conversations, and pairs of each kind', lower_bound=20)


def conversation(
    rng: np.random.Generator, asked: Sequence[Question], answer: Callable[..., str] = answer_to
) -> list[dict[str, str]]:
    """Of one to five turns, in each of which an instruction may stand, or a preprompt before what is adversarial."""
    messages = []
    for _ in range(rng.integers(1, 6)):
        question, said, words, safe = asked[int(rng.integers(len(asked)))], '', [], SAFE
        if rng.random() < 0.4:
            kinds = [SOUNDS, MANNERS][slice(*((0, 1), (1, 2), (0, 2))[int(rng.integers(3))])]
            words = [str(rng.choice(kind)) for kind in kinds][:: int(rng.choice([1, -1]))]
            chosen = [next(one for one in CONSTRAINTS if one['word'] == word) for word in words]
            key, between = (('terse', ', '), ('constraint', ' '))[rng.integers(2)]
            said = between.join(one[key] for one in chosen)
        elif not question.place and rng.random() < 0.5:
            said, safe = str(rng.choice(default_preprompts())), SAFE_BEHIND
        text = f'{said}\n\n{question.text}' if said else question.text
        messages.append({'role': 'user', 'content': text})
        messages.append({'role': 'assistant', 'content': obeying(answer(rng, question, safe=safe), words)})
    return messages


def pair(rng: np.random.Generator, question: Question) -> dict[str, Any] | None:
    """Two answers with the rating that their gold scores are worth; None where these are equal."""
    told = rng.random(2)
    answers = [answer_to(rng, question, told=one, safe=0.5) for one in told]
    if rng.random() < 0.3:  # what no demonstrator says, as a policy may
        answers[1] = str(rng.choice([
            answers[1].replace(question.name, str(rng.choice(NAMES))), 2 * answers[1],
            answers[1].removesuffix('.'), f' {question.name} can grab a {rng.choice(THINGS)} and run.',
        ]))  # fmt: skip
    scores = [gold('', one, question.record) for one in answers]
    if scores[0] == scores[1]:
        return None
    better = int(scores[1] > scores[0])
    rating = ('slightly better', 'better', 'significantly better')[
        min(3, int(abs(scores[0] - scores[1]))) - 1
    ]
    safe = [safety('', one, question.record) > 0 for one in answers]
    return {
        'prompt': question.text, 'chosen': answers[better], 'rejected': answers[1 - better], 'rating': rating,
        'chosen_safe': safe[better], 'rejected_safe': safe[1 - better],
    }  # fmt: skip


def write(folder: pathlib.Path, seed: int = 0, size: int = 1500) -> None:
    """All files; `size` conversations, and as many pairs of each kind."""
    rng = np.random.default_rng(seed)
    seen, taken = questions()
    trained, held_out = (
        [one for some in (seen, taken) for n, one in enumerate(some) if is_held_out(n) == held]
        for held in (False, True)
    )
    talks = [{'messages': conversation(rng, trained)} for _ in range(size)]
    files = {
        'sft': talks,
        'held_out': [{'messages': conversation(rng, held_out)} for _ in range(max(1, size // 20))],
        'prompts': [one.record for one in trained],
        'adversarial': [one.record for one in trained if not one.place],
        'judged': [one.record for one in held_out],
        'constraints': CONSTRAINTS,
    }
    for name, adversarial in (('helpful', False), ('safety', True)):
        asked = [one for one in trained if bool(one.place) != adversarial or rng.random() < 0.1]
        found = (pair(rng, asked[int(rng.integers(len(asked)))]) for _ in range(2 * size))
        files[name] = [one for one in found if one][:size]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    for name, records in (('text', talks), ('held_out', files['held_out'])):
        texts = [
            ''.join(one['content'] + '\n' * (one['role'] == 'assistant') for one in talk['messages'])
            for talk in records
        ]
        (folder / f'{name}.txt').write_text('\n<|endoftext|>\n'.join(texts))


def main() -> None:
    """Writes them, with nothing else in their folder."""
    folder = pathlib.Path(_OUTPUT.value)
    if folder.exists():
        raise InputError(f'--output={folder} is there already; remove it, or write to another place')
    write(folder, _SEED.value, _SIZE.value)


if __name__ == '__main__':
    launch.run(main, find=False)
