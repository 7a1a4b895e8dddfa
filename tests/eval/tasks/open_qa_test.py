"""Short answers: what counts as the same, by lm-evaluation-harness's rule and by the paper's."""

import pytest

from llama_jax.eval.task import Completions
from llama_jax.eval.tasks.open_qa import NQ_OPEN, TRIVIA_QA

NQ = {'question': 'who', 'answer': ['The Beatles', 'St. Louis']}


@pytest.mark.parametrize(
    ('text', 'exact', 'paper'),
    [
        (' The Beatles\nQ: next?', 1, 1),
        (' the beatles.', 1, 1),
        (' Beatles, of Liverpool', 1, 0),  # cut at the comma; the paper's line goes on
        (' St. Louis.', 0, 1),  # cut at its first dot
        (' A Beatles', 1, 1),
        (' The  Beatles', 0, 1),  # duplicate spaces
        (' Rolling Stones', 0, 0),
        ('', 0, 0),
    ],
)
def test_natural_questions(text, exact, paper):
    scores = NQ_OPEN.grade(NQ, [Completions((text,))])
    assert (scores['exact_match'], scores['em_paper']) == (exact, paper)


def test_trivia_qa_keeps_articles_in_the_harness_metric():
    document = {'question': 'who', 'answer': {'value': 'Beatles', 'aliases': ['Beatles']}}
    scores = TRIVIA_QA.grade(document, [Completions((' The Beatles\n',))])
    assert (scores['exact_match'], scores['em_paper']) == (0, 1)


def test_prompts(shared_data):
    data_dir = str(shared_data / 'eval')
    document = NQ_OPEN.documents(data_dir)[0]
    example = {'question': 'q', 'answer': ['a', 'b']}
    (request,) = NQ_OPEN.requests(document, NQ_OPEN.prefix(document, [example]))
    assert request.prompt == (
        'Answer these questions:\n\nQ: q?\nA: a\nQ: when was the last time anyone was on the moon?\nA:'
    )
