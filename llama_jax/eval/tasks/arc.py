"""ARC (Clark et al. 2018): science questions of grade schools; 0-shot in the LLaMA and Llama 2 papers."""

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Document, Task, lm_eval_names, multiple_choice


def choice_texts(document: Document) -> list[str]:
    """Of AI2's layout: {'choices': {'text': [...], 'label': [...]}, 'answerKey': label}."""
    return document['choices']['text']


def gold_choice(document: Document) -> int:
    """Index of the right one of `choice_texts`."""
    return document['choices']['label'].index(document['answerKey'].lstrip())


def _from_tfds(row: Document, config: str) -> Document:
    """TFDS numbers the labels."""
    choices = {'text': row['choices']['text'], 'label': ['ABCDE'[label] for label in row['choices']['label']]}
    return row | {'choices': choices, 'answerKey': 'ABCDE'[row['answerKey']]}


def _source(name: str, split: str, optional: bool = False) -> DocumentSource:
    config = {'arc_easy': 'ARC-Easy', 'arc_challenge': 'ARC-Challenge'}[name]
    return DocumentSource(
        name,
        (f'{split}.jsonl',),
        {'question': str, 'choices': dict, 'answerKey': str},
        check=lambda d: choice_texts(d)[gold_choice(d)],
        huggingface=Online('allenai/ai2_arc', split, (config,)),
        tfds=Online('ai2_arc', split, (config,), _from_tfds),
        optional=optional,
    )


def _task(name: str) -> Task:
    return multiple_choice(
        name,
        _source(name, 'test'),
        question=lambda d: f'Question: {d["question"]}\nAnswer:',
        choices=choice_texts,
        gold=gold_choice,
        load_examples=_source(name, 'train', optional=True),
        spare=False,
        metrics=('acc_norm', 'acc', 'acc_bytes')
        if name == 'arc_challenge'
        else ('acc', 'acc_norm', 'acc_bytes'),
        lm_eval=lm_eval_names(name, 'acc', 'acc_norm'),
    )


ARC_EASY = _task('arc_easy')
ARC_CHALLENGE = _task('arc_challenge')
