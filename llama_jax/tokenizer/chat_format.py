"""Conversations as token ids: the formats that Llama 2-Chat and Llama 3 Instruct were trained with, id for id.

Llama 2's tags are ordinary text around each pair of turns; Llama 3's are special tokens around each message.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side says.

    Attributes:
      role: 'system', 'user' or 'assistant'; in Llama 3 also 'tool' (or 'ipython'), what a tool answered.
      content: the text; spaces around it do not count.
      python_tag: an assistant's call of the code interpreter, which begins with <|python_tag|> (Llama 3.1).
      end_of_turn: False where the assistant goes on after a tool's answer, with <|eom_id|> at the end (Llama 3.1).
      input: what an instruction is about. Alpaca sets it apart; elsewhere it stands below the content.
    """

    role: str
    content: str
    python_tag: bool = False
    end_of_turn: bool = True
    input: str = ''


Dialog = Sequence[Message | Mapping[str, Any]]  # mappings have the keys of Message


@runtime_checkable
class ChatFormat(Protocol):
    """How a conversation becomes ids.

    Attributes:
      stop_ids: any of these ends an answer.
      template: the same as a Jinja template for Hugging Face and GGUF. There, tags within a message count as tags.
    """

    stop_ids: tuple[int, ...]
    template: str

    def encode_prompt(self, messages: Dialog, prefix: str = '') -> list[int]:
        """Ids of a conversation that waits for the assistant.

        Args:
          messages: the last one by the user, or by a tool.
          prefix: what the assistant's answer begins with, to be gone on from.

        Raises:
          InputError: the roles are not in an order that the format has, or a message holds what would read as a tag.
        """
        ...

    def encode_dialog(
        self, messages: Dialog, loss_on: Collection[str] = ('assistant',)
    ) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation to train on, and which of them (1) count in the loss.

        Args:
          messages: the last one by the assistant.
          loss_on: roles whose words count, with what ends them; headers and BOS never do.

        Raises:
          InputError: as `encode_prompt`, or a role of `loss_on` is unknown.
        """
        ...


def chat_format_for(tokenizer: Tokenizer) -> ChatFormat:
    """The format of the family that the tokenizer belongs to."""
    if '<|start_header_id|>' in getattr(tokenizer, 'special_tokens', {}):
        return Llama3ChatFormat(tokenizer)
    return Llama2ChatFormat(tokenizer)


LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    '{% for message in turns %}'
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{% set content = system + message['content'] if loop.first else message['content'] %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    '{% endfor %}'
)


class Llama2ChatFormat:
    """Llama 2-Chat: `[INST] question [/INST] answer `, each pair tokenized alone between BOS and EOS.

    Source: llama/generation.py of Llama 2, `chat_completion`.
    """

    template = LLAMA2_TEMPLATE
    _TAGS = ('[INST]', '[/INST]', '<<SYS>>', '<</SYS>>')
    _ROLES = ('system', 'user', 'assistant')

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.stop_ids = (tokenizer.eos_id,)

    def encode_prompt(self, messages: Dialog, prefix: str = '') -> list[int]:
        """See `ChatFormat`."""
        turns = self._turns(messages, last='user')
        ids: list[int] = []
        for user, assistant in zip(turns[:-1:2], turns[1::2], strict=True):
            ids += self._pair(user, assistant)[0]
        if not (prefix := prefix.strip()):
            return ids + self._instruction(turns[-1])
        return ids + self._tokenizer.encode(f'[INST] {turns[-1]} [/INST] {prefix}', bos=True)

    def encode_dialog(
        self, messages: Dialog, loss_on: Collection[str] = ('assistant',)
    ) -> tuple[list[int], list[int]]:
        """See `ChatFormat`; the system's words are part of the first user message."""
        _check_roles(loss_on, ('user', 'assistant'), 'loss_on')
        turns = self._turns(messages, last='assistant')
        ids, mask = [], []
        for user, assistant in zip(turns[::2], turns[1::2], strict=True):
            pair, asked = self._pair(user, assistant)
            ids += pair
            mask += [0] + [int('user' in loss_on)] * (asked - 1)
            mask += [int('assistant' in loss_on)] * (len(pair) - asked)
        return ids, mask

    def _instruction(self, user: str) -> list[int]:
        return self._tokenizer.encode(f'[INST] {user} [/INST]', bos=True)

    def _pair(self, user: str, assistant: str) -> tuple[list[int], int]:
        """Ids of a question with its answer, and how many of them are the question's."""
        ids = self._tokenizer.encode(f'[INST] {user} [/INST] {assistant} ', bos=True, eos=True)
        asked = self._instruction(user)
        if ids[: len(asked)] != asked:
            raise InputError(
                f'{self._tokenizer.path} joins the end of [/INST] with the answer into one token, so no loss '
                'mask can part them; use a tokenizer whose tokens do not go beyond a word'
            )
        return ids, len(asked)

    def _turns(self, messages: Dialog, last: str) -> list[str]:
        """The texts of user and assistant by turns, the system's within the first."""
        messages = _messages(messages, self._ROLES)
        for number, message in enumerate(messages):
            if tag := next((tag for tag in self._TAGS if tag in message.content), ''):
                raise InputError(
                    f'message {number} ({message.role}) contains {tag}, which Llama 2 would read as a tag; take it out'
                )
            if message.python_tag or not message.end_of_turn:
                raise InputError(
                    f'message {number} calls a tool; Llama 2 has none, so use Llama 3.1 or later'
                )
        if messages[0].role == 'system':
            if len(messages) == 1:
                raise InputError('the system message stands alone; a user message must follow')
            first = f'<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n{messages[1].content}'
            messages = [dataclasses.replace(messages[1], content=first), *messages[2:]]
        for number, message in enumerate(messages):
            if message.role != (wanted := ('user', 'assistant')[number % 2]):
                raise InputError(
                    f'turn {number} is by {message.role} where Llama 2 wants {wanted}: user and assistant take '
                    'turns, and a system message comes before them'
                )
        _check_last(messages, (last,))
        return [message.content.strip() for message in messages]


LLAMA3_TEMPLATE = (
    '{{ bos_token }}{% for message in messages %}'
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


class Llama3ChatFormat:
    """Llama 3 Instruct: each message behind a header with its role, ended by <|eot_id|> or <|eom_id|>.

    Tags within a message are encoded as ordinary characters. No system message is made up where none is given.
    Source: llama3/llama/tokenizer.py, `ChatFormat`; tools: llama-models/models/llama3/chat_format.py.
    """

    template = LLAMA3_TEMPLATE
    _ROLES = ('system', 'user', 'assistant', 'ipython')

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special: dict[str, int] = getattr(tokenizer, 'special_tokens', {})
        self.stop_ids = tokenizer.stop_ids
        for name in ('start_header_id', 'end_header_id', 'eot_id'):
            self._id(name)

    def encode_prompt(self, messages: Dialog, prefix: str = '') -> list[int]:
        """See `ChatFormat`."""
        messages = self._checked(messages, ('user', 'ipython'))
        ids = [self._tokenizer.bos_id]
        for message in messages:
            ids += self._header(message.role) + self._body(message)
        return ids + self._header('assistant') + self._tokenizer.encode(prefix.strip())

    def encode_dialog(
        self, messages: Dialog, loss_on: Collection[str] = ('assistant',)
    ) -> tuple[list[int], list[int]]:
        """See `ChatFormat`."""
        loss_on = _check_roles(loss_on, self._ROLES, 'loss_on')
        ids, mask = [self._tokenizer.bos_id], [0]
        for message in self._checked(messages, ('assistant',)):
            header, body = self._header(message.role), self._body(message)
            ids += header + body
            mask += [0] * len(header) + [int(message.role in loss_on)] * len(body)
        return ids, mask

    def _header(self, role: str) -> list[int]:
        encode = self._tokenizer.encode
        return [self._id('start_header_id'), *encode(role), self._id('end_header_id'), *encode('\n\n')]

    def _body(self, message: Message) -> list[int]:
        tag = [self._id('python_tag')] if message.python_tag else []
        end = self._id('eot_id' if message.end_of_turn else 'eom_id')
        return [*tag, *self._tokenizer.encode(message.content.strip()), end]

    def _id(self, name: str) -> int:
        if f'<|{name}|>' not in self._special:
            raise InputError(f'{self._tokenizer.path} has no <|{name}|>, which this chat of Llama 3 needs')
        return self._special[f'<|{name}|>']

    def _checked(self, messages: Dialog, last: tuple[str, ...]) -> list[Message]:
        checked = _messages(messages, self._ROLES)
        before = ''
        for number, message in enumerate(checked):
            if message.role == 'system' and number:
                raise InputError(f'message {number} is by the system; only the first may be')
            if message.role == 'ipython' and before not in ('assistant', 'ipython'):
                raise InputError(f'message {number} is by a tool; the assistant must call it just before')
            if message.role != 'assistant' and (message.python_tag or not message.end_of_turn):
                raise InputError(f'message {number} by {message.role} calls a tool; only the assistant does')
            before = message.role
        _check_last(checked, last)
        return checked


def _messages(messages: Dialog, roles: tuple[str, ...]) -> list[Message]:
    """Messages with their fields checked; a tool's role is spelled as Llama 3 spells it."""
    found = []
    kinds = {'role': str, 'content': str, 'python_tag': bool, 'end_of_turn': bool, 'input': str}
    for number, message in enumerate(messages):
        given: dict[str, Any] = dict(vars(message) if isinstance(message, Message) else message)
        if not {'role', 'content'} <= given.keys() <= kinds.keys():
            raise InputError(
                f'message {number} has the keys {", ".join(map(str, given))}; it needs role and content, and '
                'may have python_tag, end_of_turn and input'
            )
        for key, value in given.items():
            if not isinstance(value, kinds[key]):
                raise InputError(f'message {number}: {key} is {value!r}, which is no {kinds[key].__name__}')
        (given['role'],) = _check_roles([given['role']], roles, f'message {number}: role')
        if about := given.pop('input', ''):
            given['content'] = f'{given["content"]}\n\n{about}'
        found.append(Message(**given))
    if not found:
        raise InputError('the conversation holds no message; it needs at least one by the user')
    return found


def _check_roles(given: Collection[str], roles: tuple[str, ...], what: str) -> list[str]:
    named = ['ipython' if role == 'tool' and 'ipython' in roles else role for role in given]
    for role in named:
        if role not in roles:
            raise InputError(f'{what} is {role!r}; this format has {", ".join(roles)}')
    return named


def _check_last(messages: Sequence[Message], roles: tuple[str, ...]) -> None:
    if messages[-1].role not in roles:
        raise InputError(
            f'the last message is by {messages[-1].role}; it must be by {" or ".join(roles)} '
            + ('to train on' if 'assistant' in roles else 'for the assistant to answer')
        )
