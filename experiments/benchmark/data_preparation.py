"""Suite `data`: from text to packed rows on the disk."""

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from experiments.benchmark.turns import has_peer
from llama_jax.data.preparation import Preparation, TextSource
from llama_jax.data.prepare import prepare
from llama_jax.errors import InputError
from llama_jax.pretrained import load_tokenizer
from llama_jax.tokenizer.huggingface_files import huggingface_files

_SEQ_LEN = 2048


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured with.

    Attributes:
      folder: holds the text, as `*.jsonl.zst`, and what is made of it.
      texts: the same in memory.
      sentencepiece: file of a tokenizer.
      tiktoken: file of another.
      rounds: turns that each contender takes.
      contenders: names of those that prepare; empty: all.
    """

    folder: Path
    texts: list[str]
    sentencepiece: str
    tiktoken: str
    rounds: int
    contenders: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of the texts."""
        return sum(len(text.encode('utf-8', 'surrogatepass')) for text in self.texts)


def take_turns(contenders: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each in each turn; the order is another one in each."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for _ in range(rounds):
        for name in names:
            begin = time.perf_counter()
            contenders[name]()
            found[name].append(time.perf_counter() - begin)
        names.reverse()
    return found


def ratios(name: str, times: list[float], others: list[float]) -> dict[str, float]:
    """How many times as fast the first is as the second: the median, and the least and the most, turn by turn."""
    each = [theirs / ours for ours, theirs in zip(times, others, strict=True)]
    return {name: statistics.median(each), f'{name}_least': min(each), f'{name}_most': max(each)}


def prepare_beside_others(setting: Setting) -> dict[str, float]:
    """Megabytes a second of each, and ratios."""
    spiece, tiktoken = load_tokenizer(setting.sentencepiece), load_tokenizer(setting.tiktoken)
    contenders = {
        'sentencepiece': lambda: _sentencepiece(setting),
        'ours_llama2': lambda: prepare_once(setting, spiece, 2),
        'tiktoken': lambda: _tiktoken(setting),
        'ours_llama3': lambda: prepare_once(setting, tiktoken, 2),
        'one_worker': lambda: _on_one_core(lambda: prepare_once(setting, spiece, 1)),
    }
    if has_peer('datatrove', 'datatrove'):
        files = huggingface_files(tiktoken, max_seq_len=8192)
        (setting.folder / 'tokenizer.json').write_bytes(files['tokenizer.json'])
        contenders['datatrove'] = lambda: _datatrove(setting)
    for name in setting.contenders:
        if name not in contenders:
            raise InputError(f'--data_contenders has {name!r}; they are {", ".join(contenders)}')
    chosen = {name: turn for name, turn in contenders.items() if name in (setting.contenders or contenders)}
    times = take_turns(chosen, setting.rounds)
    found = {
        f'{name}_mb_per_second': setting.num_bytes / 1e6 / statistics.median(times[name]) for name in times
    }
    for name, ours, other in (
        ('times_sentencepiece', 'ours_llama2', 'sentencepiece'), ('times_tiktoken', 'ours_llama3', 'tiktoken'),
        ('two_workers_times_one', 'ours_llama2', 'one_worker'), ('times_datatrove', 'ours_llama3', 'datatrove'),
    ):  # fmt: skip
        if ours in times and other in times:
            found |= ratios(name, times[ours], times[other])
    return found


def prepare_once(setting: Setting, tokenizer: Any, num_workers: int, unit_bytes: int = 0) -> None:
    """The whole of a preparation, in units of an eighth of the text where no size is given; what it wrote goes."""
    output = setting.folder / 'prepared'
    source = TextSource('text', (f'{setting.folder}/*.jsonl.zst',))
    units = unit_bytes or setting.num_bytes // 8
    prepare(Preparation(str(output), (source,), _SEQ_LEN, units), tokenizer, num_workers=num_workers)
    shutil.rmtree(output)


def _sentencepiece(setting: Setting) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=setting.sentencepiece)  # pyright: ignore
    processor.Encode(setting.texts, num_threads=2)


def _tiktoken(setting: Setting) -> None:
    load_tokenizer(setting.tiktoken)._encoding.encode_ordinary_batch(setting.texts, num_threads=2)  # pyright: ignore


def _on_one_core(work: Callable[[], None]) -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        work()
    finally:
        os.sched_setaffinity(0, cores)


_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == '__main__':
    folder, output = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder, glob_pattern='*.jsonl.zst', compression='zstd'),
            DocumentTokenizer(
                output, tokenizer_name_or_path=f'{folder}/tokenizer.json', eos_token='<|end_of_text|>',
                shuffle_documents=False,
            ),
        ],
        tasks=8, workers=2, logging_dir=f'{output}/logs',
    ).run()
"""


def _datatrove(setting: Setting) -> None:
    output = setting.folder / 'datatrove'
    # It starts its own processes by what is run, which must be a file.
    script = setting.folder / 'pipeline.py'
    script.write_text(_DATATROVE)
    # A thread a process, as ours have.
    environment = os.environ | {'TOKENIZERS_PARALLELISM': 'false', 'RAYON_NUM_THREADS': '1'}
    subprocess.run(
        [sys.executable, script, setting.folder, output], check=True, env=environment, capture_output=True
    )
    assert any(output.glob('*.ds'))
    shutil.rmtree(output)


def one_beside_many(setting: Setting) -> dict[str, float]:
    """Time a byte of one document of 64 MB, or of all the text, as that of 64 documents of the same text."""
    text = '\n'.join(setting.texts)[: 64 << 20]
    parts = [text[begin : begin + (len(text) >> 6)] for begin in range(0, len(text), len(text) >> 6)]
    found = {}
    for name, file in (('sentencepiece', setting.sentencepiece), ('tiktoken', setting.tiktoken)):
        tokenizer = load_tokenizer(file)
        contenders = {
            'many': lambda parts=parts, tokenizer=tokenizer: tokenizer.encode_batch(parts, 1),
            'one': lambda tokenizer=tokenizer: tokenizer.encode_batch([text], 1),
        }
        times = take_turns(contenders, setting.rounds)
        found |= ratios(f'{name}_one_times_many', times['many'], times['one'])
    return found


def peak_memory(setting: Setting) -> dict[str, float]:
    """Peak of the resident bytes of all processes of the command, on some text and on ten times as much."""
    found, lines = {}, [json.dumps({'text': text}) for text in setting.texts]
    ends = list(accumulate(map(len, lines)))
    tenth = [line for line, end in zip(lines, ends, strict=True) if end <= ends[-1] / 10] or lines[:1]
    for name, written in (('tenth', tenth), ('all', lines)):
        file = setting.folder / f'{name}.jsonl'
        file.write_text('\n'.join(written))
        output = setting.folder / f'peak_{name}'
        command = [
            sys.executable, '-m', 'experiments.prepare_data', f'--input={file}', f'--tokenizer={setting.sentencepiece}',
            f'--seq_len={_SEQ_LEN}', f'--output={output}', '--num_workers=2', '--unit_bytes=1000000',
        ]  # fmt: skip
        found[f'{name}_peak_mb'] = _peak_of_tree(command) / 1e6
        shutil.rmtree(output)
    return found | {'all_times_tenth': found['all_peak_mb'] / found['tenth_peak_mb']}


def _peak_of_tree(command: list[str]) -> int:
    """Bytes of a process and all that it starts, at most, seen some twenty times a second."""
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    while process.poll() is None:
        peak = max(peak, sum(_memory_of(pid) for pid in _tree(process.pid)))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f'{" ".join(command)} ended with status {process.returncode}')
    return peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):  # it has ended
        for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
            yield from _tree(int(child))


def _memory_of(pid: int) -> int:
    """Its own share of what it shares with others."""
    with contextlib.suppress(OSError):
        for line in Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines():
            if line.startswith('Pss:'):
                return int(line.split()[1]) << 10
    return 0
