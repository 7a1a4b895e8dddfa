"""Whether two short LaTeX answers say the same: Minerva's normalisation, then equality in value.

lm-evaluation-harness asks sympy whether the difference simplifies to 0. Here both are evaluated instead, variables at
arbitrary values, which needs no computer algebra and gives the same answer but for coincidences below 1e-9.
"""

import cmath
import random
import re
from collections.abc import Callable

# Lewkowycz et al. 2022 (Minerva), appendix D.1.
_SUBSTITUTIONS = (
    ('an ', ''), ('a ', ''), ('.$', '$'), ('\\$', ''), (r'\ ', ''), (' ', ''), ('mbox', 'text'),
    (',\\text{and}', ','), ('\\text{and}', ','), ('\\text{m}', '\\text{}'),
)  # fmt: skip
_UNITS = (
    'square', 'ways', 'integers', 'dollars', 'mph', 'inches', 'ft', 'hours', 'km', 'units', 'sue', 'points', 'feet',
    'minutes', 'digits', 'cents', 'degrees', 'cm', 'gm', 'pounds', 'meters', 'meals', 'edges', 'students',
    'childrentickets', 'multiples',
)  # fmt: skip
_REMOVED = (
    '\\ldots', '\\text{s}', '\\text{.}', '\\text{\ns}', '\\text{}^2', '\\text{}^3', '\\text{\n}', '\\text{}',
    r'\mathrm{th}', r'^\circ', r'^{\circ}', r'\;', r',\!', '{,}', '"', '\\dots',
)  # fmt: skip
_MAX_ANSWER = 2000  # characters; no right answer is as long
_MAX_LENGTH = 300  # a longer answer is compared as text: no parser works for long on what a model may write


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} or \fbox{...} (also `\boxed 5$`); None without a complete one."""
    start = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
    if start < 0:
        return None
    if text.startswith('\\boxed ', start):
        return text[start + 7 :].split('$')[0]
    depth = 0
    opening = text.find('{', start)
    for end in range(opening, len(text)) if opening >= 0 else ():
        depth += (text[end] == '{') - (text[end] == '}')
        if depth == 0:
            return text[opening + 1 : end]
    return None


def normalize(answer: str) -> str:
    """One spelling for what means the same: no units, no dollar signs, full braces, plain numbers."""
    answer = answer.split('=')[-1][:_MAX_ANSWER]
    for unit in _UNITS:
        answer = re.sub(rf'(?<!\\)\b{unit}\b', '', answer)
    for before, after in _SUBSTITUTIONS:
        answer = answer.replace(before, after)
    # Units stuck to a number, but never inside a command: 'ft' is in '\left'.
    commands = re.split(r'(\\[a-zA-Z]+)', answer)
    for unit in _UNITS:
        commands[::2] = [piece.replace(unit, '') for piece in commands[::2]]
    answer = ''.join(commands)
    for expression in _REMOVED:
        answer = answer.replace(expression, '')
    if answer.count('$') > 1:
        answer = re.sub(r'(.*?)(\$)(.*?)(\$)(.*)', r'$\3$', answer)
    for wrapper in ('text', 'textbf', 'overline'):
        answer = re.sub(rf'\\{wrapper}\{{(.*?)\}}', r'\1', answer)
    answer = re.sub(r'\\boxed\{(.*)\}', r'\1', answer)
    answer = re.sub(r'frac([^{])(.)', r'frac{\1}{\2}', answer)
    answer = re.sub(r'sqrt(\[[^\]]*\])(\w)', r'sqrt\1{\2}', answer)
    answer = re.sub(r'sqrt(?!\[)([^{])', r'sqrt{\1}', answer)
    answer = answer.replace('$', '')
    return answer.replace(',', '') if re.fullmatch(r'-?\d{1,3}(,\d{3})+', answer) else answer


def equivalent(first: str, second: str) -> bool:
    """Whether two normalised answers are the same text, tuple of values, or value."""
    if first and first == second:
        return True
    first, second = _canonical(first), _canonical(second)
    if first and first == second:
        return True
    if not first or not second or max(len(first), len(second)) > _MAX_LENGTH:
        return False
    return all(_same_at(first, second, seed) for seed in (1, 2))


def _canonical(text: str) -> str:
    for before, after in (
        ('\\!', ''), ('\\,', ''), ('\\left', ''), ('\\right', ''), ('tfrac', 'frac'), ('dfrac', 'frac'),
        ('\\%', ''), ('%', ''), ('\\cdot', '*'), ('\\times', '*'), ('\\div', '/'), (' ', ''), ('\n', ''),
    ):  # fmt: skip
        text = text.replace(before, after)
    return text.rstrip('.')


def _same_at(first: str, second: str, seed: int) -> bool:
    try:
        a, b = _Evaluator(first, seed).value(), _Evaluator(second, seed).value()
    except (ValueError, ArithmeticError, RecursionError):
        return False
    return cmath.isfinite(a) and abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    '\\sin': cmath.sin, '\\cos': cmath.cos, '\\tan': cmath.tan, '\\ln': cmath.log, '\\exp': cmath.exp,
    '\\log': lambda x: cmath.log(x) / cmath.log(10),
}  # fmt: skip
_TOKEN = re.compile(r'\\[a-zA-Z]+|\d+\.?\d*|\.\d+|[a-zA-Z]|[-+*/^_(){}\[\]|!]')


class _Evaluator:
    """Recursive descent over sum, product (also by juxtaposition), power and atom."""

    def __init__(self, text: str, seed: int):
        self.tokens = _TOKEN.findall(text)
        if ''.join(self.tokens) != text:
            raise ValueError(f'{text} is no expression')
        self.place, self.seed = 0, seed

    def value(self) -> complex:
        result = self.sum()
        if self.place < len(self.tokens):
            raise ValueError(f'{self.tokens[self.place]} is left over')
        return result

    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ''

    def take(self, *expected: str) -> str:
        token = self.next()
        if not token or (expected and token not in expected):
            raise ValueError(f'{token!r} is not one of {expected}')
        self.place += 1
        return token

    def sum(self) -> complex:
        sign = -1 if self.next() in ('+', '-') and self.take() == '-' else 1
        result = sign * self.product()
        while self.next() in ('+', '-'):
            result += self.product() if self.take() == '+' else -self.product()
        return result

    def product(self) -> complex:
        result = self.power()
        while self.next() and self.next() not in '+-)}]|!^_':
            operator = self.take() if self.next() in ('*', '/') else '*'
            sign = -1 if self.next() == '-' and self.take() else 1
            factor = sign * self.power()
            result = result / factor if operator == '/' else result * factor
        return result

    def power(self) -> complex:
        base = self.atom()
        if self.next() != '^':
            return base
        self.take('^')
        exponent = self.group()
        if abs(exponent) > 1000:
            raise ValueError('too large an exponent')
        return base**exponent

    def group(self) -> complex:
        if self.next() == '-':
            self.take('-')
            return -self.atom()
        return self.atom()

    def atom(self) -> complex:
        token = self.take()
        if token[0].isdigit() or (token[0] == '.' and len(token) > 1):
            return complex(float(token))
        if token in ('{', '('):
            result = self.sum()
            self.take({'{': '}', '(': ')'}[token])
            return result
        if token == '\\frac':
            return self.atom() / self.atom()
        if token == '\\sqrt':
            degree = complex(2)
            if self.next() == '[':
                self.take('[')
                degree = self.sum()
                self.take(']')
            radicand = self.atom()
            real_odd = degree == 3 and radicand.imag == 0 and radicand.real < 0
            return complex(-(abs(radicand) ** (1 / 3))) if real_odd else radicand ** (1 / degree)
        if token == '\\pi':
            return complex(cmath.pi)
        if token in _FUNCTIONS:
            return _FUNCTIONS[token](self.atom())
        if token.isalpha() or (token.startswith('\\') and len(token) > 1):
            return self.variable(token)
        raise ValueError(f'{token} begins no value')

    def variable(self, name: str) -> complex:
        if self.next() == '_':
            self.take('_')
            name += '_' + self.take()
        return complex(1 + random.Random(f'{name}/{self.seed}').random())
