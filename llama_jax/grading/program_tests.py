"""A program and its tests in two processes: one serves the program's functions, the other calls them and compares.

The program's process gets the program and the arguments of calls, never a test or an expected result. The tests'
process runs the benchmark's code alone: what the program's functions return arrives there as plain values. So nothing
that a program does to itself, its interpreter or its frames reaches the comparison.
"""

import builtins
import dataclasses
import json
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from llama_jax.grading.plain_values import decode, encode

_MAX_MESSAGE = 1 << 22  # bytes; of a result, or of an error's text
PASSED = 'passed'
_LEFT = 'it left before its end'


@dataclasses.dataclass(frozen=True)
class ProgramTest:
    """One program and the question whether it is right.

    Attributes:
      program: Python, by whoever is judged.
      tests: Python of the benchmark's author; raises where the program is wrong.
      names: what the tests use of the program: functions, classes, values.
      definitions: Python of the benchmark's author that the tests stand behind, such as imports.
      setup: Python of the benchmark's author that needs the program's own names; runs behind the program, in its
        process, and must not hold what is expected.
    """

    program: str
    tests: str
    names: tuple[str, ...] = ()
    definitions: str = ''
    setup: str = ''


class ProgramError(Exception):
    """What a program raised, where no built-in exception says it."""


class ProgramLeft(BaseException):
    """The program's process is gone, or what it says cannot be compared; no test may catch it as a function's error."""


def send(channel: socket.socket, message: bytes) -> None:
    """One message, behind its length."""
    channel.sendall(len(message).to_bytes(8, 'big') + message)


def receive(channel: socket.socket, limit: int) -> bytes:
    """The next message.

    Raises:
      EOFError: there is no more.
      ValueError: it is longer than `limit` bytes.
    """
    length = int.from_bytes(_exactly(channel, 8), 'big')
    if length > limit:
        raise ValueError(f'a message of {length} bytes; at most {limit} are read')
    return _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = channel.recv(min(count - len(parts), 1 << 16))
        except OSError as error:
            raise EOFError(str(error)) from error
        if not part:
            raise EOFError('the other side has left')
        parts += part
    return bytes(parts)


def serve(channel: socket.socket) -> None:
    """In the program's process: runs the program that arrives, then its functions, as often as they are called."""
    source, setup = json.loads(receive(channel, sys.maxsize))
    module = types.ModuleType('__main__')
    module.__file__ = 'program.py'
    sys.modules['__main__'] = module
    kept: list[Any] = []

    def refer(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def resolve(name: str | int) -> Any:
        if isinstance(name, int):
            return kept[name]
        if name in vars(module):
            return vars(module)[name]
        if hasattr(builtins, name):
            return getattr(builtins, name)
        raise NameError(f'name {name!r} is not defined')

    def run() -> None:
        exec(compile(source, 'program.py', 'exec'), vars(module))
        exec(compile(setup, 'setup.py', 'exec'), vars(module))

    def request() -> Any:
        what, target, *rest = decode(message, resolve)
        if what == 'attribute':
            return getattr(target, *rest)
        arguments, named = rest
        return target(*arguments, **named)

    send(channel, _outcome(run, refer))
    while True:
        message = receive(channel, sys.maxsize)
        send(channel, _outcome(request, refer))


def _outcome(action: Callable[[], Any], refer: Callable[[Any], int]) -> bytes:
    """What an action returned, or raised: the names of the exception's types, nearest first, and its text."""
    try:
        return encode([True, action()], refer)
    except BaseException as error:
        names = [kind.__name__ for kind in type(error).__mro__]
        try:
            text = str(error)
        except BaseException:
            text = ''
        return encode([False, [names, text[:1000]]], refer)


class Program:
    """In the tests' process: the other end of `serve`."""

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.fault = ''  # stays, for tests that catch whatever is raised

    def fail(self, fault: str) -> ProgramLeft:
        """The exception to raise for what no right program does."""
        self.fault = self.fault or fault
        return ProgramLeft(fault)

    def start(self, source: str, setup: str) -> None:
        """Runs the program; raises what it raises."""
        self._exchange(json.dumps([source, setup]).encode())

    def request(self, *what: Any) -> Any:
        """('call', target, arguments, keywords) or ('attribute', target, name)."""
        return self._exchange(encode(what, self._refer))

    def _exchange(self, message: bytes) -> Any:
        try:
            send(self.channel, message)
            returned, result = decode(receive(self.channel, _MAX_MESSAGE), lambda name: Remote(self, name))
        except (OSError, EOFError) as error:
            raise self.fail(_LEFT) from error
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise self.fail(f'no value that can be compared: {error}') from error
        if not returned:
            raise _as_exception(*result) or self.fail(_LEFT)
        return result

    @staticmethod
    def _refer(value: Any) -> str | int:
        if isinstance(value, Remote):
            return object.__getattribute__(value, '_name')
        name = getattr(value, '__name__', '')
        if name and getattr(builtins, name, None) is value:  # a type as argument, such as `int`
            return name
        raise TypeError(f'{type(value).__name__} cannot be handed to a program')


def _as_exception(names: list[str], text: str) -> Exception | None:
    """What a program raised, as its nearest built-in exception; None for what ends a program, such as SystemExit."""
    if 'Exception' not in names:
        return None
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (Exception, StopIteration):
            try:
                return kind(text)
            except TypeError:  # one that is not made from a text, such as UnicodeDecodeError
                continue
    return ProgramError(f'{names[0]}: {text}')


class Remote:
    """Something of the program's: may be called, asked for an attribute, handed back; never compared."""

    def __init__(self, program: Program, name: str | int):
        object.__setattr__(self, '_program', program)
        object.__setattr__(self, '_name', name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls it in the process that has it."""
        return object.__getattribute__(self, '_program').request('call', self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return object.__getattribute__(self, '_program').request('attribute', self, name)

    def _refuse(self, *others: Any) -> Any:
        raise object.__getattribute__(self, '_program').fail('no plain value, and only those are compared')

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse  # pyright: ignore
    __hash__ = None  # pyright: ignore


def grade(verdicts: socket.socket, channel: socket.socket) -> None:
    """In the tests' process: answers the `ProgramTest` that arrives with 'passed', or with what happened instead."""
    try:
        test = ProgramTest(**json.loads(receive(verdicts, sys.maxsize)))
        verdict = _verdict(test, Program(channel))
    except BaseException as error:
        verdict = f'failed: {type(error).__name__}'
    send(verdicts, verdict.encode('utf-8', 'replace'))


def _verdict(test: ProgramTest, program: Program) -> str:
    try:
        program.start(test.program, test.setup)
        space: dict[str, Any] = {'__name__': 'tests'}
        exec(compile(test.definitions, 'definitions.py', 'exec'), space)
        space |= {name: Remote(program, name) for name in test.names}
        exec(compile(test.tests, 'tests.py', 'exec'), space)
        return f'failed: {program.fault}' if program.fault else PASSED
    except MemoryError:
        return 'failed: out of memory'
    except ProgramLeft as error:
        return f'failed: {error}'
    except ProgramError as error:
        return f'failed: {error}'
    except BaseException as error:
        text = ' '.join(str(error).split())
        return f'failed: {type(error).__name__}{": " if text else ""}{text}'
