"""The benchmarks, by our names (the folders of the data directory) and by lm-evaluation-harness's."""

import dataclasses

from llama_jax.errors import InputError, did_you_mean
from llama_jax.eval.task import Document, Task
from llama_jax.eval.tasks.agieval import AGIEVAL
from llama_jax.eval.tasks.arc import ARC_CHALLENGE, ARC_EASY
from llama_jax.eval.tasks.bbh import BBH
from llama_jax.eval.tasks.boolq import BOOLQ
from llama_jax.eval.tasks.commonsense_qa import COMMONSENSE_QA
from llama_jax.eval.tasks.crows_pairs import CROWS_PAIRS
from llama_jax.eval.tasks.gsm8k import GSM8K, GSM8K_COT
from llama_jax.eval.tasks.hellaswag import HELLASWAG
from llama_jax.eval.tasks.human_eval import HUMAN_EVAL
from llama_jax.eval.tasks.lambada import LAMBADA
from llama_jax.eval.tasks.math import MATH
from llama_jax.eval.tasks.mbpp import MBPP
from llama_jax.eval.tasks.mmlu import MMLU
from llama_jax.eval.tasks.open_generation import BOLD, REAL_TOXICITY_PROMPTS, REAL_TOXICITY_PROMPTS_RESPECTFUL
from llama_jax.eval.tasks.open_qa import NQ_OPEN, TRIVIA_QA
from llama_jax.eval.tasks.openbookqa import OPENBOOKQA
from llama_jax.eval.tasks.perplexity import perplexity
from llama_jax.eval.tasks.piqa import PIQA
from llama_jax.eval.tasks.race import RACE_HIGH, RACE_MIDDLE
from llama_jax.eval.tasks.siqa import SIQA
from llama_jax.eval.tasks.truthful_qa import TRUTHFUL_QA, TRUTHFUL_QA_GEN
from llama_jax.eval.tasks.winogender import WINOGENDER
from llama_jax.eval.tasks.winogrande import WINOGRANDE

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        BOOLQ, PIQA, SIQA, HELLASWAG, WINOGRANDE, ARC_EASY, ARC_CHALLENGE, OPENBOOKQA, COMMONSENSE_QA, NQ_OPEN,
        TRIVIA_QA, RACE_MIDDLE, RACE_HIGH, LAMBADA, MMLU, MATH, GSM8K, GSM8K_COT, HUMAN_EVAL, MBPP, BBH, AGIEVAL,
        TRUTHFUL_QA, TRUTHFUL_QA_GEN, CROWS_PAIRS, WINOGENDER, REAL_TOXICITY_PROMPTS, REAL_TOXICITY_PROMPTS_RESPECTFUL,
        BOLD,
    )
}  # fmt: skip


def find_task(name: str) -> Task:
    """The task of a name: ours, lm-evaluation-harness's (also of one subject, such as mmlu_anatomy), 'perplexity:FILE'.

    Where a name is both (gsm8k, arc_easy, ...) it means the same.

    Raises:
      InputError: there is no such task; offers the nearest names.
    """
    if name.startswith('perplexity:'):
        return perplexity(name.removeprefix('perplexity:'))
    if name in TASKS:
        return TASKS[name]
    theirs = {lm_eval: task for task in TASKS.values() for lm_eval, _ in task.lm_eval.values()}
    if name in theirs:
        return theirs[name]
    subsets = {subset: task for task in TASKS.values() for subset in task.subsets}
    if name in subsets:
        return _subset(subsets[name], name)
    hint = did_you_mean(name, [*TASKS, *theirs, *subsets])
    if not hint.startswith('did'):  # then our own names are enough
        hint = f'there are {", ".join(TASKS)} and perplexity:FILE'
    raise InputError(f'unknown task {name!r}; {hint}')


def _subset(task: Task, name: str) -> Task:
    value = task.subsets[name]

    def load(data_dir: str) -> list[Document]:
        return [document for document in task.load(data_dir) if document['subset'] == value]

    return dataclasses.replace(task, name=name, load=load, subsets={})
