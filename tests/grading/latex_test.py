"""Equal answers in LaTeX, unequal ones, and what must not take long."""

import re
import time
from collections import Counter

import pytest

from llama_jax.eval.tasks.math import MATH
from llama_jax.grading.latex import equivalent, last_boxed, normalize

SAME = [
    # Numbers.
    ('\\frac{\\sqrt{3}}{2}', '\\sqrt{3}/2'), ('0.5', '\\frac12'), ('\\$10', '10'), ('2\\sqrt{3}', '\\sqrt{12}'),
    ('-\\frac{2}{3}', '\\frac{-2}{3}'), ('1,000', '1000'), ('.5', '0.5'), ('\\sqrt[3]{8}', '2'),
    ('\\sqrt[3]{-8}', '-2'),
    ('2\\cdot 3', '6'), ('5\\%', '5'), ('10!', '3628800'), ('\\frac{1}{2004!}', '1/2004!'), ('5.00', '5'), ('007', '7'),
    ('1\\frac{1}{2}', '\\frac{3}{2}'), ('-2 \\frac{1}{2}', '-2.5'), ('11 2/3', '11\\frac{2}{3}'),
    ('1,234,567.', '1234567'),
    ('\\$1{,}000.50', '1000.5'), ('0.\\overline{3}', '\\frac13'), ('0.1\\overline{6}', '\\frac{1}{6}'),
    ('10^{100}', '10^{99}\\cdot10'), ('3\\times 10^{5}', '300000'), ('\\binom{5}{2}', '10'), ('\\log_2 8', '3'),
    ('(1+i)^2', '2i'), ('3+4i', '4i+3'), ('e^{\\ln 2}', '2'), ('1011_2', '1011_{2}'), ('|-3|', '3'),
    ('12 \\text{ cm}', '12'), ('90^\\circ', '90'), ('90^{\\circ}', '90'), ('\\frac{\\pi}{3}', '\\pi/3'),
    # Variables.
    ('x^2+2x+1', '(x+1)^2'), ('\\dfrac{1}{x}', 'x^{-1}'), ('xy', 'yx'), ('2\\pi r', '2r\\pi'), ('|x|', '|-x|'),
    ('\\sin 3x', '\\sin(3x)'), ('\\sin^2 x+\\cos^2 x', '1'), ('x^{10}', 'x^5x^5'), ('2^{a+b}', '2^a\\cdot 2^b'),
    ('3qr + 6q', '6q+3rq'), ('\\frac{2a + b}{2}', 'a+\\frac{b}{2}'), ('AB/2', '\\frac{AB}{2}'),
    # Parts.
    ('(1,2)', '(1, 2)'), ('(1/2, 3)', '(0.5, 3)'), ('\\left(0,1\\right]', '(0,1]'), ('\\{1,2,3\\}', '\\{3,1,2\\}'),
    ('\\{1,2\\}', '\\left\\{ 2, 1 \\right\\}'), ('1,-2', '-2, 1'),
    ('(-\\infty,2)\\cup(3,4]', '(3,4] \\cup (-\\infty,2)'),
    ('(+\\infty, 2)', '(\\infty,2)'), ('x \\in [-2,7]', '[-2,7]'), ('1 \\pm \\sqrt{19}', '1+\\sqrt{19}, 1-\\sqrt{19}'),
    ('\\{1\\pm\\sqrt{5},-2\\}', '\\{-2, 1-\\sqrt5, 1+\\sqrt 5\\}'), ('7, \\text{ and } -5', '-5, 7'),
    ('\\begin{pmatrix} 1/2 \\\\ 0 \\end{pmatrix}', '\\begin{pmatrix}0.5\\\\0\\end{pmatrix}'),
    ('\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}', '\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}'),
    # Relations.
    ('x = 5', '5'), ('y = 2x + 3', '2x+3'), ('f(2)=6', '6'), ('x=1,x=2', '2,1'), ('x = 1 \\text{ or } x = 2', '1,2'),
    ('x^2+y^2=4', 'y^2+x^2=4'), ('2x^2+2y^2=8', 'x^2+y^2=4'), ('x-3z=0', '3z-x=0'), ('x>5', '5<x'),
    ('1<x\\le 2', '2 \\geq x > 1'), ('f(2) < f(1) < f(4)', 'f(4) > f(1) > f(2)'),
    # Words.
    ('\\text{even}', 'even'), ('\\text{(B)}', 'B'), ('\\text{B, C}', 'B,C'),
]  # fmt: skip
DIFFERENT = [
    # Words, and letters that are none of a product.
    ('east', 'seat'), ('\\text{odd}', 'dod'), ('no', 'on'), ('ABC', 'CAB'), ('\\overline{AB}', '\\overline{BA}'),
    ('\\text{A}', '\\text{B}'), ('\\text{4:30 p.m.}', '\\text{4:03 p.m.}'), ('1:2', '2:1'), ('x', 'y'), ('x_1', 'x_2'),
    # Numbers.
    ('5', '6'), ('\\frac{1}{2}', '\\frac{1}{3}'), ('-2', '2'), ('\\sqrt{2}', '1.414'), ('9!', '10!'),
    ('10!', '3628801'),
    ('12345678901234567', '12345678901234576'), ('1234567890123.5', '1234567890132.5'), ('2e3', '3e2'),
    ('1/0', '1/0+0'),
    ('\\frac{1}{3}', '0.333333333333333'), ('1\\frac{1}{2}', '\\frac12'), ('11 2/3', '\\frac{112}{3}'),
    ('0.\\overline{3}', '0.3'), ('1011_2', '11'), ('1011_2', '1011_3'), ('1101_2', '1011_2'), ('1011', '1011_2'),
    ('3+4i', '3-4i'), ('2^3', '3^2'), ('10^{10^{10}}', '10^{10^{10}}+1'), ('50\\%', '0.5'), ('23', '2,3'),
    # Variables.
    ('|x|', 'x'), ('\\sqrt{x^2}', 'x'), ('\\sin x', '\\cos x'), ('x^{10}', 'x^10'), ('x2', '2x'), ('a + b', 'b'),
    ('2a - b', '2-b'), ('\\infty', '-\\infty'), ('\\infty-\\infty', '0'), ('x^2', 'x^3'), ('ab', 'a+b'),
    # Parts.
    ('(1,2)', '(2,1)'), ('[0,1]', '(0,1)'), ('[0,1)', '(0,1]'), ('(1,2)', '\\{1,2\\}'), ('(1,2)', '1,2'),
    ('(1,2,3)', '(1,3,2)'), ('\\{1,2\\}', '\\{1,2,3\\}'), ('\\{1,1,2\\}', '\\{1,2,2\\}'), ('\\{1\\}', '1'),
    ('1 \\pm 2', '1'), ('1+2', '1 \\pm 2'), ('\\pm 2', '2'), ('(0,2)\\cup(3,4)', '(0,2)\\cup(3,5)'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}1&2\\end{pmatrix}'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}2\\\\1\\end{pmatrix}'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '(1,2)'),
    ('\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}', '\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}'),
    # Relations.
    ('x+y=4', 'x^2+y^2=4'), ('x-3z=1', 'x-3z=0'), ('x>5', 'x<5'), ('x\\ge5', 'x>5'), ('x=5,y=3', 'x=3,y=5'),
    ('x=7,y=3', 'x=5,y=3'), ('f(1) < f(2) < f(4)', 'f(2) < f(1) < f(4)'),
    # No answers.
    ('', '0'), ('[invalidanswer]', '3'), ('\\frac{}{}', '1'), ('{}', '0'), ('=', '0'),
]  # fmt: skip


@pytest.mark.parametrize(('first', 'second'), SAME)
def test_same(first, second):
    assert equivalent(normalize(first), normalize(second))
    assert equivalent(normalize(second), normalize(first))


@pytest.mark.parametrize(('first', 'second'), DIFFERENT)
def test_different(first, second):
    assert not equivalent(normalize(first), normalize(second))
    assert not equivalent(normalize(second), normalize(first))


def test_an_answer_may_say_what_it_is_the_value_of_but_the_right_one_is_the_whole_equation():
    """Nine of MATH's answers are equations, most of them '... = 0': '0' is not what they say."""
    for answer, right in (('a+b = 5', '5'), ('x^2+y^2 = 4', '4')):
        assert equivalent(normalize(answer), normalize(right))
        assert not equivalent(normalize(right), normalize(answer))
    assert not equivalent(normalize('x=5,y=3'), normalize('3'))
    assert not equivalent(normalize('x = 0'), normalize('x-3z=0'))


def _rewritten(gold):
    """Other spellings of an answer."""
    yield f'${gold}$'
    yield f' {gold} '
    yield gold.replace('\\frac', '\\dfrac').replace('\\dd', '\\d').replace('\\td', '\\t')
    yield gold.replace('pmatrix', 'bmatrix')
    if not re.search(r'[=,<]|text', gold):
        yield f'x = {gold}'
    if '\\left' not in gold:
        yield gold.replace('(', '\\left(').replace(')', '\\right)')
    if not re.search(r'\d\s*\\frac', gold):
        yield re.sub(r'\\frac\{(-?\d+)\}\{(\d+)\}', r'(\1/\2)', gold)
    if re.fullmatch(r'-?\d{1,3}', gold):
        yield f'{gold}.0'
        yield f'\\frac{{{int(gold) * 6}}}{{6}}'


def _spoiled(gold):
    """Answers to other cases of the problem: digits permuted or changed, signs turned, brackets, letters, order."""
    digits = [place for place, letter in enumerate(gold) if letter.isdigit()]
    for left, right in zip(digits, digits[1:], strict=False):
        if gold[left] != gold[right]:
            yield gold[:left] + gold[right] + gold[left + 1 : right] + gold[left] + gold[right + 1 :]
    for place in digits[:3]:
        yield gold[:place] + str((int(gold[place]) + 3) % 10) + gold[place + 1 :]
    for sign in list(re.finditer(r'(?<![\d{^])-(?!0)', gold))[:2]:
        yield f'{gold[: sign.start()]}+{gold[sign.end() :]}'
    if re.fullmatch(r'[1-9]\d*|\\frac\{\d+\}\{\d+\}', gold):
        yield from (
            f'-{gold}',
            f'{gold}+1',
            f'{gold}x',
            f'2\\cdot {gold}',
            f'\\sqrt{{{gold}}}0',
            f'({gold},{gold})',
        )
    if ',' in gold and '\\!' not in gold:
        yield from (gold.replace(a, b, 1) for a, b in ('([', '[(', ')]', '])') if a in gold)
        if plain := re.fullmatch(r'\(([^()]*)\)', gold.replace('\\left', '').replace('\\right', '').strip()):
            parts = [part.strip() for part in plain[1].split(',')]
            if len(set(parts)) > 1:
                yield f'({",".join([*parts[1:], parts[0]])})'
    text = re.sub(r'\\[a-zA-Z]+|units|inches|p\.m', '', gold) if 'text' in gold else ''
    for word in re.findall(r'[A-Za-z]{2,}', text):
        yield gold.replace(word, word[::-1])
        yield gold.replace(word, word[1:] + word[0])
    if '_' in gold:
        yield from (gold.split('_')[0], re.sub(r'_\{?(\d+)\}?', r'_{1\1}', gold))


def _check_golds(shared_data, stride):
    golds = [
        gold
        for d in MATH.documents(str(shared_data / 'eval'))[::stride]
        if (gold := last_boxed(d['solution']))
    ]
    counts, wrong = Counter(), []
    for gold in golds:
        for other in _rewritten(gold):
            counts['same'] += 1
            if not equivalent(normalize(other), normalize(gold)):
                wrong.append((other, gold))
        for other in _spoiled(gold):
            # Moved within a sum, a product or a list of solutions it may still say the same.
            moved = sorted(other) == sorted(gold) and re.search(r'\+|[a-z}\d] ?-|\)\(|^[^(\[]*,', gold)
            unit = re.search(r'units|inches|cm|\b0\b', gold)  # 'units^2'; -0, 0x
            if moved or unit or other.replace(' ', '') == gold.replace(' ', ''):
                continue
            counts['different'] += 1
            if equivalent(normalize(other), normalize(gold)):
                wrong.append((other, gold))
    assert wrong == []
    return counts


def test_answers_of_math(shared_data):
    counts = _check_golds(shared_data, 160)
    assert counts['same'] > 150 and counts['different'] > 100


@pytest.mark.slow
def test_more_answers_of_math(shared_data):
    counts = _check_golds(shared_data, 20)
    assert counts['same'] > 1200 and counts['different'] > 800


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
        '10^{10^{10}}',
        '9!' + '!' * 200,
        '3000!^{3000!}',
        '1000!' * 50,
        '1/' + '/'.join(['2999!'] * 40),
        ','.join(f'{n}!' for n in range(2971, 3000)),
        '\\{' + ','.join(['x\\pm1'] * 30) + '\\}',
        '((x+y)^{20}' * 20 + ')' * 20,
        '\\sqrt[64]{' + '9' * 200 + '}',
        '\\binom{3000}{1500}' * 10,
        '|' * 299,
        '=' * 1999,
        'x=1,x',
        '=\\\\,',
        ' ' * 2000 + 'and',
        '\\begin{pmatrix}' * 20,
    ],
)
def test_hostile_text_is_quick(text):
    start = time.process_time()
    equivalent(normalize(text), '1')
    equivalent(normalize(text), normalize(text + '+0'))
    last_boxed('\\boxed{' * 2000 + text)
    assert time.process_time() - start < 2  # milliseconds


def test_last_boxed():
    assert last_boxed('a \\boxed{1} b \\boxed{\\frac{1}{2}} c') == '\\frac{1}{2}'
    assert last_boxed('\\boxed 5$ x') == '5'
    assert last_boxed('\\fbox{7}') == '7'
    assert last_boxed('none') is None and last_boxed('\\boxed{1') is None
