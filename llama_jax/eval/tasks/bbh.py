"""BIG-Bench Hard (Suzgun et al. 2022): 27 tasks (23 kinds), each after its authors' three chains of thought."""

import functools
import re
from collections.abc import Sequence

from etils import epath

from llama_jax.errors import InputError
from llama_jax.eval.documents import DocumentSource, Online, is_online, read_text
from llama_jax.eval.task import (
    Completion,
    Completions,
    Document,
    FewShot,
    Graders,
    Request,
    Scores,
    Task,
    by_group,
    mean,
)
from llama_jax.json_file import parse_json

SUBSETS = (
    'boolean_expressions', 'causal_judgement', 'date_understanding', 'disambiguation_qa', 'dyck_languages',
    'formal_fallacies', 'geometric_shapes', 'hyperbaton', 'logical_deduction_five_objects',
    'logical_deduction_seven_objects', 'logical_deduction_three_objects', 'movie_recommendation',
    'multistep_arithmetic_two', 'navigate', 'object_counting', 'penguins_in_a_table',
    'reasoning_about_colored_objects', 'ruin_names', 'salient_translation_error_detection', 'snarks',
    'sports_understanding', 'temporal_sequences', 'tracking_shuffled_objects_five_objects',
    'tracking_shuffled_objects_seven_objects', 'tracking_shuffled_objects_three_objects', 'web_of_lies', 'word_sorting',
)  # fmt: skip
INVALID = '[invalid]'
_STEPS = "\nA: Let's think step by step.\n"
_FIELDS = {'input': str, 'target': str}


def _load(data_dir: str) -> list[Document]:
    if is_online(data_dir):
        online = Online('lukaemon/bbh', 'test', SUBSETS, lambda row, config: row | {'subset': config})
        return DocumentSource('bbh', (), _FIELDS, huggingface=online)(data_dir)
    check, documents = DocumentSource('bbh', (), _FIELDS), []
    for subset in SUBSETS:
        path = epath.Path(data_dir) / 'bbh' / 'bbh' / f'{subset}.json'
        content = parse_json(read_text(path), str(path)) if path.exists() else {}
        rows = content.get('examples') if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise InputError(
                f'no items of bbh in {path}; expected {{"examples": [{{"input", "target"}}]}} there'
            )
        for index, row in enumerate(rows):
            documents.append(check.checked(f'{path}: item {index}', row) | {'subset': subset})
    return documents


@functools.cache
def _cot_prompt(data_dir: str, subset: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Instruction and solved examples of a prompt file: a canary line, '-----', the instruction, 'Q: ... A: ...'."""
    path = epath.Path(data_dir) / 'bbh' / 'cot-prompts' / f'{subset}.txt'
    text = read_text(path) if path.exists() else ''
    instruction, *examples = re.split(r'\n\nQ: ', text.partition('-----\n')[2])
    pairs = [
        tuple(re.split(r"\nA: Let's think step by step\.[\n ]", example, maxsplit=1)) for example in examples
    ]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"no chains of thought of bbh in {path}; expected the publisher's cot-prompts/{subset}.txt"
        )
    return instruction, tuple((question, answer) for question, answer in pairs)


def _examples(data_dir: str) -> list[Document]:
    """The chains of thought; read from the data directory also where the items come from elsewhere."""
    documents = []
    for subset in SUBSETS:
        instruction, pairs = _cot_prompt(data_dir, subset)
        for question, answer in pairs:
            documents.append(
                {'input': question, 'target': answer, 'subset': subset, 'instruction': instruction}
            )
    return documents


def extracted(text: str) -> str:
    """What follows the first 'the answer is ' on its line, without the last character, or INVALID."""
    match = re.search(r'(?<=the answer is )(.*)(?=.)', text)
    return match.group(1).strip() if match else INVALID


def _example(document: Document) -> str:
    return f'Q: {document["input"]}{_STEPS}{document["target"]}'


def _ask(document: Document, prefix: str) -> list[Request]:
    prompt = f'{prefix}Q: {document["input"]}{_STEPS}'
    return [Completion(prompt, stop=('</s>', 'Q', '\n\n'), max_new_tokens=1024)]


def _grade(document: Document, results: Sequence[Completions], graders: Graders) -> Scores:
    answer = extracted(results[0].texts[0])
    return {'exact_match': float(answer == document['target']), 'extracted': answer}


def _aggregate(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    by_subset = by_group(documents, scores, lambda d: d['subset'])
    parts = {subset: mean([], part)['exact_match'] for subset, part in by_subset.items()}
    return {
        **mean(documents, scores),
        'exact_match_macro': sum(parts.values()) / len(parts),
        **{f'exact_match/{subset}': value for subset, value in parts.items()},
    }


BBH = Task(
    name='bbh',
    load=_load,
    ask=_ask,
    grader=_grade,
    answer=lambda d: f'So the answer is {d["target"]}.',
    metrics=('exact_match', 'exact_match_macro'),
    few_shot=FewShot(
        _example,
        _examples,
        sampler='first',
        group=lambda d: d['subset'],
        description=lambda examples: f'{examples[0]["instruction"]}\n\n',
    ),
    num_fewshot=3,
    aggregate=_aggregate,
    lm_eval={'exact_match': ('bbh_cot_fewshot', 'exact_match,get-answer')},
    subsets={f'bbh_cot_fewshot_{subset}': subset for subset in SUBSETS},
)
