"""Scorers against models whose score is known: the oracle, the liar, the guesser, the one that likes it short."""

import json
import math
import random
from collections import defaultdict
from pathlib import Path

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.task import Completions, Continuation, Graders, Likelihood
from llama_jax.eval.tasks import TASKS, find_task

CHOICE_TASKS = (
    'boolq', 'piqa', 'siqa', 'hellaswag', 'winogrande', 'arc_easy', 'arc_challenge', 'openbookqa', 'mmlu', 'agieval',
    'truthful_qa', 'crows_pairs', 'winogender', 'lambada',
)  # fmt: skip
TEXT_TASKS = ('nq_open', 'trivia_qa', 'gsm8k', 'gsm8k_cot', 'math', 'bbh', 'truthful_qa_gen')
FIRST = {'truthful_qa': 'mc1', 'crows_pairs': 'pct_stereotype'}


@pytest.fixture(scope='module')
def load(shared_data):
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = find_task(name).documents(str(shared_data / 'eval'))
        return loaded[name]

    return load


def _choice_documents(task, documents):
    """Documents whose answer can be both right and wrong: a few of AGIEval have all choices right, one has none."""
    stride = max(len(documents) // 500, 1)  # 500 to 1,000 documents of a benchmark say it all
    for document in documents[::stride]:
        requests = task.requests(document)
        if not all(isinstance(request, Continuation) for request in requests):
            continue
        right = set(task.answer(document))
        if right and (len(right) < len(requests) or task.name == 'lambada'):
            yield document, requests, right


def _evaluate(task, documents, answer):
    """Metrics of a model: `answer(index, right, request)` -> (log-probability, is greedy)."""
    used, scores = [], []
    for document, requests, right in _choice_documents(task, documents):
        results = [
            Likelihood(*answer(index, index in right, request)) for index, request in enumerate(requests)
        ]
        used.append(document)
        scores.append(task.grade(document, results))
    return used, task.aggregate(used, scores)


@pytest.mark.parametrize('name', CHOICE_TASKS)
def test_oracle_scores_all_and_liar_none(load, name):
    task = TASKS[name]

    def oracle(index, right, request):
        if request.context == 'Answer:':
            return -500.0, False
        return (0.0, True) if right else (-1000.0, False)

    def liar(index, right, request):
        if request.context == 'Answer:':
            return -500.0, False
        return (-1000.0, False) if right else (0.0, True)

    for model, expected in ((oracle, 1.0), (liar, 0.0)):
        used, metrics = _evaluate(task, load(name), model)
        assert len(used) > 300
        shares = {m: v for m, v in metrics.items() if m.startswith(('acc', 'mc', 'pct'))}
        assert set(task.metrics) - {'perplexity', 'likelihood_diff'} <= set(shares)
        assert shares == pytest.approx(dict.fromkeys(shares, expected), abs=1e-12), name


@pytest.mark.parametrize('name', CHOICE_TASKS)
def test_guesser_scores_chance(load, name):
    """Within 4 standard deviations: once in 16,000 runs by chance, and the seed is fixed."""
    task, rng = TASKS[name], random.Random(0)
    used, metrics = _evaluate(
        task, load(name), lambda index, right, request: (-10 * rng.random(), rng.random() < 0.25)
    )
    chances = []
    for document, requests, right in _choice_documents(task, load(name)):
        count = sum(request.context != 'Answer:' for request in requests)
        if name == 'truthful_qa':
            count, right = len(document['mc1_targets']), {0}
        chances.append(0.25 if name == 'lambada' else len(right) / count)
    expected = sum(chances) / len(used)
    sigma = math.sqrt(sum(chance * (1 - chance) for chance in chances)) / len(used)
    assert abs(metrics[FIRST.get(name, 'acc')] - expected) < 4 * sigma


@pytest.mark.parametrize('name', CHOICE_TASKS)
def test_uniform_model_takes_the_shortest(load, name):
    """Every character equally likely: the shortest choice wins, the first of several; counted here on its own."""
    task = TASKS[name]
    used, metrics = _evaluate(
        task, load(name), lambda index, right, request: (-float(len(request.continuation)), False)
    )
    wins = 0
    for document, requests, right in _choice_documents(task, load(name)):
        lengths = [len(request.continuation) for request in requests if request.context != 'Answer:']
        if name == 'truthful_qa':
            lengths = lengths[: len(document['mc1_targets'])]
        shortest = min(range(len(lengths)), key=lengths.__getitem__)
        if name == 'crows_pairs':
            wins += lengths[0] < lengths[1]  # a tie is no preference for the stereotype
        elif name != 'lambada':  # a single continuation, which this model never finds the likeliest
            wins += shortest in right
    assert metrics[FIRST.get(name, 'acc')] == pytest.approx(wins / len(used), abs=1e-12)


# From the publishers' rows themselves: (file, choices, index of the right one).
RAW = {
    'piqa': ('validation', lambda r: [r['sol1'], r['sol2']], lambda r: r['label']),
    'siqa': ('validation', lambda r: [r[f'answer{x}'] for x in 'ABC'], lambda r: int(r['label']) - 1),
    'hellaswag': ('validation', lambda r: r['endings'], lambda r: r['label']),
    'arc_easy': ('test', lambda r: r['choices']['text'], lambda r: r['choices']['label'].index(r['answerKey'])),
    'arc_challenge': ('test', lambda r: r['choices']['text'], lambda r: r['choices']['label'].index(r['answerKey'])),
    'openbookqa': (
        'validation', lambda r: r['choices']['text'], lambda r: r['choices']['label'].index(r['answerKey']),
    ),
    'boolq': ('validation', lambda r: ['no', 'yes'], lambda r: int(r['answer'])),
}  # fmt: skip


@pytest.mark.parametrize('name', RAW)
def test_uniform_model_from_the_files_alone(load, shared_data, name):
    split, choices, gold = RAW[name]
    text = (shared_data / 'eval' / name / f'{split}.jsonl').read_text('utf-8')
    rows = [json.loads(line) for line in text.splitlines()]
    rows = rows[:: max(len(rows) // 500, 1)]
    wins = [gold(row) == min(range(len(choices(row))), key=lambda i: len(choices(row)[i])) for row in rows]
    _, metrics = _evaluate(
        TASKS[name], load(name), lambda index, right, request: (-float(len(request.continuation)), False)
    )
    assert metrics['acc'] == pytest.approx(sum(wins) / len(rows), abs=1e-12)


@pytest.mark.parametrize('name', TEXT_TASKS)
def test_right_texts_score_and_wrong_ones_do_not(load, name):
    """The answers of the documents themselves; then those of their neighbours, where these are others."""
    task, documents = TASKS[name], load(name)
    documents = documents[:: max(len(documents) // 500, 1)]
    texts = [task.answer(document) for document in documents]
    scores = [task.grade(d, [Completions((text,))]) for d, text in zip(documents, texts, strict=True)]
    metrics = task.aggregate(documents, scores)
    strict = {
        'nq_open': 0.85,
        'trivia_qa': 0.85,
        'math': 0.995,
        'truthful_qa_gen': 0.97,
    }  # see the comments below
    for metric in task.metrics:
        # An answer with a dot or comma in it is cut by lm-evaluation-harness's rule, so it cannot be right there; an
        # answer of MATH over two lines is not found; TruthfulQA has true references that are nearer to false ones.
        least = strict.get(name, 1.0) if metric not in ('em_paper', 'exact_match_boxed') else 1.0
        assert metrics[metric] >= least, metric
    # Answers of different questions coincide now and then.
    others = [texts[index - len(texts) // 2] for index in range(len(texts))]
    if name == 'truthful_qa_gen':
        others = [document['wrong'][0] for document in documents]
    wrong = [
        task.grade(d, [Completions((other,))])
        for d, other, text in zip(documents, others, texts, strict=True)
        if other != text
    ]
    assert len(wrong) > 0.75 * len(documents)
    assert task.aggregate(documents[: len(wrong)], wrong)[task.metrics[0]] < 0.05
    empty = [task.grade(document, [Completions(('',))]) for document in documents[:50]]
    assert task.aggregate(documents[:50], empty)[task.metrics[0]] == 0.0


def test_names_of_lm_eval_are_accepted():
    assert find_task('social_iqa') is TASKS['siqa'] and find_task('minerva_math') is TASKS['math']
    assert TASKS['hellaswag'].lm_eval['acc_norm'] == ('hellaswag', 'acc_norm,none')
    assert {name for name, task in TASKS.items() if task.name != name} == set()


FILES = {
    'race_middle': 'race/SPLIT/middle/*.txt', 'race_high': 'race/SPLIT/high/*.txt',
    'mmlu': 'mmlu/SPLIT/SUBJECT_SPLIT.csv', 'mbpp': 'mbpp/mbpp.jsonl', 'bbh': 'bbh/bbh/KIND.json, bbh/cot-prompts',
    'agieval': 'agieval/SET.jsonl', 'bold': 'bold/DOMAIN_prompt.json',
    'winogender': 'winogender/all_sentences.tsv, occupations-stats.tsv',
}  # fmt: skip


def table_line(task):
    """A task's line in docs/evaluation.md."""
    files = FILES.get(task.name) or f'{task.load.folder}/{" or ".join(task.load.files)}'
    theirs = defaultdict(list)
    for metric, (owner, key) in task.lm_eval.items():
        theirs[owner].append(metric if key == f'{metric},none' else f'{metric} = {key}')
    named = '; '.join(f'`{owner}`: {" / ".join(keys)}' for owner, keys in theirs.items())
    return f'| `{task.name}` | {files} | {task.num_fewshot} | {", ".join(task.metrics)} | {named} |'


def test_the_page_has_the_table_of_names():
    page = (Path(__file__).parents[2] / 'docs/evaluation.md').read_text().splitlines()
    lines = [table_line(task) for task in TASKS.values()]
    assert [
        line for line in page if line.split('`')[1:2] and line.split('`')[1] in TASKS and line[0] == '|'
    ] == lines


def test_a_subject_alone(shared_data):
    documents = find_task('mmlu_anatomy').documents(str(shared_data / 'eval'))
    assert len(documents) == 135 and {document['subset'] for document in documents} == {'anatomy'}


@pytest.mark.parametrize(
    ('name', 'offers'),
    [('hellaswg', 'hellaswag'), ('arc_chalenge', 'arc_challenge'), ('???', 'there are boolq')],
)
def test_unknown_task_offers_the_nearest(name, offers):
    with pytest.raises(InputError, match=offers):
        find_task(name)


@pytest.mark.parametrize('name', TASKS)
def test_missing_data_says_what_is_expected(tmp_path, name):
    with pytest.raises(InputError, match='expected .*') as error:
        TASKS[name].documents(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


def test_code_tasks_ask_for_permission_first():
    with pytest.raises(InputError, match='executes generated code, which is off'):
        TASKS['human_eval'].check(Graders())
    TASKS['human_eval'].check(Graders(run_code=lambda program: 'passed'))


def test_documents_and_requests_are_plain(load):
    """A log of JSON lines holds any document; equal requests are found by hashing."""
    for name in (*CHOICE_TASKS, *TEXT_TASKS):
        document = load(name)[0]
        assert json.loads(json.dumps(document)) == document
        assert len({*TASKS[name].requests(document)}) >= 1
