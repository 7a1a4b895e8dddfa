r"""MATH (Hendrycks et al. 2021): competition problems after Minerva's four examples, the answer in LaTeX.

`exact_match` reads "Final Answer: The final answer is ...", as the examples end and lm-evaluation-harness's
minerva_math does; `exact_match_boxed` falls back on the last \boxed{}. With several samples maj1@k is their majority
vote (the LLaMA paper has k = 256). Whether answers are equal: `grading.latex`.
"""

import re
from collections.abc import Sequence

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Completion, Completions, Document, FewShot, Graders, Scores, Task
from llama_jax.grading.latex import equivalent, last_boxed, normalize
from llama_jax.grading.sampling_metrics import exact_match_scores

INVALID = '[invalidanswer]'
_SAYS = 'Final Answer: The final answer is'
_CONFIGS = (
    'algebra', 'counting_and_probability', 'geometry', 'intermediate_algebra', 'number_theory', 'prealgebra',
    'precalculus',
)  # fmt: skip


def final_answer(text: str) -> str:
    """What the completion says to be its final answer, as it stands there, or INVALID."""
    match = re.search(_SAYS + r'(.*?). I hope it is correct.', text + 'I hope it is correct.')
    return match.group(1).strip() if match else INVALID


def boxed_answer(text: str) -> str:
    """The final answer, or the last boxed one, or INVALID."""
    answer = final_answer(text)
    return answer if answer != INVALID else last_boxed(text) or INVALID


def gold_answer(document: Document) -> str:
    """The normalised answer of the official solution."""
    boxed = last_boxed(document['solution'])
    if boxed is None:
        raise ValueError('a solution without \\boxed{answer}')
    return normalize(boxed)


def _prompt(problem: str) -> str:
    return f'Problem:\n{problem}\n\nSolution:'


def _grade(document: Document, results: Sequence[Completions], graders: Graders) -> Scores:
    gold, scores = gold_answer(document), Scores()
    for suffix, extract in (('', final_answer), ('_boxed', boxed_answer)):
        answers = [normalize(extract(text)) for text in results[0].texts]
        scores |= exact_match_scores(answers, lambda answer: equivalent(answer, gold), INVALID, suffix)
    return scores


# Lewkowycz et al. 2022 (arXiv:2206.14858), appendix D.2.
_EXAMPLES = (
    (
        'Find the domain of the expression  $\\frac{\\sqrt{x-2}}{\\sqrt{5-x}}$.',
        'The expressions inside each square root must be non-negative. Therefore, $x-2 \\ge 0$, so '
        '$x\\ge2$, and $5 - x \\ge 0$, so $x \\le 5$. Also, the denominator cannot be equal to zero, so '
        '$5-x>0$, which gives $x<5$. Therefore, the domain of the expression is $\\boxed{[2,5)}$.\n'
        'Final Answer: The final answer is $[2,5)$. I hope it is correct.',
    ),
    (
        'If $\\det \\mathbf{A} = 2$ and $\\det \\mathbf{B} = 12,$ then find $\\det (\\mathbf{A} '
        '\\mathbf{B}).$',
        'We have that $\\det (\\mathbf{A} \\mathbf{B}) = (\\det \\mathbf{A})(\\det \\mathbf{B}) = (2)(12) = '
        '\\boxed{24}.$\n'
        'Final Answer: The final answer is $24$. I hope it is correct.',
    ),
    (
        'Terrell usually lifts two 20-pound weights 12 times. If he uses two 15-pound weights '
        'instead, how many times must Terrell lift them in order to lift the same total weight?',
        'If Terrell lifts two 20-pound weights 12 times, he lifts a total of $2\\cdot 12\\cdot20=480$ '
        'pounds of weight.  If he lifts two 15-pound weights instead for $n$ times, he will lift a '
        'total of $2\\cdot15\\cdot n=30n$ pounds of weight.  Equating this to 480 pounds, we can solve '
        'for $n$:\n'
        '\\begin{align*}\n'
        '30n&=480\\\\\n'
        '\\Rightarrow\\qquad n&=480/30=\\boxed{16}\n'
        '\\end{align*}\n'
        'Final Answer: The final answer is $16$. I hope it is correct.',
    ),
    (
        'If the system of equations\n'
        '\n'
        '\\begin{align*}\n'
        '6x-4y&=a,\\\\\n'
        '6y-9x &=b.\n'
        '\\end{align*}has a solution $(x, y)$ where $x$ and $y$ are both nonzero,\n'
        'find $\\frac{a}{b},$ assuming $b$ is nonzero.',
        'If we multiply the first equation by $-\\frac{3}{2}$, we obtain\n'
        '\n'
        '$$6y-9x=-\\frac{3}{2}a.$$Since we also know that $6y-9x=b$, we have\n'
        '\n'
        '$$-\\frac{3}{2}a=b\\Rightarrow\\frac{a}{b}=\\boxed{-\\frac{2}{3}}.$$\n'
        'Final Answer: The final answer is $-\\frac{2}{3}$. I hope it is correct.',
    ),
)

MATH = Task(
    name='math',
    load=DocumentSource(
        'math',
        ('test.jsonl',),
        {'problem': str, 'solution': str},
        check=gold_answer,
        huggingface=Online('EleutherAI/hendrycks_math', 'test', _CONFIGS),
    ),
    ask=lambda d, prefix: [Completion(prefix + _prompt(d['problem']), stop=('Problem:',))],
    grader=_grade,
    answer=lambda d: f' {d["solution"]}\n{_SAYS} ${last_boxed(d["solution"])}$. I hope it is correct.',
    metrics=('exact_match', 'exact_match_boxed'),
    few_shot=FewShot(
        lambda d: f'{_prompt(d["problem"])} {d["solution"]}',
        lambda data_dir: [{'problem': problem, 'solution': solution} for problem, solution in _EXAMPLES],
        sampler='first',
    ),
    num_fewshot=4,
    lm_eval={'exact_match': ('minerva_math', 'exact_match,none')},
)
