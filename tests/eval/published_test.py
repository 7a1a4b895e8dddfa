"""The published scores as data, and ours beside them."""

import math

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.published import PUBLISHED, binomial_interval, compare, published_scores, to_markdown
from llama_jax.eval.tasks import TASKS
from llama_jax.models.presets import PRESETS

COMMON_SENSE = {
    'boolq', 'piqa', 'siqa', 'hellaswag', 'winogrande', 'arc_easy', 'arc_challenge', 'openbookqa', 'commonsense_qa',
}  # fmt: skip


def test_every_released_base_model_has_scores():
    models = {score.model.removesuffix('_chat').removesuffix('_instruct') for score in PUBLISHED}
    assert models <= set(PRESETS)
    without = {'tiny', 'stories_15m', 'stories_110m'} | {
        name for name in PRESETS if name.startswith('code_llama')
    }
    assert set(PRESETS) - models == without


def test_scores_are_fractions_of_known_tasks_and_metrics():
    for score in PUBLISHED:
        assert 0 <= score.value <= 1, score
        if not score.same_protocol or score.task not in TASKS:
            continue
        known = {*TASKS[score.task].metrics, 'acc_macro', 'maj1@256', 'maj1@100', 'pass@80', 'pass@100'}
        known |= {'truthful', 'informative', 'truthful_and_informative'}
        first = score.metric.partition('/')[0]
        assert first in known or first.startswith('acc_'), score


def test_overview_follows_from_the_tables():
    """Llama 2 paper, Table 3: commonsense, code and world knowledge are means of the rows transcribed here."""
    expected = {
        'llama2_7b': (63.9, 16.8, 48.9), 'llama2_13b': (66.9, 24.5, 55.4), 'llama2_34b': (69.9, 27.8, 58.7),
        'llama2_70b': (71.9, 37.5, 63.6),
    }  # fmt: skip
    for model, (common_sense, code, knowledge) in expected.items():
        scores = {
            (s.task, s.metric, s.num_fewshot): 100 * s.value
            for s in published_scores(model)
            if 'Llama 2 paper' in s.source
        }
        eight = [v for (task, _, _), v in scores.items() if task in COMMON_SENSE - {'boolq'}]
        assert len(eight) == 8
        assert sum(eight) / 8 == pytest.approx(common_sense, abs=0.11)
        pair = [scores['human_eval', 'pass@1', 0], scores['mbpp', 'pass@1', 3]]
        assert sum(pair) / 2 == pytest.approx(code, abs=0.11)
        pair = [scores['nq_open', 'em_paper', 5], scores['trivia_qa', 'em_paper', 5]]
        assert sum(pair) / 2 == pytest.approx(knowledge, abs=0.11)


def test_interval_is_wilsons():
    # Agresti and Coull 1998: 0 of 10 gives (0, 0.278), 5 of 10 gives (0.237, 0.763).
    assert binomial_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert binomial_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = binomial_interval(0.7, 10_000)  # many items: the normal approximation of the Llama 3 paper
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.21 / 10_000), rel=1e-3)


def test_comparison():
    results = {
        'boolq': {'acc_answer': 0.774, 'acc': 0.7, 'n': 3270, 'num_fewshot': 0},
        'nq_open': {'em_paper': 0.30, 'n': 3610, 'num_fewshot': 5},
        'gsm8k_cot': {'exact_match': 0.146, 'n': 1319, 'num_fewshot': 4},
        'lambada': {'acc': 0.7, 'n': 5153},
    }
    rows = compare('llama2_7b', results)
    found = {(row.published.task, row.published.metric, row.published.num_fewshot): row for row in rows}
    assert ('nq_open', 'em_paper', 5) in found and ('nq_open', 'em_paper', 0) not in found
    boolq = found['boolq', 'acc_answer', 0]
    assert boolq.difference == pytest.approx(0) and boolq.same_protocol
    assert boolq.interval[0] < 0.774 < boolq.interval[1]
    assert not found['gsm8k_cot', 'exact_match', 8].same_protocol  # four examples against eight
    table = to_markdown(rows)
    assert '| nq_open | em_paper | 5 | 3610 | 30.0 (28.5 to 31.5) | 25.7 | +4.3 |' in table
    assert '4 (published: 8)' in table and table.count('\n| ') == len(rows)


def test_unknown_model_offers_the_nearest():
    with pytest.raises(InputError, match='llama2_7b'):
        compare('llama2_7B', {'piqa': {'acc': 1.0, 'n': 1}})
