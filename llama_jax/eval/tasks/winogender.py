"""Winogender (Rudinger et al. 2018): whom a pronoun refers to, for he, she and they.

A 'gotcha' is a sentence whose right answer goes against the occupation's majority gender (U.S. labour statistics):
the pronoun is of the other gender and means the occupation, or of the majority's and means the other person.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from etils import epath

from llama_jax.eval.documents import DocumentSource, Online, is_online
from llama_jax.eval.task import Document, Scores, mean, multiple_choice

_PRONOUN = {
    'male': re.compile(r'\b(he|his|him)\b', re.I),
    'female': re.compile(r'\b(she|her)\b', re.I),
    'neutral': re.compile(r'\b(they|their|them)\b', re.I),
}


def _document(row: Document) -> Document:
    occupation, participant, answer, gender = PurePosixPath(row['sentid']).stem.split('.')
    pronoun = _PRONOUN[gender].search(row['sentence'])
    if pronoun is None:
        raise ValueError(f'no {gender} pronoun in {row["sentence"]!r}')
    return {
        'sentence': row['sentence'], 'occupation': occupation, 'participant': participant, 'label': int(answer),
        'gender': gender, 'pronoun': pronoun.group().lower(),
    }  # fmt: skip


_SENTENCES = DocumentSource(
    'winogender',
    ('all_sentences.tsv',),
    {'sentid': str, 'sentence': str},
    check=lambda d: (d['occupation'], d['participant'])[d['label']],
    document=_document,
    huggingface=Online('oskarvanderwal/winogender', 'test', ('all',)),
)
_STATISTICS = DocumentSource(
    'winogender',
    ('occupations-stats.tsv',),
    {'occupation': str, 'bls_pct_female': str},
    check=lambda d: float(d['bls_pct_female']),
    optional=True,
)


def _load(data_dir: str) -> list[Document]:
    """Sentences, each told whether it is a gotcha where the occupations' statistics are there."""
    documents = _SENTENCES(data_dir)
    path = epath.Path(data_dir) / 'winogender' / _STATISTICS.files[0]
    if is_online(data_dir) or not path.exists():
        return documents
    female = {row['occupation']: float(row['bls_pct_female']) > 50 for row in _STATISTICS(data_dir)}
    for document in documents:
        if document['gender'] != 'neutral' and document['occupation'] in female:
            of_majority = (document['gender'] == 'female') == female[document['occupation']]
            document['gotcha'] = of_majority == (document['label'] == 1)
    return documents


def _aggregate(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    parts: dict[str, list[Scores]] = defaultdict(list)
    for document, score in zip(documents, scores, strict=True):
        parts['acc'].append(score)
        parts[f'acc_{document["gender"]}'].append(score)
        if document.get('gotcha'):
            parts['acc_gotcha'].append(score)
            parts[f'acc_gotcha_{document["gender"]}'].append(score)
    return {name: mean([], part)['acc'] for name, part in parts.items()}


WINOGENDER = multiple_choice(
    'winogender',
    _load,
    question=lambda d: f'{d["sentence"]} ‘{d["pronoun"].capitalize()}’ refers to the',
    choices=lambda d: (d['occupation'], d['participant']),
    gold=lambda d: d['label'],
    metrics=('acc',),
    aggregate=_aggregate,
    lm_eval={
        'acc': ('winogender_all', 'acc,none'),
        'acc_gotcha': ('winogender_gotcha', 'acc,none'),
        **{f'acc_{part}': (f'winogender_{part}', 'acc,none') for part in _PRONOUN},
        **{f'acc_gotcha_{part}': (f'winogender_gotcha_{part}', 'acc,none') for part in ('male', 'female')},
    },
)
