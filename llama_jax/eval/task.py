"""The vocabulary of evaluation: a task turns documents into requests, and the results of its requests into scores.

A task knows its benchmark and nothing of models; an engine answers requests and knows nothing of benchmarks:

    documents = task.documents(data_dir)
    shots = task.draw(documents, data_dir)                              # the few-shot examples of each document
    requests = [task.requests(d, task.prefix(d, s)) for d, s in zip(documents, shots)]
    results = ...                                                       # one a request: the engine's work
    scores = [task.grade(d, r, graders) for d, r in zip(documents, results)]
    metrics = task.aggregate(documents, scores)

Requests are hashable values: equal ones (the unconditional 'Answer:' of BoolQ, on every document) need one answer.
All functions of a task are pure and safe to call from several threads.
"""

import dataclasses
import random
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from llama_jax.errors import InputError
from llama_jax.grading.program_tests import ProgramTest

Document = dict[str, Any]  # one item, with the field names of its publisher; plain JSON values
# Numbers are aggregated, strings are remarks for the log, such as the answer that was extracted.
Scores = dict[str, float | str]


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Asks log P(continuation | context); answered by a `Likelihood`.

    The tokens are those of lm-evaluation-harness: white space at the context's end is moved to the continuation, and
    the continuation's tokens are those of the whole text behind the context's. BOS comes first; an empty context is
    BOS alone. A text longer than the model's context loses its left end.
    """

    context: str
    continuation: str


@dataclasses.dataclass(frozen=True)
class Rolling:
    """Asks log P(text), every token predicted once and BOS before the first; answered by a `Likelihood`.

    Text longer than the model's context is cut into windows in which every token is predicted exactly once.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """Asks for generated text; answered by `Completions`.

    Attributes:
      prompt: what the model reads, after BOS.
      stop: generation ends before the first of these strings (or at the end-of-text token).
      max_new_tokens: at most this many.
      temperature: 0 is greedy.
      top_p: nucleus of the draws.
      num_samples: how many independent texts; pass@k and maj1@k need at least k.
      further: other settings of an `inference.sampling.Sampler`, by name.
    """

    prompt: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    further: tuple[tuple[str, float | int], ...] = ()


Request = Continuation | Rolling | Completion


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What a model makes of given text.

    Attributes:
      log_probability: natural logarithm, summed over the predicted tokens.
      is_greedy: every predicted token is the most likely one.
      num_tokens: that were predicted.
      truncated: the context lost its left end.
    """

    log_probability: float
    is_greedy: bool = False
    num_tokens: int = 0
    truncated: bool = False


@dataclasses.dataclass(frozen=True)
class Completions:
    """The texts that a model generated for one prompt, without prompt and stop string."""

    texts: tuple[str, ...]
    truncated: bool = False


Result = Likelihood | Completions


@dataclasses.dataclass(frozen=True)
class Graders:
    """What some tasks need to score generated text; handed to every `Task.grade`, None where there is none.

    Attributes:
      run_code: runs a Python program and its tests, returns 'passed' or why not (`grading.sandbox`).
      rate_text: rates a text, e.g. its toxicity in [0, 1] (`eval.text_rating`).
    """

    run_code: Callable[[ProgramTest], str] | None = None
    rate_text: Callable[[str], float] | None = None


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Where a task's examples come from and how they stand in the prompt.

    Attributes:
      example: one solved example as text, question and answer.
      load: reads the pool of examples; None, or an empty pool: the evaluated documents, never the one asked about.
      sampler: 'random': drawn per document; 'first': the first ones of the pool.
      group: only examples of the document's own group are used (MMLU's subject).
      delimiter: stands behind each example.
      description: text before them, from them.
      spare: one example more is drawn than used, and the document asked about is left out, as lm-evaluation-harness
        does for every benchmark that it evaluates on something else than a test split.
    """

    example: Callable[[Document], str]
    load: Callable[[str], list[Document]] | None = None
    sampler: Literal['random', 'first'] = 'random'
    group: Callable[[Document], str] = lambda document: ''
    delimiter: str = '\n\n'
    description: Callable[[Sequence[Document]], str] = lambda examples: ''
    spare: bool = False


def lm_eval_names(task: str, *metrics: str) -> dict[str, tuple[str, str]]:
    """`Task.lm_eval` where lm-evaluation-harness has one task and calls the metrics as we do."""
    return {metric: (task, f'{metric},none') for metric in metrics}


def mean(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    """Mean of every number over the documents that have it."""
    values = defaultdict(list)
    for score in scores:
        for metric, value in score.items():
            if not isinstance(value, str):
                values[metric].append(value)
    return {metric: sum(column) / len(column) for metric, column in values.items()}


def by_group(
    documents: Sequence[Document], scores: Sequence[Scores], group: Callable[[Document], str]
) -> dict[str, list[Scores]]:
    """The scores of each group of documents, such as a subject."""
    groups = defaultdict(list)
    for document, score in zip(documents, scores, strict=True):
        groups[group(document)].append(score)
    return dict(groups)


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
      name: the folder of its files in the data directory, where it has one of its own.
      load: documents to evaluate from a data directory (or 'hf://', 'tfds://': see `eval.documents`).
      ask: requests of a document; the second argument is the text before its question (see `prefix`).
      grader: scores of a document given the results of its requests, in order.
      answer: what is right, for the log and for the tests of the scorers: the indices of the right continuations
        among the requests, or a completion that is right.
      metrics: names of what `aggregate` returns, the one to look at first in front. Further ones may follow, such as
        a subject's accuracy, pass@k for each k that the number of samples allows.
      few_shot: None for a task without examples.
      num_fewshot: examples by default, as the Llama papers used.
      description: text before the examples.
      aggregate: metrics over all documents from (documents, scores), aligned.
      executes_code: `grade` cannot do without `Graders.run_code`.
      rates_text: `grade` uses `Graders.rate_text` where there is one.
      lm_eval: our metric -> (lm-evaluation-harness's task, its metric key), such as {'acc': ('piqa', 'acc,none')}.
      subsets: lm-evaluation-harness's name -> value of a document's 'subset' (MMLU's subjects).
    """

    name: str
    load: Callable[[str], list[Document]]
    ask: Callable[[Document, str], list[Request]]
    grader: Callable[[Document, Sequence[Any], Graders], Scores]
    answer: Callable[[Document], tuple[int, ...] | str]
    metrics: tuple[str, ...]
    few_shot: FewShot | None = None
    num_fewshot: int = 0
    description: Callable[[Document], str] = lambda document: ''
    aggregate: Callable[[Sequence[Document], Sequence[Scores]], dict[str, float]] = mean
    executes_code: bool = False
    rates_text: bool = False
    lm_eval: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    subsets: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def documents(self, data_dir: str) -> list[Document]:
        """All documents to evaluate, in the publisher's order.

        Raises:
          InputError: a file is missing (what was expected where) or an item is malformed (file and line).
        """
        return self.load(data_dir)

    def draw(
        self,
        documents: Sequence[Document],
        data_dir: str,
        num_fewshot: int | None = None,
        seed: int = 1234,
    ) -> list[list[Document]]:
        """The few-shot examples of each document, drawn exactly as lm-evaluation-harness does.

        One generator draws for all documents in order, so the draw belongs to the whole list (its first N documents
        get the same examples whatever N), and is made before documents are dealt out to processes.

        Args:
          documents: to evaluate, from the first one.
          data_dir: where the pool of examples is.
          num_fewshot: examples a document; None for the task's own number.
          seed: lm-evaluation-harness's default is 1234.

        Raises:
          InputError: the task has no examples, or fewer than asked for.
        """
        count = self.num_fewshot if num_fewshot is None else num_fewshot
        if count < 0:
            raise InputError(f'num_fewshot is {count}; it must be 0 or more')
        if count == 0:
            return [[] for _ in documents]
        if self.few_shot is None:
            raise InputError(f'task {self.name} has no few-shot examples; num_fewshot is {count}, use 0')
        pool = self.few_shot.load(data_dir) if self.few_shot.load else []
        spare = self.few_shot.spare or not pool
        groups: dict[str, list[Document]] = defaultdict(list)
        for example in pool or self.load(data_dir):
            groups[self.few_shot.group(example)].append(example)
        rng, drawn = random.Random(seed), []
        for document in documents:
            candidates = groups[group := self.few_shot.group(document)]
            if len(candidates) < count + spare:
                where = f' for {group!r}' if group else ''
                allowed = max(len(candidates) - spare, 0)
                raise InputError(
                    f'task {self.name} has {allowed} few-shot examples{where}; num_fewshot is {count}, '
                    f'use at most {allowed}'
                )
            first = self.few_shot.sampler == 'first'
            picked = candidates if first else rng.sample(candidates, count + spare)
            if spare:
                picked = [example for example in picked if example != document]
                if len(picked) < count:  # a document that the pool holds twice was drawn twice
                    picked = rng.sample([example for example in candidates if example != document], count)
            drawn.append(picked[:count])
        return drawn

    def prefix(self, document: Document, examples: Sequence[Document]) -> str:
        """What stands before the document's own question: the description, then the solved examples."""
        if not examples or self.few_shot is None:
            return self.description(document)
        shots = (self.few_shot.example(example) + self.few_shot.delimiter for example in examples)
        return self.description(document) + self.few_shot.description(examples) + ''.join(shots)

    def requests(self, document: Document, prefix: str = '') -> list[Request]:
        """What to ask the model about a document; for sampling settings, `dataclasses.replace` the Completions."""
        return self.ask(document, prefix)

    def check(self, graders: Graders) -> None:
        """Raises InputError where the task needs a grader that is not there; call it before the model's work."""
        if self.executes_code and graders.run_code is None:
            raise InputError(f'task {self.name} executes generated code, which is off; it must be allowed')

    def grade(self, document: Document, results: Sequence[Result], graders: Graders | None = None) -> Scores:
        """Scores of one document from the results of its requests, in their order; see `check`."""
        graders = graders or Graders()
        self.check(graders)
        return self.grader(document, results, graders)


def multiple_choice(
    name: str,
    load: Callable[[str], list[Document]],
    *,
    question: Callable[[Document], str],
    choices: Callable[[Document], Sequence[str]],
    gold: Callable[[Document], int | tuple[int, ...]],
    load_examples: Callable[[str], list[Document]] | None = None,
    delimiter: str = ' ',
    unconditional: str = '',
    spare: bool = True,
    metrics: tuple[str, ...] = ('acc', 'acc_norm', 'acc_bytes'),
    few_shot: FewShot | None = None,
    **kwargs: Any,
) -> Task:
    """A task that is answered by the most likely of several continuations of one question.

    Its metrics (the share of documents whose best choice is right, best by):
    - acc: log-probability.
    - acc_norm: log-probability per character, as lm-evaluation-harness's acc_norm and the LLaMA paper (section 3).
    - acc_bytes: per UTF-8 byte, lm-evaluation-harness's acc_bytes.
    - acc_answer: log P(choice | question) - log P(choice | 'Answer:'), the LLaMA paper's rule for OpenBookQA and
      BoolQ, after GPT-3; only with `unconditional`.

    Args:
      name: of the task.
      load: its documents.
      question: text before the choice.
      choices: continuations, without the delimiter.
      gold: index of the right choice, or several.
      load_examples: pool of few-shot examples.
      delimiter: between question and choice; it counts neither as character nor as byte.
      unconditional: the context of acc_answer.
      spare: see `FewShot`.
      metrics: to report, the first one first.
      few_shot: replaces the usual rule, question + delimiter + right choice.
      **kwargs: further fields of `Task`.
    """

    def right(document: Document) -> tuple[int, ...]:
        index = gold(document)
        return index if isinstance(index, tuple) else (index,)

    def ask(document: Document, prefix: str) -> list[Request]:
        context, options = prefix + question(document), choices(document)
        requests: list[Request] = [Continuation(context, delimiter + option) for option in options]
        if unconditional:
            requests += [Continuation(unconditional, delimiter + option) for option in options]
        return requests

    def grade(document: Document, results: Sequence[Likelihood], graders: Graders) -> Scores:
        return choice_scores(choices(document), results, right(document), metrics)

    if unconditional:
        metrics = (*metrics, 'acc_answer')
    return Task(
        name=name,
        load=load,
        ask=ask,
        grader=grade,
        answer=right,
        metrics=metrics,
        few_shot=few_shot
        or FewShot(lambda d: question(d) + delimiter + choices(d)[right(d)[0]], load_examples, spare=spare),
        **kwargs,
    )


def choice_scores(
    choices: Sequence[str], results: Sequence[Likelihood], right: tuple[int, ...], metrics: tuple[str, ...]
) -> Scores:
    """The metrics of `multiple_choice` for one document; a tie goes to the first choice."""
    count = len(choices)
    values = [result.log_probability for result in results[:count]]
    lengths = {
        'acc': [1] * count,
        'acc_norm': [max(len(choice), 1) for choice in choices],
        'acc_bytes': [max(len(choice.encode()), 1) for choice in choices],
    }
    scores: Scores = {}
    for metric in metrics:
        if metric == 'acc_answer':
            by = [value - free.log_probability for value, free in zip(values, results[count:], strict=True)]
        else:
            by = [value / length for value, length in zip(values, lengths[metric], strict=True)]
        scores[metric] = float(by.index(max(by)) in right)
    return scores


def count_words(text: str) -> int:
    """Pieces between runs of white space, as lm-evaluation-harness counts the words of a perplexity."""
    return len(re.split(r'\s+', text))
