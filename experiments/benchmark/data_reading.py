"""Suite `data`: from rows on the disk, or in a bucket, to batches."""

import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.data_preparation import Setting, ratios, take_turns
from llama_jax.data.datasets import pretrain_dataset
from llama_jax.data.prepared import MANIFEST, PreparedRows, origins_file
from llama_jax.data.shards import write_prepared
from llama_jax.errors import InputError
from llama_jax.pretrained import load_tokenizer

_SEQ_LEN, _BATCH_SIZE, _NUM_BATCHES = 2048, 64, 20
_DELAY = 0.03  # seconds that each request takes
_REPOSITORY = Path(__file__).resolve().parents[2]


def random_rows(setting: Setting) -> dict[str, float]:
    """Rows a second of the loader, of ArrayRecord's own reads, and beside what a small model trains on."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    folders = _write_shards(setting, 1000)
    tokenizer = load_tokenizer(setting.sentencepiece)
    data = pretrain_dataset([str(folder) for folder in folders], tokenizer, _SEQ_LEN, validation_fraction=0.0)
    files = sorted(str(file) for folder in folders for file in folder.glob('rows-*'))
    reader = ArrayRecordDataSource(files)
    rng, firsts = np.random.default_rng(0), itertools.count(0, _BATCH_SIZE * _NUM_BATCHES)
    count = _BATCH_SIZE * _NUM_BATCHES

    def ours() -> None:
        for _ in itertools.islice(data.batches(_BATCH_SIZE, first_row=next(firsts)), _NUM_BATCHES):
            pass

    def array_record() -> None:
        for _ in range(_NUM_BATCHES):
            reader.__getitems__(rng.integers(0, len(reader), _BATCH_SIZE).tolist())

    for _ in range(8):  # every shard is open
        ours()
        array_record()
    times = take_turns({'ours': ours, 'array_record': array_record}, max(setting.rounds, 5))
    found: dict[str, float] = {'shards': len(files)}
    found |= {f'{name}_per_second': count / statistics.median(seconds) for name, seconds in times.items()}
    found |= ratios('times_array_record', times['ours'], times['array_record'])
    lines = _train(setting, 'stories_15m', str(folders[0]), 12, data__seq_len=256, train__batch_size=8)
    trained = statistics.median(line['tokens_per_second'] for line in lines[2:])
    found['stories_15m_tokens_per_second'] = trained
    found['tokens_times_stories_15m'] = found['ours_per_second'] * _SEQ_LEN / trained
    return found


def open_many(setting: Setting) -> dict[str, float]:
    """Seconds to open a folder of 10,000 shards, and to read its first row."""
    folder = setting.folder / 'many'
    write_prepared(setting.texts[:1], load_tokenizer(setting.sentencepiece), 64, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (shard,) = manifest['shards']
    shards = []
    for number in range(10_000):
        name = f'rows-{number:05d}.array_record'
        if number:
            os.link(folder / shard['file'], folder / name)
            os.link(folder / origins_file(shard['file']), folder / origins_file(name))
        shards.append(shard | {'file': name})
    counts = {key: manifest[key] * 10_000 for key in ('num_rows', 'num_documents', 'num_tokens', 'num_bytes')}
    (folder / MANIFEST).write_text(json.dumps(manifest | counts | {'shards': shards}, indent=1))
    seconds = []
    for _ in range(setting.rounds):
        begin = time.perf_counter()
        rows = PreparedRows(folder)
        seconds.append(time.perf_counter() - begin)
        assert rows[len(rows) - 1]['tokens'].any()
    return {'seconds_of_10000_shards': statistics.median(seconds)}


def bucket_rows(setting: Setting) -> dict[str, float]:
    """Rows a second that come from a bucket whose requests take 30 ms, by the loader and one by one."""
    with _bucket() as delay:
        (folder,) = _write_shards(setting, 16, 'gs://bench/rows')
        tokenizer = load_tokenizer(setting.sentencepiece)
        data = pretrain_dataset([folder], tokenizer, _SEQ_LEN, validation_fraction=0.0)
        for number in range(len(data.train_rows[0])):  # shards are open
            data.train_rows[0][number]
        delay(_DELAY)
        firsts = itertools.count(0, 256)

        def ours() -> None:
            for _ in itertools.islice(data.batches(32, first_row=next(firsts)), 8):
                pass

        def one_by_one() -> None:
            first = next(firsts)
            for row in range(first, first + 256):
                data.train[row]

        times = take_turns({'ours': ours, 'one_by_one': one_by_one}, setting.rounds)
    found = {f'{name}_per_second': 256 / statistics.median(seconds) for name, seconds in times.items()}
    return found | ratios('times_one_by_one', times['ours'], times['one_by_one'])


def waits(setting: Setting) -> dict[str, float]:
    """Per cent of the time that `tiny` waits for its batches."""
    found = {}
    with _bucket() as delay:
        for name, folder in (('disk', str(setting.folder / 'wait')), ('bucket', 'gs://bench/wait')):
            (place,) = _write_shards(setting, 16, folder)
            delay(_DELAY if name == 'bucket' else 0.0)
            lines = _train(setting, 'tiny', str(place), 60, log__every=10)
            found[f'{name}_percent'] = 100 * statistics.mean(line['data_wait'] for line in lines[2:])
            delay(0.0)
    return found


def _write_shards(setting: Setting, count: int, folder: str = '') -> list[Any]:
    """Prepared folders with about so many shards: two, or the one that is named."""
    tokenizer = load_tokenizer(setting.sentencepiece)
    pieces = [text[begin : begin + 8000] for text in setting.texts for begin in range(0, len(text), 8000)]
    if count < 100:  # of a bucket
        pieces = pieces[:600]
    unit_bytes = sum(len(piece.encode('utf-8', 'surrogatepass')) for piece in pieces) // count
    places = [folder] if folder else [setting.folder / 'shards0', setting.folder / 'shards1']
    for number, place in enumerate(places):
        write_prepared(pieces[number :: len(places)], tokenizer, _SEQ_LEN, place, unit_bytes=unit_bytes)
    return places


def _train(
    setting: Setting, preset: str, folder: str, num_steps: int, **changed: Any
) -> list[dict[str, Any]]:
    """What a run logged."""
    workdir = setting.folder / f'run_{preset}'
    settings = {
        'data.train': folder, 'data.tokenizer': setting.sentencepiece, 'data.weights': '', 'data.validation': '',
        'data.validation_fraction': 0.0, 'train.num_steps': num_steps, 'log.every': 2, 'log.tensorboard': False,
        'checkpoint.every': 10 * num_steps, 'eval.sample_tokens': 0, 'optimizer.warmup_steps': 2,
    } | {name.replace('__', '.'): value for name, value in changed.items()}  # fmt: skip
    command = [
        sys.executable, '-m', 'experiments.pretrain', f'--config=configs/pretrain.py:{preset}', f'--workdir={workdir}',
        *(f'--config.{name}={value}' for name, value in settings.items()),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}')
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    shutil.rmtree(workdir)
    return [line for line in map(json.loads, lines) if 'loss' in line]


@contextlib.contextmanager
def _bucket() -> Iterator[Any]:
    """A bucket of the tests, in a process of its own, and what sets the seconds that each request to it takes."""
    if not (_REPOSITORY / 'tests/reference/fake_gcs.py').exists():
        raise InputError(
            'the parts bucket and wait need the folder tests of the repository; run them from a checkout'
        )
    command: Sequence[str] = [sys.executable, '-m', 'tests.reference.fake_gcs']
    with subprocess.Popen(
        command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        stdin, stdout = process.stdin, process.stdout
        os.environ.update(json.loads(stdout.readline()))

        def delay(seconds: float) -> None:
            stdin.write(f'{seconds}\n')
            stdin.flush()
            stdout.readline()

        try:
            yield delay
        finally:
            stdin.close()
            process.wait()
