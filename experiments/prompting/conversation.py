"""What somebody types into a chat: words for the model, or commands that change the conversation."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath

from llama_jax.errors import InputError, SystemFailure, did_you_mean
from llama_jax.inference.chat import check_messages
from llama_jax.inference.chat_session import ChatSession, ContextFull
from llama_jax.json_file import parse_json, read_bytes
from llama_jax.serve.documents import Documents, citations, with_passages
from llama_jax.storage import write_atomically
from llama_jax.tokenizer.text_pieces import without_surrogates

HELP = (
    '/reset begins anew; /system TEXT says how it is to answer; /undo takes the last answer back;\n'
    '/save FILE and /load FILE keep the conversation; /stats tells of the last answer; /quit ends, as Ctrl-D does.\n'
    'Ctrl-C stops an answer.'
)


class Conversation:
    """A session and who types."""

    def __init__(
        self,
        make_session: Callable[[list[dict[str, Any]]], ChatSession],
        settings: dict[str, Any],
        documents: Documents | None,
        show: Callable[[str], None],
    ):
        """Nothing is said yet.

        Args:
          make_session: with messages so far.
          settings: of `ChatSession.say`.
          documents: that answers are to be found in.
          show: takes text for the screen.
        """
        self._make, self._settings, self._documents, self._show = make_session, settings, documents, show
        self._session = make_session([])
        self._stats = 'nothing was answered yet'

    def take(self, line: str) -> bool:
        """Obeys or answers one line; False where it is the last."""
        try:
            if not line.startswith('/'):
                if line.strip():
                    self._answer(line)
                return True
            name, _, rest = line[1:].strip().partition(' ')
            if name == 'quit':
                return False
            self._obey(name, rest.strip())
        except ContextFull as error:
            self._show(f'{error}: say less, take answers back by /undo, or begin anew by /reset\n')
        except (InputError, SystemFailure, OSError) as error:
            self._show(f'{error}\n')
        return True

    def _obey(self, name: str, rest: str) -> None:
        messages = self._session.messages
        system = messages[:1] if messages and messages[0]['role'] == 'system' else []
        if name == 'help':
            self._show(f'{HELP}\n')
        elif name == 'reset':
            self._session = self._make(system)
        elif name == 'system':
            said = [{'role': 'system', 'content': rest}] if rest else []
            self._session = self._make([*said, *messages[len(system) :]])
        elif name == 'undo':
            if len(messages) - len(system) < 2:
                raise InputError('there is no answer to take back')
            self._session.messages = messages[:-2]
        elif name == 'save':
            self._save(_named(rest, name), messages)
        elif name == 'load':
            file = epath.Path(_named(rest, name))
            self._session = self._make(check_messages(parse_json(read_bytes(file), str(file))))
        elif name == 'stats':
            self._show(f'{self._stats}\n')
        else:
            known = ('help', 'reset', 'system', 'undo', 'save', 'load', 'stats', 'quit')
            raise InputError(f'/{name} is no command; {did_you_mean(name, known)}')

    def _save(self, file: str, messages: list[dict[str, Any]]) -> None:
        if os.path.exists(file):
            raise InputError(f'{file} is there already; name another file')
        if not (path := epath.Path(file)).parent.is_dir():
            raise InputError(f'{file} cannot be written: there is no folder {path.parent}')
        text = json.dumps(messages, ensure_ascii=False, indent=1)
        try:
            write_atomically(path, without_surrogates(text) + '\n')  # as the model read it
        except OSError as error:
            raise InputError(f'{file} cannot be written: {error.strerror}') from None

    def _answer(self, line: str) -> None:
        passages = self._documents.find(line) if self._documents else []
        began, first, number = time.monotonic(), 0.0, 0
        with _interrupted() as is_interrupted:
            for piece in self._session.say(with_passages(line, passages), **self._settings):
                first = first or time.monotonic() - began
                number += 1
                self._show(piece)
                if is_interrupted():
                    break
        self._session.stop()
        self._show('\n')
        for cited in citations(passages):
            self._show(f'{cited}\n')
        seconds = time.monotonic() - began
        self._stats = (
            f'{self._session.num_made} tokens in {seconds:.1f} s, the first after {first:.2f} s; '
            f'{self._session.num_cached} tokens of the conversation were not read again'
        )


@contextmanager
def _interrupted() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was typed, which within ends nothing by itself."""
    typed = []
    before = signal.signal(signal.SIGINT, lambda *_: typed.append(True))
    try:
        yield lambda: bool(typed)
    finally:
        signal.signal(signal.SIGINT, before)


def _named(rest: str, name: str) -> str:
    if not rest:
        raise InputError(f'/{name} needs a file')
    if '\0' in rest:
        raise InputError(f'/{name} {rest!r}: no file has such a name')
    return os.path.expanduser(rest)
