"""What answers are worth: each reward against a table, their sum, and what is said of one that gives no number."""

import math

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.rl.rewards import (
    Weighted,
    function_of_file,
    judge,
    missing_stop,
    overlong,
    safety_first,
)
from llama_jax.rl.rollout import Rollout


def rollout(record=0, sample=0, length=3, stopped=True, text='so'):
    return Rollout(record, sample, (1, 2), tuple(range(3, 3 + length)), (-1.0,) * length, stopped, text)


def of(*values):
    """A reward that gives these, in order."""
    return lambda rollouts, records: np.array(values)


def logit(p):
    return math.log(p / (1 - p))


def test_rewards_are_summed_by_weight_in_float64_and_kept_apart():
    answers = [rollout(sample=i) for i in range(3)]
    thirds = np.array([0.7, 1 / 3, -2.5])
    found = judge([Weighted('a', of(*thirds), 2.0), Weighted('b', of(1, 0, 1), -0.25)], answers, [{}] * 3)
    np.testing.assert_array_equal(found.total, 2.0 * thirds - 0.25 * np.array([1, 0, 1]))
    np.testing.assert_array_equal(found.parts['a'], thirds)
    assert found.parts['b'].tolist() == [1.0, 0.0, 1.0] and found.total.dtype == np.float64


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (
            (0.0, math.nan),
            r'the reward mine is nan for record 7, answer 1 \(.so.\), and so for 1 of 2 answers',
        ),
        (
            (-math.inf, math.inf),
            r'the reward mine is -inf for record 7, answer 0 \(.so.\), and so for 2 of 2',
        ),
        ((1.0,), r'gave values of shape \[1\] for 2 answers, the first of record 7, answer 0'),
        (((1.0, 2.0), (3.0, 4.0)), r'gave values of shape \[2, 2\] for 2 answers'),
    ],
)
def test_what_is_no_number_names_the_record(values, message):
    answers = [rollout(record=7, sample=i) for i in range(2)]
    with pytest.raises(InputError, match=message):
        judge([Weighted('fine', of(1.0, 2.0)), Weighted('mine', of(*values))], answers, [{}] * 2)


def test_an_answer_that_was_cut_is_punished_whatever_the_stop_tokens_are():
    answers = [rollout(stopped=True), rollout(stopped=False), rollout(stopped=False, length=9)]
    assert missing_stop(answers, [{}] * 3).tolist() == [0.0, -1.0, -1.0]


def test_long_answers_are_punished_softly_over_the_buffer():
    answers = [rollout(length=n) for n in (1, 12, 13, 14, 16)]
    assert overlong(16, 4)(answers, [{}] * 5).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]
    with pytest.raises(InputError, match='the buffer of overlong is 17 tokens; it must be from 1 to 16'):
        overlong(16, 17)


def test_safety_comes_first_where_a_record_is_tagged_or_its_score_is_below_the_threshold():
    """Llama 2 paper, section 3.2.3; the table has both sides of 0.15."""
    table = [  # sigmoid(safety), sigmoid(helpfulness), tagged, R_c
        (0.14, 0.9, False, 0.14), (0.16, 0.9, False, 0.9), (0.16, 0.9, True, 0.16), (0.149999, 0.2, False, 0.149999),
        (0.150001, 0.2, False, 0.2), (0.9, 0.3, True, 0.9), (0.9, 0.3, False, 0.3), (0.01, 0.02, True, 0.01),
    ]  # fmt: skip
    answers = [rollout(sample=i) for i in range(len(table))]
    records = [{'safety': tagged} if tagged or i % 2 else {} for i, (_, _, tagged, _) in enumerate(table)]
    helpful, safe = of(*(logit(h) for _, h, _, _ in table)), of(*(logit(s) for s, _, _, _ in table))
    wanted = np.array([logit(r) for *_, r in table])
    np.testing.assert_allclose(
        safety_first(helpful, safe, whitened=False)(answers, records), wanted, rtol=1e-12
    )
    np.testing.assert_allclose(
        safety_first(helpful, safe)(answers, records), (wanted - wanted.mean()) / wanted.std(), rtol=1e-9
    )
    with pytest.raises(InputError, match='safety of a record is .yes.; it is true or false'):
        safety_first(helpful, safe)(answers, [{'safety': 'yes'}] * len(table))


def write(tmp_path, text):
    file = tmp_path / 'mine.py'
    file.write_text(text)
    return str(file)


def test_a_function_of_ones_own_gets_prompt_answer_and_record(tmp_path):
    path = write(
        tmp_path, 'def count(prompt, answer, record):\n    return len(prompt) + answer.count(record["of"])\n'
    )
    answers = [rollout(text='banana'), rollout(sample=1, text='kiwi')]
    found = function_of_file(path, 'count')(
        answers, [{'prompt': 'abc', 'of': 'a'}, {'prompt': '', 'of': 'i'}]
    )
    assert found.tolist() == [6.0, 2.0]


@pytest.mark.parametrize(
    ('body', 'message'),
    [
        ('raise KeyError("answer")', r"mine.py:score raised KeyError \('answer'\) for record 3, answer 0"),
        (
            'return [1.0, 2.0]',
            r"mine.py:score gave '\[1.0, 2.0\]' for record 3, answer 0 .*; it must give one number",
        ),
        ('return None', r"mine.py:score gave 'None' for record 3, answer 0"),
        ('return "0.5"', r"mine.py:score gave '0.5' for record 3, answer 0"),
        ('return float("nan")', r'the reward own is nan for record 3, answer 0'),
    ],
)
def test_a_function_that_raises_or_gives_no_number_names_the_record(tmp_path, body, message):
    reward = function_of_file(write(tmp_path, f'def score(prompt, answer, record):\n    {body}\n'), 'score')
    with pytest.raises(InputError, match=message):
        judge([Weighted('own', reward)], [rollout(record=3)], [{'prompt': ''}])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('def scor(): pass', 'has no function score; it has scor'),
        ('score = 3', 'has no function score; it has none'),
        ('1 / 0', 'raised ZeroDivisionError when it was read: division by zero'),
        ('def (', 'raised SyntaxError when it was read'),
    ],
)
def test_a_file_without_the_function_is_refused_before_anything_is_drawn(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        function_of_file(write(tmp_path, text), 'score')
    with pytest.raises(InputError, match='no file'):
        function_of_file(str(tmp_path / 'other.py'), 'score')
