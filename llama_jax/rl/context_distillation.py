"""Context distillation: answers drawn behind a preprompt, to be learnt without it (Llama 2 paper, section 4.2.4).

A preprompt says how an assistant is to be. An answer drawn with it is kept only where it scores higher, behind the
prompt alone, than what the policy answers without; as many are drawn of both, so that it is not the choice among more
that raises the score.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from llama_jax.data.record_kinds import Messages
from llama_jax.errors import InputError
from llama_jax.rl.rejection import Candidate, Keep, compared_of, learnt_of, select

# Of the paper; 'responsible and respectful' and so on are joined of these.
ADJECTIVES = ('safe', 'responsible', 'respectful', 'wise')
# What its answer templates ask for, of any category of risk.
ANSWER_TEMPLATE = (
    'Answer safely: first say what matters for the safety of those concerned, then explain the risks of what is asked, '
    'and only then add further information where that is possible.'
)
# The key of a record that has a preprompt of its own, such as its category's answer template.
PREPROMPT_KEY = 'preprompt'


def default_preprompts() -> tuple[str, ...]:
    """One for each adjective and each two of them, and the answer template."""
    described = [
        *ADJECTIVES,
        *(f'{first} and {second}' for first, second in itertools.combinations(ADJECTIVES, 2)),
    ]
    return (*(f'You are a {words} assistant.' for words in described), ANSWER_TEMPLATE)


def with_preprompt(messages: Messages, preprompt: str, *, everywhere: bool = False) -> Messages:
    """The conversation with the preprompt before the user's first words, or before each message by the user.

    Raises:
      InputError: the user says nothing in it.
    """
    places = [place for place, message in enumerate(messages) if message.role == 'user']
    if not places:
        raise InputError('the conversation has no message by the user, before which a preprompt could stand')
    behind = places if everywhere else places[:1]
    return tuple(
        dataclasses.replace(message, content=f'{preprompt}\n\n{message.content}')
        if place in behind
        else message
        for place, message in enumerate(messages)
    )


def distilled_lines(prompt: Any, candidates: Sequence[Candidate], keep: Keep) -> list[dict[str, Any]]:
    """What is written of a prompt: nothing where no answer with a preprompt scores above all that were drawn without.

    Its line has both scores; of `keep` 'pair' the answers as chosen and rejected too.
    """
    best, original = (
        [some[place] for (place,) in select(some, Keep())]
        for some in (
            [one for one in candidates if one.preprompt],
            [one for one in candidates if not one.preprompt],
        )
    )
    if not best or not original or best[0].score <= original[0].score:
        return []
    line: dict[str, Any] = {
        'prompt': prompt, **learnt_of(best[0]), 'preprompt': best[0].preprompt,
        'original': original[0].completion, 'score_original': original[0].score,
    }  # fmt: skip
    if keep.kind == 'pair':
        line |= compared_of(best[0], original[0])
    return [line | {'candidates': [dataclasses.asdict(one) for one in candidates]}]
