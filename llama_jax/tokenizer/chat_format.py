"""Conversations as token ids: the formats that Llama 2-Chat and Llama 3 Instruct were trained with, id for id.

Llama 2's tags are ordinary text around each pair of turns; Llama 3's are special tokens around each message.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from llama_jax.errors import InputError, did_you_mean
from llama_jax.tokenizer.dialog import Dialog, Message, check_last, check_messages, check_roles, counted
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.tokenizer.text_format import SPELLINGS, TextFormat


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
        self,
        messages: Dialog,
        loss_on: Collection[str] = ('assistant',),
        counts: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation to train on, and which of them (1) count in the loss.

        Args:
          messages: the last one by the assistant.
          loss_on: roles whose words count, with what ends them; headers and BOS never do.
          counts: which messages do so instead, one a message.

        Raises:
          InputError: as `encode_prompt`, or a role of `loss_on` is unknown.
        """
        ...


def chat_format_for(tokenizer: Tokenizer, name: str = '') -> ChatFormat:
    """The format of that name, of `FORMATS`; '': that of the family that the tokenizer belongs to.

    Raises:
      InputError: there is none, or the tokenizer lacks its special tokens.
    """
    of_llama3 = '<|start_header_id|>' in getattr(tokenizer, 'special_tokens', {})
    if name in SPELLINGS:
        return TextFormat(tokenizer, SPELLINGS[name])
    if name not in ('', *FORMATS):
        raise InputError(f'unknown chat format {name!r}; {did_you_mean(name, FORMATS)}')
    if name == 'llama3' and not of_llama3:
        raise InputError(
            f'the chat format llama3 needs <|start_header_id|>, which {tokenizer.path} lacks; llama2 fits it, and the '
            f'formats without special tokens: {", ".join(SPELLINGS)}'
        )
    return Llama3ChatFormat(tokenizer) if of_llama3 and name != 'llama2' else Llama2ChatFormat(tokenizer)


FORMATS = ('llama2', 'llama3', *SPELLINGS)


def format_with(tokenizer: Tokenizer, template: str) -> ChatFormat | None:
    """The format of text that has this template, None where none has."""
    of_text = (TextFormat(tokenizer, spelling) for spelling in SPELLINGS.values())
    return next((found for found in of_text if found.template == template), None)


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
        self,
        messages: Dialog,
        loss_on: Collection[str] = ('assistant',),
        counts: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[int]]:
        """See `ChatFormat`; the system's words are part of the first user message."""
        check_roles(loss_on, ('user', 'assistant'), 'loss_on')
        turns = self._turns(messages, last='assistant')
        checked = check_messages(messages, self._ROLES)
        said = counted(checked, loss_on, counts)[-len(turns) :]
        ids, mask = [], []
        for place in range(0, len(turns), 2):
            is_cut = place + 2 == len(turns) and checked[-1].is_cut
            pair, asked = self._pair(*turns[place : place + 2], is_cut=is_cut)
            ids += pair
            mask += [0] + [int(said[place])] * (asked - 1)
            mask += [int(said[place + 1])] * (len(pair) - asked)
        return ids, mask

    def _instruction(self, user: str) -> list[int]:
        return self._tokenizer.encode(f'[INST] {user} [/INST]', bos=True)

    def _pair(self, user: str, assistant: str, is_cut: bool = False) -> tuple[list[int], int]:
        """Ids of a question with its answer, and how many of them are the question's."""
        end = '' if is_cut else ' '
        ids = self._tokenizer.encode(f'[INST] {user} [/INST] {assistant}{end}', bos=True, eos=not is_cut)
        asked = self._instruction(user)
        if ids[: len(asked)] != asked:
            raise InputError(
                f'{self._tokenizer.path} joins the end of [/INST] with the answer into one token, so no loss '
                'mask can part them; use a tokenizer whose tokens do not go beyond a word'
            )
        return ids, len(asked)

    def _turns(self, messages: Dialog, last: str) -> list[str]:
        """The texts of user and assistant by turns, the system's within the first."""
        messages = check_messages(messages, self._ROLES)
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
        check_last(messages, (last,))
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
        self,
        messages: Dialog,
        loss_on: Collection[str] = ('assistant',),
        counts: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[int]]:
        """See `ChatFormat`."""
        loss_on = check_roles(loss_on, self._ROLES, 'loss_on')
        checked = self._checked(messages, ('assistant',))
        ids, mask = [self._tokenizer.bos_id], [0]
        for message, counts_too in zip(checked, counted(checked, loss_on, counts), strict=True):
            header, body = self._header(message.role), self._body(message)
            ids += header + body
            mask += [0] * len(header) + [int(counts_too)] * len(body)
        return ids, mask

    def _header(self, role: str) -> list[int]:
        encode = self._tokenizer.encode
        return [self._id('start_header_id'), *encode(role), self._id('end_header_id'), *encode('\n\n')]

    def _body(self, message: Message) -> list[int]:
        tag = [self._id('python_tag')] if message.python_tag else []
        end = self._id('eot_id' if message.end_of_turn else 'eom_id')
        return [*tag, *self._tokenizer.encode(message.content.strip()), *([] if message.is_cut else [end])]

    def _id(self, name: str) -> int:
        if f'<|{name}|>' not in self._special:
            raise InputError(f'{self._tokenizer.path} has no <|{name}|>, which this chat of Llama 3 needs')
        return self._special[f'<|{name}|>']

    def _checked(self, messages: Dialog, last: tuple[str, ...]) -> list[Message]:
        checked = check_messages(messages, self._ROLES)
        before = ''
        for number, message in enumerate(checked):
            if message.role == 'system' and number:
                raise InputError(f'message {number} is by the system; only the first may be')
            if message.role == 'ipython' and before not in ('assistant', 'ipython'):
                raise InputError(f'message {number} is by a tool; the assistant must call it just before')
            if message.role != 'assistant' and (message.python_tag or not message.end_of_turn):
                raise InputError(f'message {number} by {message.role} calls a tool; only the assistant does')
            before = message.role
        check_last(checked, last)
        return checked
