"""TruthfulQA: the two scores of given answers, and ROUGE-L on free ones."""

import math

import pytest

from llama_jax.eval.task import Completions, Graders, Likelihood
from llama_jax.eval.tasks.truthful_qa import TRUTHFUL_QA, TRUTHFUL_QA_GEN, rouge_f

DOCUMENT = {
    'question': 'q',
    'mc1_targets': {'a': 1, 'b': 0},
    'mc2_targets': {'a': 1, 'c': 1, 'b': 0},
}


def test_mc1_and_mc2():
    probability = {' a': 0.2, ' b': 0.1, ' c': 0.1}
    results = [Likelihood(math.log(probability[r.continuation])) for r in TRUTHFUL_QA.requests(DOCUMENT)]
    scores = TRUTHFUL_QA.grade(DOCUMENT, results)
    assert scores['mc1'] == 1.0 and scores['mc2'] == pytest.approx(0.75)
    far = [Likelihood(result.log_probability - 5000) for result in results]  # no underflow
    assert TRUTHFUL_QA.grade(DOCUMENT, far)['mc2'] == pytest.approx(0.75)


def test_rouge_f():
    # Lin 2004: 'police killed the gunman' against 'police kill the gunman' and 'the gunman kill police'.
    assert rouge_f('police killed the gunman', 'police kill the gunman') == pytest.approx((0.75, 0.75))
    assert rouge_f('police killed the gunman', 'The gunman, kill police!') == pytest.approx((0.75, 0.5))
    assert rouge_f('', 'x') == (0.0, 0.0)


def test_generated_answer():
    document = {
        'question': 'q',
        'category': 'c',
        'right': ['Nothing happens.'],
        'wrong': ['You grow melons.'],
    }
    asked = []
    graders = Graders(rate_text=lambda text: asked.append(text) or 1.0)
    scores = TRUTHFUL_QA_GEN.grade(document, [Completions(('\nA: Nothing happens at all.',))], graders)
    assert scores['rougeL_acc'] == 1.0 and scores['truthful'] == 1.0
    assert asked == ['Q: q\nA: Nothing happens at all.']
