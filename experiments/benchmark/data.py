"""From text to rows, and from rows to batches: beside what users would otherwise take, contenders in turns.

prepare   JSON lines in Zstandard to packed rows on the disk, in two processes: beside the batch calls of
sentencepiece and tiktoken on the same text in memory, datatrove's pipeline, and one process on one core
length    one long document beside the same text as many
memory    peak of all processes on ten times the text beside that on one
rows      random rows of a mixture over 1,000 shards: beside ArrayRecord's own batched reads of random records, and
the tokens that a small model trains on in the same time
open      a folder of 10,000 shards
bucket    rows of a bucket that takes 30 ms a request, read as the loader does beside one by one
wait      the share of time that a run of `tiny` waits for its batches, from the disk and from that bucket
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard
from absl import flags

from experiments import launch
from experiments.benchmark import data_preparation, data_reading
from experiments.run.config_file import split_list
from llama_jax.data.sources import read_documents
from llama_jax.errors import InputError

PARTS = {
    'prepare': data_preparation.prepare_beside_others,
    'length': data_preparation.one_beside_many,
    'memory': data_preparation.peak_memory,
    'rows': data_reading.random_rows,
    'open': data_reading.open_many,
    'bucket': data_reading.bucket_rows,
    'wait': data_reading.waits,
}

_PARTS = flags.DEFINE_list('data_parts', list(PARTS), 'what to measure')
_TEXT = launch.define_path(
    'data_text', 'python_stdlib', 'sources of text, by commas, used again where they are short'
)
_SIZE = flags.DEFINE_integer('data_mb', 64, 'of text', lower_bound=1)
_SENTENCEPIECE = launch.define_path('data_sentencepiece', '', 'tokenizer.model of Llama 2')
_TIKTOKEN = launch.define_path('data_tiktoken', '', 'tokenizer.model of Llama 3')
_ROUNDS = flags.DEFINE_integer('data_rounds', 3, 'turns that each contender takes', lower_bound=1)
_CONTENDERS = flags.DEFINE_list('data_contenders', [], 'of prepare: only these two or more; empty: all')


def main() -> Iterator[dict[str, Any]]:
    """The figures, after each part."""
    for flag in (_SENTENCEPIECE, _TIKTOKEN):
        if not flag.value:
            raise InputError(f'--{flag.name} is required, a tokenizer file')
    for part in _PARTS.value:
        if part not in PARTS:
            raise InputError(f'--data_parts has {part!r}; they are {", ".join(PARTS)}')
    figures: dict[str, Any] = {'text_mb': _SIZE.value, 'rounds': _ROUNDS.value}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = write_text(split_list(_TEXT.value), _SIZE.value * 1_000_000, folder)
        setting = data_preparation.Setting(
            folder, texts, _SENTENCEPIECE.value, _TIKTOKEN.value, _ROUNDS.value, tuple(_CONTENDERS.value)
        )
        for part in _PARTS.value:
            found = PARTS[part](setting)
            for name, value in found.items():
                print(f'{part:8} {name:48} {value:14.4g}', flush=True)
            figures |= {f'{part}_{name}': value for name, value in found.items()}
            yield figures


def write_text(sources: Sequence[str], num_bytes: int, folder: Path) -> list[str]:
    """The texts of some bytes, which are also written as eight files of JSON lines in Zstandard."""

    def endless() -> Iterator[str]:
        while True:
            for source in sources:
                yield from read_documents(source)

    texts, size = [], 0
    for text in endless():
        texts.append(text)
        size += len(text.encode('utf-8', 'surrogatepass'))
        if size >= num_bytes:
            break
    for number in range(8):
        lines = '\n'.join(json.dumps({'text': text}) for text in texts[number::8])
        (folder / f'{number}.jsonl.zst').write_bytes(zstandard.compress(lines.encode()))
    return texts
