"""MBPP (Austin et al. 2021): short Python functions from a sentence and three tests; 3-shot, pass@k.

Test items are the publisher's 11 to 510, examples 2, 3 and 4. The LLaMA papers sample as on HumanEval, with pass@80.
Needs `grading.sandbox`.
"""

import ast
import builtins
import dataclasses
import warnings
from collections.abc import Sequence

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Completion, Completions, Document, FewShot, Graders, Request, Scores, Task
from llama_jax.eval.tasks.human_eval import code_scores
from llama_jax.grading.program_tests import ProgramTest

ALL = DocumentSource(
    'mbpp',
    ('mbpp.jsonl',),
    {'task_id': int, 'text': str, 'code': str, 'test_list': list, 'test_setup_code': str},
    check=lambda d: (d['test_list'][2], _question(d)),
    huggingface=Online('google-research-datasets/mbpp', 'prompt+test', ('full',)),
)


def _question(document: Document) -> ProgramTest:
    """The tests, and which of their names are the program's: those that the reference solution defines.

    Raises:
      ValueError, SyntaxError: tests or solution are no Python.
    """
    tests, setup = '\n'.join(document['test_list'][:3]), document['test_setup_code']
    with warnings.catch_warnings(action='ignore'):  # about the escapes in its regular expressions
        # The reference solution is taken apart, not run.
        body = ast.parse(document['code']).body + ast.parse(setup).body
    used, bound = _names(ast.parse(tests))
    imports = [line for line in body if isinstance(line, ast.Import | ast.ImportFrom)]
    defined = set().union(*(_names(line)[1] for line in body if line not in imports))
    imported = set().union(*(_names(line)[1] for line in imports))
    known = bound | imported | set(dir(builtins))
    return ProgramTest(
        program='',
        tests=tests,
        names=tuple(sorted(name for name in used if name in defined or name not in known)),
        definitions='\n'.join(ast.unparse(line) for line in imports if _names(line)[1] & used),
        setup=setup,
    )


def _names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """What is read and what is bound; of functions and classes the name alone."""
    used, bound = set(), set()
    if isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return used, {tree.name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition('.')[0])
    return used, bound


def _part(data_dir: str, first: int, last: int) -> list[Document]:
    return [document for document in ALL(data_dir) if first <= document['task_id'] <= last]


def _prompt(document: Document) -> str:
    tests = '\n'.join(document['test_list'][:3])
    return (
        f'You are an expert Python programmer, and here is your task: {document["text"]} '
        f'Your code should pass these tests:\n\n{tests}\n[BEGIN]\n'
    )


def _ask(document: Document, prefix: str) -> list[Request]:
    return [Completion(prefix + _prompt(document), stop=('[DONE]',))]


def _grade(document: Document, results: Sequence[Completions], graders: Graders) -> Scores:
    question = _question(document)
    return code_scores([dataclasses.replace(question, program=text) for text in results[0].texts], graders)


MBPP = Task(
    name='mbpp',
    load=lambda data_dir: _part(data_dir, 11, 510),
    ask=_ask,
    grader=_grade,
    answer=lambda d: d['code'],
    metrics=('pass@1',),
    few_shot=FewShot(
        lambda d: f'{_prompt(d)}{d["code"]}\n[DONE]', lambda data_dir: _part(data_dir, 2, 4), sampler='first'
    ),
    num_fewshot=3,
    executes_code=True,
    lm_eval={'pass@1': ('mbpp', 'pass_at_1,none')},
)
