r"""Whether two short LaTeX answers say the same: Minerva's normalisation, then their parts, then equality in value.

lm-evaluation-harness asks sympy whether the difference of two normalised answers simplifies to 0. Here answers are
taken apart first, for MATH's answers are sets, tuples, intervals, matrices, equations and words as well as numbers;
what is left is compared by `grading.expression`. A right answer refused costs less than a wrong one accepted: what
is not understood is equal to its own text alone.

Where it leaves lm-evaluation-harness, on purpose: an equation with more than a name on its left (`x^2+y^2=4`) is not
its right side, 'a' before a sign is a variable and no article, 1\frac12 is 3/2, 11 2/3 is not 112/3, 0.\overline{3} is
not 0.3, and 'east' is not e a s t.
"""

import re

from llama_jax.grading.expression import proportional, same_value

# Lewkowycz et al. 2022 (Minerva), appendix D.1; but for 'an ' and 'a ', see `_ARTICLE`.
_SUBSTITUTIONS = (
    ('.$', '$'), ('\\$', ''), (r'\ ', ''), (' ', ''), ('mbox', 'text'), ('\\text{m}', '\\text{}'),
)  # fmt: skip
_ARTICLE = re.compile(r'(?<![\w\\^_+*/=-])(?<![\w+*/=-] )an? (?=[a-zA-Z]{2})')
_AND = re.compile(r',?\s*\\(?:text|mbox)\s*\{\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+')
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
_MAX_PARTS = 30


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
    """One spelling for what means the same: no units, no dollar signs, full braces, plain numbers, no 'x ='."""
    answer = _right_side(_AND.sub(',', answer[:_MAX_ANSWER]))
    for unit in _UNITS:
        answer = re.sub(rf'(?<!\\)\b{unit}\b', '', answer)
    answer = _ARTICLE.sub('', answer)
    answer = re.sub(r'\\\\\s+', r'\\\\', answer)  # the end of a matrix's row is no space
    answer = re.sub(r'_(\w) (?=\w)', r'_{\1}', answer)
    answer = re.sub(r'(?<![\d.])(\d+) (\d+)/(\d+)(?![\d.])', r'\1\\frac{\2}{\3}', answer)
    answer = re.sub(r'(\d*\.\d*)\\overline\{(\d{1,50})\}', r'\1\\repeating{\2}', answer)
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
    return answer.replace(',', '') if re.fullmatch(r'-?\d{1,3}(,\d{3})+(\.\d*)?', answer) else answer


def _right_side(answer: str) -> str:
    """What stands behind 'x =' or 'f(2) =', also in each part of 'x = 1, x = 2'; another equation stays whole."""
    if '=' not in answer or re.search(r'[<>]|\\[lg]eq?|\\neq?\b|[<>!]=', answer):
        return answer
    parts = [part.rsplit('=', 1) for part in _split(answer, (',',))]
    if len({part[0].strip() for part in parts}) > 1 or min(map(len, parts)) < 2:
        return answer  # of several names each keeps its own
    simple = all(not re.search(r'[-+*/^]|^\W*\d|\\cdot|\\times', _outside(part[0])) for part in parts)
    return ','.join(part[1] for part in parts) if simple else answer


def _outside(text: str) -> str:
    """What of a text is not inside brackets."""
    while (shorter := re.sub(r'\([^()]*\)|\{[^{}]*\}', '', text)) != text:
        text = shorter
    return text


def equivalent(answer: str, right: str) -> bool:
    """Whether a normalised answer says what the right one says; only the answer may be an equation for a value."""
    if answer and answer == right:
        return True
    answer, right = _canonical(answer), _canonical(right)
    if answer and answer == right:
        return True
    if not answer or not right or max(len(answer), len(right)) > _MAX_LENGTH:
        return False
    if '=' in answer and len(_split(answer, (',',))) == 1 and not re.search(r'[=<>≤≥]', right):
        answer = answer.rsplit('=', 1)[1]
    return _same(answer, right)


def _canonical(text: str) -> str:
    for before, after in (
        ('\\!', ''), ('\\,', ''), ('\\left', ''), ('\\right', ''), ('tfrac', 'frac'), ('dfrac', 'frac'),
        ('cfrac', 'frac'), ('\\%', ''), ('%', ''), ('\\cdot', '*'), ('\\times', '*'), ('\\div', '/'), (' ', ''),
        ('\n', ''), ('\\mathbf', ''), ('\\mathrm', ''), ('\\lbrace', '\\{'), ('\\rbrace', '\\}'), ('\\lvert', '|'),
        ('\\rvert', '|'), ('\\vert', '|'),
    ):  # fmt: skip
        text = text.replace(before, after)
    text = re.sub(r'\\(leqslant|leq|le)|<=|≤', '≤', text)
    text = re.sub(r'\\(geqslant|geq|ge)|>=|≥', '≥', text)
    text = text.replace('\\lt', '<').replace('\\gt', '>')
    text = re.sub(r'(^|[(\[,])\+', r'\1', text)
    text = re.sub(r'^[a-zA-Z]\\in(?!fty|t)', '', text)
    return text.rstrip('.')


# From the brackets at the ends of a whole text to the text between them, where they belong together.
_OPENING, _CLOSING = ('(', '[', '{', '\\{', '\\begin'), (')', ']', '}', '\\}', '\\end')
_PIECE = re.compile(r'\\[a-zA-Z]+|\\.|.', re.DOTALL)


def _split(text: str, separators: tuple[str, ...]) -> list[str]:
    """The parts between separators that no brackets enclose."""
    parts, depth = [''], 0
    for piece in _PIECE.findall(text):
        depth += (piece in _OPENING) - (piece in _CLOSING)
        if piece in separators and depth == 0:
            parts.append('')
        else:
            parts[-1] += piece
    return parts


def _same(first: str, second: str) -> bool:
    """Of two canonical texts; brackets, commas and relations are taken apart from the outside in."""
    if first == second:
        return bool(first)
    for compare in (_relations, _unions, _lists, _matrices, _brackets, _in_bases):
        found = compare(first, second)
        if found is not None:
            return found
    return same_value(first, second)


def _pairwise(first: list[str], second: list[str]) -> bool:
    return len(first) == len(second) <= _MAX_PARTS and all(map(_same, first, second))


def _in_any_order(first: list[str], second: list[str]) -> bool:
    if len(first) != len(second) or len(first) > _MAX_PARTS:
        return False
    left = list(second)
    for part in first:
        match = next((other for other in left if _same(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _relations(first: str, second: str) -> bool | None:
    """Equations up to a factor, inequalities in either direction."""
    read = [
        [re.findall(r'[<>≤≥=]', _outside(text)), _split(text, tuple('<>≤≥='))] for text in (first, second)
    ]
    if not read[0][0] and not read[1][0]:
        return None
    for relation in read:
        if len(relation[1]) != len(relation[0]) + 1:
            return False
        if relation[0] and relation[0][0] in '>≥':
            turned = {'>': '<', '≥': '≤', '<': '>', '≤': '≥', '=': '='}
            relation[:] = [turned[sign] for sign in relation[0][::-1]], relation[1][::-1]
    (signs, sides), (other_signs, other_sides) = read
    if signs != other_signs:
        return False
    if _pairwise(sides, other_sides):
        return True
    return signs == ['='] and proportional((sides[0], sides[1]), (other_sides[0], other_sides[1]))


def _unions(first: str, second: str) -> bool | None:
    parts = [_split(text, ('\\cup',)) for text in (first, second)]
    return _in_any_order(*parts) if max(map(len, parts)) > 1 else None


def _lists(first: str, second: str) -> bool | None:
    """Sets, and values without brackets: MATH asks for 'all solutions, separated by commas'. The signs of ± are two."""
    parts = []
    for text in (first, second):
        inner = text[2:-2] if _enclosed(text, '\\{', '\\}') else text
        found = []
        for part in _split(inner, (',',)):
            if '\\pm' in part or '\\mp' in part:
                found += [part.replace('\\pm', a).replace('\\mp', b) for a, b in ('+-', '-+')]
            else:
                found.append(part)
        parts.append((found, text != inner))
    (items, is_set), (other_items, other_is_set) = parts
    if len(items) == len(other_items) == 1 and is_set == other_is_set == False:  # noqa: E712
        return None
    if (is_set or other_is_set) and not (is_set and other_is_set) and max(len(items), len(other_items)) == 1:
        return False  # the set of a value is not the value
    return _in_any_order(items, other_items)


def _enclosed(text: str, opening: str, closing: str) -> bool:
    """Whether these two brackets, which belong together, hold all of a text."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(opening) + len(closing):
        return False
    depth, left = 0, len(text)
    for piece in _PIECE.findall(text):
        left -= len(piece)
        depth += (piece in _OPENING) - (piece in _CLOSING)
        if depth == 0:
            return left == 0
    return False


_MATRIX = re.compile(r'\\begin\{([pbvBV]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}', re.DOTALL)


def _matrices(first: str, second: str) -> bool | None:
    found = [_MATRIX.fullmatch(text) for text in (first, second)]
    if not any(found):
        return None
    kinds, rows = [], []
    for match in found:
        if match is None or '\\begin' in match[2]:
            return False
        kinds.append(
            'matrix' if match[1] in ('pmatrix', 'bmatrix') else match[1]
        )  # round or square, as one likes
        rows.append([row.split('&') for row in re.split(r'\\\\', re.sub(r'\\\\$', '', match[2]))])
    if kinds[0] != kinds[1] or len(rows[0]) != len(rows[1]):
        return False
    return all(map(_pairwise, *rows))


def _brackets(first: str, second: str) -> bool | None:
    """Tuples, points and intervals: order and kind of brackets count."""
    inner = []
    for text in (first, second):
        pairs = [(a, b) for a in '([' for b in ')]' if _enclosed(text, a, b)]
        parts = _split(text[1:-1], (',',)) if pairs else []
        inner.append((pairs, parts) if len(parts) > 1 else None)
    if inner[0] is None and inner[1] is None:
        return None
    if inner[0] is None or inner[1] is None or inner[0][0] != inner[1][0]:
        return False
    return _pairwise(inner[0][1], inner[1][1])


def _in_bases(first: str, second: str) -> bool | None:
    """Digits with their base: 1011_2."""
    found = [re.fullmatch(r'([0-9A-F]+)_\{?(\d+)\}?', text) for text in (first, second)]
    if not any(match and match[1][0].isdigit() for match in found):
        return None
    return bool(found[0] and found[1]) and found[0].groups() == found[1].groups()  # pyright: ignore
