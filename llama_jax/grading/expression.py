"""The value of a LaTeX expression at a point: exact where it is rational, in floating point elsewhere.

Two expressions that agree at points nobody chose are equal, which needs no computer algebra: sympy, which
lm-evaluation-harness asks, may not end on what a model may write. Here every step is bounded.
"""

import cmath
import math
import random
import re
from collections.abc import Callable
from fractions import Fraction

Number = Fraction | complex

POINTS = 3
_MAX_BITS = 60_000  # of an exact number; 3,000! has 30,000
_MAX_DEPTH = 40
_MAX_FACTORIAL = 3000
_MAX_ROOT = 64

_LETTERS = frozenset((
    'alpha', 'beta', 'gamma', 'delta', 'epsilon', 'varepsilon', 'zeta', 'eta', 'theta', 'vartheta', 'iota', 'kappa',
    'lambda', 'mu', 'nu', 'xi', 'rho', 'sigma', 'tau', 'upsilon', 'phi', 'varphi', 'chi', 'psi', 'omega', 'Gamma',
    'Delta', 'Theta', 'Lambda', 'Xi', 'Sigma', 'Phi', 'Psi', 'Omega', 'ell',
))  # fmt: skip
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    '\\sin': cmath.sin, '\\cos': cmath.cos, '\\tan': cmath.tan, '\\sinh': cmath.sinh, '\\cosh': cmath.cosh,
    '\\tanh': cmath.tanh, '\\arcsin': cmath.asin, '\\arccos': cmath.acos, '\\arctan': cmath.atan,
    '\\sec': lambda x: 1 / cmath.cos(x), '\\csc': lambda x: 1 / cmath.sin(x),
    '\\cot': lambda x: cmath.cos(x) / cmath.sin(x), '\\ln': cmath.log, '\\exp': cmath.exp,
    '\\log': lambda x: cmath.log(x) / math.log(10),
}  # fmt: skip
_BINOMIALS = ('\\binom', '\\dbinom', '\\tbinom')
_COMMANDS = {
    *_FUNCTIONS,
    *_BINOMIALS,
    *('\\' + name for name in _LETTERS),
    '\\pi',
    '\\frac',
    '\\sqrt',
    '\\repeating',
}
_TOKEN = re.compile(r'\\[a-zA-Z]+|\d+\.?\d*|\.\d+|[a-zA-Z]+|[-+*/^_(){}\[\]|!]')


def same_value(first: str, second: str) -> bool:
    """Whether two expressions have the same value wherever they are looked at; False where one has none."""
    for point in range(POINTS):
        try:
            if not _close(evaluate(first, point), evaluate(second, point)):
                return False
        except (ValueError, ArithmeticError, RecursionError):
            return False
    return True


def proportional(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two equations, each by its sides, say the same: their differences have one ratio everywhere."""
    ratios: list[Number] = []
    for point in range(POINTS):
        try:
            differences = [evaluate(a, point) - evaluate(b, point) for a, b in (first, second)]
            ratios.append(differences[0] / differences[1])
        except (ValueError, ArithmeticError, RecursionError):
            return False
    return ratios[0] != 0 and all(_close(ratios[0], ratio) for ratio in ratios[1:])


def _close(a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = complex(a), complex(b)
    return cmath.isfinite(a) and cmath.isfinite(b) and abs(a - b) <= 1e-12 * max(abs(a), abs(b))


def evaluate(text: str, point: int) -> Number:
    """The value where every variable has a value of its own, chosen by the number of the point.

    Raises:
      ValueError: it is no expression, or too large a one.
      ArithmeticError: it has no value here.
    """
    return _Evaluator(text, point).value()


def _is_product(letters: str) -> bool:
    """Whether letters side by side are variables multiplied, and no word: 'xy', 'qr', '2mn', but not 'east' or 'no'."""
    if len(letters) == 1 or set(letters) <= set('xyz') or set(letters) == set('abc'):
        return True
    vowels = set(letters) & set('aeiouy')
    if len(letters) == 2 and vowels in ({'a'}, {'y'}):
        return letters.islower() and letters not in {'ah', 'am', 'an', 'as', 'at', 'ma', 'pa', 'my', 'by'}
    return letters.islower() and not vowels


def _tokens(text: str) -> list[str]:
    found = _TOKEN.findall(text)
    if ''.join(found) != text:
        raise ValueError(f'{text} is no expression')
    tokens = []
    for token in found:
        if token[0] == '\\' and token not in _COMMANDS:  # '\\pi r' without its space
            command = max((known for known in _COMMANDS if token.startswith(known)), key=len, default='')
            if not command:
                raise ValueError(f'{token} is not known')
            tokens.append(command)
            token = token[len(command) :]
        tokens += list(token) if token.isalpha() and _is_product(token) else [token]
    return tokens


def _bounded(value: Number) -> Number:
    if (
        isinstance(value, Fraction)
        and value.numerator.bit_length() + value.denominator.bit_length() > _MAX_BITS
    ):
        raise ValueError('too large a number')
    return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = base.numerator.bit_length() + base.denominator.bit_length()
            if abs(exponent) * size > _MAX_BITS:
                raise ValueError('too large a power')
            return base ** int(exponent)
        if base >= 0 and exponent.denominator <= _MAX_ROOT:
            root = _exact_root(base, exponent.denominator)
            if root is not None:
                return _power(root, Fraction(exponent.numerator))
    base, exponent = complex(base), complex(exponent)
    if abs(exponent) > 1000:
        raise ValueError('too large an exponent')
    return base**exponent


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    parts = []
    for part in (value.numerator, value.denominator):
        if part.bit_length() > 2000:
            return None
        root = math.isqrt(part) if degree == 2 else _nearest_root(part, degree)
        if root**degree != part:
            return None
        parts.append(root)
    return Fraction(*parts)


def _nearest_root(value: int, degree: int) -> int:
    low, high = 0, 1 << (value.bit_length() // degree + 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
    return low


def _whole(value: Number, most: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= most:
        raise ValueError(f'{value} is no number of things')
    return int(value)


class _Evaluator:
    """Recursive descent over sum, product (also by juxtaposition), power and atom."""

    def __init__(self, text: str, point: int):
        self.tokens, self.place, self.point, self.depth = _tokens(text), 0, point, 0

    def value(self) -> Number:
        result = self.sum()
        if self.place < len(self.tokens):
            raise ValueError(f'{self.tokens[self.place]} is left over')
        return result

    def next(self, ahead: int = 0) -> str:
        return self.tokens[self.place + ahead] if self.place + ahead < len(self.tokens) else ''

    def take(self, *expected: str) -> str:
        token = self.next()
        if not token or (expected and token not in expected):
            raise ValueError(f'{token!r} is not one of {expected}')
        self.place += 1
        return token

    def sum(self) -> Number:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError('nested too deep')
        result = self.sign() * self.product()
        while self.next() in ('+', '-'):
            result = _bounded(result + self.sign() * self.product())
        self.depth -= 1
        return result

    def sign(self) -> int:
        """Of at most one sign."""
        return -1 if self.next() in ('+', '-') and self.take() == '-' else 1

    def product(self, until_function: bool = False) -> Number:
        result = self.power()
        while self.next() and self.next() not in '+-)}]|!^_':
            if until_function and (self.next() in ('*', '/') or self.next() in _FUNCTIONS):
                break
            operator = self.take() if self.next() in ('*', '/') else ''
            if not operator and self.next()[0].isdigit() and self.tokens[self.place - 1][-1].isalpha():
                raise ValueError('a number behind a letter: an index, a power, 2e3?')
            factor = self.sign() * self.power()
            result = _bounded(result / factor if operator == '/' else result * factor)
        return result

    def power(self) -> Number:
        base = self.atom()
        while self.next() == '!':
            self.take('!')
            base = Fraction(math.factorial(_whole(base, _MAX_FACTORIAL)))
        if self.next() != '^':
            return base
        self.take('^')
        return _power(base, self.sign() * self.atom(exponent=True))

    def atom(self, exponent: bool = False) -> Number:
        token = self.take()
        if token[0].isdigit() or token[0] == '.':
            if exponent and len(token) > 1:  # LaTeX raises the first digit alone
                raise ValueError(f'^{token} without braces')
            return self.number(token)
        if token in ('{', '('):
            result = self.sum()
            self.take({'{': '}', '(': ')'}[token])
            return result
        if token == '|':
            result = self.sum()
            self.take('|')
            return abs(result) if isinstance(result, Fraction) else complex(abs(result))
        if token == '\\frac':
            above, below = self.group(), self.group()
            return _bounded(above / below)
        if token in _BINOMIALS:
            whole, part = self.group(), self.group()
            return Fraction(math.comb(_whole(whole, _MAX_FACTORIAL), _whole(part, _MAX_FACTORIAL)))
        if token == '\\sqrt':
            return self.root()
        if token in _FUNCTIONS:
            return self.function(token)
        return self.name(token)

    def group(self) -> Number:
        if self.next() != '{':
            raise ValueError('an argument without braces')
        return self.atom()

    def number(self, token: str) -> Number:
        value = Fraction(token if token[-1] != '.' else token[:-1])
        if self.next() == '\\repeating':
            self.take()
            self.take('{')
            digits = self.take()
            self.take('}')
            places = len(token.partition('.')[2])
            return value + Fraction(int(digits), (10 ** len(digits) - 1) * 10**places)
        if self.next() == '_':
            raise ValueError(f'{token} in another base')
        fraction = [self.next(ahead) for ahead in range(7)]
        if token.isdigit() and fraction[0] == '\\frac' and fraction[2].isdigit() and fraction[5].isdigit():
            part = self.atom()
            if not isinstance(part, Fraction) or not 0 < part < 1:
                raise ValueError('neither a mixed number nor a product')
            return value + part
        return value

    def root(self) -> Number:
        degree = Fraction(2)
        if self.next() == '[':
            self.take('[')
            degree = self.sum()
            self.take(']')
        radicand = self.group()
        if degree == 3 and isinstance(radicand, Fraction) and radicand < 0:
            return -_power(-radicand, Fraction(1, 3))
        return _power(radicand, 1 / degree)

    def function(self, name: str) -> Number:
        """A function with its argument, which without brackets is all that stands beside it: sin 2x, not sin(2) x."""
        base, exponent = None, Fraction(1)
        if name == '\\log' and self.next() == '_':
            self.take('_')
            base = self.atom(exponent=True)
        if self.next() == '^':
            self.take('^')
            exponent = Fraction(_whole(self.atom(exponent=True), 100))
        argument = self.atom() if self.next() in ('(', '{') else self.product(until_function=True)
        if base is not None:
            return _power(cmath.log(complex(argument)) / cmath.log(complex(base)), exponent)
        return _power(_FUNCTIONS[name](complex(argument)), exponent)

    def name(self, token: str) -> Number:
        name = token.removeprefix('\\')
        if token[0] == '\\' and name not in _LETTERS and name != 'pi' or not name.isalpha():
            raise ValueError(f'{token} begins no value')
        if self.next() == '_':
            self.take('_')
            index = [self.take()]
            while index[0] == '{' and index[-1] != '}':
                index.append(self.take())
            name += '_' + ''.join(index).strip('{}')
        constants = {'pi': complex(math.pi), 'e': complex(math.e), 'i': 1j}
        if name in constants and (name != 'pi' or token[0] == '\\'):
            return constants[name]
        # Of either sign: |x| is not x.
        draw = random.Random(f'{name}/{self.point}')
        return Fraction(draw.randrange(5000, 30000), 10007) * (1, -1, draw.choice((1, -1)))[self.point % 3]
