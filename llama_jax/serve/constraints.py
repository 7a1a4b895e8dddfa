"""What answers must keep to, as clients ask for it: read beside the event loop, within limits of size and time."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llama_jax.errors import InputError
from llama_jax.inference.constraint import Rule, Rules
from llama_jax.serve.bodies import ChatBody, NamedTool, Sampling
from llama_jax.serve.refusal import Refusal, bad, of_input_error
from llama_jax.serve.service import Service

# Reading a rule takes some milliseconds of a core; one that takes more than this is refused, though its thread goes on
# for a while. A machine that is busy, and rules that are read before, make it wait: that is no fault of the rule.
_SECONDS = 1.8
_MAX_WAIT = 30.0
_POOL = ThreadPoolExecutor(2, thread_name_prefix='rules')


async def rule_of(service: Service, body: Sampling) -> Rule | None:
    """The rule that a request asks for, by whatever parameter.

    Raises:
      Refusal: it is none, too large or too slow to read, or there are several.
    """
    asked = _asked(body)
    if not asked:
        return None
    if len(asked) > 1:
        raise bad(f'{" and ".join(asked)} are both given; an answer keeps to one', list(asked)[1])
    ((param, read),) = asked.items()
    rules = service.served().rules
    if isinstance(rules, str):
        raise bad(f'{param} is not offered here: {rules}', param, 'unsupported_parameter')
    for name, value in (('ignore_eos', body.ignore_eos), ('min_tokens', body.min_tokens)):
        if value:
            raise bad(f'{name} is given beside {param}, which says where the answer ends', name)
    try:
        return await _read(lambda: read(rules), param)
    except InputError as error:
        raise of_input_error(error, param) from None


async def _read(read: Callable[[], Rule], param: str) -> Rule:
    clocks: list[Callable[[], float]] = []

    def timed() -> Rule:
        clocks.append(_stopwatch())
        return read()

    reading = asyncio.get_running_loop().run_in_executor(_POOL, timed)
    end = time.monotonic() + _MAX_WAIT
    while not (await asyncio.wait({reading}, timeout=0.1))[0]:
        if clocks and clocks[0]() > _SECONDS:
            reading.cancel()
            raise bad(f'{param} takes more than {_SECONDS:g} s to read; make it simpler', param)
        if time.monotonic() > end:
            reading.cancel()
            raise Refusal(503, f'{param} waits to be read; ask again soon', param, 'busy')
    return reading.result()


def _stopwatch() -> Callable[[], float]:
    """Seconds of a core that this thread has taken since now, for any thread to ask."""
    if hasattr(time, 'pthread_getcpuclockid'):
        clock = time.pthread_getcpuclockid(threading.get_ident())
        began = time.clock_gettime(clock)
        return lambda: time.clock_gettime(clock) - began
    began = time.monotonic()  # macOS tells of its own thread alone
    return lambda: time.monotonic() - began


def _asked(body: Sampling) -> dict[str, Callable[[Rules], Rule]]:
    """{parameter: what reads its rule}."""
    found: dict[str, Callable[[Rules], Rule]] = {}
    if (regex := body.regex) is not None:
        found['regex'] = lambda rules: rules.of_regex(regex)
    if (grammar := body.grammar) is not None:
        found['grammar'] = lambda rules: rules.of_grammar(grammar)
    if isinstance(body, ChatBody):
        if body.response_format is not None and body.response_format.type != 'text':
            schema = _schema(body)
            found['response_format'] = lambda rules: rules.of_schema(schema)
        if body.tools and (body.tool_choice == 'required' or isinstance(body.tool_choice, NamedTool)):
            calls = _calls(body)
            found['tool_choice'] = lambda rules: rules.of_schema(calls)
    return found


def _schema(body: ChatBody) -> dict[str, Any]:
    assert body.response_format is not None
    if body.response_format.type == 'json_object':
        return {'type': 'object'}
    if body.response_format.json_schema is None:
        raise bad('response_format is a json_schema without one', 'response_format.json_schema')
    return body.response_format.json_schema.schema_


def _calls(body: ChatBody) -> dict[str, Any]:
    """Of a call of one of the functions, in the words of `tool_calls.spell_call`."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for tool in body.tools or []:
        if named in (None, tool.function.name):
            parameters: dict[str, Any] = dict(tool.function.parameters or {'type': 'object'})
            definitions |= parameters.pop('$defs', {})
            calls.append(
                {
                    'type': 'object',
                    'properties': {'name': {'const': tool.function.name}, 'parameters': parameters},
                    'required': ['name', 'parameters'],
                    'additionalProperties': False,
                }
            )
    return {'anyOf': calls, '$defs': definitions}
