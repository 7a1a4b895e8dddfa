"""Numbers out of worked solutions, and votes over several."""

import pytest

from llama_jax.eval.task import Completions
from llama_jax.eval.tasks.gsm8k import GSM8K, GSM8K_COT, INVALID, flexible_answer, plain_number, strict_answer

HASHES, SAYS = r'#### (\-?[0-9\.\,]+)', r'The answer is (\-?[0-9\.\,]+).'


@pytest.mark.parametrize(
    ('text', 'strict', 'flexible'),
    [
        ('so 7.\n#### 1,234', '1234', '1234'),
        ('#### -5\n#### 6', '-5', '6'),
        ('it costs $12.50', INVALID, '12.50'),
        ('nothing', INVALID, INVALID),
        ('#### 18.', '18', '18'),
        ('', INVALID, INVALID),
    ],
)
def test_extraction(text, strict, flexible):
    assert plain_number(strict_answer(text, HASHES)) == strict
    assert plain_number(flexible_answer(text)) == flexible


def test_majority_vote():
    document = {'question': 'q', 'answer': 'so\n#### 8'}
    texts = ('#### 8', '#### 9', 'no idea', '#### 8')
    scores = GSM8K.grade(document, [Completions(texts)])
    assert scores['exact_match'] == 0.5 and scores['maj1@4'] == 1.0 and scores['extracted'] == '8'


def test_official_solutions_are_read(shared_data):
    documents = GSM8K.documents(str(shared_data / 'eval'))
    read = [plain_number(strict_answer(d['answer'], HASHES)) == plain_number(d['answer']) for d in documents]
    assert sum(read) >= 0.995 * len(read)
    loose = [plain_number(flexible_answer(d['answer'])) == plain_number(d['answer']) for d in documents]
    assert sum(loose) >= 0.995 * len(loose)


def test_chains_of_thought_end_as_they_are_read():
    examples = GSM8K_COT.few_shot.load('')
    assert len(examples) == 8
    assert [strict_answer(e['answer'], SAYS) for e in examples] == ['6', '5', '39', '8', '9', '29', '33', '8']
