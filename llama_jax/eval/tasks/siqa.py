"""Social IQa (Sap et al. 2019): why people act, and what follows."""

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, lm_eval_names, multiple_choice


def _choices(document: Document) -> list[str]:
    return [document['answerA'], document['answerB'], document['answerC']]


def _source(split: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'siqa',
        (f'{split}.jsonl',),
        {'context': str, 'question': str, 'answerA': str, 'answerB': str, 'answerC': str, 'label': str},
        check=lambda d: {'1': 0, '2': 1, '3': 2}[d['label']],
        huggingface=Online('lighteval/siqa', split),
        optional=optional,
    )


SIQA = multiple_choice(
    'siqa',
    _source('validation'),
    question=lambda d: f'Q: {d["context"]} {d["question"]}\nA:',
    choices=_choices,
    gold=lambda d: int(d['label']) - 1,
    load_examples=_source('train', optional=True),
    lm_eval=lm_eval_names('social_iqa', 'acc'),
)
