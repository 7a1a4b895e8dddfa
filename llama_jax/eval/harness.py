"""Runs tasks: documents become requests, an engine answers them, the task scores them, and a log lets it go on.

prepared = prepare(find_task('piqa'), data_dir, limit=100)
metrics = evaluate(prepared, Engine(model, params, tokenizer))
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tqdm

from llama_jax.errors import InputError
from llama_jax.eval.task import Completion, Document, Graders, Request, Result, Scores, Task
from llama_jax.inference.sampling import Sampler
from llama_jax.item_log import ItemLog
from llama_jax.runtime import from_main_process, is_main_process

# Programs that are executed, and texts that are rated, beside the devices' work.
_SCORING_THREADS = 4

_SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger(__name__)


@runtime_checkable
class Answers(Protocol):
    """Who answers requests: `eval.engine.Engine`."""

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """Every distinct request with its result, in any order."""
        ...


_MOST_SAMPLES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What replaces a task's own sampling of completions; None keeps it."""

    num_samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task with the documents it is evaluated on and what is asked about each."""

    task: Task
    num_fewshot: int
    documents: list[Document]
    requests: list[list[Request]]


def prepare(
    task: Task,
    data_dir: str,
    *,
    limit: int = 0,
    num_fewshot: int | None = None,
    sampling: Sampling | None = None,
) -> PreparedTask:
    """Reads documents and writes prompts, before any model is needed.

    Args:
      task: what to evaluate.
      data_dir: see `eval.documents`.
      limit: the first so many documents; 0: all.
      num_fewshot: examples in a prompt; None: the task's own number, or 0 where it has no examples.
      sampling: of completions; None: the task's own.

    Raises:
      InputError: a file is missing or malformed, or the settings are impossible.
    """
    if limit < 0:
        raise InputError(f'limit is {limit}; it must be 0 (all items) or more')
    sampling = sampling or Sampling()
    if sampling.num_samples is not None and not 1 <= sampling.num_samples <= _MOST_SAMPLES:
        raise InputError(f'num_samples is {sampling.num_samples}; it must be from 1 to {_MOST_SAMPLES:,}')
    Sampler(
        sampling.temperature or 0.0, top_p=1.0 if sampling.top_p is None else sampling.top_p
    )  # checks them
    documents = task.documents(data_dir)
    documents = documents[: limit or len(documents)]
    changes = {name: value for name, value in vars(sampling).items() if value is not None}
    requests = [
        [
            dataclasses.replace(request, **changes) if isinstance(request, Completion) else request
            for request in task.requests(document, task.prefix(document, examples))
        ]
        for document, examples in zip(documents, task.draw(documents, data_dir, num_fewshot), strict=True)
    ]
    return PreparedTask(task, task.num_fewshot if num_fewshot is None else num_fewshot, documents, requests)


def evaluate(
    prepared: PreparedTask,
    engine: Answers,
    *,
    graders: Graders | None = None,
    log: ItemLog | None = None,
    progress: bool = True,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The task's metrics, 'n' (documents) and 'num_fewshot'.

    Also 'num_samples' where several texts of an item were asked for, and 'truncated' where contexts were too long for
    the model.

    Args:
      prepared: from `prepare`.
      engine: answers the requests.
      graders: what the task may need beside the model; None: it needs none.
      log: on process 0, of the items that are finished already and those that become so.
      progress: shows a bar with the time left, or without a terminal a line now and then, on process 0.
      pause: called after each document, on all processes; may raise.

    Returns:
      The metrics, on process 0; other processes, which do their part of the model's work, get {}.

    Raises:
      InputError: a grader is missing, the log's items are other than these, or an item cannot be asked.
    """
    graders = graders or Graders()
    prepared.task.check(graders)
    finished = {} if log is None else finished_items(prepared, log)
    done = np.zeros(len(prepared.documents), bool)
    done[list(finished)] = True
    done = from_main_process(done)
    todo = [index for index in range(len(prepared.documents)) if not done[index]]
    items = dict(finished)
    is_main = is_main_process()
    with (
        tqdm.tqdm(
            total=len(prepared.documents), initial=len(prepared.documents) - len(todo), unit='item',
            postfix=prepared.task.name, disable=None if progress and is_main else True,
        ) as bar,
        ThreadPoolExecutor(_SCORING_THREADS) as pool,
    ):  # fmt: skip
        grading: list[Future[dict[str, Any]]] = []
        said = time.monotonic()

        def take(wait: bool) -> None:
            """Items whose scores are there, to the log."""
            nonlocal said
            for future in [f for f in grading if wait or f.done()]:
                grading.remove(future)
                item = future.result()
                items[item['index']] = item
                if log is not None:
                    log.add(item)
                bar.update()
            if progress and bar.disable and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                logger.info('%s: %d of %d items', prepared.task.name, len(items), len(prepared.documents))

        try:
            for index, results in _results(prepared, todo, engine):
                if is_main:
                    grading.append(pool.submit(_item, prepared, index, results, graders))
                    take(wait=False)
                pause()
            take(wait=True)
        except BaseException:  # an error or a signal ends it: what waits for its turn is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return _metrics(prepared, items) if is_main else {}


def _results(
    prepared: PreparedTask, todo: Sequence[int], engine: Answers
) -> Iterator[tuple[int, list[Result]]]:
    """Documents in the order in which the last of their requests is answered; equal requests are asked once."""
    waiting: dict[Request, list[int]] = {}
    missing = {}
    for index in todo:
        distinct = dict.fromkeys(prepared.requests[index])  # in their order: batches follow from it
        missing[index] = len(distinct)
        for request in distinct:
            waiting.setdefault(request, []).append(index)
    answers: dict[Request, Result] = {}
    # What many documents wait for is asked first.
    shared = sorted(waiting, key=lambda request: -len(waiting[request]))
    common = [request for request in shared if len(waiting[request]) > 2]
    for asked in (common, shared[len(common) :]):
        for request, result in engine.answer(asked) if asked else ():
            answers[request] = result
            for index in waiting.pop(request):
                missing[index] -= 1
                if not missing[index]:
                    yield index, [answers[request] for request in prepared.requests[index]]


def _item(prepared: PreparedTask, index: int, results: list[Result], graders: Graders) -> dict[str, Any]:
    """A line of the log."""
    document, requests = prepared.documents[index], prepared.requests[index]
    asked = [dataclasses.asdict(request) for request in requests]
    for before, after in zip(asked[-2::-1], asked[:0:-1], strict=True):
        if 'context' in after and after['context'] == before.get('context'):
            after['context'] = None  # the one before: it may be long
    return {
        'index': index,
        'requests_hash': _hash(requests),
        'document': document,
        'requests': asked,
        'results': [dataclasses.asdict(result) for result in results],
        'answer': prepared.task.answer(document),
        'scores': prepared.task.grade(document, results, graders),
    }


def _hash(requests: Sequence[Request]) -> str:
    values = [[type(r).__name__, *dataclasses.astuple(r)] for r in requests]
    # What asks for nothing further is known by the hash that it had before anything could.
    values = [row[:-1] if row[0] == 'Completion' and not row[-1] else row for row in values]
    text = json.dumps(values)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_items(prepared: PreparedTask, log: ItemLog) -> dict[int, dict[str, Any]]:
    """The items of the log that are asked now.

    Raises:
      InputError: one was asked otherwise then.
    """
    found = {index: item for index, item in log.items.items() if index < len(prepared.documents)}
    for index, item in found.items():
        if item.get('requests_hash') != _hash(prepared.requests[index]):
            raise InputError(
                f'item {index} of {prepared.task.name} is asked otherwise than in the log: data, examples or '
                'sampling have changed; restore them, or write to another place'
            )
    return found


def _metrics(prepared: PreparedTask, items: dict[int, dict[str, Any]]) -> dict[str, float]:
    scores: list[Scores] = [items[index]['scores'] for index in range(len(prepared.documents))]
    metrics: dict[str, float] = dict(prepared.task.aggregate(prepared.documents, scores))
    metrics |= {'n': len(prepared.documents), 'num_fewshot': prepared.num_fewshot}
    samples = [r.num_samples for requests in prepared.requests for r in requests if isinstance(r, Completion)]
    metrics |= {'num_samples': max(samples)} if samples and max(samples) > 1 else {}
    truncated = sum(any(result['truncated'] for result in item['results']) for item in items.values())
    return metrics | ({'truncated': truncated} if truncated else {})
