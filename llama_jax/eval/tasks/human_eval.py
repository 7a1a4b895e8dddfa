"""HumanEval (Chen et al. 2021): write the body of a function that its tests accept; 0-shot, pass@k.

The LLaMA papers sample pass@1 at temperature 0.1 (top-p 0.95 for Llama 2) and pass@100 at 0.8; lm-evaluation-harness
and this task's default are greedy. Needs `grading.sandbox`.
"""

import dataclasses
from collections.abc import Sequence

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Completion, Completions, Document, Graders, Request, Scores, Task
from llama_jax.grading.program_tests import ProgramTest
from llama_jax.grading.sampling_metrics import pass_at_k

REPORTED_K = (1, 10, 80, 100)


def code_scores(programs: Sequence[ProgramTest], graders: Graders) -> Scores:
    """pass@k for every reported k that the number of programs allows, and what became of each program."""
    assert graders.run_code is not None  # Task.check
    outcomes = [graders.run_code(program) for program in programs]
    right = sum(outcome == 'passed' for outcome in outcomes)
    scores: Scores = {
        f'pass@{k}': pass_at_k(len(programs), right, k) for k in REPORTED_K if k <= len(programs)
    }
    return scores | {'outcome': ' | '.join(outcomes)}


def _ask(document: Document, prefix: str) -> list[Request]:
    stop = ('\nclass', '\ndef', '\n#', '\nif', '\nprint')
    return [Completion(prefix + document['prompt'], stop, max_new_tokens=1024)]


def _grade(document: Document, results: Sequence[Completions], graders: Graders) -> Scores:
    prompt, name = document['prompt'], document['entry_point']
    # Some tests use a function that the prompt defines; the one that they get is the prompt's own.
    question = ProgramTest(
        program='',
        tests=f'{document["test"]}\ncheck({name})',
        names=(name,),
        definitions=f'{prompt}\n    pass\n',
    )
    programs = [dataclasses.replace(question, program=prompt + text) for text in results[0].texts]
    return code_scores(programs, graders)


HUMAN_EVAL = Task(
    name='human_eval',
    load=DocumentSource(
        'human_eval',
        ('HumanEval.jsonl.gz', 'HumanEval.jsonl'),
        {'task_id': str, 'prompt': str, 'entry_point': str, 'test': str, 'canonical_solution': str},
        huggingface=Online('openai/openai_humaneval', 'test'),
    ),
    ask=_ask,
    grader=_grade,
    answer=lambda d: d['canonical_solution'],
    metrics=('pass@1',),
    executes_code=True,
    lm_eval={'pass@1': ('humaneval', 'pass@1,create_test')},
)
