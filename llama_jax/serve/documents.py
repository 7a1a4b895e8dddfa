"""Passages of a folder's texts that have to do with a question, found by their words (BM25)."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from llama_jax.errors import InputError

# Of one file, and of all; what is larger is no folder of notes.
_MAX_FILE, _MAX_FILES = 4 << 20, 10_000
# Characters of a passage, about; it ends with a line.
_PASSAGE = 800
_INSTRUCTION = 'Answer from these passages where they help, and cite them by their numbers, as in [1].'
# Llama 2's tags, which are text to its tokenizer, and what stands for them in a passage.
_TAGS = ('[INST]', '[/INST]', '<<SYS>>', '<</SYS>>')


@dataclasses.dataclass(frozen=True)
class Passage:
    """Some lines of a file.

    Attributes:
      file: within the folder.
      line: its first, from 1.
      text: of the lines.
    """

    file: str
    line: int
    text: str

    @property
    def place(self) -> str:
        """For a citation."""
        return f'{self.file}:{self.line}'


class Documents:
    """The texts of a folder, cut into passages."""

    def __init__(self, folder: str):
        """Reads all files that are texts; others, and hidden ones, are passed over.

        Raises:
          InputError: there is no such folder, no text in it, or too much.
        """
        self._passages = [passage for passage in _read(epath.Path(folder)) if passage.text.strip()]
        if not self._passages:
            raise InputError(f'{folder} holds no texts to read; files of UTF-8 are read')
        self._index: Any = self._search().BM25()
        self._index.index(self._words([passage.text for passage in self._passages]), show_progress=False)

    @staticmethod
    def _search() -> Any:
        try:
            import bm25s
        except ImportError:
            raise InputError("documents need the package bm25s: pip install 'llama_jax[serve]'") from None
        logging.getLogger('bm25s').setLevel(logging.WARNING)  # it sets DEBUG, and narrates
        return bm25s

    def _words(self, texts: Sequence[str]) -> Any:
        return self._search().tokenize(list(texts), stopwords='en', show_progress=False)

    def find(self, question: str, most: int = 4) -> list[Passage]:
        """Passages that share words with the question, the nearest first."""
        words = self._words([question])
        if not words.vocab:
            return []
        number = min(most, len(self._passages))
        (places,), (scores,) = self._index.retrieve(words, k=number, show_progress=False)
        return [self._passages[int(place)] for place, score in zip(places, scores, strict=True) if score > 0]


def with_passages(question: str, passages: Sequence[Passage]) -> str:
    """What the model is asked: the passages with their numbers and places, then the question."""
    if not passages:
        return question
    shown = '\n\n'.join(
        f'[{number}] {passage.place}\n{_without_tags(passage.text)}'
        for number, passage in enumerate(passages, 1)
    )
    return f'{_INSTRUCTION}\n\n{shown}\n\n{question}'


def citations(passages: Sequence[Passage]) -> list[str]:
    """What the numbers stand for."""
    return [f'[{number}] {passage.place}' for number, passage in enumerate(passages, 1)]


def _without_tags(text: str) -> str:
    for tag in _TAGS:
        text = text.replace(tag, f'{tag[0]} {tag[1:]}')
    return text.strip()


def _read(folder: epath.Path) -> Iterator[Passage]:
    if not folder.is_dir():
        raise InputError(f'{folder} is no folder; give one of texts')
    number = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(name for name in names if not name.startswith('.')):
            if (number := number + 1) > _MAX_FILES:
                raise InputError(f'{folder} holds more than {_MAX_FILES} files; give a smaller one')
            path = os.path.join(place, name)
            if not os.path.isfile(path) or os.path.getsize(path) > _MAX_FILE:
                continue
            data = epath.Path(path).read_bytes()
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            if '\0' not in text:
                yield from _passages(os.path.relpath(path, folder), text)


def _passages(file: str, text: str) -> Iterator[Passage]:
    """The lines of a text, together as long as a passage may be; a heading or paragraph begins one if it can."""
    held: list[str] = []
    first, size = 1, 0
    for number, line in enumerate(text.splitlines(), 1):
        is_break = not line.strip() and size > _PASSAGE // 2
        if held and (size + len(line) > _PASSAGE or is_break):
            yield Passage(file, first, '\n'.join(held))
            held, first, size = [], number, 0
        held.append(line[: 4 * _PASSAGE])
        size += len(line) + 1
    if held:
        yield Passage(file, first, '\n'.join(held))
