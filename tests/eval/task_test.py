"""The vocabulary: few-shot draws, the rules for the best choice, what needs a grader."""

import random

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.task import FewShot, Likelihood, choice_scores, count_words, multiple_choice


def _task(spare=True, sampler='random', pool=20):
    return multiple_choice(
        'toy',
        lambda data_dir: [{'q': f'e{i}', 'g': i % 2} for i in range(10)],
        question=lambda d: d['q'],
        choices=lambda d: ('no', 'yes'),
        gold=lambda d: d['g'],
        few_shot=FewShot(
            lambda d: f'{d["q"]} {("no", "yes")[d["g"]]}',
            lambda data_dir: [{'q': f't{i}', 'g': i % 2} for i in range(pool)],
            sampler=sampler,
            spare=spare,
        ),
        description=lambda d: 'Answer.\n\n',
    )


@pytest.mark.parametrize(('spare', 'extra'), [(True, 1), (False, 0)])
def test_examples_are_drawn_as_lm_eval_draws_them(spare, extra):
    task = _task(spare)
    documents = task.documents('')
    rng = random.Random(1234)  # lm-evaluation-harness's sampler: one generator, document after document
    pool = [{'q': f't{i}', 'g': i % 2} for i in range(20)]
    expected = [rng.sample(pool, 3 + extra)[:3] for _ in documents]
    assert task.draw(documents, '', 3) == expected
    assert task.draw(documents[:4], '', 3) == expected[:4]  # a limit does not change the draw


def test_without_a_pool_the_documents_serve_each_other():
    task = _task(pool=0)
    documents = task.documents('')
    for document, examples in zip(documents, task.draw(documents, '', 9), strict=True):
        assert len(examples) == 9 and document not in examples
    with pytest.raises(InputError, match='toy has 9 few-shot examples; num_fewshot is 10, use at most 9'):
        task.draw(documents, '', 10)


def test_prompt_is_description_examples_question():
    task = _task(sampler='first')
    document = task.documents('')[0]
    prefix = task.prefix(document, task.draw([document], '', 2)[0])
    contexts = {request.context for request in task.requests(document, prefix)}
    assert contexts == {'Answer.\n\nt0 no\n\nt1 yes\n\ne0'}
    assert [request.continuation for request in task.requests(document)] == [' no', ' yes']


def test_best_choice_by_each_rule():
    choices = ('a' * 10, 'é' * 6, 'x')  # 10, 6 and 1 characters; 10, 12 and 1 bytes
    results = [Likelihood(value) for value in (-9.0, -6.6, -3.0)] + [
        Likelihood(v) for v in (-8.0, -5.0, -12.0)
    ]
    metrics = ('acc', 'acc_norm', 'acc_bytes', 'acc_answer')
    # -9 -6.6 -3; per character -0.9 -1.1 -3; per byte -0.9 -0.55 -3; less the unconditional -1 -1.6 +9.
    for right, expected in ((0, [0, 1, 0, 0]), (1, [0, 0, 1, 0]), (2, [1, 0, 0, 1])):
        scores = choice_scores(choices, results, (right,), metrics)
        assert [scores[metric] for metric in metrics] == expected


def test_words_are_counted_as_lm_eval_counts_them():
    assert count_words(' two  words\n') == 4  # re.split leaves the empty ends
