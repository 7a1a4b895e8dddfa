"""RACE from the official layout, on articles made here."""

import json

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.task import Likelihood
from llama_jax.eval.tasks.race import RACE_HIGH, RACE_MIDDLE

ARTICLE = {
    'article': 'Tom has a red kite.',
    'questions': ['What has Tom?', 'The kite is   _  .', 'Who is it about?'],
    'options': [
        ['A kite', 'A dog', 'A car', 'A hat'],
        ['red', 'blue', 'old', 'big'],
        ['Ann', 'Bob', 'Tom', 'Sue'],
    ],
    'answers': ['A', 'A', 'C'],
    'id': 'high1.txt',
}


def _write(root, article):
    folder = root / 'race' / 'test' / 'high'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / '1.txt').write_text(json.dumps(article))
    return str(root)


def test_each_question_follows_the_earlier_ones(tmp_path):
    documents = RACE_HIGH.documents(_write(tmp_path, ARTICLE))
    requests = [RACE_HIGH.requests(document) for document in documents]
    assert [request.continuation for request in requests[2]] == [' Ann', ' Bob', ' Tom', ' Sue']
    assert requests[0][0].context == 'Article: Tom has a red kite.\n\nWhat has Tom?'
    assert requests[2][0].context == (
        'Article: Tom has a red kite.\n\nQuestion: What has Tom?\nAnswer: A kite\n'
        'The kite is  red\nWho is it about?'
    )


def test_last_question_alone_is_lm_evals_accuracy(tmp_path):
    documents = RACE_HIGH.documents(_write(tmp_path, ARTICLE))
    third = [Likelihood(-9.0), Likelihood(-9.0), Likelihood(-1.0), Likelihood(-9.0)]
    scores = [RACE_HIGH.grade(document, third) for document in documents]
    metrics = RACE_HIGH.aggregate(documents, scores)
    assert metrics['acc'] == pytest.approx(1 / 3) and metrics['acc_last'] == 1.0


@pytest.mark.parametrize(
    ('change', 'message'),
    [({'answers': ['A', 'A']}, 'malformed item'), ({'answers': ['A', 'A', 'E']}, 'malformed item'),
     ({'options': 'x'}, 'it must be list'), ({'article': None}, 'article is')],
)  # fmt: skip
def test_malformed_article_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=f'1.txt.*{message}'):
        RACE_HIGH.documents(_write(tmp_path, ARTICLE | change))


def test_missing_level_says_what_is_expected(tmp_path):
    with pytest.raises(InputError, match=r'expected race/test/middle/\*.txt'):
        RACE_MIDDLE.documents(_write(tmp_path, ARTICLE))
