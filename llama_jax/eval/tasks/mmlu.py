"""MMLU (Hendrycks et al. 2021): 57 subjects, the letter of the choice after 5 examples of the subject.

The LLaMA and Llama 2 papers report the mean over questions (`acc`), Llama 3 the mean over subjects (`acc_macro`).
Groups are Hendrycks's, with anatomy under Other, as in the papers' group rows; lm-evaluation-harness has it in STEM.
"""

from collections.abc import Sequence

from etils import epath

from llama_jax.errors import InputError
from llama_jax.eval.documents import DocumentSource, Online, is_online, read_csv_lines
from llama_jax.eval.task import Document, FewShot, Scores, by_group, lm_eval_names, mean, multiple_choice

_GROUPS = {
    'stem': 'abstract_algebra astronomy college_biology college_chemistry college_computer_science '
    'college_mathematics college_physics computer_security conceptual_physics electrical_engineering '
    'elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science '
    'high_school_mathematics high_school_physics high_school_statistics machine_learning',
    'humanities': 'formal_logic high_school_european_history high_school_us_history high_school_world_history '
    'international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory '
    'professional_law world_religions',
    'social_sciences': 'econometrics high_school_geography high_school_government_and_politics '
    'high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality '
    'professional_psychology public_relations security_studies sociology us_foreign_policy',
    'other': 'anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management '
    'marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology',
}
GROUP_OF = {subject: group for group, subjects in _GROUPS.items() for subject in subjects.split()}
SUBJECTS = tuple(sorted(GROUP_OF))


def _from_hub(row: Document, config: str) -> Document:
    return _document(config, row['question'], row['choices'], 'ABCD'[row['answer']])


def _document(subject: str, question: str, choices: Sequence[str], answer: str) -> Document:
    return {'subset': subject, 'question': question, 'choices': list(choices), 'answer': 'ABCD'.index(answer)}


def _load(split: str, data_dir: str) -> list[Document]:
    if is_online(data_dir):
        return DocumentSource('mmlu', (), {}, huggingface=Online('cais/mmlu', split, SUBJECTS, _from_hub))(
            data_dir
        )
    documents = []
    for subject in SUBJECTS:
        path = epath.Path(data_dir) / 'mmlu' / split / f'{subject}_{split}.csv'
        if not path.exists():
            raise InputError(
                f'no {path.name} of mmlu; expected {path}: question, A, B, C, D, answer in each line, no header'
            )
        for place, row in read_csv_lines(path):
            if len(row) != 6 or row[5] not in ('A', 'B', 'C', 'D'):
                raise InputError(
                    f'{place}: malformed item {str(row)[:60]}; it has question, A, B, C, D, answer (A-D)'
                )
            documents.append(_document(subject, row[0], row[1:5], row[5]))
    return documents


def _question(document: Document) -> str:
    lines = '\n'.join(f'{letter}. {text}' for letter, text in zip('ABCD', document['choices'], strict=True))
    return f'{document["question"].strip()}\n{lines}\nAnswer:'


def _description(document: Document) -> str:
    subject = document['subset'].replace('_', ' ')
    return f'The following are multiple choice questions (with answers) about {subject}.\n\n'


def averages(subjects: dict[str, float], sizes: dict[str, int]) -> dict[str, float]:
    """The published averages from each subject's accuracy.

    Args:
      subjects: accuracy of each subject.
      sizes: its number of questions.

    Returns:
      acc (over questions), acc_macro (over subjects), acc_GROUP (over the group's questions), acc/SUBJECT.
    """

    def weighted(names: list[str]) -> float:
        return sum(subjects[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)

    metrics = {'acc': weighted(list(subjects)), 'acc_macro': sum(subjects.values()) / len(subjects)}
    for group in _GROUPS:
        if names := [subject for subject in subjects if GROUP_OF.get(subject) == group]:
            metrics[f'acc_{group}'] = weighted(names)
    return metrics | {f'acc/{subject}': value for subject, value in subjects.items()}


def _aggregate(documents: Sequence[Document], scores: Sequence[Scores]) -> dict[str, float]:
    subjects = by_group(documents, scores, lambda d: d['subset'])
    sizes = {subject: len(part) for subject, part in subjects.items()}
    return averages({subject: mean([], part)['acc'] for subject, part in subjects.items()}, sizes)


MMLU = multiple_choice(
    'mmlu',
    lambda data_dir: _load('test', data_dir),
    question=_question,
    choices=lambda d: ('A', 'B', 'C', 'D'),
    gold=lambda d: d['answer'],
    few_shot=FewShot(
        lambda d: f'{_question(d)} {"ABCD"[d["answer"]]}',
        lambda data_dir: _load('dev', data_dir),
        sampler='first',
        group=lambda d: d['subset'],
    ),
    metrics=('acc',),
    num_fewshot=5,
    description=_description,
    aggregate=_aggregate,
    lm_eval=lm_eval_names('mmlu', 'acc'),
    subsets={f'mmlu_{subject}': subject for subject in SUBJECTS},
)
