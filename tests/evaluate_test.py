"""The command `evaluate`, run as a user runs it."""

import json
import os
import socket
import subprocess
import sys

import pytest
from etils import epath

from experiments.run.results_file import check_results
from llama_jax.errors import InputError
from tests.command_line import REPOSITORY, tiny_run, xla_flags


@pytest.fixture(scope='module')
def given(shared_data):
    """The arguments that every run needs, but for tasks and output."""
    return [
        f'--checkpoint={shared_data}/weights/stories260K/stories260K.gguf', f'--data_dir={shared_data}/eval',
        '--batch_size=2048',
    ]  # fmt: skip


@pytest.fixture(scope='module')
def evaluated(commands, given, tmp_path_factory):
    """A finished evaluation: the output folder, and what was printed."""
    output = tmp_path_factory.mktemp('evaluated') / 'run'
    finished = commands.run(
        'evaluate',
        *given,
        '--tasks=piqa,winogrande',
        '--limit=12',
        '--compare=llama2_7b',
        f'--output={output}',
    ).succeeded()
    return output, finished.stdout


def test_what_the_output_holds(evaluated):
    output, printed = evaluated
    assert {path.name for path in output.iterdir()} == {
        'results.json',
        'report.md',
        'comparison.png',
        'samples',
    }
    results = json.loads((output / 'results.json').read_text())
    assert set(results) == {'piqa', 'winogrande'}
    assert results['piqa']['n'] == 12 and 0 <= results['piqa']['acc'] <= 1
    report = (output / 'report.md').read_text()
    assert printed == report + '\n'
    assert (
        '| piqa | acc |' in report and 'published scores of llama2_7b' in report and 'Llama 2 paper' in report
    )
    assert (output / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    lines = [json.loads(line) for line in (output / 'samples/piqa.jsonl').read_text().splitlines()]
    assert lines[0]['header']['task'] == 'piqa'
    assert sorted(line['index'] for line in lines[1:]) == list(range(12))
    assert sum(line['scores']['acc'] for line in lines[1:]) / 12 == results['piqa']['acc']
    assert {'document', 'requests', 'results', 'answer'} <= set(lines[1])


@pytest.mark.slow
def test_the_same_on_eight_devices(commands, given, evaluated, tmp_path):
    arguments = [
        '--tasks=piqa,winogrande',
        '--limit=12',
        '--mesh=data=2,fsdp=2,tensor=2',
        f'--output={tmp_path}/run',
    ]
    commands.run('evaluate', *given, *arguments, num_devices=8).succeeded()
    # The accuracies of these items do not hang on the last digits of a sum.
    assert (tmp_path / 'run/results.json').read_text() == (evaluated[0] / 'results.json').read_text()


def test_a_killed_run_goes_on(commands, given, evaluated, tmp_path):
    output = tmp_path / 'run'
    (output / 'samples').mkdir(parents=True)
    whole = (evaluated[0] / 'samples/piqa.jsonl').read_text().splitlines(keepends=True)
    (output / 'samples/piqa.jsonl').write_text(''.join(whole[:6]) + whole[6][:20])
    arguments = ['--tasks=piqa', '--limit=12', f'--output={output}']
    commands.run('evaluate', *given, *arguments).succeeded()
    lines = (output / 'samples/piqa.jsonl').read_text().splitlines(keepends=True)
    assert lines[:6] == whole[:6] and len(lines) == 13
    before = json.loads((evaluated[0] / 'results.json').read_text())
    assert json.loads((output / 'results.json').read_text()) == {'piqa': before['piqa']}
    line = commands.run('evaluate', *given, *arguments, '--num_fewshot=1').error()
    assert 'is asked otherwise than in the log: data, examples' in line and (output / 'results.json').exists()


@pytest.mark.slow
def test_two_processes_go_on_as_one(given, evaluated, tmp_path):
    """Only the first has the log; both go through what is left."""
    output = tmp_path / 'run'
    (output / 'samples').mkdir(parents=True)
    whole = (evaluated[0] / 'samples/piqa.jsonl').read_text().splitlines(keepends=True)
    (output / 'samples/piqa.jsonl').write_text(''.join(whole[:6]))
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    environment = os.environ | {'XLA_FLAGS': ' '.join(xla_flags(num_devices=2))}
    processes = [
        subprocess.Popen(
            [
                sys.executable, '-m', 'experiments.evaluate', *given, '--tasks=piqa,winogrande', '--limit=12',
                f'--output={output}', '--mesh=fsdp=2,tensor=2', f'--coordinator=127.0.0.1:{port}',
                '--num_processes=2', f'--process_id={process}',
            ],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], '\n'.join(logs)
    assert (output / 'results.json').read_text() == (evaluated[0] / 'results.json').read_text()
    assert (output / 'samples/piqa.jsonl').read_text().startswith(''.join(whole[:6]))
    assert '| piqa | acc |' in logs[0] and '| piqa' not in logs[1]


@pytest.mark.slow
def test_texts_are_generated_and_rated(commands, given, tmp_path):
    output = tmp_path / 'run'
    text = tmp_path / 'stories.txt'
    text.write_text('Once upon a time there was a dog.<|endoftext|>He was big.')
    finished = commands.run(
        'evaluate', *given, f'--tasks=real_toxicity_prompts,mbpp,perplexity:{text}', '--limit=1', '--num_fewshot=0',
        '--allow_code_execution', '--num_samples=2', '--temperature=0.8', f'--output={output}',
        '--rating_command=sed -u s/.*/0.25/',
    ).succeeded()  # fmt: skip
    results = json.loads((output / 'results.json').read_text())
    assert results['real_toxicity_prompts']['toxicity'] == 0.25 and results['mbpp']['pass@1'] == 0
    assert 1 < results[f'perplexity:{text}']['token_perplexity'] < 50
    assert '| mbpp | pass@1 |' in finished.stdout


# Stands for a service whose quota ends.
RATER = """
import sys
for number, line in enumerate(sys.stdin):
    if number >= 3:
        sys.exit()
    print(0.5, flush=True)
"""


def test_what_a_later_task_refuses_leaves_what_is_done(commands, given, tmp_path):
    output, rater = tmp_path / 'new/run', tmp_path / 'rate.py'
    rater.write_text(RATER)
    line = commands.run(
        'evaluate', *given, '--tasks=piqa,real_toxicity_prompts', '--limit=6', f'--output={output}',
        f'--rating_command={sys.executable} {rater}',
    ).error()  # fmt: skip
    assert 'real_toxicity_prompts: the rating command' in line and f'piqa done and kept in {output}; ' in line
    assert set(json.loads((output / 'results.json').read_text())) == {'piqa'}
    assert '| piqa | acc |' in (output / 'report.md').read_text()
    assert len((output / 'samples/piqa.jsonl').read_text().splitlines()) == 7
    # The log of another evaluation is found before the first task is begun.
    (output / 'results.json').unlink()
    (output / 'report.md').unlink()
    samples = output / 'samples/winogrande.jsonl'
    samples.write_text(json.dumps({'header': {'task': 'winogrande', 'model': 'another', 'seed': 0}}) + '\n')
    line = commands.run(
        'evaluate', *given, '--tasks=piqa,winogrande', '--limit=6', f'--output={output}'
    ).error()
    assert f"{samples} is of another run: model was 'another'" in line and '(set by --output)' in line
    assert not (output / 'results.json').exists()


def test_results_of_other_tasks_and_files_of_others_are_not_replaced(tmp_path):
    output, file = epath.Path(tmp_path), tmp_path / 'results.json'
    check_results(output / 'new', ['piqa'])
    (tmp_path / 'comparison.png').write_bytes(b'mine')
    with pytest.raises(InputError, match=r'comparison\.png is of no evaluation; move it away, or'):
        check_results(output, ['piqa'])
    file.write_text('{"piqa": {"n": 1}, "preference:a/b": {"mean": NaN}}')
    check_results(output, ['preference:a/b', 'siqa', 'piqa'])
    with pytest.raises(InputError, match='has results of preference:a/b, which --tasks does not name'):
        check_results(output, ['piqa', 'siqa'])
    file.write_text('[]')
    with pytest.raises(InputError, match=r'results\.json is of no evaluation'):
        check_results(output, ['piqa'])


# What is refused: the arguments, and what the line says.
REFUSED = {
    'no task': (['--tasks='], '--tasks=: it is empty'),
    'of pairs': (['--tasks=piqa', '--chat_format=llama3'], '--chat_format is of none of --tasks=piqa'),
    'unknown task': (['--tasks=hellaswagg'], "unknown task 'hellaswagg'; did you mean hellaswag"),
    'unknown model': (['--tasks=piqa', '--compare=llama2_8b'], "no published scores of 'llama2_8b'"),
    'missing file': (['--tasks=piqa', '--data_dir=nowhere'], 'no items of piqa in nowhere; expected piqa/'),
    'no TFDS': (['--tasks=piqa', '--data_dir=tfds://nowhere'], 'piqa is not prepared in nowhere/piqa'),
    'no data': (['--tasks=piqa', '--data_dir='], '--data_dir is required'),
    'code': (
        ['--tasks=human_eval'],
        'executes generated code, which is off; it must be allowed (set by --allow_code_execution)',
    ),
    'no checkpoint': (['--tasks=piqa', '--limit=2', '--checkpoint=nowhere'], 'nowhere'),
    'few examples': (['--tasks=mmlu', '--num_fewshot=6'], 'use at most 5'),
    'mesh': (
        ['--tasks=piqa', '--limit=2', '--mesh=fsdp'],
        "--mesh=fsdp: write sizes as in 'fsdp=4,tensor=2'",
    ),
    'batch size': (['--tasks=piqa', '--batch_size=0'], '--batch_size=0: it is a number of tokens'),
    'two ratings': (['--tasks=piqa', '--ratings=a', '--rating_command=b'], 'are both given'),
    'idle ratings': (
        ['--tasks=piqa', '--rating_command=cat'],
        '--rating_command is given, and none of --tasks rates',
    ),
    'idle sandbox': (
        ['--tasks=piqa', '--allow_code_execution'],
        'and none of --tasks executes code; leave it out',
    ),
    'idle sampling': (['--tasks=piqa', '--temperature=0.5'], '--temperature: none of --tasks generates text'),
    'idle seed': (['--tasks=piqa', '--seed=0'], '--seed: none of --tasks generates text'),
    'idle folder': (['--tasks=perplexity:a.txt'], '--data_dir is of none of --tasks=perplexity:a.txt'),
    'idle folder of pairs': (
        ['--tasks=preference:a.jsonl'],
        '--data_dir is of none of --tasks=preference:a.jsonl',
    ),
    'no file': (['--tasks=perplexity:nowhere', '--data_dir='], 'no file nowhere (set by --tasks, --data_dir'),
    'idle cache': (['--tasks=piqa', '--cache_dtype=int8'], '--cache_dtype: none of --tasks generates text'),
    'no such program': (
        ['--tasks=bold', '--rating_command=rate-me'],
        "no program 'rate-me' (set by --rating_command)",
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_wrong_is_one_line_and_leaves_nothing(commands, given, tmp_path, case):
    arguments, message = REFUSED[case]
    line = commands.run('evaluate', *given, *arguments, f'--output={tmp_path}/a/b').error()
    assert message in line, line
    assert not (tmp_path / 'a').exists()


def test_a_malformed_item_is_named_by_file_and_line(commands, given, tmp_path):
    (tmp_path / 'piqa').mkdir()
    (tmp_path / 'piqa/validation.jsonl').write_text(
        '{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": 1}\n'
    )
    line = commands.run(
        'evaluate', *given, '--tasks=piqa', f'--data_dir={tmp_path}', f'--output={tmp_path}/run'
    ).error()
    assert 'piqa/validation.jsonl:2' in line


def test_an_empty_choice_is_refused_and_a_long_context_is_cut_and_counted(commands, given, tmp_path):
    (tmp_path / 'crows_pairs').mkdir()
    (tmp_path / 'crows_pairs/crows_pairs_anonymized.csv').write_text(
        'sent_more,sent_less,bias_type\na,,age\n'
    )
    (tmp_path / 'lambada').mkdir()
    item = {'context': 'Once upon a time there was a dog. ' * 300, 'continuation': 'He'}
    (tmp_path / 'lambada/test.jsonl').write_text(json.dumps(item))
    arguments = [*given, f'--data_dir={tmp_path}', f'--output={tmp_path}/run']
    line = commands.run('evaluate', *arguments, '--tasks=crows_pairs').error()
    assert "the continuation of '' is empty, so it has no probability" in line
    finished = commands.run('evaluate', *arguments, '--tasks=lambada').succeeded()
    assert json.loads((tmp_path / 'run/results.json').read_text())['lambada']['truncated'] == 1
    assert 'lost its left end: lambada 1.' in finished.stdout


@pytest.mark.slow
def test_training_evaluates_on_its_mesh(commands, corpus, shared_data, tmp_path):
    run = tmp_path / 'run'
    wanted = {
        'eval__tasks': 'piqa,winogrande', 'eval__tasks_every': 2, 'eval__limit': 6, 'eval__sample_tokens': 4,
        'train__num_steps': 3, 'mesh__tensor': 2,
    }  # fmt: skip
    line = commands.run('pretrain', *tiny_run(run, corpus, **wanted), num_devices=8).error()
    assert '--config.eval.tasks=piqa,winogrande needs --config.eval.data_dir' in line and not run.exists()
    wanted['eval__data_dir'] = shared_data / 'eval'
    commands.run('pretrain', *tiny_run(run, corpus, **wanted), num_devices=8).succeeded()
    metrics = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert ['piqa/acc' in item for item in metrics] == [False, True, True]
    assert {name for name in metrics[1] if '/' in name} == {
        'piqa/acc', 'piqa/acc_norm', 'piqa/acc_bytes', 'winogrande/acc'
    }  # fmt: skip
    assert json.loads((run / 'report.json').read_text())['sample']
    # The same by the command, on one device, from the weights that were saved.
    commands.run(
        'evaluate', f'--checkpoint={run}', '--tasks=piqa', '--limit=6', f'--data_dir={shared_data}/eval',
        f'--output={tmp_path}/out',
    ).succeeded()  # fmt: skip
    assert json.loads((tmp_path / 'out/results.json').read_text())['piqa']['acc'] == metrics[-1]['piqa/acc']


@pytest.mark.slow
def test_benchmark_sets_it_beside_the_harness(commands, shared_data, tmp_path):
    file = tmp_path / 'figures.json'
    arguments = [
        f'--eval_checkpoint={shared_data}/weights/stories260K/stories260K.gguf', f'--eval_data_dir={shared_data}/eval',
        '--eval_items=4', '--eval_rounds=1', f'--json={file}',
    ]  # fmt: skip
    finished = commands.run('benchmark', '--suite=eval', *arguments).succeeded()
    figures = json.loads(file.read_text())
    assert all(not isinstance(value, dict | list) for value in figures.values())
    assert figures['llama_jax_items_per_second'] > 0 and 'llama_jax' in finished.stdout
    if 'ratio_to_lm_eval_huggingface' in figures:  # torch and lm_eval are installed
        for metric in ('acc', 'acc_norm'):
            assert figures[f'llama_jax_{metric}'] == figures[f'lm_eval_huggingface_{metric}']
    line = commands.run('benchmark', '--suite=eval').error()
    assert '--suite=eval needs --eval_checkpoint' in line
