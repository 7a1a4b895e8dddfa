"""Equal answers in LaTeX, unequal ones, and what must not take long."""

import time

import pytest

from llama_jax.grading.latex import equivalent, last_boxed, normalize


@pytest.mark.parametrize(
    ('first', 'second'),
    [
        ('\\frac{\\sqrt{3}}{2}', '\\sqrt{3}/2'), ('x^2+2x+1', '(x+1)^2'), ('0.5', '\\frac12'), ('\\$10', '10'),
        ('2\\sqrt{3}', '\\sqrt{12}'), ('(1,2)', '(1, 2)'), ('-\\frac{2}{3}', '\\frac{-2}{3}'), ('1,000', '1000'),
        ('x = 5', '5'), ('12 \\text{ cm}', '12'), ('90^\\circ', '90'), ('\\dfrac{1}{x}', 'x^{-1}'), ('.5', '0.5'),
        ('\\sqrt[3]{8}', '2'), ('\\left(0,1\\right]', '(0,1]'), ('2\\cdot 3', '6'), ('5\\%', '5'),
    ],
)  # fmt: skip
def test_same(first, second):
    assert equivalent(normalize(first), normalize(second))
    assert equivalent(normalize(second), normalize(first))


@pytest.mark.parametrize(
    ('first', 'second'),
    [
        ('5', '6'), ('x', 'y'), ('(1,2)', '(2,1)'), ('[0,1]', '(0,1)'), ('\\frac{1}{2}', '\\frac{1}{3}'), ('', '0'),
        ('-2', '2'), ('\\sqrt{2}', '1.414'), ('[invalidanswer]', '3'), ('1/0', '1/0+0'), ('\\text{A}', '\\text{B}'),
    ],
)  # fmt: skip
def test_different(first, second):
    assert not equivalent(normalize(first), normalize(second))


@pytest.mark.parametrize(
    'text',
    [
        '9^9^9^9^9',
        '(' * 5000,
        '{' * 299,
        '\\frac' * 1000,
        'sqrt' * 3000,
        '$' * 3000,
        '-' * 290 + '1',
        '9' * 290,
    ],
)
def test_hostile_text_is_quick(text):
    start = time.perf_counter()
    equivalent(normalize(text), '1')
    last_boxed('\\boxed{' * 2000 + text)
    assert time.perf_counter() - start < 2  # milliseconds where nothing else runs


def test_last_boxed():
    assert last_boxed('a \\boxed{1} b \\boxed{\\frac{1}{2}} c') == '\\frac{1}{2}'
    assert last_boxed('\\boxed 5$ x') == '5'
    assert last_boxed('\\fbox{7}') == '7'
    assert last_boxed('none') is None and last_boxed('\\boxed{1') is None
