"""Brings what of the tests' data is public from the Hugging Face hub: `python -m tests.fetch_data DIR`.

Then `LLAMA_JAX_SHARED_DATA=DIR pytest` runs the tests that read it, and skips those of what is not brought: tokenizers,
which are gated, texts, and benchmarks of which the hub has no copy with their publishers' fields (AGIEval, the chains
of thought of BIG-Bench Hard, RACE). What is there is kept. A second argument, hf://FOLDER, stands for the hub, as for
`experiments.evaluate`. Needs what the extra `test` brings, and the package `datasets`.
"""

import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

import llama_jax
from llama_jax.errors import InputError, error_line
from llama_jax.eval.documents import DocumentSource
from llama_jax.eval.task import Document
from llama_jax.eval.tasks import TASKS, bbh, mbpp, mmlu, winogender
from tests.reference import numpy_llama

# Repository, file there, SHA-256.
WEIGHTS = (
    (
        'karpathy/tinyllamas', 'stories260K/stories260K.pt',
        'eec953f9d0f139e894ef8996302680e64b24813c7a98425424f5c85f7cf4abb1',
    ),
    (
        'karpathy/tinyllamas', 'stories260K/tok512.model',
        'dfff07d929db979913f166ec94a6f5ecad4c70cfed8eb5c9cbe7e464455e46f5',
    ),
    (
        'ggml-org/models', 'tinyllamas/stories260K.gguf',
        '270cba1bd5109f42d03350f60406024560464db173c0e387d91f0426d3bd256d',
    ),
)  # fmt: skip
# Folder: the file that the tests read, and the split that it holds, where these are not the task's own.
SPLITS = {
    'openbookqa': ('validation.jsonl', 'validation'),
    'trivia_qa': ('sample.jsonl', 'validation[:3000]'),
    'real_toxicity_prompts': ('sample.jsonl', 'train[:200]'),
    'mbpp': ('mbpp.jsonl', 'prompt+test+validation+train'),
}
NEW_TOKENS = 256  # of the expected text


def sources() -> dict[str, DocumentSource]:
    """FOLDER/FILE -> where its items come from."""
    loads = [load for task in TASKS.values() for load in (task.load, getattr(task.few_shot, 'load', None))]
    found = {}
    for load in [*loads, mbpp.ALL, winogender._SENTENCES]:
        wanted = isinstance(load, DocumentSource) and load.huggingface
        if wanted and (not load.optional or load.folder == 'gsm8k'):
            file, split = SPLITS.get(load.folder, (load.files[0], load.huggingface.split))
            found[f'{load.folder}/{file}'] = dataclasses.replace(
                load, huggingface=dataclasses.replace(load.huggingface, split=split)
            )
    return found


def rows_of(source: DocumentSource, hub: str) -> list[Document]:
    """The publisher's rows, each checked."""
    rows = []
    for place, row in source._rows(hub):
        source.checked(place, row)
        rows.append(row)
    return rows


def in_parts(hub: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Of the benchmarks with a file for each subject or kind: (path, how to get its bytes)."""
    mmlu_loads = {'test': TASKS['mmlu'].load, 'dev': TASKS['mmlu'].few_shot.load}
    whole = functools.cache(lambda load: load(hub))

    def of_subset(load: Callable[[str], list[Document]], subset: str) -> list[Document]:
        return [document for document in whole(load) if document['subset'] == subset]

    for (split, load), subject in itertools.product(mmlu_loads.items(), mmlu.SUBJECTS):

        def questions(load=load, subject=subject) -> bytes:
            lines = ([d['question'], *d['choices'], 'ABCD'[d['answer']]] for d in of_subset(load, subject))
            return _separated(lines)

        yield f'mmlu/{split}/{subject}_{split}.csv', questions
    for kind in bbh.SUBSETS:

        def examples(kind=kind) -> bytes:
            rows = [{key: d[key] for key in ('input', 'target')} for d in of_subset(TASKS['bbh'].load, kind)]
            return json.dumps({'examples': rows}).encode()

        yield f'bbh/bbh/{kind}.json', examples


def file_of(name: str, rows: list[dict[str, Any]]) -> bytes:
    """The rows in the format of a name: .jsonl, .json, .csv or .tsv, also with .gz."""
    match name.removesuffix('.gz').rpartition('.')[2]:
        case 'jsonl':
            data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
        case 'json':
            data = json.dumps(rows).encode()
        case 'csv':
            data = _separated([[*rows[0]], *(list(map(_cell, row.values())) for row in rows)])
        case _:
            data = ''.join(
                '\t'.join(map(str, row)) + '\n' for row in [[*rows[0]], *map(dict.values, rows)]
            ).encode()
    return gzip.compress(data, mtime=0) if name.endswith('.gz') else data


def _cell(value: Any) -> Any:
    """Several texts as TruthfulQA's file has them."""
    return '; '.join(value) if isinstance(value, list) else value


def _separated(lines: Iterable[list[Any]]) -> bytes:
    text = io.StringIO(newline='')
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()


def weights(folder: pathlib.Path) -> None:
    """The small Llama of the tests, and what its float64 reference says."""
    import huggingface_hub

    for repository, name, digest in WEIGHTS:
        place = folder / pathlib.PurePosixPath(name).name
        if not place.exists():
            data = (
                pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=[name])) / name
            ).read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != digest:
                raise InputError(
                    f'{name} of {repository} has the SHA-256 {found}; the tests are written for {digest}'
                )
            write(place, data)
    if not (folder / 'expected.json').exists():
        write(folder / 'expected.json', json.dumps(expected_of(folder), indent=2).encode())


def expected_of(folder: pathlib.Path, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """The most likely text after BOS."""
    config, params, tokenizer = llama_jax.load(folder / 'stories260K.pt', tokenizer=folder / 'tok512.model')
    constants = {'norm_eps': config.norm_eps, 'rope_theta': config.rope_theta, 'rope_scaling': None}
    held, ids = numpy_llama.to_float64(jax.device_get(params)), [tokenizer.bos_id]
    for _ in range(new_tokens):
        ids.append(int(numpy_llama.forward(constants, held, np.array([ids]))[0, -1].argmax()))
    return {
        'prompt': '', 'temperature': 0.0, 'max_new_tokens': new_tokens,
        'greedy_text': tokenizer.decode(ids[1:]), 'first_ids': ids[:16],
    }  # fmt: skip


def write(place: pathlib.Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f'{place.name}.part')
    beside.write_bytes(data)
    beside.rename(place)
    print(place)


def fetch(folder: pathlib.Path, hub: str = 'hf://') -> list[str]:
    """Brings what is missing; what could not be brought, a line for each."""
    failures = []

    def attempt(place: pathlib.Path, make: Callable[[], bytes]) -> None:
        if not place.exists():
            try:
                write(place, make())
            except InputError as error:
                failures.append(str(error))

    for path, source in sources().items():
        attempt(folder / 'eval' / path, lambda path=path, source=source: file_of(path, rows_of(source, hub)))
    for path, make in in_parts(hub):
        attempt(folder / 'eval' / path, make)
    try:
        weights(folder / 'weights/stories260K')
    except Exception as error:  # the hub's own are of many kinds
        failures.append(f'stories260K: {error_line(error)}')
    return failures


if __name__ == '__main__':
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith('-'):
        sys.exit('python -m tests.fetch_data DIR [hf://FOLDER]')
    missing = fetch(pathlib.Path(sys.argv[1]), *sys.argv[2:])
    for line in missing:
        print(f'not brought: {line}', file=sys.stderr)
    sys.exit(1 if missing else 0)
