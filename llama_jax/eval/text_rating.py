"""Ratings of text by others: a local file of scores, or a classifier that runs as a command.

They stand in for services such as Perspective (toxicity) and for libraries such as VADER (sentiment).
"""

import contextlib
import json
import logging
import math
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from llama_jax.errors import InputError
from llama_jax.eval.documents import DocumentSource, read_rows

logger = logging.getLogger(__name__)
_MAX_ANSWER = 400  # characters of a number


def file_rating(file: str) -> Callable[[str], float]:
    """Looks texts up in a JSON Lines file of {"text": ..., "score": number}.

    Raises:
      InputError: the file is malformed; or, when called, it does not hold the text.
    """
    source = DocumentSource(
        'scores', (file,), {'text': str, 'score': (int, float)}, check=lambda row: _finite(row['score'])
    )
    rows = [source.checked(place, row) for place, row in read_rows(epath.Path(file))]
    scores = {row['text']: float(row['score']) for row in rows}

    def rate(text: str) -> float:
        if text not in scores:
            raise InputError(
                f'{file} has no score for {text[:60]!r}; it needs a line {{"text", "score"}} for each text'
            )
        return scores[text]

    return rate


def _finite(number: str | float | int) -> float:
    if not math.isfinite(value := float(number)):  # of a huge whole number an OverflowError
        raise ValueError(f'{value} is no finite number')
    return value


class CommandRating:
    """A command that reads one JSON string a line and answers each with one number a line.

    It is started once, at the first text, and ended by `close` (or as a context manager). Calls from several threads
    take turns. One that does not answer is said in a warning, and later given up.

    Raises:
      InputError: `command` is no command of a shell; or, when called, it cannot be started, answers no number or not in
        time.
    """

    def __init__(self, command: str, patience: float = 10.0, timeout: float = 300.0):
        """Args: command: for a shell's eyes. patience, timeout: seconds until one text is warned of, and given up."""
        self.command, self._patience, self._timeout = command, patience, timeout
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise InputError(f'the rating command {command!r} cannot be read: {error}') from error
        if not self._arguments:
            raise InputError(f'the rating command {command!r} is empty; give a program and its arguments')
        if shutil.which(self._arguments[0]) is None:
            raise InputError(
                f'the rating command {command!r} cannot be started: no program {self._arguments[0]!r}'
            )
        self._process: subprocess.Popen | None = None
        self._asking = ThreadPoolExecutor(1, 'rating')  # its pipes may block, in both directions
        self._turn = threading.Lock()

    def __call__(self, text: str) -> float:
        """The command's figure of a text; one is asked at a time."""
        with self._turn:
            answer = self._asking.submit(self._ask, text)
            try:
                try:
                    return _finite(answer.result(self._patience))
                except TimeoutError:
                    logger.warning(
                        'the rating command %r has not answered for %g s', self.command, self._patience
                    )
                    return _finite(answer.result(self._timeout - self._patience))
            except TimeoutError as error:
                self._kill()
                raise InputError(
                    f'the rating command {self.command!r} did not answer {text[:40]!r} within {self._timeout:g} s'
                ) from error
            except (OSError, ValueError) as error:
                raise InputError(
                    f'the rating command {self.command!r} did not answer {text[:40]!r} with a number: {error}'
                    f'{self._how_it_ended()}'
                ) from error

    def _ask(self, text: str) -> str:
        self._process = self._process or subprocess.Popen(
            self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(text) + '\n')
        self._process.stdin.flush()
        return self._process.stdout.readline(_MAX_ANSWER)

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process and (status := self._process.wait(0.2)):
                return f'; it ended with status {status}'
        return ''

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Ends the command: by the end of its input, and by force if that does not end it."""
        if self._process is not None:
            assert self._process.stdin and self._process.stdout
            with contextlib.suppress(OSError):  # what it has not read is of no use now
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._kill()
                self._process.wait()
            self._asking.shutdown()
            self._process.stdout.close()
            self._process = None

    def __enter__(self) -> 'CommandRating':
        return self

    def __exit__(self, *exception) -> None:
        self.close()
