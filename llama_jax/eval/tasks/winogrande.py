"""WinoGrande (Sakaguchi et al. 2020): which of two names fills a blank.

Both choices share the continuation, the text behind the blank, and differ in the context: partial evaluation, after
Trinh and Le 2018, as lm-evaluation-harness and the Llama 3 evaluations do.
"""

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
    lm_eval_names,
)


def _contexts(document: Document) -> list[str]:
    before = document['sentence'][: document['sentence'].index('_')]
    return [before + document['option1'], before + document['option2']]


def _suffix(document: Document) -> str:
    return document['sentence'][document['sentence'].index('_') + 1 :].strip()


def _gold(document: Document) -> int:
    return {'1': 0, '2': 1}[document['answer']]


def _ask(document: Document, prefix: str) -> list[Request]:
    return [Continuation(prefix + context, ' ' + _suffix(document)) for context in _contexts(document)]


def _grade(document: Document, results: Sequence[Likelihood], graders: Graders) -> Scores:
    first, second = (result.log_probability for result in results)
    return {'acc': float((second > first) == _gold(document))}


def _from_tfds(row: Document, config: str) -> Document:
    return {'sentence': row['sentence'], 'option1': row['option1'], 'option2': row['option2']} | {
        'answer': str(int(row['label']) + 1)
    }


def _source(split: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'winogrande',
        (f'{split}.jsonl',),
        {'sentence': str, 'option1': str, 'option2': str, 'answer': str},
        check=lambda d: (_contexts(d), _gold(d)),
        huggingface=Online('allenai/winogrande', split, ('winogrande_xl',)),
        tfds=Online('winogrande', 'train_xl' if split == 'train' else split, row=_from_tfds),
        optional=optional,
    )


WINOGRANDE = Task(
    name='winogrande',
    load=_source('validation'),
    ask=_ask,
    grader=_grade,
    answer=lambda d: (_gold(d),),
    metrics=('acc',),
    few_shot=FewShot(
        lambda d: f'{_contexts(d)[_gold(d)]} {_suffix(d)}', _source('train', optional=True), spare=True
    ),
    lm_eval=lm_eval_names('winogrande', 'acc'),
)
