"""HellaSwag (Zellers et al. 2019): how a description goes on; 0-shot in the Llama papers."""

import re

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, lm_eval_names, multiple_choice


def clean(text: str) -> str:
    """Without the marks that WikiHow's pages left in the data ('[title]', '[step]', ...)."""
    text = re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. '))
    return text.replace('  ', ' ')


def _from_hub(row: Document, config: str) -> Document:
    context = f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}'
    return {'ctx': clean(context), 'endings': [clean(e) for e in row['endings']], 'label': int(row['label'])}


def _document(row: Document) -> Document:
    """The publisher's own rows have `ctx_a`, `ctx_b` and `activity_label`; joined and cleaned ones have `ctx` alone."""
    return _from_hub(row, '') if 'activity_label' in row else row


def _source(split: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'hellaswag',
        (f'{split}.jsonl',),
        {'ctx': str, 'endings': list, 'label': (int, str)},
        check=lambda d: range(len(d['endings'])).index(d['label']),
        document=_document,
        huggingface=Online('Rowan/hellaswag', split),
        optional=optional,
    )


HELLASWAG = multiple_choice(
    'hellaswag',
    _source('validation'),
    question=lambda d: d['ctx'],
    choices=lambda d: d['endings'],
    gold=lambda d: d['label'],
    load_examples=_source('train', optional=True),
    metrics=('acc_norm', 'acc', 'acc_bytes'),
    lm_eval=lm_eval_names('hellaswag', 'acc', 'acc_norm'),
)
