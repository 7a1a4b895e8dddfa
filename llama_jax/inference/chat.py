"""A conversation as the ids that a model answers: by the checkpoint's own template, or by its family's format.

What people write is plain text, whatever tags it spells: the family's format reads it so, and is taken wherever the
template gives the same ids; what goes through a template has the names of special tokens hidden from it meanwhile.
"""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError
from llama_jax.json_file import show_json
from llama_jax.tokenizer.chat_format import (
    ChatFormat,
    Dialog,
    Llama3ChatFormat,
    chat_format_for,
    format_with,
)
from llama_jax.tokenizer.chat_template import ChatTemplate
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.tokenizer.text_pieces import split_at

_PROBES = (
    [{'role': 'user', 'content': 'Hi'}],
    [
        {'role': 'system', 'content': 'Be brief.'},
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Hello!'},
        {'role': 'user', 'content': 'Bye'},
    ],
)
_OTHER_TAGS = ('<|im_start|>', '<|user|>', '<start_of_turn>', '<|start_header_id|>')


class Chat:
    """How one checkpoint is talked to.

    Attributes:
      stop_ids: any of these ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, template: str):
        """Takes the checkpoint's tokenizer and its template in Jinja, '' where it has none.

        Raises:
          InputError: it has no template, and its tokens are those of no family whose format is known.
        """
        self._tokenizer = tokenizer
        self._template = ChatTemplate(template) if template else None
        self._format = format_with(tokenizer, template) or self._fitting_format()
        formats = self._format.stop_ids if self._format else ()
        self.stop_ids = tuple(sorted({*tokenizer.stop_ids, *formats}))

    def _fitting_format(self) -> ChatFormat | None:
        """The family's format, where there is no template, or one that says the same."""
        names = _names(self._tokenizer)
        if self._template is None:
            found = chat_format_for(self._tokenizer)
            ours = '<|start_header_id|>' in getattr(self._tokenizer, 'special_tokens', {})
            others = [tag for tag in _OTHER_TAGS if tag in names.values()]
            if others := [tag for tag in others if not (ours and tag == '<|start_header_id|>')]:
                family = 'Llama 3 Instruct' if ours else 'Llama 2-Chat'
                raise InputError(
                    f'{self._tokenizer.path} has the token {others[0]}, which is none of {family}, and the '
                    "checkpoint has no chat template; put the template that it was trained with into its folder's "
                    'chat_template.jinja'
                )
            return found
        try:
            found = chat_format_for(self._tokenizer)
            if all(found.encode_prompt(probe) == self._by_template(probe) for probe in _PROBES):
                return found
        except InputError:  # one of them has no such conversation
            pass
        return None

    @property
    def is_by_template(self) -> bool:
        """Whether the checkpoint's own template decides, which has its own words for tools."""
        return self._format is None

    @property
    def knows_tools(self) -> bool:
        """Whether the model may have heard of functions that it can call."""
        return self._format is None or isinstance(self._format, Llama3ChatFormat)

    def encode_prompt(self, messages: Dialog, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Ids of a conversation that waits for the assistant, or whose last message, the assistant's, is to go on.

        Args:
          messages: of the conversation.
          tools: functions that the model may call, for a template; None: none.

        Raises:
          InputError: the messages are none, or not in an order that the checkpoint knows.
        """
        plain = check_messages(messages)
        if self._format is None:
            return self._by_template(plain, tools)
        if plain[-1]['role'] == 'assistant':
            if len(plain) == 1:
                raise InputError(
                    "the only message is the assistant's, to be gone on from; one by the user must come before it"
                )
            return self._format.encode_prompt(plain[:-1], prefix=plain[-1]['content'])
        return self._format.encode_prompt(plain)

    def _by_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        assert self._template is not None
        goes_on = messages[-1]['role'] == 'assistant'
        names = _names(self._tokenizer)
        ends = {
            'bos_token': names.get(self._tokenizer.bos_id, ''),
            'eos_token': names.get(self._tokenizer.eos_id, ''),
        }
        special: Mapping[str, int] = getattr(self._tokenizer, 'special_tokens', {})
        hidden = _Hidden(special)
        text = self._template.render(
            hidden.hide(list(messages)), add_generation_prompt=not goes_on, continue_last=goes_on,
            tools=hidden.hide(tools and list(tools)), **ends,
        )  # fmt: skip
        if not hidden:
            return self._tokenizer.encode(text, special=True)
        ids = []
        for piece, id in split_at(text, special):
            ids += self._tokenizer.encode(hidden.show(piece)) if id is None else [id]
        return ids


class _Hidden:
    """Names of special tokens in what people write, hidden from a template; marks that no text has stand for them."""

    def __init__(self, names: Collection[str]):
        longest_first = sorted(names, key=len, reverse=True)
        # Whole, or begun at the end, or ended at the beginning: a template may put two texts together.
        begun = {name[:size] for name in longest_first for size in range(1, len(name))}
        ended = {name[size:] for name in longest_first for size in range(1, len(name))}
        self._whole = re.compile('|'.join(map(re.escape, longest_first)) or '(?!)')
        self._begun, self._ended = begun, ended
        self._most = max(map(len, longest_first), default=0)
        self._mark = f'\ue000{secrets.token_hex(8)}:'
        self._kept: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._kept)

    def hide(self, value: Any) -> Any:
        """Plain values with marks in all their texts."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {key: item if key in ('role', 'type') else self.hide(item) for key, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, list) else value

    def _hide_text(self, text: str) -> str:
        text = self._whole.sub(lambda found: self._keep(found[0]), text)
        for size in range(min(self._most - 1, len(text)), 0, -1):
            if text[-size:] in self._begun:
                text = text[:-size] + self._keep(text[-size:])
                break
        for size in range(min(self._most - 1, len(text)), 0, -1):
            if text[:size] in self._ended:
                return self._keep(text[:size]) + text[size:]
        return text

    def _keep(self, text: str) -> str:
        self._kept.append(text)
        return f'{self._mark}{len(self._kept) - 1}\ue001'

    def show(self, text: str) -> str:
        """A text with what the marks stand for."""
        return re.sub(f'{self._mark}(\\d+)\ue001', lambda found: self._kept[int(found[1])], text)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages of a conversation as plain mappings; each has a role and a text.

    Raises:
      InputError: they are no list of such, or there are none.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f'a conversation is {show_json(messages)}; it must be a list of messages')
    found = []
    for number, message in enumerate(messages):
        given = dict(message) if isinstance(message, Mapping) else dict(getattr(message, '__dict__', {}))
        if not isinstance(given.get('role'), str) or not isinstance(given.get('content'), str):
            raise InputError(
                f'message {number} is {show_json(message)}; it must be an object with a role and a content, both texts'
            )
        found.append(given)
    return found


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    """Of the tokens that templates speak of, by id."""
    known = {**getattr(tokenizer, 'special_tokens', {}), **getattr(tokenizer, 'added_tokens', {})}
    return {id: name for name, id in known.items()}
