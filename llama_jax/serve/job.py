"""One model over the devices of one process or several: the first hears clients, all do with it what that one tells."""

import contextlib
import dataclasses
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from llama_jax import runtime
from llama_jax.errors import InputError, SystemFailure, error_line
from llama_jax.inference.completion import Watch
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest, Progress
from llama_jax.inference.scoring import TokenScore
from llama_jax.serve.served import Served


class Job:
    """A generator that all processes drive alike; what is submitted and cancelled, others hear with the next step."""

    def __init__(self, served: Served, generator: Generator):
        self._served, self._generator = served, generator
        self._orders: list[tuple[Any, ...]] = []
        self._is_alone = jax.process_count() == 1
        self._drafted = generator.drafted
        if not self._is_alone:
            runtime.bytes_from_main_process(b'0')  # compiles what carries orders, before any client is there

    def submit(self, request: CompletionRequest, stop: Sequence[str]) -> tuple[int, Watch]:
        """As `Generator.submit`, of a request that is also over where one of these texts is there; and its text."""
        if not self._is_alone:  # before it may be refused, as it then is everywhere
            source = None if request.rule is None else request.rule.source
            self._orders.append(('submit', dataclasses.replace(request, rule=None), tuple(stop), source))
        watch = Watch(self._served.tokenizer, request.tokens, stop)
        request = dataclasses.replace(request, is_complete=watch.look if stop else None)
        return self._generator.submit(request), watch

    def cancel(self, number: int) -> None:
        """As `Generator.cancel`."""
        self._orders.append(('cancel', number))
        self._generator.cancel(number)

    def advance(self) -> list[Progress]:
        """As `Generator.advance`."""
        with self._together('advance'):
            return self._generator.advance()

    def newly_drafted(self) -> tuple[int, int]:
        """Tokens that the draft has proposed since this was last asked, and of them those that were taken."""
        before, self._drafted = self._drafted, self._generator.drafted
        return self._drafted[0] - before[0], self._drafted[1] - before[1]

    def score(self, tokens: Sequence[int]) -> list[TokenScore]:
        """As `Served.score`."""
        with self._together('score', tuple(tokens)):
            return self._served.score(tokens)

    def meet(self) -> None:
        """Nothing is to be done; all learn whether the others are there."""
        with self._together('meet'):
            pass

    def end(self) -> None:
        """The others end."""
        with self._together('end'):
            pass

    def follow(self) -> None:
        """Does in another process what the first one tells, until that ends."""
        while True:
            with _together():
                orders = pickle.loads(runtime.bytes_from_main_process(b''))  # of the same command
                for kind, *arguments in orders:
                    if kind == 'end':
                        return
                    self._do(kind, *arguments)

    def _do(self, kind: str, *arguments: Any) -> None:
        if kind == 'submit':
            request, stop, source = arguments
            if source is not None:
                assert not isinstance(rules := self._served.rules, str)
                request = dataclasses.replace(request, rule=rules.read(source))
            with contextlib.suppress(InputError):
                self.submit(request, stop)
            self._orders = []
        elif kind == 'cancel':
            self._generator.cancel(*arguments)
        elif kind == 'advance':
            self._generator.advance()
        elif kind == 'score':
            self._served.score(*arguments)

    @contextlib.contextmanager
    def _together(self, *order: Any) -> Iterator[None]:
        """Within, all processes do the same, after what was ordered before."""
        orders, self._orders = [*self._orders, order], []
        if self._is_alone:
            yield
            return
        with _together():
            runtime.bytes_from_main_process(pickle.dumps(orders))
            yield


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What fails here, in one of several processes, no other can go on without."""
    try:
        yield
    except Exception as error:
        raise SystemFailure(
            f'the processes of the job do not go on together ({error_line(error)}); start all of them again'
        ) from error


def follow(load: Callable[[], Served]) -> None:
    """What all processes but the first do: they load, and do as they are told. The first one hears signals for all.

    Raises:
      SystemFailure: another process is gone, or has failed.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):  # a second one ends at once
        signal.signal(signum, lambda signum, _: signal.signal(signum, signal.SIG_DFL))
    served = load()
    Job(served, served.warm_up()).follow()
