"""From source strings to what a training run reads: endless mixed rows, and rows to validate on."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from jax.sharding import Mesh

from llama_jax.data.loader import batches
from llama_jax.data.mixture import Mixture, Skip, Stage, mix
from llama_jax.data.packing import (
    JoinedRows,
    PackedRows,
    Progress,
    Rows,
    check_seq_len,
    tokenize_documents,
    tokenize_units,
)
from llama_jax.data.prepared import VALIDATION, PreparedRows, is_prepared
from llama_jax.data.sources import Reading, check_source, read_documents
from llama_jax.data.units import UNIT_BYTES, cut_texts, is_held_out, read_units
from llama_jax.errors import InputError, checked_names
from llama_jax.partitioning import Partitioner, as_mesh
from llama_jax.table import html_of
from llama_jax.tokenizer.protocol import required
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.training import train_sentencepiece
from llama_jax.types import LMBatch

_log = logging.getLogger(__name__)


# Source strings or paths, one or several.
Sources = str | os.PathLike | Sequence[str | os.PathLike]


@dataclasses.dataclass(frozen=True)
class PretrainData:
    """What pretraining reads.

    Attributes:
      train: endless; row `i` depends on the sources, the weights, the seed and `i` only.
      validation: rows in order, or None where nothing was given or held out.
      validation_parts: the same by the name of what they are of, where that is several.
      train_rows: the rows of each training source.
      names: of these, each once.
      fingerprint: hash of the training rows, the weights that they begin with, their length and the tokenizer; not of
        the seed.
      num_train_tokens: tokens in one pass over all training sources; so for documents, bytes and rows.
    """

    train: Mixture
    validation: Rows | None
    validation_parts: Mapping[str, Rows]
    train_rows: tuple[Rows, ...]
    names: tuple[str, ...]
    fingerprint: str
    num_train_tokens: int
    num_train_documents: int
    num_train_bytes: int
    num_train_rows: int

    def __repr__(self) -> str:
        return f'PretrainData({", ".join(f"{name}: {value}" for name, value in self._shown().items())})'

    def _repr_html_(self) -> str:
        return html_of('PretrainData', self._shown())

    def _shown(self) -> dict[str, object]:
        numbers = {
            'documents': self.num_train_documents, 'bytes': self.num_train_bytes, 'tokens': self.num_train_tokens,
            'rows': self.num_train_rows, 'validation rows': len(self.validation) if self.validation else 0,
        }  # fmt: skip
        return {name: f'{number:,}' for name, number in numbers.items()}

    def batches(
        self, batch_size: int, mesh: Mesh | Mapping[str, int] | None = None, *, first_row: int = 0
    ) -> Iterator[LMBatch]:
        """Endless batches of `train`, in order.

        Args:
          batch_size: B.
          mesh: that the rows are spread over, or the sizes of its axes; None: the first device.
          first_row: where to begin: the rows consumed before.

        Raises:
          InputError: the batch does not divide over the mesh.
        """
        if batch_size < 1:
            raise InputError(f'batch_size is {batch_size}; it must be at least 1')
        seq_len = self.train[0]['tokens'].shape[0] - 1
        sharding = Partitioner(as_mesh(mesh)).batch_sharding(batch_size, seq_len)
        return batches(self.train, LMBatch.abstract(batch_size, seq_len, sharding), rows_consumed=first_row)


@checked_names()
def pretrain_dataset(
    train: Sources,
    tokenizer: Tokenizer | None,
    seq_len: int,
    *,
    texts: Iterable[str] | None = None,
    weights: Sequence[float | int] | None = None,
    stages: Sequence[Stage] = (),
    skips: Sequence[Skip] = (),
    validation: Sources = (),
    validation_fraction: float = 0.01,
    text_key: str = 'text',
    separator: str = '',
    seed: int = 0,
    unit_bytes: int = UNIT_BYTES,
    progress: Progress | None = None,
) -> PretrainData:
    """Reads, tokenises, packs and mixes the sources of a run; folders of prepared rows are just opened.

        data = llama_jax.pretrain_dataset([], tokenizer, seq_len=16, texts=['Once upon a time ...', 'The end ...'])

    Args:
      train: source strings (see `sources`), or folders that `write_prepared` wrote; one of them, or several.
      tokenizer: must be the one that prepared folders were written with.
      seq_len: T; rows have T + 1 tokens.
      texts: documents in memory, one more training source behind the others; [] for `train` where there are none.
      weights: one for each training source, or None: by size.
      stages: other weights from a row on.
      skips: rows that are left out.
      validation: source strings, or prepared folders, each of which is validated on by itself. Empty: what was held
        out of prepared folders, and documents held out of sources that are text; which ones depends on their text
        alone, and the first document of a source always trains, but for its end where it is the only one.
      validation_fraction: how much to hold out then; 0: nothing.
      text_key: field of the text in JSON lines and TFDS.
      separator: where text files are cut into documents.
      seed: of the shuffling.
      unit_bytes: of the text that is packed together, where a source is text; 0: all of it, as it was once.
      progress: called after each batch of a source, counting from its start.

    Raises:
      InputError: a source cannot be read, or prepared rows do not fit the tokenizer or seq_len.
    """
    train, tokenizer = _as_sources(train), required(tokenizer)
    if not train and texts is None:
        raise InputError('no training data: name at least one source, or give texts')
    check_seq_len(seq_len)
    if not 0 <= validation_fraction < 1:
        raise InputError(f'validation_fraction is {validation_fraction}; it must be from 0 to below 1')
    validation = _as_sources(validation)
    fraction = 0.0 if validation else validation_fraction
    held_out: list[str] = []
    rows: list[Rows] = []
    for source in train:
        if is_prepared(source):
            rows.append(_open_prepared(source, tokenizer, seq_len))
            continue
        documents = read_units(source, Reading(text_key, separator), unit_bytes)
        documents = _hold_out(documents, fraction, held_out)
        rows.append(PackedRows(tokenize_units(documents, tokenizer, progress), seq_len))
    if texts is not None:
        documents = _hold_out(cut_texts(_checked_texts(texts), unit_bytes), fraction, held_out)
        rows.append(PackedRows(tokenize_units(documents, tokenizer, progress), seq_len))
    names = _names_of([*train, *['texts'] * (texts is not None)])
    kept: dict[str, Rows] = {}
    if validation:
        of_text = [source for source in validation if not is_prepared(source)]
        folders = [source for source in validation if source not in of_text]
        if of_text and folders:
            raise InputError(
                f'validation mixes the prepared folder {folders[0]} with {of_text[0]}, which is text; prepare all of it'
            )
        of_folders = zip(_names_of(folders), folders, strict=True)
        kept = {name: _open_prepared(source, tokenizer, seq_len) for name, source in of_folders}
        held_out = [
            text
            for source in of_text
            for text in read_documents(source, text_key=text_key, separator=separator)
        ]
    elif fraction:
        for name, source in zip(names, train, strict=False):  # texts are not prepared
            if is_prepared(folder := f'{source.rstrip("/")}/{VALIDATION}'):
                kept[name] = _open_prepared(folder, tokenizer, seq_len)
    if held_out:
        kept['held_out'] = PackedRows(tokenize_documents(held_out, tokenizer), seq_len)
    if fraction and not kept:
        _log.warning('no validation: none of the training documents falls in the %g held out', fraction)
    if len(kept) == 1:
        kept = {'': next(iter(kept.values()))}
    validation_rows = None
    if kept:
        parts = list(kept.values())
        validation_rows = JoinedRows(parts) if len(parts) > 1 else parts[0]
    # Rows that are prepared in units are drawn in another order than the same in memory.
    prints = [f'units {r.fingerprint}' if getattr(r, 'in_units', False) else r.fingerprint for r in rows]
    identity = [prints, list(map(float, weights or [])), seq_len, tokenizer.sha256]
    return PretrainData(
        train=mix(rows, weights, seed, stages=stages, skips=skips),
        validation=validation_rows,
        validation_parts=kept if len(kept) > 1 else {},
        train_rows=tuple(rows),
        names=names,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        num_train_tokens=sum(r.num_tokens for r in rows),
        num_train_documents=sum(r.num_documents for r in rows),
        num_train_bytes=sum(r.num_bytes for r in rows),
        num_train_rows=sum(len(r) for r in rows),
    )


def check_sources(sources: Sequence[str]) -> None:
    """Refuses sources that are not there or are none, before any of them is read.

    Raises:
      InputError: names the first.
    """
    for source in sources:
        if not is_prepared(source):
            check_source(source)


def train_tokenizer(
    sources: Sources,
    vocab_size: int,
    path: str | os.PathLike,
    *,
    text_key: str = 'text',
    separator: str = '',
) -> Tokenizer:
    """Trains a sentencepiece tokenizer on text sources, writes it to `path` and opens it.

    Args:
      sources: source strings (see `sources`).
      vocab_size: see `train_sentencepiece`.
      path: file to write.
      text_key: field of the text in JSON lines and TFDS.
      separator: where text files are cut into documents.

    Raises:
      InputError: a source cannot be read, or its text does not suit `vocab_size`.
    """
    texts = (
        read_documents(source, text_key=text_key, separator=separator) for source in _as_sources(sources)
    )
    train_sentencepiece(itertools.chain.from_iterable(texts), vocab_size, path)
    return load_tokenizer(path)


def _names_of(sources: Sequence[str]) -> tuple[str, ...]:
    """What sources are called in figures: the last part of each path, or more of it where that is not enough."""
    parts = [re.sub(r'\W+$', '', source).split('/') for source in sources]
    names: list[str] = []
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [re.sub(r'[^\w.\-]', '_', '_'.join(part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f'{number}_{name}' for number, name in enumerate(names))


def _as_sources(sources: Sources) -> tuple[str, ...]:
    if isinstance(sources, str | os.PathLike):
        return (os.fspath(sources),) * bool(os.fspath(sources))
    return tuple(os.fspath(source) for source in sources)


def _checked_texts(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise InputError(f'texts are one string, {texts[:40]!r}; give a list of documents, as [text]')
    number = -1
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f'text {number} is {repr(text)[:60]}, a {type(text).__name__}; it must be a string'
            )
        if text:
            yield text
    if number < 0:
        raise InputError('texts hold no document; give at least one')


def _hold_out(
    documents: Iterable[tuple[int, str]], fraction: float, held_out: list[str]
) -> Iterator[tuple[int, str]]:
    """Passes (unit, text) on, but for `fraction` of the texts by their hash, which go to `held_out`.

    Of a single document, such as one book in a file, it is the end that is held out, from the beginning of a line.
    """
    documents = iter(documents)
    first_two = list(itertools.islice(documents, 2))
    if fraction and len(first_two) == 1:
        unit, text = first_two[0]
        middle = int(len(text) * (1 - fraction))
        cut = text.rfind('\n', 0, middle) + 1 or middle
        if cut:
            held_out.append(text[cut:])
            first_two = [(unit, text[:cut])]
    for number, (unit, text) in enumerate(itertools.chain(first_two, documents)):
        if number and is_held_out(text, fraction):
            held_out.append(text)
        else:
            yield unit, text


def _open_prepared(directory: str, tokenizer: Tokenizer, seq_len: int) -> PreparedRows:
    rows = PreparedRows(directory, seq_len)
    if rows.tokenizer_sha256 != tokenizer.sha256:
        raise InputError(
            f'{directory} was prepared with another tokenizer (sha256 {rows.tokenizer_sha256[:12]}) than '
            f'{tokenizer.path} ({tokenizer.sha256[:12]}); use that one or prepare the data again'
        )
    return rows
