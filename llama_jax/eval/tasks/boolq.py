"""BoolQ (Clark et al. 2019): yes or no from a passage; 0-shot in the Llama papers."""

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, lm_eval_names, multiple_choice

_FIELDS = {'question': str, 'passage': str, 'answer': bool}


def _from_hub(row: Document, config: str) -> Document:
    return {'question': row['question'], 'passage': row['passage'], 'answer': bool(row['label'])}


def _source(split: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'boolq',
        (f'{split}.jsonl',),
        _FIELDS,
        huggingface=Online('aps/super_glue', split, ('boolq',), _from_hub),
        tfds=Online('bool_q', split),
        optional=optional,
    )


BOOLQ = multiple_choice(
    'boolq',
    _source('validation'),
    question=lambda d: f'{d["passage"]}\nQuestion: {d["question"]}?\nAnswer:',
    choices=lambda d: ('no', 'yes'),
    gold=lambda d: int(d['answer']),
    load_examples=_source('train', optional=True),
    unconditional='Answer:',
    lm_eval=lm_eval_names('boolq', 'acc'),
)
