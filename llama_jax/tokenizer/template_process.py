"""The process in which `chat_template` renders: a line of JSON in, a line out, until its input ends.

It imports nothing of llama_jax, so that it starts in a tenth of a second and holds nothing that a template could want.
The system enforces the limits: a step inside Python's own C code, such as a power, hears no others.
"""

import datetime
import functools
import json
import os
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """Hugging Face's tags around what an assistant says; they write nothing themselves."""

    tags = {'generation'}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('_body'), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _environment() -> jinja2.Environment:
    """As transformers has it: transformers/utils/chat_template_utils.py, `_compile_jinja_template`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters['tojson'] = _tojson
    environment.globals['raise_exception'] = _raise_exception
    environment.globals['strftime_now'] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment


_compile = functools.lru_cache(8)(_environment().from_string)


def _render(template: str, names: dict[str, Any], most: int) -> str:
    parts, size = [], 0
    for part in _compile(template).generate(**names):
        size += len(part)
        if size > most:
            raise jinja2.TemplateError(f'it writes more than {most} characters')
        parts.append(part)
    return ''.join(parts)


def _reason(error: BaseException) -> str:
    kind = '' if isinstance(error, jinja2.TemplateError) else f'{type(error).__name__}: '
    return ' '.join(f'{kind}{str(error)[:400]}'.split())


def _serve(seconds: float, memory: int, most: int) -> None:
    """Answers requests; each may take so much time of the processor, memory beyond the process's own, and text."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is at
    if os.path.exists('/proc/self/statm'):
        with open('/proc/self/statm') as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    with os.fdopen(0, 'rb') as requests, os.fdopen(1, 'wb') as answers:
        for line in requests:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                answer = {'text': _render(most=most, **json.loads(line))}
            except Exception as error:
                answer = {'error': _reason(error), 'ends': isinstance(error, MemoryError)}  # in what state?
            answers.write(json.dumps(answer).encode() + b'\n')
            answers.flush()
            signal.setitimer(signal.ITIMER_PROF, 0)
            if answer.get('ends'):
                return


if __name__ == '__main__':
    _serve(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
