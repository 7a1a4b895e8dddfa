"""Ghost Attention: an instruction that is given once and obeyed to the end (Llama 2 paper, section 3.3, A.3.5).

Answers are drawn with the instruction before every message by the user, and learnt with it before the first alone. Only
the last answer is learnt: those before it may not obey.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.record_kinds import Messages
from llama_jax.errors import InputError
from llama_jax.rl.context_distillation import with_preprompt
from llama_jax.storage import write_atomically
from llama_jax.tokenizer.chat_format import Message

_KEYS = ('constraint', 'terse', 'kind')
# Of the kinds that the paper names; its lists of hobbies and of people were made by the model itself.
_LANGUAGES = ('French', 'German', 'Italian', 'Spanish', 'Portuguese')
_HOBBIES = ('tennis', 'chess', 'gardening', 'sailing', 'cooking', 'astronomy')
_FIGURES = ('Napoleon', 'Marie Curie', 'Mozart', 'Cleopatra', 'Isaac Newton', 'Jane Austen')


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Something to hold to in every answer.

    Attributes:
      text: as a sentence: 'Always answer in French.'
      terse: as a label: 'language: French'.
      kind: of which an instruction has one at most, such as 'language'.
      fields: the whole record, for what judges an answer.
    """

    text: str
    terse: str
    kind: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """What is asked for.

    Attributes:
      text: of all constraints.
      constraints: in the order of the text.
      is_terse: said by their labels.
    """

    text: str
    constraints: tuple[Constraint, ...]
    is_terse: bool


def default_constraints() -> tuple[Constraint, ...]:
    """Languages, hobbies and public figures."""
    found = [
        *(('language', f'Always answer in {name}.', name) for name in _LANGUAGES),
        *(('hobby', f'You love {name}.', name) for name in _HOBBIES),
        *(('act as', f'Act as {name}.', name) for name in _FIGURES),
    ]
    return tuple(
        Constraint(text, f'{kind}: {name}', kind, {'constraint': text, 'kind': kind})
        for kind, text, name in found
    )


def constraint_of(record: Mapping[str, Any]) -> Constraint:
    """A constraint of {"constraint": TEXT, "terse": TEXT, "kind": TEXT}, with anything else beside them.

    Without `terse` the text stands in its place; without `kind` it is of one by itself, and joins with any other.

    Raises:
      InputError: one of them is no text.
    """
    text = record.get('constraint')
    found = {'constraint': text, 'terse': record.get('terse', text), 'kind': record.get('kind', text)}
    for key in _KEYS:
        if not isinstance(found[key], str) or not found[key].strip():
            raise InputError(f'{key} is {found[key]!r}; it must be a text')
    return Constraint(*[found[key].strip() for key in _KEYS], fields=dict(record))


def instruction_of(constraints: Sequence[Constraint], most: int, seed: int, index: int) -> Instruction:
    """The instruction of a dialog: a random combination, every second one of the list terse.

    Args:
      constraints: to choose from.
      most: constraints in an instruction; of as many kinds, each number equally likely.
      seed: of the choice.
      index: number of the dialog.
    """
    by_kind: dict[str, list[Constraint]] = {}
    for one in constraints:
        by_kind.setdefault(one.kind, []).append(one)
    rng = np.random.default_rng([seed, index])
    number = int(rng.integers(1, min(most, len(by_kind)) + 1))
    kinds = [list(by_kind)[place] for place in rng.permutation(len(by_kind))[:number]]
    chosen = tuple(by_kind[kind][rng.integers(len(by_kind[kind]))] for kind in kinds)
    is_terse = (index + seed) % 2 == 1
    text = ', '.join(one.terse for one in chosen) if is_terse else ' '.join(one.text for one in chosen)
    return Instruction(text, chosen, is_terse)


def learnt(messages: Messages, instruction: str, answer: str) -> list[dict[str, Any]]:
    """Messages with weights as `sft` reads them: the instruction before the first, the last answer alone learnt.

    Raises:
      InputError: the user says nothing in it.
    """
    said = (*with_preprompt(messages, instruction), Message('assistant', answer))
    return [
        {
            'role': message.role,
            'content': f'{message.content}\n\n{message.input}' if message.input else message.content,
            'weight': int(number == len(said) - 1),
        }
        for number, message in enumerate(said)
    ]


def dialogs_of(number: int, turns: int, seed: int) -> list[list[int]]:
    """As many dialogs as prompts: which follow one another in each.

    Each prompt stands once at every turn; none twice in a dialog, where there are as many as turns.
    """
    rng = np.random.default_rng(seed)
    order, shifts = rng.permutation(number).tolist(), rng.permutation(number).tolist()
    return [
        [order[(first + shifts[turn % number]) % number] for turn in range(turns)] for first in range(number)
    ]


def plot_obedience(path: epath.Path, shares: Mapping[int, float]) -> None:
    """Share of obeying answers over the turn: table 30 of the Llama 2 paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout='constrained')
    axes = figure.subplots()
    axes.plot(list(shares), list(shares.values()), marker='o')
    axes.set(xlabel='turn', ylabel='obeying answers', ylim=(-0.05, 1.05), title='an instruction given once')
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    write_atomically(path, data.getvalue())
