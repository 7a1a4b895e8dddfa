"""Commands that kill themselves in the middle of their work, and go on: what they end with is to be what an unbroken
run ends with.
"""

import pathlib
import random
import signal
from collections.abc import Callable, Mapping, Sequence

# The process kills itself when a function is called for the so-manieth time.
_BEFORE = """
import importlib, os, signal
module, _, name = 'MOMENT'.partition(':')
owner, calls = importlib.import_module(module), 0
*outer, name = name.split('.')
for part in outer:
    owner = getattr(owner, part)
original = getattr(owner, name)


def counted(*given, **named):
    global calls
    calls += 1
    if calls == CALLS:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*given, **named)


setattr(owner, name, counted)
"""


def kill(commands, run: Sequence[str], moment: str, calls: int) -> bool:
    """Whether a command was killed at that call of `MODULE:FUNCTION` before it ended by itself."""
    before = _BEFORE.replace('MOMENT', moment).replace('CALLS', str(calls))
    ended = commands.run(*run, before=before)
    assert ended.status in (0, -signal.SIGKILL), ended.stderr
    return ended.status != 0


def kill_ten_times(
    commands,
    output: pathlib.Path,
    run: Callable[[pathlib.Path], list[str]],
    moments: Mapping[str, int],
    check: Callable[[pathlib.Path], None],
) -> None:
    """Kills a command at random moments, starts it again each time, and checks each output that it ends with.

    Args:
      commands: the fixture.
      output: of the first command; those that begin when it is through have a number behind its name.
      run: the command that writes there.
      moments: functions, and how many calls of each there are at least in a whole run.
      check: of a whole output.
    """
    chosen, kills, place = random.Random(), 0, output
    while kills < 10:
        moment = chosen.choice(list(moments))
        calls = chosen.randint(1, moments[moment])
        print(f'{place.name}: kill at call {calls} of {moment}', flush=True)
        if kill(commands, run(place), moment, calls):
            kills += 1
        else:
            check(place)
            place = output.with_stem(f'{output.stem}_{kills}')
    commands.run(*run(place)).succeeded()
    check(place)
