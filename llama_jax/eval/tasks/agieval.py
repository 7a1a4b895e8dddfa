"""AGIEval (Zhong et al. 2023): exams for people; choices by likelihood, two cloze sets by greedy generation.

`acc_english` is the Llama papers' English average: eight sets (no English of Gaokao, no cloze), weighted by their
questions, as recomputing the Llama 2 paper's Table 24 shows. lm-evaluation-harness's agieval is `acc`, without
examples; the papers' 3 to 5 examples are the publisher's.
"""

import ast
import re
from collections.abc import Sequence

from etils import epath

from llama_jax.errors import InputError, error_line
from llama_jax.eval.documents import MALFORMED, DocumentSource, read_rows
from llama_jax.eval.task import (
    Completion,
    Completions,
    Continuation,
    Document,
    FewShot,
    Graders,
    Likelihood,
    Request,
    Scores,
    Task,
    by_group,
    choice_scores,
    lm_eval_names,
    mean,
)  # fmt: skip
from llama_jax.grading.latex import equivalent, last_boxed, normalize

LLAMA_ENGLISH = (
    'aqua-rat', 'logiqa-en', 'lsat-ar', 'lsat-lr', 'lsat-rc', 'sat-en', 'sat-en-without-passage', 'sat-math',
)  # fmt: skip
_ENGLISH = (*LLAMA_ENGLISH, 'gaokao-english')
_CHINESE = (
    'gaokao-biology', 'gaokao-chemistry', 'gaokao-chinese', 'gaokao-geography', 'gaokao-history', 'gaokao-mathqa',
    'gaokao-physics', 'jec-qa-ca', 'jec-qa-kd', 'logiqa-zh',
)  # fmt: skip
_CLOZE = ('math', 'gaokao-mathcloze')
SUBSETS = (*_ENGLISH, *_CHINESE, *_CLOZE)


def _document(subset: str, row: Document) -> Document:
    """A question in AGIEval's zero-shot wording, with its choices and the indices of the right ones, or its answer."""
    passage, question, options = row.get('passage') or '', row['question'], row['options'] or []
    document = {'subset': subset}
    if subset in _CLOZE:
        wording = '{}Q: {}\nA: The answer is' if subset == 'math' else '{}问题：{}\n答案：'
        return document | {'query': wording.format(passage, question), 'answer': row['answer']}
    if len(options) == 1:  # some examples have all their options in one text
        options = [part.strip() for part in re.split(r'(?=[A-G]\.)', options[0]) if part.strip()]
    # Several letters may be right ('ACD', 'A B D', ['A', 'C']); one item of jec-qa-kd has none, and is never right.
    label = ''.join(row['label'])
    gold = [index for index, letter in enumerate('ABCDEFG'[: len(options)]) if letter in label]
    if not options or (label and not gold):
        raise ValueError(f'label {label!r} is none of its {len(options)} options')
    wording = (
        '{}Q: {} Answer Choices: {}\nA: Among A through {}, the answer is'
        if subset in _ENGLISH
        else '{}问题：{} 选项：{}\n答案：从A到{}, 我们应选择'
    )
    query = wording.format(passage, question, ' '.join(options), 'ABCDEFG'[len(options) - 1])
    return document | {'query': query, 'choices': options, 'gold': gold}


def _load(data_dir: str) -> list[Document]:
    return [document for subset in SUBSETS for document in _source(subset)(data_dir)]


def _source(subset: str) -> DocumentSource:
    return DocumentSource(
        'agieval',
        (f'{subset}.jsonl',),
        {'question': str, 'options': (list, type(None))},
        document=lambda row: _document(subset, row),
    )


def _examples(data_dir: str) -> list[Document]:
    """The publisher's few_shot_prompts.csv: a column a set, rows of Python literals and of explanations in turn."""
    path = epath.Path(data_dir) / 'agieval' / 'few_shot_prompts.csv'
    rows = [row for _, row in read_rows(path)]
    documents = []
    for subset in SUBSETS:
        column = 'sat-en' if subset == 'sat-en-without-passage' else subset
        for row in rows[::2]:
            if not row.get(column):
                continue
            try:
                example = ast.literal_eval(row[column])
                if subset == 'sat-en-without-passage':
                    example['passage'] = None
                documents.append(_document(subset, example))
            except (*MALFORMED, SyntaxError, MemoryError, RecursionError) as error:
                raise InputError(f'{path}: malformed example of {column}: {error_line(error)}') from error
    return documents


def _example(document: Document) -> str:
    answer = document['choices'][document['gold'][0]] if 'gold' in document else document['answer']
    return f'{document["query"]} {answer}'


def _ask(document: Document, prefix: str) -> list[Request]:
    if document['subset'] in _CLOZE:
        return [Completion(prefix + document['query'], stop=('Q:',), max_new_tokens=32)]
    return [Continuation(prefix + document['query'], f' {choice}') for choice in document['choices']]


def cloze_answer(text: str) -> str:
    """The answer in a completion: boxed, else between dollar signs, else after the last '=', else the last number."""
    if (boxed := last_boxed(text)) is not None:
        return boxed.split('=')[-1].strip()
    if dollars := re.findall(r'\$(.*)\$', text):
        return dollars[-1].split('=')[-1].strip()
    if '=' in text:
        return text.split('=')[-1].strip().rstrip('.').split('\n')[0]
    numbers = re.findall(r'\$?\d+(?:\.\d+)?(?!\w)', text)
    return numbers[-1] if numbers else text.strip().split('\n')[0]


def _grade(document: Document, results: Sequence[Likelihood | Completions], graders: Graders) -> Scores:
    if document['subset'] in _CLOZE:
        text = results[0].texts[0]  # pyright: ignore[reportAttributeAccessIssue]
        answer, gold = cloze_answer(text), cloze_answer(document['answer'])
        right = answer == gold or equivalent(normalize(answer), normalize(gold))
        return {'acc': float(right), 'extracted': answer}
    likelihoods = [result for result in results if isinstance(result, Likelihood)]
    return choice_scores(document['choices'], likelihoods, tuple(document['gold']), ('acc', 'acc_norm'))


def _aggregate(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    by_subset = by_group(documents, scores, lambda d: d['subset'])
    metrics = {}
    for metric, names in {
        'acc': SUBSETS,
        'acc_english': LLAMA_ENGLISH,
        'acc_en': (*_ENGLISH, 'math'),
        'acc_cn': (*_CHINESE, 'gaokao-mathcloze'),
    }.items():
        if part := [score for name in names for score in by_subset.get(name, ())]:
            metrics[metric] = mean([], part)['acc']
    return metrics | {f'acc/{name}': mean([], part)['acc'] for name, part in by_subset.items()}


AGIEVAL = Task(
    name='agieval',
    load=_load,
    ask=_ask,
    grader=_grade,
    answer=lambda d: tuple(d['gold']) if 'gold' in d else f' ${cloze_answer(d["answer"])}$',
    metrics=('acc', 'acc_english', 'acc_en', 'acc_cn'),
    few_shot=FewShot(_example, _examples, sampler='first', group=lambda d: d['subset']),
    num_fewshot=3,
    aggregate=_aggregate,
    lm_eval=lm_eval_names('agieval', 'acc')
    | {'acc_en': ('agieval_en', 'acc,none'), 'acc_cn': ('agieval_cn', 'acc,none')},
    subsets={f'agieval_{subset.replace("-", "_")}': subset for subset in SUBSETS},
)
