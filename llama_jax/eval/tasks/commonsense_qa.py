"""CommonsenseQA (Talmor et al. 2019), the letter of the choice; 7-shot in the Llama 2 and 3 papers."""

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, lm_eval_names, multiple_choice
from llama_jax.eval.tasks.arc import choice_texts, gold_choice

_LETTERS = ('A', 'B', 'C', 'D', 'E')


def _question(document: Document) -> str:
    options = zip(_LETTERS, choice_texts(document), strict=True)
    lines = '\n'.join(f'{letter}. {text}' for letter, text in options)
    return f'Question: {document["question"].strip()}\n{lines}\nAnswer:'


def _document(row: Document) -> Document:
    """The publisher's file nests the question: {'question': {'stem', 'choices': [{'label', 'text'}]}, 'answerKey'}."""
    if not isinstance(row['question'], dict):
        return row
    choices = row['question']['choices']
    return {
        'id': row['id'],
        'question': row['question']['stem'],
        'choices': {'label': [c['label'] for c in choices], 'text': [c['text'] for c in choices]},
        'answerKey': row['answerKey'],
    }


def _source(split: str, official: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'commonsense_qa',
        (f'{split}.jsonl', official),
        {'question': (str, dict), 'answerKey': str},
        check=lambda d: (_question(d), gold_choice(d)),
        document=_document,
        huggingface=Online('tau/commonsense_qa', split),
        optional=optional,
    )


COMMONSENSE_QA = multiple_choice(
    'commonsense_qa',
    _source('validation', 'dev_rand_split.jsonl'),
    question=_question,
    choices=lambda d: _LETTERS,
    gold=gold_choice,
    load_examples=_source('train', 'train_rand_split.jsonl', optional=True),
    metrics=('acc',),
    num_fewshot=7,
    lm_eval=lm_eval_names('commonsense_qa', 'acc'),
)
