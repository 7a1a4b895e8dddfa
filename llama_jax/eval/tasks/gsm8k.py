"""GSM8K (Cobbe et al. 2021): grade school mathematics, the number at the end of a worked solution.

`gsm8k` shows solved training questions (lm-evaluation-harness's task, 5 of them); `gsm8k_cot` the eight chains of
thought of Wei et al. 2022, the 8-shot prompt of the Llama papers. With several samples a question, maj1@k is their
majority vote (the LLaMA paper has k = 100).
"""

import re
from collections.abc import Sequence

from llama_jax.eval.documents import DocumentSource, Online
from llama_jax.eval.task import Completion, Completions, Document, FewShot, Graders, Request, Scores, Task
from llama_jax.grading.sampling_metrics import exact_match_scores

INVALID = '[invalid]'
_FLEXIBLE = re.compile(r'(-?[$0-9.,]{2,})|(-?[0-9]+)')


def strict_answer(text: str, pattern: str) -> str:
    """The first number that stands where the format asks for it, or INVALID."""
    match = re.search(pattern, text)
    return match.group(1).strip() if match else INVALID


def flexible_answer(text: str) -> str:
    """The last number of the text, or INVALID."""
    numbers = _FLEXIBLE.findall(text)
    return next((part for part in numbers[-1] if part), INVALID).strip() if numbers else INVALID


def plain_number(text: str) -> str:
    """As compared: without what precedes '#### ', commas, dollar signs and a final dot."""
    text = re.sub(r'(?s).*#### ', '', text.replace(',', '').replace('$', ''))
    return re.sub(r'\.$', '', text).lower()


def _source(split: str, optional: bool = False) -> DocumentSource:
    return DocumentSource(
        'gsm8k',
        (f'{split}.jsonl',),
        {'question': str, 'answer': str},
        check=lambda d: d['answer'].split('####')[1],
        huggingface=Online('openai/gsm8k', split, ('main',)),
        tfds=Online('gsm8k', split),
        optional=optional,
    )


def _task(name: str, question: str, pattern: str, stop: str, few_shot: FewShot, **kwargs) -> Task:
    def ask(document: Document, prefix: str) -> list[Request]:
        prompt = prefix + question.format(document['question'])
        return [Completion(prompt, stop=(stop, '</s>', '<|im_end|>'))]

    def grade(document: Document, results: Sequence[Completions], graders: Graders) -> Scores:
        texts, gold = results[0].texts, plain_number(document['answer'])
        scores: Scores = {}
        for suffix, extract in (
            ('', lambda text: strict_answer(text, pattern)),
            ('_flexible', flexible_answer),
        ):
            answers = [plain_number(extract(text)) for text in texts]
            scores |= exact_match_scores(answers, lambda answer: answer == gold, INVALID, suffix)
        return scores

    return Task(
        name=name,
        load=_source('test'),
        ask=ask,
        grader=grade,
        answer=lambda d: f' {d["answer"]} {SAYS[name].format(plain_number(d["answer"]))}',
        metrics=('exact_match', 'exact_match_flexible'),
        few_shot=few_shot,
        lm_eval={
            'exact_match': (name, 'exact_match,strict-match'),
            'exact_match_flexible': (name, 'exact_match,flexible-extract'),
        },
        **kwargs,
    )


# How a completion that follows the examples ends, besides the official solution's own '#### N'.
SAYS = {'gsm8k': '', 'gsm8k_cot': 'The answer is {}.'}

# Wei et al. 2022 (arXiv:2201.11903), Table 20.
_CHAINS_OF_THOUGHT = (
    (
        'There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they '
        'are done, there will be 21 trees. How many trees did the grove workers plant today?',
        'There are 15 trees originally. Then there were 21 trees after some more were planted. So there '
        'must have been 21 - 15 = 6. The answer is 6.',
    ),
    (
        'If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking '
        'lot?',
        'There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.',
    ),
    (
        'Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left '
        'in total?',
        'Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After '
        'eating 35, they had 74 - 35 = 39. The answer is 39.',
    ),
    (
        'Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many '
        'lollipops did Jason give to Denny?',
        'Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 '
        '- 12 = 8. The answer is 8.',
    ),
    (
        'Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys '
        'does he have now?',
        'Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys.'
        ' 5 + 4 = 9. The answer is 9.',
    ),
    (
        'There were nine computers in the server room. Five more computers were installed each day, from '
        'monday to thursday. How many computers are now in the server room?',
        'There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = '
        '20 computers were added. 9 + 20 is 29. The answer is 29.',
    ),
    (
        'Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How '
        'many golf balls did he have at the end of wednesday?',
        'Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After '
        'losing 2 more, he had 35 - 2 = 33 golf balls. The answer is 33.',
    ),
    (
        'Olivia has $23. She bought five bagels for $3 each. How much money does she have left?',
        'Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - '
        '15 dollars left. 23 - 15 is 8. The answer is 8.',
    ),
)

GSM8K = _task(
    'gsm8k',
    'Question: {}\nAnswer:',
    r'#### (\-?[0-9\.\,]+)',
    'Question:',
    FewShot(lambda d: f'Question: {d["question"]}\nAnswer: {d["answer"]}', _source('train', optional=True)),
    num_fewshot=5,
)
GSM8K_COT = _task(
    'gsm8k_cot',
    'Q: {}\nA:',
    r'The answer is (\-?[0-9\.\,]+).',
    'Q:',
    FewShot(
        lambda d: f'Q: {d["question"]}\nA: {d["answer"]}',
        lambda data_dir: [{'question': q, 'answer': a} for q, a in _CHAINS_OF_THOUGHT],
        sampler='first',
    ),
    num_fewshot=8,
)
