"""MBPP (Austin et al. 2021): short Python functions from a sentence and three tests; 3-shot, pass@k.

Test items are the publisher's 11 to 510, examples 2, 3 and 4. The LLaMA papers sample as on HumanEval, with pass@80.
Needs `grading.sandbox`.
"""

from collections.abc import Sequence

from llama_jax.eval.documents import Online, Source
from llama_jax.eval.task import Completion, Completions, Document, FewShot, Judges, Request, Scores, Task
from llama_jax.eval.tasks.human_eval import code_scores

ALL = Source(
    'mbpp',
    ('mbpp.jsonl',),
    {'task_id': int, 'text': str, 'code': str, 'test_list': list, 'test_setup_code': str},
    check=lambda d: d['test_list'][2],
    huggingface=Online('google-research-datasets/mbpp', 'prompt+test', ('full',)),
)


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


def _judge(document: Document, results: Sequence[Completions], judges: Judges) -> Scores:
    tests = '\n'.join(document['test_list'][:3])
    setup = document['test_setup_code']
    return code_scores([f'{text}\n{setup}\n{tests}' for text in results[0].texts], judges)


MBPP = Task(
    name='mbpp',
    load=lambda data_dir: _part(data_dir, 11, 510),
    ask=_ask,
    judge=_judge,
    answer=lambda d: d['code'],
    metrics=('pass@1',),
    few_shot=FewShot(
        lambda d: f'{_prompt(d)}{d["code"]}\n[DONE]', lambda data_dir: _part(data_dir, 2, 4), sampler='first'
    ),
    num_fewshot=3,
    executes_code=True,
    lm_eval={'pass@1': ('mbpp', 'pass_at_1,none')},
)
