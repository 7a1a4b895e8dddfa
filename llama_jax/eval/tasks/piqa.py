"""PIQA (Bisk et al. 2020): which of two solutions reaches a goal in the physical world."""

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, lm_eval_names, multiple_choice


def _choices(document: Document) -> list[str]:
    return [document['sol1'], document['sol2']]


def _source(split: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'piqa',
        (f'{split}.jsonl',),
        {'goal': str, 'sol1': str, 'sol2': str, 'label': int},
        check=lambda d: {0: 0, 1: 0}[d['label']],
        huggingface=Online('baber/piqa', split),
        tfds=Online('piqa', split),
        optional=optional,
    )


PIQA = multiple_choice(
    'piqa',
    _source('validation'),
    question=lambda d: f'Question: {d["goal"]}\nAnswer:',
    choices=_choices,
    gold=lambda d: d['label'],
    load_examples=_source('train', optional=True),
    lm_eval=lm_eval_names('piqa', 'acc', 'acc_norm'),
)
