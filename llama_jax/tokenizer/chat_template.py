"""Chat templates: a conversation as text by the Jinja that comes with a checkpoint, rendered as transformers does it.

A template is a program by somebody else. Jinja's sandbox keeps it from the machine, but not from looping for ever or
asking for all memory, often within a single step of Python's own C code, which no other thread can stop. So it runs in
a process of its own, which the system ends where its limits are reached.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from llama_jax.errors import InputError
from llama_jax.json_file import read_bytes, read_object, show_json

Messages = Sequence[Mapping[str, Any]]

_PROGRAM = os.path.join(os.path.dirname(__file__), 'template_process.py')
_MARK = 'CONTINUE_FINAL_MESSAGE_TAG '  # where the last message ends; transformers' own
_MAX_TEMPLATE = 1 << 20  # characters; the largest known have some twenty thousand
_MAX_TEXT = 16 << 20  # characters of a rendered conversation
_MAX_MEMORY = 256 << 20  # bytes
_CPU_SECONDS = 1.0  # a long conversation takes some hundredths
_SECONDS = 60.0  # until a process that does not even compute is given up


class ChatTemplate:
    """A Jinja template, ready to render conversations; its process is started by the first and kept for the next.

    Attributes:
      text: of the template.
    """

    def __init__(self, text: str, *, cpu_seconds: float = _CPU_SECONDS):
        """Keeps the template.

        Args:
          text: Jinja.
          cpu_seconds: of the processor that a conversation may take.

        Raises:
          InputError: it is too large for a template, or jinja2 is not installed.
        """
        if len(text) > _MAX_TEMPLATE:
            raise InputError(
                f'the chat template has {len(text)} characters; at most {_MAX_TEMPLATE} are read'
            )
        if importlib.util.find_spec('jinja2') is None:
            raise InputError("a chat template needs the package jinja2: pip install 'llama_jax[hf]'")
        self.text = text
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen | None = None
        self._turn = threading.Lock()

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        **names: Any,
    ) -> str:
        """A conversation as text; from any thread, one at a time.

        Args:
          messages: with `role`, `content` and whatever else the template knows.
          add_generation_prompt: end with what an answer begins with.
          continue_last: end with the last message's own text, to be continued.
          **names: further names of the template: bos_token, eos_token, tools, documents; plain values, as in JSON.

        Raises:
          InputError: the template is wrong, refuses the messages, or takes more time, memory or text than allowed.
        """
        given = [dict(message) for message in messages]
        last = given[-1].get('content') if given else None
        if continue_last:
            if not isinstance(last, str):
                raise InputError('the conversation does not end with a text, so it cannot be continued')
            given[-1]['content'] = last + _MARK
        names = {'messages': given, 'add_generation_prompt': add_generation_prompt} | names
        try:
            # Absent they would be undefined, which some templates tell from none.
            request = json.dumps({'template': self.text, 'names': {'tools': None, 'documents': None} | names})
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f'the messages are no plain values, as JSON has them: {show_json(error)}'
            ) from error
        with self._turn:
            answer = self._ask(request)
        if 'error' in answer:
            reason = show_json(ValueError(answer['error']))
            raise InputError(f'the chat template cannot render {len(messages)} messages: {reason}')
        text = answer['text']
        if not continue_last:
            return text
        end = text.rfind(_MARK.strip())
        if end < 0 or str(last).strip() not in text:
            raise InputError(
                'the chat template does not write the last message as it is; it cannot be continued'
            )
        # Spaces at its end stay where the template keeps them.
        return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()

    def _ask(self, request: str) -> dict[str, Any]:
        """The process's answer; it is ended, and the next request starts another, where it gave none."""
        process = self._process = self._process or self._start()
        assert process.stdin and process.stdout
        watch = threading.Timer(_SECONDS, process.kill)
        watch.start()
        try:
            process.stdin.write(request.encode() + b'\n')
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it ended before it had read all
            line = b''
        finally:
            watch.cancel()
        answer: dict[str, Any] = json.loads(line) if line.endswith(b'\n') else {'ends': True}
        if answer.get('ends'):
            self._process = None
            _end(process)
            if process.returncode == -signal.SIGPROF:
                answer['error'] = f'it computes for more than {self._cpu_seconds:g} s'
            answer.setdefault('error', f'the process that renders it ended (status {process.returncode})')
        return answer

    def _start(self) -> subprocess.Popen:
        limits = self._cpu_seconds, _MAX_MEMORY, _MAX_TEXT
        kept = ('PATH', 'LD_LIBRARY_PATH', 'TZ')
        process = subprocess.Popen(
            # Neither the file's own folder nor what site-packages run at a start; where packages are it is told.
            [sys.executable, '-P', '-S', _PROGRAM, *map(str, limits)],
            env={name: os.environ[name] for name in kept if name in os.environ}
            | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt is this process's, which then ends that one
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen) -> None:
    assert process.stdin and process.stdout
    with contextlib.suppress(OSError):  # of what it has not read
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def read_template(file: epath.Path) -> str:
    """The template in a file of Jinja.

    Raises:
      InputError: there is no such file, or it is no text.
    """
    try:
        return read_bytes(file, _MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f'{file} is no text in UTF-8 from byte {error.start} on; give a template in Jinja'
        ) from None


def template_beside(folder: epath.Path) -> str:
    """The template that a Hugging Face folder holds, in a file of its own or in its configuration; '' for none.

    Raises:
      InputError: a file is damaged.
    """
    if (file := folder / 'chat_template.jinja').exists():
        return read_template(file)
    if not (file := folder / 'tokenizer_config.json').exists():
        return ''
    template = read_object(file).get('chat_template')
    if isinstance(template, list):  # several by name
        named = {str(t.get('name')): t.get('template') for t in template if isinstance(t, dict)}
        template = named.get('default', '')
    if not isinstance(template, str | None):
        raise InputError(f'{file}: chat_template is {show_json(template)}; it must be a text')
    return template or ''
