"""MMLU's averages against the published ones, from the paper's own table of subjects."""

from collections import Counter

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.published import PUBLISHED, published_scores
from llama_jax.eval.published_tables import MMLU_MODELS
from llama_jax.eval.tasks.mmlu import MMLU, SUBJECTS, averages


@pytest.mark.parametrize('model', MMLU_MODELS)
def test_published_averages_follow_from_the_subjects(shared_data, model):
    sizes = Counter(document['subset'] for document in MMLU.documents(str(shared_data / 'eval')))
    assert len(SUBJECTS) == 57 and sizes.total() == 14_042
    table = {
        score.metric.partition('/')[2]: score.value
        for score in published_scores(model)
        if score.task == 'mmlu' and '/' in score.metric
    }
    metrics = averages(table, dict(sizes))
    checked = 0
    for score in PUBLISHED:
        if score.model == model and score.task == 'mmlu' and '/' not in score.metric:
            # Half a unit of the last printed digit, of the average and of each subject; the Humanities of LLaMA-I
            # are printed 67.4 where the table gives 67.5.
            assert metrics[score.metric] == pytest.approx(score.value, abs=0.0011), score.metric
            checked += 1
    assert checked == 5


def test_macro_average_of_the_7b():
    scores = [score for score in published_scores('llama_7b') if score.task == 'mmlu']
    table = {score.metric[4:]: score.value for score in scores if score.metric.startswith('acc/')}
    metrics = averages(table, dict.fromkeys(table, 100))
    assert metrics['acc_macro'] == pytest.approx(0.3564, abs=1e-4)
    assert metrics['acc'] == pytest.approx(metrics['acc_macro'], abs=1e-12)


def test_prompt_is_the_harness_one(shared_data):
    data_dir = str(shared_data / 'eval')
    document = MMLU.documents(data_dir)[0]
    request = MMLU.requests(document, MMLU.prefix(document, MMLU.draw([document], data_dir, 1)[0]))[1]
    assert request.continuation == ' B'
    assert request.context == (
        'The following are multiple choice questions (with answers) about abstract algebra.\n\n'
        'Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: B\n\n'
        'Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n'
        'A. 0\nB. 4\nC. 2\nD. 6\nAnswer:'
    )


def test_malformed_line_is_named(tmp_path):
    folder = tmp_path / 'mmlu' / 'test'
    folder.mkdir(parents=True)
    (folder / 'abstract_algebra_test.csv').write_text('q,1,2,3,4,A\nq,1,2,3,4,E\n')
    with pytest.raises(InputError, match=r'abstract_algebra_test.csv:2: malformed item'):
        MMLU.documents(str(tmp_path))
