"""A conversation as the ids that a model answers: by the checkpoint's own template, or by its family's format.

The family's format reads what people write as plain text, whatever tags it spells; a template is text by itself, so
that tags within a message count, as in transformers. So the format is taken wherever both give the same ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.json_file import show_json
from llama_jax.tokenizer.chat_format import ChatFormat, Dialog, chat_format_for, format_with
from llama_jax.tokenizer.chat_template import ChatTemplate
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.types import InputError

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

    def encode_prompt(self, messages: Dialog) -> list[int]:
        """Ids of a conversation that waits for the assistant, or whose last message, the assistant's, is to go on.

        Raises:
          InputError: the messages are none, or not in an order that the checkpoint knows.
        """
        plain = check_messages(messages)
        if self._format is None:
            return self._by_template(plain)
        if plain[-1]['role'] == 'assistant':
            if len(plain) == 1:
                raise InputError(
                    "the only message is the assistant's, to be gone on from; one by the user must come before it"
                )
            return self._format.encode_prompt(plain[:-1], prefix=plain[-1]['content'])
        return self._format.encode_prompt(plain)

    def _by_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        assert self._template is not None
        goes_on = messages[-1]['role'] == 'assistant'
        names = _names(self._tokenizer)
        ends = {
            'bos_token': names.get(self._tokenizer.bos_id, ''),
            'eos_token': names.get(self._tokenizer.eos_id, ''),
        }
        text = self._template.render(
            messages, add_generation_prompt=not goes_on, continue_last=goes_on, **ends
        )
        return self._tokenizer.encode(text, special=True)


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
