"""MATH's answers out of solutions, and when two are the same; the latter is `grading.latex`."""

from llama_jax.eval.task import Completions
from llama_jax.eval.tasks.math import MATH, boxed_answer, final_answer, gold_answer
from llama_jax.grading.latex import equivalent, normalize


def test_official_solutions_are_read(shared_data):
    documents = MATH.documents(str(shared_data / 'eval'))
    read = [equivalent(normalize(boxed_answer(d['solution'])), normalize(d['answer'])) for d in documents]
    assert sum(read) >= 0.995 * len(read)


def test_examples_end_as_they_are_read():
    found = [normalize(final_answer(example['solution'])) for example in MATH.few_shot.load('')]
    assert found == ['[2,5)', '24', '16', '-\\frac{2}{3}']


def test_majority_vote():
    document = {'problem': 'p', 'solution': 'so $\\boxed{\\frac{1}{2}}$'}
    assert gold_answer(document) == '\\frac{1}{2}'
    say = 'Final Answer: The final answer is ${}$. I hope it is correct.'
    texts = tuple(say.format(answer) for answer in ('\\frac12', '3', '0.5', '\\frac12')) + ('?',)
    scores = MATH.grade(document, [Completions(texts)])
    assert scores['exact_match'] == 3 / 5 and scores['maj1@5'] == 1.0
