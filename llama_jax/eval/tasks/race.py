"""RACE (Lai et al. 2017): reading comprehension from English exams, middle and high school.

A question comes after its article and the article's earlier questions with their answers, as in GPT-3's set-up, which
the LLaMA paper follows. lm-evaluation-harness asks only the last question of each article: that is `acc_last`.
"""

import dataclasses

from etils import epath

from llama_jax.errors import InputError
from llama_jax.eval.documents import DocumentSource, Online, is_online, read_text
from llama_jax.eval.task import (
    Document,
    FewShot,
    Graders,
    Likelihood,
    Scores,
    Task,
    choice_scores,
    multiple_choice,
)  # fmt: skip
from llama_jax.json_file import parse_json

_FIELDS = {'article': str, 'questions': list, 'options': list, 'answers': list}
_BLANK = '  _  .'  # a question that is a sentence with its end left out


def _articles_to_documents(row: Document) -> list[Document]:
    asked = list(zip(row['questions'], row['options'], row['answers'], strict=True))
    problems = [{'question': q, 'options': o, 'answer': 'ABCD'.index(a)} for q, o, a in asked]
    for problem in problems:
        problem['options'][problem['answer']]
    return [
        {'article': row['article'], 'problems': problems[: index + 1], 'last': index == len(problems) - 1}
        for index in range(len(problems))
    ]


@dataclasses.dataclass(frozen=True)
class _Articles:
    """Reads RACE's layout: one JSON file an article in race/SPLIT/LEVEL/."""

    level: str
    split: str
    optional: bool = False

    def __call__(self, data_dir: str) -> list[Document]:
        if is_online(data_dir):
            rows = _online(self.level, self.split)(data_dir)
        else:
            folder = epath.Path(data_dir) / 'race' / self.split / self.level
            files = sorted(folder.glob('*.txt')) if folder.is_dir() else []
            if not files and self.optional:
                return []
            if not files:
                raise InputError(
                    f'no items of race in {data_dir}; expected race/{self.split}/{self.level}/*.txt'
                )
            rows = [_one_article(path) for path in files]
        return [document for row in rows for document in _articles_to_documents(row)]


def _one_article(path: epath.Path) -> Document:
    source = DocumentSource('race', (), _FIELDS, check=_articles_to_documents)
    return source.checked(str(path), parse_json(read_text(path), str(path)))


def _online(level: str, split: str) -> DocumentSource:
    return DocumentSource(
        'race', (), _FIELDS, check=_articles_to_documents, tfds=Online('race', split, (level,))
    )


def _question(document: Document) -> str:
    *earlier, last = document['problems']
    text = f'Article: {document["article"]}\n\n'
    for problem in earlier:
        question, answer = problem['question'], problem['options'][problem['answer']]
        if question.endswith(_BLANK):
            text += f'{question[:-5]}{answer}\n'
        else:
            text += f'Question: {question}\nAnswer: {answer}\n'
    return text + last['question']


def _choices(document: Document) -> list[str]:
    return document['problems'][-1]['options']


def _gold(document: Document) -> int:
    return document['problems'][-1]['answer']


def _grade(document: Document, results: list[Likelihood], graders: Graders) -> Scores:
    scores = choice_scores(_choices(document), results, (_gold(document),), ('acc_norm', 'acc', 'acc_bytes'))
    return scores | ({'acc_last': scores['acc']} if document['last'] else {})


def _task(name: str, level: str) -> Task:
    task = multiple_choice(
        name,
        _Articles(level, 'test'),
        question=_question,
        choices=_choices,
        gold=_gold,
        few_shot=FewShot(
            lambda d: f'{_question(d)} {_choices(d)[_gold(d)]}', _Articles(level, 'train', optional=True)
        ),
        metrics=('acc_norm', 'acc', 'acc_bytes', 'acc_last'),
        # lm-evaluation-harness has the high school half alone.
        lm_eval={'acc_last': ('race', 'acc,none')} if level == 'high' else {},
    )
    return dataclasses.replace(task, grader=_grade)


RACE_MIDDLE = _task('race_middle', 'middle')
RACE_HIGH = _task('race_high', 'high')
