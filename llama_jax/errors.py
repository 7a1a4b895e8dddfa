"""What is refused, and what has failed, in a line each.

Nothing is imported but Python: processes that work without JAX start in a quarter of the time.
"""

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar


class InputError(ValueError):
    """Something the user gave is wrong; the message is the one line that they read.

    It says what is wrong, the value, what is allowed and what to do. Commands print it and exit with status 2;
    every other exception is a defect of ours and keeps its traceback.
    """


class SystemFailure(Exception):
    """The system failed while work was under way: a device, a network; the message is the one line.

    Commands print it and exit with status 1. What was finished before stays, and the same command goes on from there.
    """


class SystemRefusal(SystemFailure):
    """What failed goes on failing until the user has made room, raised a limit or given a permission.

    Commands print it and exit with status 2, as whoever restarts them by themselves has to stop.
    """


# By name, as processes and machines tell one another what they have ended with.
FAILURES = {kind.__name__: kind for kind in (InputError, SystemRefusal, SystemFailure)}


def kind_of(error: Exception) -> str:
    """The name in `FAILURES` of what another process is to raise where this one has ended with an error."""
    return next((name for name, kind in FAILURES.items() if isinstance(error, kind)), SystemFailure.__name__)


@contextlib.contextmanager
def refusals_of(origin: object) -> Iterator[None]:
    """What is refused within is said of `origin`: a file or folder whose content was looked at without its name.

    Raises:
      InputError: with `origin` in front.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f'{origin}: {error}') from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'did you mean a or b?', each name once; where none is near, all that there are."""
    names = list(dict.fromkeys(known))
    begun = sorted((n for n in names if name and n.startswith(name)), key=len)
    near = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, names, n=3, cutoff=0.5)]))[:3]
    return f'did you mean {" or ".join(near)}?' if near else f'there are {", ".join(sorted(names))}'


P = ParamSpec('P')
R = TypeVar('R')


def checked_names(*others: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function of the face: an argument's name that it does not know is refused with the nearest ones.

    Args:
      others: functions whose arguments it passes on, where it takes any name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = _argument_names(function).union(*map(_argument_names, others))

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            if unknown := [name for name in kwargs if name not in known]:
                raise InputError(
                    f'{function.__name__} has no argument {unknown[0]!r}; {did_you_mean(unknown[0], known)}'
                )
            return function(*args, **kwargs)

        return called

    return decorate


def _argument_names(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def error_line(error: BaseException) -> str:
    """What a library's error says, short enough to be the reason within a line of ours; its type where it is silent."""
    lines = filter(None, map(str.strip, str(error).splitlines()))
    line = next(lines, type(error).__name__)[:300]
    return ''.join(letter if letter.isprintable() else '\ufffd' for letter in line)
