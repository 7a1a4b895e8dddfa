"""What is said in a conversation, and by whom: checked before a format makes ids of it."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side says.

    Attributes:
      role: 'system', 'user' or 'assistant'; in Llama 3 also 'tool' (or 'ipython'), what a tool answered.
      content: the text; spaces around it do not count.
      python_tag: an assistant's call of the code interpreter, which begins with <|python_tag|> (Llama 3.1).
      end_of_turn: False where the assistant goes on after a tool's answer, with <|eom_id|> at the end (Llama 3.1).
      input: what an instruction is about. Alpaca sets it apart; elsewhere it stands below the content.
      is_cut: an answer, the last message, that was broken off: nothing that ends an answer stands behind it.
    """

    role: str
    content: str
    python_tag: bool = False
    end_of_turn: bool = True
    input: str = ''
    is_cut: bool = False


Dialog = Sequence[Message | Mapping[str, Any]]  # mappings have the keys of Message


def check_messages(messages: Dialog, roles: tuple[str, ...], fold_input: bool = True) -> list[Message]:
    """Messages with their fields checked; a tool's role is spelled as Llama 3 spells it.

    Args:
      messages: of a conversation.
      roles: that the format has.
      fold_input: whether what an instruction is about goes below it.

    Raises:
      InputError: names the message and what is wrong with it.
    """
    found = []
    kinds = {
        'role': str,
        'content': str,
        'python_tag': bool,
        'end_of_turn': bool,
        'input': str,
        'is_cut': bool,
    }
    for number, message in enumerate(messages):
        given: dict[str, Any] = dict(vars(message) if isinstance(message, Message) else message)
        if not {'role', 'content'} <= given.keys() <= kinds.keys():
            raise InputError(
                f'message {number} has the keys {", ".join(map(str, given))}; it needs role and content, and '
                'may have python_tag, end_of_turn, input and is_cut'
            )
        for key, value in given.items():
            if not isinstance(value, kinds[key]):
                raise InputError(f'message {number}: {key} is {value!r}, which is no {kinds[key].__name__}')
        (given['role'],) = check_roles([given['role']], roles, f'message {number}: role')
        if fold_input and (about := given.pop('input', '')):
            given['content'] = f'{given["content"]}\n\n{about}'
        found.append(Message(**given))
    if not found:
        raise InputError('the conversation holds no message; it needs at least one by the user')
    for number, message in enumerate(found):
        if message.is_cut and (number < len(found) - 1 or message.role != 'assistant'):
            raise InputError(
                f'message {number} ({message.role}) is cut; only an answer that ends the conversation may be'
            )
    return found


def check_roles(given: Collection[str], roles: tuple[str, ...], what: str) -> list[str]:
    """Roles as the format spells them; refuses others."""
    named = ['ipython' if role == 'tool' and 'ipython' in roles else role for role in given]
    for role in named:
        if role not in roles:
            raise InputError(f'{what} is {role!r}; this format has {", ".join(roles)}')
    return named


def check_last(messages: Sequence[Message], roles: tuple[str, ...]) -> None:
    """Refuses a conversation that does not end with one of these roles."""
    if messages[-1].role not in roles:
        raise InputError(
            f'the last message is by {messages[-1].role}; it must be by {" or ".join(roles)} '
            + ('to train on' if 'assistant' in roles else 'for the assistant to answer')
        )


def counted(
    messages: Sequence[Message], loss_on: Collection[str], counts: Sequence[bool] | None
) -> list[bool]:
    """Which messages count in the loss: those that `counts` names, or those by a role of `loss_on`."""
    if counts is None:
        return [message.role in loss_on for message in messages]
    if len(counts) != len(messages):
        raise InputError(f'counts has {len(counts)} entries for {len(messages)} messages; give one each')
    return list(map(bool, counts))
