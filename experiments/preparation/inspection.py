"""Prepared rows as people read them: what a folder holds and leaves out, a row, the documents of a run's step."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath

from experiments.preparation.report import draw_report
from experiments.prompting.prompt_file import check_output
from experiments.run.config_file import flatten, split_list
from experiments.run.data_schedule import parse_schedule
from experiments.run.record import read_record
from llama_jax import pretrained, storage
from llama_jax.data.datasets import pretrain_dataset
from llama_jax.data.prepare import REPORT, WORK
from llama_jax.data.prepared import VALIDATION, PreparedRows, is_prepared
from llama_jax.data.provenance import (
    Passage,
    document_lengths,
    files_of,
    find_copies,
    passages_of,
    read_text,
    reading_of,
)
from llama_jax.data.sources import read_fields
from llama_jax.errors import InputError
from llama_jax.json_file import read_object, show_json
from llama_jax.tokenizer.tokenizer import Tokenizer

_MAX_ROWS = 100_000  # that copies are looked for in; more takes minutes
_SAMPLES, _LETTERS, _FIELDS = 3, 80, 300

# What decides which rows a step reads, and may have been let change on the way.
_READS = ('seed', 'data.train', 'data.weights', 'data.skip', 'data.seq_len', 'data_fingerprint')


def inspect(
    folder: str, row: int | None, step: int | None, tokenizer: str | None, picture: str | None
) -> str:
    """What is in a folder of rows, in one of them, or in the batch of a step of a run.

    Args:
      folder: of prepared rows, or a workdir where there is a step.
      row: the only one to show.
      step: from 1, as logged.
      tokenizer: to show the text of a row with.
      picture: file for a picture of the lengths.

    Raises:
      InputError: it is none, has no such row or step, or what is given does not go together.
    """
    if step is not None:
        for name, given in (('row', row), ('tokenizer', tokenizer), ('output', picture)):
            if given is not None:
                raise InputError(f'{name} and step are both given; a step is shown as a whole')
        return describe_step(folder, step)
    if not is_prepared(folder):
        raise InputError(_why_not_prepared(folder))
    if picture:
        check_output(picture)
        storage.write_atomically(epath.Path(picture), draw_folder(folder))
    if row is None:
        return describe_folder(folder)
    return describe_row(
        PreparedRows(folder), row, pretrained.load_tokenizer(tokenizer) if tokenizer else None
    )


def _why_not_prepared(folder: str) -> str:
    """What is wrong with a folder that holds no rows."""
    path = epath.Path(folder)
    if not folder or not path.exists():
        return f'no folder {folder!r}; give one of prepared rows, or the workdir of a run and a step'
    if (path / WORK).exists():
        return f'{folder} is not finished; prepare it to its end by the same command'
    # A workdir has a report too, of another kind.
    if (path / REPORT).exists() and (sources := read_object(path / REPORT).get('sources')):
        return f'{folder} holds several sources, each in a folder of its own: {", ".join(sources)}; give one of these'
    return f'{folder} has no manifest of prepared rows; of a workdir give a step too'


def describe_folder(folder: str) -> str:
    """Counts, lengths, what was left out with samples, documents that are there several times."""
    rows = PreparedRows(folder)
    manifest, lengths = rows.manifest, document_lengths(rows)
    lines = [
        f'{folder}: {len(rows):,} rows of {rows.seq_len} tokens, {rows.num_documents:,} documents, '
        f'{rows.num_tokens:,} tokens, {rows.num_bytes / 1e6:.1f} MB of text, {len(manifest["shards"]):,} shards, '
        f'from {len(files_of(rows)):,} files',
        f'tokens of a document: {lengths.min():,} to {lengths.max():,}, {lengths.mean():,.1f} on average, '
        f'{np.median(lengths):,.0f} in the middle',
    ]
    counts = count_lengths(lengths)
    lines += [f'  under {2**bits:,}: {count:,}' for bits, count in enumerate(counts) if count]
    for name, what in (('bad', 'bad records'), ('empty', 'empty texts')):
        lines.append(f'left out: {manifest["filters"][name]:,} {what}')
        lines += [f'  {sample}' for sample in manifest.get(f'{name}_first', ())]
    lines.append(f'held out: {manifest["filters"]["held_out"]:,} documents')
    if is_prepared(held_out := f'{folder.rstrip("/")}/{VALIDATION}'):
        lines += [f'  {sample}' for sample in _first_documents(PreparedRows(held_out))]
    looked_at, copies = find_copies(rows, _MAX_ROWS)
    more = sum(len(group.places) - 1 for group in copies)
    lines.append(f'copies: {more:,} of {looked_at:,} documents are the same as one before')
    for group in copies[:_SAMPLES]:
        places = ', '.join(f'{file} record {record}' for file, record in group.places[:_SAMPLES])
        also = ', ...' if len(group.places) > _SAMPLES else ''
        text = _beginning(rows, *group.places[0])
        lines.append(f'  {len(group.places):,} of {group.num_tokens:,} tokens, {text}: {places}{also}')
    return '\n'.join(lines)


def count_lengths(lengths: Sequence[int] | np.ndarray) -> list[int]:
    """Documents of under 2, 4, 8, ... tokens, as a report has them."""
    bits = np.frexp(np.asarray(lengths, np.float64))[1]
    return np.bincount(bits, minlength=32).tolist()


def draw_folder(folder: str) -> bytes:
    """Tokens and lengths of a folder's documents, as PNG."""
    rows = PreparedRows(folder)
    lengths = count_lengths(document_lengths(rows))
    name = folder.rstrip('/').rpartition('/')[2]
    return draw_report({'sources': {name: {'train': {'tokens': rows.num_tokens, 'lengths': lengths}}}})


def _first_documents(rows: PreparedRows) -> list[str]:
    found = {}
    for number in range(min(len(rows), _SAMPLES)):
        for passage in passages_of(rows, number):
            found.setdefault((passage.file, passage.record), None)
    return [
        f'{file} record {record}, {_beginning(rows, file, record)}' for file, record in list(found)[:_SAMPLES]
    ]


def _beginning(rows: PreparedRows, file: str, record: int) -> str:
    """How a text begins, where its file is still there."""
    try:
        text = read_text(file, reading_of(rows), record)
    except InputError as error:
        return f'({error})'
    return repr(text if len(text) <= _LETTERS else f'{text[:_LETTERS]}...')


def describe_row(rows: PreparedRows, number: int, tokenizer: Tokenizer | None) -> str:
    """A row: what is predicted in it, where each document came from and, where there is a tokenizer, how it reads.

    Where a document's file is still there, what its record says beside the text stands with it.

    Raises:
      InputError: there is no such row, or the tokenizer is another one.
    """
    if not 0 <= number < len(rows):
        raise InputError(f'row is {number}; {rows.folder} has rows 0 to {len(rows) - 1}')
    if tokenizer and tokenizer.sha256 != rows.tokenizer_sha256:
        raise InputError(
            f'{tokenizer.path} is not the tokenizer that {rows.folder} was prepared with (sha256 '
            f'{tokenizer.sha256[:12]}, not {rows.tokenizer_sha256[:12]}); give that one'
        )
    row, found = rows[number], passages_of(rows, number)
    used = found[-1].end
    predicted = sum(passage.end - passage.begin - 1 for passage in found)
    lines = [
        f'row {number} of {rows.folder}: {used} of {rows.seq_len + 1} tokens, of which {predicted} are predicted, '
        f'{len(found)} documents'
    ]
    for passage in found:
        lines.append(f'  {describe_passage(passage)}')
        if fields := _fields(rows, passage):
            lines.append(f'    {fields}')
        if tokenizer:
            lines.append(f'    {_decoded(row["tokens"][passage.begin : passage.end], tokenizer)}')
    return '\n'.join(lines)


def _fields(rows: PreparedRows, passage: Passage) -> str:
    """What a document's record says of it beside its text, where its file is still there."""
    try:
        fields = read_fields(passage.file, reading_of(rows).text_key, passage.record)
    except InputError as error:
        return f'({error})'
    shown = ', '.join(f'{name}: {show_json(value)}' for name, value in fields.items())
    return shown if len(shown) <= _FIELDS else f'{shown[:_FIELDS]}...'


def describe_passage(passage: Passage) -> str:
    """Which tokens of the row are of which of which record."""
    last = passage.first_token + passage.end - passage.begin - 1
    ends = ', its end' if passage.is_whole else ''
    return (
        f'tokens {passage.begin}-{passage.end - 1}: {passage.file} record {passage.record}, its tokens '
        f'{passage.first_token}-{last}{ends}'
    )


def _decoded(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    begins, ends = ids[0] == tokenizer.bos_id, ids[-1] == tokenizer.eos_id
    text = tokenizer.decode(ids[int(begins) : len(ids) - int(ends)].tolist())
    return ('<BOS>' if begins else '...') + repr(text)[1:-1] + ('<EOS>' if ends else '...')


@dataclasses.dataclass(frozen=True)
class StepRow:
    """A row of a step's global batch: its source, its number there, and which pass over that source it is of."""

    name: str
    rows: PreparedRows
    number: int
    epoch: int


def rows_of_step(workdir: str, step: int) -> list[StepRow]:
    """The rows of the global batch that a run's step has read, or will read, in order.

    Args:
      workdir: of a pretraining on prepared folders.
      step: from 1, as logged.

    Raises:
      InputError: there is no such run, or it does not tell what that step reads.
    """
    record = read_record(epath.Path(workdir))
    if record is None:
        raise InputError(f'{workdir} is neither a folder of prepared rows nor a workdir of a run')
    if step < 1:
        raise InputError(f'step is {step}; steps count from 1')
    config = flatten(record['config'])
    sources = split_list(config.get('data.train') or '')
    if not sources or not {'data.weights', 'data.seq_len', 'train.batch_size', 'seed'} <= config.keys():
        raise InputError(f'{workdir} is of no pretraining; the documents of its steps are not told')
    for source in sources:
        if not is_prepared(source):
            raise InputError(
                f'{workdir} reads {source}, which is text and was packed in memory: only of prepared rows is it told '
                'where they came from; prepare it'
            )
    batch_size, first = config['train.batch_size'], _rows_before(workdir, record, step)
    schedule = parse_schedule(config['data.weights'], config.get('data.skip') or '', len(sources))
    stages, skips = schedule.in_rows(batch_size)
    data = pretrain_dataset(
        sources, pretrained.load_tokenizer(workdir), config['data.seq_len'], weights=schedule.weights, stages=stages,
        skips=skips, validation_fraction=0.0, seed=config['seed'],
    )  # fmt: skip
    if data.fingerprint != record['data_fingerprint']:
        raise InputError(
            f'the data of {workdir} have changed since: its folders hold other rows (fingerprint '
            f'{record["data_fingerprint"][:12]}, now {data.fingerprint[:12]}); restore them'
        )
    found = []
    for index in range(first, first + batch_size):
        source, number = data.train.find_row(index)
        rows, (_, drawn) = data.train_rows[source], data.train.find(index)
        assert isinstance(rows, PreparedRows)
        found.append(StepRow(data.names[source], rows, number, drawn // len(rows) + 1))
    return found


def _rows_before(workdir: str, record: dict, step: int) -> int:
    """Rows that the steps before have read; another size of the batch may have been let in on the way."""
    if (fork := record.get('fork')) and step <= fork['step']:
        raise InputError(
            f'step {step} was taken by {fork["workdir"]}, which {workdir} goes on from; look there'
        )
    count, done = 0, 0
    for change in record.get('history', ()):
        if change['key'] in _READS and step <= change['step']:
            raise InputError(
                f'step {step} of {workdir} was taken when {change["key"]} was {change["before"]!r}; from step '
                f'{change["step"] + 1} on it is told'
            )
        if change['key'] == 'train.batch_size':
            if step <= change['step']:
                raise InputError(
                    f'step {step} of {workdir} was taken with batch_size {change["before"]}; from step '
                    f'{change["step"] + 1} on it is told'
                )
            count, done = count + (change['step'] - done) * change['before'], change['step']
    return count + (step - 1 - done) * flatten(record['config'])['train.batch_size']


def describe_step(workdir: str, step: int) -> str:
    """The documents of every row of a step, by file and record."""
    lines = []
    for place, row in enumerate(rows_of_step(workdir, step)):
        lines.append(f'step {step} row {place}: {row.name} row {row.number}, pass {row.epoch}')
        lines += [f'  {describe_passage(passage)}' for passage in passages_of(row.rows, row.number)]
    return '\n'.join(lines)
