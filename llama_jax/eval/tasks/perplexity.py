"""Perplexity of any text: how likely a model finds it, per word, per byte and per token.

The task 'perplexity:FILE' reads a text file (documents split by '<|endoftext|>'), or JSON Lines with a field `text`.
Words and bytes are counted in the text, so these metrics compare across tokenizers; per token they do not.
"""

import math
from collections.abc import Sequence

from etils import epath

from llama_jax.errors import InputError
from llama_jax.eval.documents import DocumentSource, read_rows, read_text
from llama_jax.eval.task import Document, Graders, Likelihood, Rolling, Scores, Task, count_words


def _load(file: str) -> list[Document]:
    path = epath.Path(file)
    if path.name.removesuffix('.gz').endswith('.jsonl'):
        source = DocumentSource('perplexity', (path.name,), {'text': str})
        documents = [source.checked(place, row) for place, row in read_rows(path)]
    else:
        documents = [{'text': text} for text in read_text(path).split('<|endoftext|>') if text.strip()]
    if not documents:
        raise InputError(f'no text in {file}; expected plain text, or JSON Lines with a field text')
    return documents


def _grade(document: Document, results: Sequence[Likelihood], graders: Graders) -> Scores:
    text, result = document['text'], results[0]
    return {
        'log_probability': result.log_probability,
        'num_words': float(count_words(text)),
        'num_bytes': float(len(text.encode())),
        'num_tokens': float(result.num_tokens),
    }


def _aggregate(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    """Over the text as a whole: sums first, one division."""
    keys = ('log_probability', 'num_words', 'num_bytes', 'num_tokens')
    nats, words, size, tokens = (math.fsum(float(score[key]) for score in scores) for key in keys)
    metrics = {
        'word_perplexity': math.exp(min(-nats / words, 700)),
        'byte_perplexity': math.exp(min(-nats / size, 700)),
        'bits_per_byte': -nats / size / math.log(2),
    }
    return metrics | ({'token_perplexity': math.exp(min(-nats / tokens, 700))} if tokens else {})


def perplexity(file: str) -> Task:
    """The task of predicting one file's text; its name is 'perplexity:FILE'."""
    return Task(
        name=f'perplexity:{file}',
        load=lambda data_dir: _load(file),
        ask=lambda d, prefix: [Rolling(d['text'])],
        grader=_grade,
        answer=lambda d: (0,),
        metrics=('word_perplexity', 'byte_perplexity', 'bits_per_byte', 'token_perplexity'),
        aggregate=_aggregate,
    )
