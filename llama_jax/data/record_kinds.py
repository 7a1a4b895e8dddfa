r"""What a record to fine-tune on is read as: a conversation, a pair, a judged answer, a prompt; told by its keys.

    conversation   messages (role, content, tools, tool_calls, weight) | conversations (from, value) |
                   instruction, output (input, system, history) | prompt, completion
    preference     prompt, conversations or instruction (input, history), chosen, rejected |
                   chosen, rejected with the prompt inside both | input, preferred_output, non_preferred_output |
                   prompt, response_1, response_2, preference_strength
    judged         prompt, completion, label
    prompted       prompt | messages | conversations | instruction (input), with anything else beside it

An answer that was drawn and cut at its most tokens has "stopped": false beside it, of a pair "chosen_stopped" or
"rejected_stopped": no stop token is learnt behind it.

A text with the turns of hh-rlhf ('\n\nHuman: ... \n\nAssistant: ...') is the messages that it spells.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from llama_jax.data.messages import (
    first_difference,
    one_or_more_messages,
    prompt_messages,
    read_conversation,
    with_beside,
    with_end,
)
from llama_jax.errors import InputError
from llama_jax.json_file import show_json
from llama_jax.tokenizer.chat_format import Message

Messages = tuple[Message, ...]

# Llama 2 paper, Table 27: what a rating is worth at most; its small margins are a third of these.
RATINGS = {
    'significantly better': 3.0,
    'better': 2.0,
    'slightly better': 1.0,
    'negligibly better': 0.0,
    'negligibly better / unsure': 0.0,
    'unsure': 0.0,
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is trained on as it is.

    Attributes:
      messages: the last by the assistant.
      counts: which of them are to be learnt.
      place: the file and record that it is from.
    """

    messages: Messages
    counts: tuple[bool, ...]
    place: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers of which one is better.

    Attributes:
      prompt: ends before the answer.
      chosen: the better answer; one message, or several where tools are called.
      rejected: the other.
      margin: by how much, in the unit of the data: a rating's (`RATINGS`), a difference of scores; None: not said.
      safe: whether each of the two is safe (`chosen_safe`, `rejected_safe`); None: not said.
      place: the file and record that it is from.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None = None
    safe: tuple[bool | None, bool | None] = (None, None)
    place: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class Judged:
    """One answer, good or bad.

    Attributes:
      prompt: ends before the answer.
      completion: the answer.
      label: whether it is good.
      place: the file and record that it is from.
    """

    prompt: Messages
    completion: Messages
    label: bool
    place: str = dataclasses.field(default='', compare=False)


@dataclasses.dataclass(frozen=True)
class Prompted:
    """What is to be answered.

    Attributes:
      messages: the last by the user or a tool.
      fields: the whole record, for what judges an answer.
      place: the file and record that it is from.
    """

    messages: Messages
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = dataclasses.field(default='', compare=False)


Kind = TypeVar('Kind', Conversation, Preference, Judged, Prompted)


def _conversation(item: Mapping[str, Any]) -> Conversation:
    if ('chosen' in item or 'preferred_output' in item) and 'completion' not in item:
        raise InputError(
            'it holds a pair to compare, not an answer to learn; to learn the better one read it as completion by a '
            'key map, as prompt=prompt,completion=chosen'
        )
    messages, counts = read_conversation(item)
    if messages[-1].role != 'assistant':
        raise InputError(f'the conversation ends with the {messages[-1].role}; it must end with an answer')
    first = messages[0] if messages[0].role != 'system' or len(messages) == 1 else messages[1]
    if first.role == 'assistant':
        raise InputError('the conversation begins with the assistant; a message by the user must come first')
    for number, (message, count) in enumerate(zip(messages, counts, strict=True)):
        if count and not message.content.strip():
            raise InputError(f'message {number}, an answer to learn, is empty; every answer needs a text')
    if not any(counts):
        raise InputError('no answer of it is to be learnt, for all have weight 0; leave it out')
    return Conversation(with_end(messages, item, 'stopped'), counts)


def _preference(item: Mapping[str, Any]) -> Preference:
    if 'preferred_output' in item or 'non_preferred_output' in item:
        item = _openai(item)
    elif 'preference_strength' in item or 'overall_preference' in item:
        item = _helpsteer(item)
    for key in ('chosen', 'rejected'):
        if not item.get(key):
            what = (
                'is empty' if key in item else f'is missing among the keys {", ".join(map(show_json, item))}'
            )
            raise InputError(f'a pair needs chosen and rejected (or a key map to them): {key} {what}')
    chosen, rejected = (one_or_more_messages(item[key], key) for key in ('chosen', 'rejected'))
    prompt = prompt_messages(item)
    if chosen[0].role != 'assistant':  # the prompt stands in both
        chosen, rejected = (with_beside(one, item) for one in (chosen, rejected))
        end = len(chosen) - 1
        if prompt and prompt != chosen[:end]:
            raise InputError(first_difference(prompt, chosen, 'the prompt', 'chosen'))
        prompt = chosen[:end]
        if rejected[:-1] != prompt:
            raise InputError(first_difference(prompt, rejected, 'chosen', 'rejected'))
        chosen, rejected = chosen[end:], rejected[end:]
    if not prompt:
        raise InputError('it has no prompt: chosen and rejected must begin with one, or a key prompt hold it')
    for name, answer in (('chosen', chosen), ('rejected', rejected)):
        if not answer or {answer[0].role, answer[-1].role} != {'assistant'}:
            raise InputError(
                f'{name} ends with the {(answer or prompt)[-1].role}; it must end with an answer'
            )
        if not answer[-1].content.strip():
            raise InputError(f'{name} is empty; every answer needs a text')
    chosen, rejected = (
        with_end(chosen, item, 'chosen_stopped'),
        with_end(rejected, item, 'rejected_stopped'),
    )
    if chosen == rejected:
        raise InputError(f'chosen and rejected are the same answer, {show_json(chosen[-1].content)}')
    if prompt[-1].role not in ('user', 'tool'):
        raise InputError(f'the prompt ends with the {prompt[-1].role}; it must end with the user')
    safe = item.get('chosen_safe'), item.get('rejected_safe')
    if not all(one is None or isinstance(one, bool) for one in safe):
        raise InputError(f'chosen_safe and rejected_safe are {show_json(safe)}; they are true or false')
    return Preference(prompt, chosen, rejected, _margin(item), safe)


def _openai(item: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's pairs, whose prompt and tools stand in `input`."""
    given = item.get('input')
    within = given if isinstance(given, Mapping) else {}
    asked = {'prompt': within.get('messages'), 'tools': within.get('tools')}
    return {
        **item,
        **{key: value for key, value in asked.items() if value},
        'chosen': item.get('preferred_output'),
        'rejected': item.get('non_preferred_output'),
    }


def _helpsteer(item: Mapping[str, Any]) -> dict[str, Any]:
    """HelpSteer2 and 3: the sign says which answer is better, the size by how much."""
    answers = [item.get(f'response_{i}', item.get(f'response{i}')) for i in (1, 2)]
    strength = item.get('preference_strength', item.get('overall_preference'))
    if not isinstance(strength, int | float) or not strength:
        raise InputError(f'the preference is {show_json(strength)}: a pair needs a loser, so leave ties out')
    better = int(strength > 0)
    return {
        **item,
        'prompt': item.get('prompt', item.get('context')),
        'chosen': answers[better],
        'rejected': answers[1 - better],
        'margin': item.get('margin', item.get('rating', abs(strength))),
    }


def _margin(item: Mapping[str, Any]) -> float | None:
    """What the record says by a key of its own, else by the scores of both answers."""
    given = item.get('margin', item.get('rating'))
    if given is None:
        if not {'score_chosen', 'score_rejected'} <= item.keys():
            return None
        scores = item['score_chosen'], item['score_rejected']
        if not all(isinstance(score, int | float) and np.isfinite(score) for score in scores):
            raise InputError(f'the scores are {show_json(scores)}; they must be numbers')
        return float(scores[0]) - float(scores[1])
    if isinstance(given, str) and given.strip().lower() in RATINGS:
        return RATINGS[given.strip().lower()]
    if isinstance(given, bool) or not isinstance(given, int | float) or not np.isfinite(given):
        raise InputError(f'the margin is {show_json(given)}; it is a number, or one of {", ".join(RATINGS)}')
    return float(given)


def _judged(item: Mapping[str, Any]) -> Judged:
    if not {'prompt', 'completion', 'label'} <= item.keys():
        raise InputError(
            f'it has the keys {", ".join(map(show_json, item))}; it needs prompt, completion and label, or a key map'
        )
    label = item['label']
    if label not in (0, 1):  # booleans among them
        raise InputError(f'label is {show_json(label)}; it is true or false')
    completion = one_or_more_messages(item['completion'], 'completion')
    prompt = prompt_messages(item)
    if not completion[-1].content.strip():
        raise InputError('completion is empty; every answer needs a text')
    if not prompt or prompt[-1].role not in ('user', 'tool'):
        raise InputError('the prompt is empty or does not end with the user')
    return Judged(prompt, with_end(completion, item, 'stopped'), bool(label))


def _prompted(item: Mapping[str, Any]) -> Prompted:
    prompt = prompt_messages(item)
    if not prompt:
        keys = ', '.join(map(show_json, item))
        raise InputError(f'it has the keys {keys}; it needs prompt, messages, conversations or instruction')
    if prompt[-1].role not in ('user', 'tool') or not prompt[-1].content.strip():
        raise InputError(f'the prompt ends with the {prompt[-1].role}; it must end with a text by the user')
    return Prompted(prompt)


READERS: dict[Any, Callable[[Mapping[str, Any]], Any]] = {
    Conversation: _conversation,
    Preference: _preference,
    Judged: _judged,
    Prompted: _prompted,
}
