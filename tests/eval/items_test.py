"""Items of the log, looked at one by one."""

import contextlib
import dataclasses

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.eval.harness import evaluate, prepare
from llama_jax.eval.items import choice_probabilities, confidences, show_item
from llama_jax.eval.task import Continuation, Likelihood
from llama_jax.eval.tasks import find_task
from llama_jax.item_log import ItemLog


class Lengths:
    """Takes a continuation for the likelier the shorter it is."""

    def answer(self, requests):
        for request in requests:
            assert isinstance(request, Continuation)
            yield request, Likelihood(-0.1 * len(request.continuation), False, 1)


@pytest.mark.parametrize(('name', 'choices'), [('piqa', 2), ('boolq', 2), ('arc_easy', 4)])
def test_choices_are_those_of_the_question(shared_data, tmp_path, name, choices):
    prepared = prepare(find_task(name), str(shared_data / 'eval'), limit=12, num_fewshot=0)
    with contextlib.closing(ItemLog(tmp_path / 'log', {})) as log:
        found = evaluate(prepared, Lengths(), log=log, progress=False)
    items = [log.items[index] for index in range(12)]
    probabilities = choice_probabilities(items[0])
    lengths = [len(request.continuation) for request in prepared.requests[0][:choices]]
    expected = np.exp(-0.1 * np.array(lengths))
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-12)
    sure, right = confidences(items)
    assert right.mean() == found['acc'] and sure[0] == probabilities.max()
    table = show_item(items[0])
    assert len(table.rows) == choices and table.title.endswith(items[0]['requests'][0]['context'][-20:])
    assert [row[1] for row in table.rows].index('right') in items[0]['answer']


def test_a_completion_has_no_choices(shared_data):
    prepared = prepare(find_task('gsm8k'), str(shared_data / 'eval'), limit=1, num_fewshot=0)
    request = dataclasses.asdict(prepared.requests[0][0])
    with pytest.raises(InputError, match='item 3 is no choice between texts'):
        choice_probabilities({'index': 3, 'requests': [request], 'results': [{}]})
