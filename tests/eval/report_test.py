"""What people read of an evaluation."""

from llama_jax.eval.published import compare, is_share
from llama_jax.eval.report import plot_comparison, result_lines, to_report

RESULTS = {
    'boolq': {'acc': 0.7, 'acc_answer': 0.774, 'n': 3270, 'num_fewshot': 0, 'truncated': 2},
    'mmlu': {'acc': 0.4, 'acc_macro': 0.41, 'acc/anatomy': 0.3, 'n': 14042, 'num_fewshot': 0},
    'race_high': {'acc_norm': 0.46, 'acc_last': 0.4, 'n': 3498, 'num_fewshot': 0},
    'perplexity:a.txt': {'word_perplexity': 12.5, 'n': 3, 'num_fewshot': 0},
}


def test_main_metrics_stand_in_the_table_and_those_of_subjects_do_not():
    lines = result_lines(RESULTS)
    assert '| boolq | acc | 0.7000 (0.6841 to 0.7155) | 0 | 3,270 |' in lines
    # Of the last question of each article, so that n is not its number of items.
    assert '| race_high | acc_last | 0.4000 | 0 | 3,498 |' in lines
    assert '| perplexity:a.txt | word_perplexity | 12.5000 | 0 | 3 |' in lines
    assert not any('anatomy' in line for line in lines)


def test_report_sets_ours_beside_theirs_and_counts_what_was_cut(tmp_path):
    rows = compare('llama2_7b', RESULTS)
    report = to_report('Evaluation of x', RESULTS, 'llama2_7b', rows)
    assert report.startswith('# Evaluation of x\n\n| task |')
    assert 'longer than the model reads and lost its left end: boolq 2.' in report
    assert 'Beside the published scores of llama2_7b' in report
    assert '| boolq | acc_answer | 0 | 3270 | 77.4 (75.9 to 78.8) | 77.4 | +0.0 |' in report
    assert '| mmlu | acc | 0 (published: 5) |' in report and '-5.3*' in report
    plot_comparison(tmp_path / 'plot.png', 'llama2_7b', rows)
    assert (tmp_path / 'plot.png').read_bytes().startswith(b'\x89PNG')
    assert 'In brackets: the 95 % interval' in report
    of_text = {'perplexity:a.txt': RESULTS['perplexity:a.txt']}
    assert 'In brackets' not in to_report('Evaluation of x', of_text, '', [])
    alone = to_report('Evaluation of x', {'mmlu': RESULTS['mmlu']}, '', [])
    assert 'published' not in alone and 'longer than' not in alone


def test_only_means_of_zeros_and_ones_have_an_interval():
    """Twenty samples of an item are not twenty items, and a mean of subjects is none of questions."""
    found = {'pass@1': 0.3, 'pass@10': 0.6, 'n': 164, 'num_fewshot': 0}
    assert '| human_eval | pass@1 | 0.3000 (0.2351 to 0.3741) | 0 | 164 |' in result_lines(
        {'human_eval': found}
    )
    several = found | {'num_samples': 20}
    assert '| human_eval | pass@1 | 0.3000 | 0 | 164 |' in result_lines({'human_eval': several})
    (row,) = [r for r in compare('llama2_7b', {'human_eval': several}) if r.published.metric == 'pass@1']
    assert row.interval is None
    votes = {'exact_match': 0.1, 'maj1@4': 0.2, 'n': 100, 'num_fewshot': 4, 'num_samples': 4}
    shares = {m for m in votes | {'acc_macro': 0.4} if is_share(m, 4)}
    assert shares == {'maj1@4'} and not is_share('acc_macro') and is_share('exact_match_boxed')
