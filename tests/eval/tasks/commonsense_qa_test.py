"""CommonsenseQA from its publisher's file, on an item made here."""

import json

from llama_jax.eval.task import Likelihood
from llama_jax.eval.tasks.commonsense_qa import COMMONSENSE_QA

ITEM = {
    'answerKey': 'B',
    'id': '1',
    'question': {
        'stem': 'Where is a dog at home? ',
        'choices': [
            {'label': 'A', 'text': 'sky'},
            {'label': 'B', 'text': 'kennel'},
            {'label': 'C', 'text': 'sea'},
            {'label': 'D', 'text': 'moon'},
            {'label': 'E', 'text': 'sun'},
        ],
    },
}


def test_publishers_layout_is_read(tmp_path):
    (tmp_path / 'commonsense_qa').mkdir()
    (tmp_path / 'commonsense_qa' / 'dev_rand_split.jsonl').write_text(json.dumps(ITEM) + '\n')
    (document,) = COMMONSENSE_QA.documents(str(tmp_path))
    requests = COMMONSENSE_QA.requests(document)
    assert requests[1].context == (
        'Question: Where is a dog at home?\nA. sky\nB. kennel\nC. sea\nD. moon\nE. sun\nAnswer:'
    )
    results = [Likelihood(-1.0 if request.continuation == ' B' else -2.0) for request in requests]
    assert COMMONSENSE_QA.grade(document, results) == {'acc': 1.0}
