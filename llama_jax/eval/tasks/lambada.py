"""LAMBADA (Paperno et al. 2016), OpenAI's version: the last word of a passage."""

import math
from collections.abc import Sequence

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import (
    Continuation,
    Document,
    FewShot,
    Graders,
    Likelihood,
    Request,
    Scores,
    Task,
    mean,
)


def _from_hub(row: Document, config: str) -> Document:
    context, _, word = row['text'].rpartition(' ')
    return {'context': context, 'continuation': word}


def _ask(document: Document, prefix: str) -> list[Request]:
    return [Continuation(prefix + document['context'], ' ' + document['continuation'])]


def _grade(document: Document, results: Sequence[Likelihood], graders: Graders) -> Scores:
    return {'acc': float(results[0].is_greedy), 'log_probability': results[0].log_probability}


def _aggregate(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    metrics = mean(documents, scores)
    return {'acc': metrics['acc'], 'perplexity': math.exp(min(-metrics['log_probability'], 700))}


LAMBADA = Task(
    name='lambada',
    load=DocumentSource(
        'lambada',
        ('test.jsonl',),
        {'context': str, 'continuation': str},
        huggingface=Online('EleutherAI/lambada_openai', 'test', ('default',), _from_hub),
    ),
    ask=_ask,
    grader=_grade,
    answer=lambda d: (0,),
    metrics=('acc', 'perplexity'),
    few_shot=FewShot(lambda d: f'{d["context"]} {d["continuation"]}'),
    aggregate=_aggregate,
    lm_eval={
        'acc': ('lambada_openai', 'acc,none'),
        'perplexity': ('lambada_openai', 'perplexity,none'),
    },
)
