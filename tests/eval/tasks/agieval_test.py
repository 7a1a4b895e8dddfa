"""AGIEval's published English average, from the paper's own columns."""

from collections import Counter

import pytest

from llama_jax.eval.published import PUBLISHED
from llama_jax.eval.tasks.agieval import AGIEVAL, LLAMA_ENGLISH


def test_english_average_is_weighted_by_questions(shared_data):
    sizes = Counter(document['subset'] for document in AGIEVAL.documents(str(shared_data / 'eval')))
    total = sum(sizes[name] for name in LLAMA_ENGLISH)
    for model in ('llama_7b', 'llama_65b', 'llama2_7b', 'llama2_13b', 'llama2_34b', 'llama2_70b'):
        scores = {
            s.metric: s.value
            for s in PUBLISHED
            if (s.model, s.task) == (model, 'agieval') and 'Table 24' in s.source
        }
        average = sum(scores[f'acc/{name}'] * sizes[name] for name in LLAMA_ENGLISH) / total
        # Printed to a tenth of a percent, from columns that are.
        assert average == pytest.approx(scores['acc_english'], abs=0.0011), model


def test_few_shot_examples_are_the_publishers(shared_data):
    data_dir = str(shared_data / 'eval')
    documents = {document['subset']: document for document in AGIEVAL.documents(data_dir)}
    for subset, document in documents.items():
        prefix = AGIEVAL.prefix(document, AGIEVAL.draw([document], data_dir, 3)[0])
        asked = {'math': 'A: The answer is', 'gaokao-mathcloze': '答案：'}
        words = asked.get(subset) or (
            'Among A through' if document['query'].find('Q: ') >= 0 else '答案：从A到'
        )
        assert prefix.count(words) == 3, subset
