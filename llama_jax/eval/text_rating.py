"""Ratings of text by others: a local file of scores, or a classifier that runs as a command.

They stand in for services such as Perspective (toxicity) and for libraries such as VADER (sentiment).
"""

import json
import shlex
import subprocess
import threading
from collections.abc import Callable

from etils import epath

from llama_jax.eval.documents import Source, read_rows
from llama_jax.types import InputError


def file_rating(file: str) -> Callable[[str], float]:
    """Looks texts up in a JSON Lines file of {"text": ..., "score": number}.

    Raises:
      InputError: the file is malformed; or, when called, it does not hold the text.
    """
    source = Source('scores', (file,), {'text': str, 'score': (int, float)})
    rows = [source.checked(place, row) for place, row in read_rows(epath.Path(file))]
    scores = {row['text']: float(row['score']) for row in rows}

    def rate(text: str) -> float:
        if text not in scores:
            raise InputError(
                f'{file} has no score for {text[:60]!r}; it needs a line {{"text", "score"}} for each text'
            )
        return scores[text]

    return rate


class CommandRating:
    """A command that reads one JSON string a line and answers each with one number a line.

    It is started once, at the first text, and ended by `close` (or as a context manager). Calls from several threads
    take turns.

    Raises:
      InputError: `command` is no command of a shell; or, when called, it cannot be started or answers no number.
    """

    def __init__(self, command: str):
        self.command = command
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise InputError(f'the rating command {command!r} cannot be read: {error}') from error
        if not self._arguments:
            raise InputError(f'the rating command {command!r} is empty; give a program and its arguments')
        self._process: subprocess.Popen | None = None
        self._turn = threading.Lock()

    def __call__(self, text: str) -> float:
        with self._turn:
            try:
                self._process = self._process or subprocess.Popen(
                    self._arguments,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    bufsize=1,
                )
                assert self._process.stdin and self._process.stdout
                self._process.stdin.write(json.dumps(text) + '\n')
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
                return float(answer)
            except (OSError, ValueError) as error:
                raise InputError(
                    f'the rating command {self.command!r} did not answer {text[:40]!r} with a number: {error}'
                ) from error

    def close(self) -> None:
        """Ends the command."""
        if self._process is not None:
            self._process.communicate(timeout=10)
            self._process = None

    def __enter__(self) -> 'CommandRating':
        return self

    def __exit__(self, *exception) -> None:
        self.close()
