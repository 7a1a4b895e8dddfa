r"""Formats of text alone: no special tokens but BOS and EOS, turns told apart by words, written in one table.

All that stands before an answer is encoded as one text, the answer as one that goes on behind it, and then comes EOS:
so a token is the prompt's or the answer's, whatever the tokenizer likes to join.

    BOS | Below is ... ### Instruction:\n question \n\n### Response: | answer EOS | \n\n### Instruction:\n ...
"""

import dataclasses
import json
from collections.abc import Collection, Sequence

from llama_jax.errors import InputError
from llama_jax.tokenizer.dialog import Dialog, Message, check_last, check_messages, check_roles, counted
from llama_jax.tokenizer.protocol import Tokenizer


@dataclasses.dataclass(frozen=True)
class Spelling:
    """The words around those that are said, '{}'.

    Attributes:
      user: of a question.
      answer: before an answer; where a prompt ends.
      gap: between that and the answer, which it is part of.
      between: an answer's end and the next question.
      system: of a system message.
      preamble: where there is none.
      input: of what an instruction is about; '' where that has no place of its own.
      preamble_with_input: instead of `preamble`, where there is such.
      strip: whether spaces around what is said do not count.
    """

    user: str
    answer: str
    gap: str = ''
    between: str = ''
    system: str = '{}\n\n'
    preamble: str = ''
    input: str = ''
    preamble_with_input: str = ''
    strip: bool = True

    @property
    def tags(self) -> tuple[str, ...]:
        """The words that begin a turn, by which a reader would take what is said for another's."""
        begins = (
            words.partition('{}')[0].rstrip() for words in (self.system, self.user, self.input, self.answer)
        )
        return tuple(filter(None, begins))


_TASK = 'Below is an instruction that describes a task'
_REQUEST = 'Write a response that appropriately completes the request.\n\n'

SPELLINGS = {
    # Stanford Alpaca, its two prompts
    'alpaca': Spelling(
        user='### Instruction:\n{}\n\n',
        input='### Input:\n{}\n\n',
        answer='### Response:',
        between='\n\n',
        preamble=f'{_TASK}. {_REQUEST}',
        preamble_with_input=f'{_TASK}, paired with an input that provides further context. {_REQUEST}',
    ),
    # open-instruct, the template of Tulu
    'tulu': Spelling(
        system='<|system|>\n{}\n', user='<|user|>\n{}\n', answer='<|assistant|>\n', between='\n'
    ),
    # FastChat, vicuna_v1.1
    'vicuna': Spelling(
        system='{} ',
        user='USER: {} ',
        answer='ASSISTANT:',
        gap=' ',
        preamble='A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
        "detailed, and polite answers to the user's questions. ",
    ),
    # Anthropic's hh-rlhf, README
    'hh': Spelling(system='{}', user='\n\nHuman: {}', answer='\n\nAssistant:', gap=' '),
    # A text and how it goes on.
    'plain': Spelling(user='{}', answer='', between='\n', strip=False),
}


class TextFormat:
    """A `ChatFormat` of text; questions and answers may come in any order that ends as it should."""

    _ROLES = ('system', 'user', 'assistant')

    def __init__(self, tokenizer: Tokenizer, spelling: Spelling):
        self._tokenizer, self._spelling = tokenizer, spelling
        self.stop_ids = (tokenizer.eos_id,)
        self.template = template_of(spelling)

    def encode_prompt(self, messages: Dialog, prefix: str = '') -> list[int]:
        """See `ChatFormat`."""
        checked = self._checked(messages, 'user')
        ids, _, asked = self._encode(checked, [False] * len(checked))
        ids += self._piece(asked + self._spelling.answer, first=not ids)
        return ids + (self._continued(self._spelling.gap + self._own(prefix)) if prefix.strip() else [])

    def encode_dialog(
        self,
        messages: Dialog,
        loss_on: Collection[str] = ('assistant',),
        counts: Sequence[bool] | None = None,
    ) -> tuple[list[int], list[int]]:
        """See `ChatFormat`; only answers can count, for questions are one text with what stands around them.

        Raises:
          InputError: another role is to count.
        """
        check_roles(loss_on, ('assistant',), 'loss_on')
        checked = self._checked(messages, 'assistant')
        said = counted(checked, loss_on, counts)
        for number, (message, counts_too) in enumerate(zip(checked, said, strict=True)):
            if counts_too and message.role != 'assistant':
                raise InputError(
                    f'message {number} by the {message.role} cannot count; in text only answers do'
                )
        ids, mask, _ = self._encode(checked, said)
        return ids, mask

    def _encode(self, messages: list[Message], said: list[bool]) -> tuple[list[int], list[int], str]:
        """(ids, mask, the words behind the last answer) of a conversation."""
        spelling, ids, mask, asked = self._spelling, [], [], ''
        if messages[0].role != 'system':
            about = any(message.input for message in messages)
            asked = spelling.preamble_with_input if about and spelling.input else spelling.preamble
        for message, counts in zip(messages, said, strict=True):
            content = self._own(message.content)
            if message.role != 'assistant':
                asked += (spelling.system if message.role == 'system' else spelling.user).replace(
                    '{}', content
                )
                asked += spelling.input.replace('{}', self._own(message.input)) if message.input else ''
                continue
            prompt = self._piece(asked + spelling.answer, first=not ids)
            end = [] if message.is_cut else [self._tokenizer.eos_id]
            answer = self._continued(spelling.gap + content) + end
            ids += prompt + answer
            mask += [0] * len(prompt) + [int(counts)] * len(answer)
            asked = spelling.between
        return ids, mask, asked

    def _own(self, text: str) -> str:
        return text.strip() if self._spelling.strip else text

    def _piece(self, text: str, first: bool) -> list[int]:
        return self._tokenizer.encode(text, bos=True) if first else self._continued(text)

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that goes on behind another: without the space that sentencepiece puts in front."""
        line_end, ids = self._tokenizer.encode('\n'), self._tokenizer.encode('\n' + text)
        if ids[: len(line_end)] == line_end:
            return ids[len(line_end) :]
        return self._tokenizer.encode(
            text
        )  # line ends join, which they do in tokenizers without such a space

    def _checked(self, messages: Dialog, last: str) -> list[Message]:
        checked = check_messages(messages, self._ROLES, fold_input=not self._spelling.input)
        for number, message in enumerate(checked):
            if message.role == 'system' and number:
                raise InputError(f'message {number} is by the system; only the first may be')
            said = (self._own(message.content), self._own(message.input))
            if tag := next((tag for tag in self._spelling.tags if any(tag in text for text in said)), ''):
                raise InputError(
                    f'message {number} ({message.role}) contains {json.dumps(tag)}, with which a turn of this format '
                    'begins; take it out, or choose a format with special tokens'
                )
            if message.python_tag or not message.end_of_turn:
                raise InputError(f'message {number} calls a tool; this format has none, so use llama3')
        check_last(checked, (last,))
        return checked


def template_of(spelling: Spelling) -> str:
    """The same in Jinja, as other programs read it."""
    trim = ' | trim' if spelling.strip else ''

    def around(words: str, content: str = f"message['content']{trim}") -> str:
        before, _, after = words.partition('{}')
        return f'{{{{ {json.dumps(before)} + {content} + {json.dumps(after)} }}}}'

    return (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
        f'{{{{ {json.dumps(spelling.preamble)} }}}}{{% endif %}}'
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        f"{around(spelling.system)}{{% elif message['role'] == 'user' %}}{around(spelling.user)}{{% else %}}"
        f'{around(spelling.answer + spelling.gap + "{}")}{{{{ eos_token }}}}'
        f'{{% if not loop.last %}}{{{{ {json.dumps(spelling.between)} }}}}{{% endif %}}{{% endif %}}{{% endfor %}}'
        f'{{% if add_generation_prompt %}}{{{{ {json.dumps(spelling.answer)} }}}}{{% endif %}}'
    )
