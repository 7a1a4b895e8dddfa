"""OpenBookQA (Mihaylov et al. 2018), on the split that the data directory has: test, else validation.

lm-evaluation-harness asks the 500 questions of the test split; name the file `test.jsonl` to do the same.
"""

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, lm_eval_names, multiple_choice
from llama_jax.eval.tasks.arc import choice_texts, gold_choice


def _from_tfds(row: Document, config: str) -> Document:
    texts = [row['question'][f'choice_{letter}'] for letter in 'ABCD']
    choices = {'text': texts, 'label': list('ABCD')}
    return {
        'question_stem': row['question']['stem'], 'choices': choices, 'answerKey': 'ABCD'[row['answerKey']]
    }  # fmt: skip


def _source(split: str, files: tuple[str, ...], optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'openbookqa',
        files,
        {'question_stem': str, 'choices': dict, 'answerKey': str},
        check=lambda d: choice_texts(d)[gold_choice(d)],
        huggingface=Online('allenai/openbookqa', split, ('main',)),
        tfds=Online('openbookqa', split, row=_from_tfds),
        optional=optional,
    )


OPENBOOKQA = multiple_choice(
    'openbookqa',
    _source('test', ('test.jsonl', 'validation.jsonl')),
    question=lambda d: d['question_stem'],
    choices=choice_texts,
    gold=gold_choice,
    load_examples=_source('train', ('train.jsonl',), optional=True),
    unconditional='Answer:',
    spare=False,
    lm_eval=lm_eval_names('openbookqa', 'acc', 'acc_norm'),
)
