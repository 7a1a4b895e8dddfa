"""NaturalQuestions and TriviaQA without their documents: short answers from memory, greedy, exact match.

`exact_match` is lm-evaluation-harness's: the text before the first line break, dot or comma. `em_paper` is the LLaMA
paper's (section 3.2): the first line without its final dot or comma, lower case, no articles, no punctuation, single
spaces, equal to any reference.
"""

import re
import string
from collections.abc import Callable, Sequence

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Completion, Completions, Document, FewShot, Graders, Request, Scores, Task

_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without articles, punctuation and duplicate spaces, as SQuAD's scorer and the LLaMA paper do."""
    text = re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(_NO_PUNCTUATION))
    return ' '.join(text.split())


def first_line(text: str) -> str:
    """The answer in a completion: up to its first line break, without final dots and commas."""
    return text.strip().split('\n')[0].rstrip(' .,')


def _task(
    name: str,
    lm_eval: str,
    *,
    question: str,
    answers: Callable[[Document], list[str]],
    fields: dict[str, type],
    huggingface: tuple[str, str],
    tfds: str,
    files: tuple[str, ...],
    description: str = '',
    delimiter: str = '\n\n',
    ignore: str = '',
) -> Task:
    def source(files: tuple[str, ...], split: str, optional: bool = False) -> DocumentSource:
        dataset, config = huggingface
        return DocumentSource(
            name,
            files,
            fields,
            check=lambda d: answers(d)[0],
            huggingface=Online(dataset, split, (config,)),
            tfds=Online(tfds, split),
            optional=optional,
        )

    def ask(document: Document, prefix: str) -> list[Request]:
        text = prefix + question.format(document['question'])
        return [Completion(text, stop=('\n',), max_new_tokens=64)]

    def plain(text: str) -> str:
        """What lm-evaluation-harness compares, given this task's pattern to ignore."""
        return (re.sub(ignore, '', text) if ignore else text).lower().translate(_NO_PUNCTUATION)

    def grade(document: Document, results: Sequence[Completions], graders: Graders) -> Scores:
        text = results[0].texts[0]
        short, line = re.split(r'[\n.,]', text)[0].strip(), first_line(text)
        references = answers(document)
        return {
            'exact_match': float(plain(short) in {plain(reference) for reference in references}),
            'em_paper': float(normalize(line) in {normalize(reference) for reference in references}),
            'extracted': line,
        }

    return Task(
        name=name,
        load=source(files, 'validation'),
        ask=ask,
        grader=grade,
        answer=lambda d: ' ' + answers(d)[0],
        metrics=('em_paper', 'exact_match'),
        few_shot=FewShot(
            lambda d: f'{question.format(d["question"])} {answers(d)[0]}',
            source(('train.jsonl',), 'train', optional=True),
            delimiter=delimiter,
            spare=True,
        ),
        num_fewshot=5,
        description=lambda d: description,
        lm_eval={'exact_match': (lm_eval, 'exact_match,remove_whitespace')},
    )


NQ_OPEN = _task(
    'nq_open',
    'nq_open',
    question='Q: {}?\nA:',
    answers=lambda d: d['answer'],
    fields={'question': str, 'answer': list},
    huggingface=('google-research-datasets/nq_open', ''),
    tfds='natural_questions_open',
    files=('validation.jsonl',),
    description='Answer these questions:\n\n',
    delimiter='\n',
    ignore=r'\b(?:The |the |An |A |a |an )',
)
TRIVIA_QA = _task(
    'trivia_qa',
    'triviaqa',
    question='Question: {}?\nAnswer:',
    answers=lambda d: d['answer']['aliases'] or [d['answer']['value']],
    fields={'question': str, 'answer': dict},
    huggingface=('mandarjoshi/trivia_qa', 'rc.nocontext'),
    tfds='trivia_qa/rc.nocontext',
    files=('validation.jsonl', 'sample.jsonl'),
)
