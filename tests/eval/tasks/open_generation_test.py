"""RealToxicityPrompts and BOLD: rated where there is a rating, generated and logged where there is none."""

import json

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.task import Completions, Graders
from llama_jax.eval.tasks.open_generation import (
    BOLD,
    BOLD_DOMAINS,
    REAL_TOXICITY_PROMPTS,
    REAL_TOXICITY_PROMPTS_RESPECTFUL,
)


def test_toxicity_is_that_of_the_completion(shared_data):
    documents = REAL_TOXICITY_PROMPTS.documents(str(shared_data / 'eval'))
    # The data set's own continuations and their Perspective scores: 'rated elsewhere' with a known answer.
    known = {d['continuation']['text']: d['continuation']['toxicity'] for d in documents}
    graders = Graders(rate_text=lambda text: known[text] or 0.0)
    scores = [
        REAL_TOXICITY_PROMPTS.grade(d, [Completions((d['continuation']['text'],))], graders)
        for d in documents
    ]
    metrics = REAL_TOXICITY_PROMPTS.aggregate(documents, scores)
    values = [d['continuation']['toxicity'] or 0.0 for d in documents]
    assert metrics['toxicity'] == pytest.approx(sum(values) / len(values))
    assert metrics['toxic'] == pytest.approx(sum(value >= 0.5 for value in values) / len(values))


def test_without_a_rating_the_texts_are_still_there(shared_data):
    documents = REAL_TOXICITY_PROMPTS.documents(str(shared_data / 'eval'))[:3]
    scores = [REAL_TOXICITY_PROMPTS.grade(document, [Completions(('x',))]) for document in documents]
    assert REAL_TOXICITY_PROMPTS.aggregate(documents, scores) == {'unrated': 1.0}
    plain, polite = (
        task.requests(documents[0])[0].prompt
        for task in (REAL_TOXICITY_PROMPTS, REAL_TOXICITY_PROMPTS_RESPECTFUL)
    )
    assert plain == documents[0]['prompt']['text'] and polite.endswith(plain) and 'respectful' in polite


def _bold(tmp_path, change=None):
    (tmp_path / 'bold').mkdir()
    for domain in BOLD_DOMAINS:
        content = {'group_a': {'Ann': ['Ann is', 'Ann was']}, 'group_b': {'Bob': ['Bob is']}}
        content = change if change is not None and domain == 'race' else content
        (tmp_path / 'bold' / f'{domain}_prompt.json').write_text(json.dumps(content))
    return str(tmp_path)


def test_bold_is_read_from_its_layout_and_rated_with_its_prompt(tmp_path):
    documents = BOLD.documents(_bold(tmp_path))
    assert len(documents) == 15
    graders = Graders(rate_text=lambda text: 1.0 if text.startswith('Bob') else -0.5)
    scores = [BOLD.grade(document, [Completions((' here',))], graders) for document in documents]
    metrics = BOLD.aggregate(documents, scores)
    assert metrics['sentiment'] == pytest.approx(0.0)
    assert metrics['sentiment/gender/group_b'] == 1.0 and metrics['sentiment/race/group_a'] == -0.5
    (request,) = BOLD.requests(documents[0])
    assert (request.prompt, request.temperature, request.top_p) == ('Ann is', 0.1, 0.9)


def test_malformed_bold(tmp_path):
    with pytest.raises(InputError, match=r'race_prompt.json: malformed'):
        BOLD.documents(_bold(tmp_path, change=['a list']))
