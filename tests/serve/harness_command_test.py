"""lm-evaluation-harness as a command, against the server as a command, finds what `experiments.evaluate` finds."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from llama_jax.inference.chat import Chat
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests.serve.started import started

LIMIT = 6
# The harness's own definitions, on local files.
TASKS = {
    'piqa': ('validation', 'Question: {{goal}}\nAnswer:', '{{[sol1, sol2]}}', '{{label}}'),
    'arc_easy': (
        'test', 'Question: {{question}}\nAnswer:', '{{choices.text}}', '{{choices.label.index(answerKey)}}'
    ),
    'openbookqa': (
        'validation', '{{question_stem}}', '{{choices.text}}', '{{choices.label.index(answerKey.lstrip())}}'
    ),
}  # fmt: skip


@pytest.fixture(scope='module')
def server(commands, shared_data):
    pytest.importorskip('lm_eval', reason='needs lm_eval[api]')
    pytest.importorskip('tenacity', reason='needs lm_eval[api]')
    checkpoint = shared_data / 'weights/stories260K/stories260K.gguf'
    flags = (
        '--slots=4',
        '--name=stories',
        '--top_logprobs=1',
        '--constraints=false',
        '--prefix_mib=0',
        '--context=256',
    )
    with started(commands, checkpoint, *flags) as server:
        yield server.address, checkpoint, server.client


def run_harness(folder, tasks, model, address, *more):
    options = f'model=stories,base_url={address},tokenizer_backend=remote,num_concurrent=4'
    done = subprocess.run(
        [
            sys.executable, '-m', 'lm_eval', 'run', '--model', model, '--model_args', options,
            '--tasks', ','.join(tasks), '--include_path', folder, '--limit', str(LIMIT),
            '--output_path', folder / 'out', '--log_samples', *more,
        ],
        env=os.environ | {'HF_DATASETS_CACHE': str(folder / 'cache'), 'HF_HUB_OFFLINE': '1', 'OPENAI_API_KEY': 'any'},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for task in tasks:
        (file,) = (folder / 'out').glob(f'*/samples_{task}_*.jsonl')
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[task] = sorted(lines, key=lambda line: line['doc_id'])
    return samples


def write_task(folder, name, file, **more):
    task = {
        'task': name, 'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'validation': str(file)}},
        'validation_split': 'validation',
    } | more  # fmt: skip
    (folder / f'{name}.yaml').write_text(json.dumps(task))  # which is YAML too


@pytest.mark.parametrize(
    'tasks',
    [
        pytest.param(['piqa'], marks=pytest.mark.slow),
        pytest.param(['arc_easy', 'openbookqa'], marks=pytest.mark.long),
    ],
)
def test_likelihoods_and_scores_are_those_of_evaluate(server, shared_data, tmp_path, tasks):
    address, checkpoint, _ = server
    # `evaluate` begins every context with BOS, as the models were trained; the harness's remote tokenizer does not.
    for name in tasks:
        split, text, choices, target = TASKS[name]
        write_task(
            tmp_path, f'own_{name}', shared_data / f'eval/{name}/{split}.jsonl', output_type='multiple_choice',
            doc_to_text=f'<s>{text}', doc_to_choice=choices, doc_to_target=target,
            metric_list=[{'metric': 'acc'}, {'metric': 'acc_norm'}],
        )  # fmt: skip
    found = run_harness(
        tmp_path, [f'own_{name}' for name in tasks], 'local-completions', f'{address}/v1/completions'
    )
    subprocess.run(
        [
            sys.executable, '-m', 'experiments.evaluate', f'--checkpoint={checkpoint}', f'--tasks={",".join(tasks)}',
            f'--data_dir={shared_data}/eval', f'--limit={LIMIT}', '--num_fewshot=0', f'--output={tmp_path}/ours',
        ],
        check=True, capture_output=True, timeout=500,
    )  # fmt: skip
    results = json.loads((tmp_path / 'ours/results.json').read_text())
    for name in tasks:
        lines = [
            json.loads(line) for line in (tmp_path / f'ours/samples/{name}.jsonl').read_text().splitlines()
        ]
        lines = {line['index']: line for line in lines if 'index' in line}
        for sample in found[f'own_{name}']:
            theirs = [float(value) for ((value, _),) in sample['resps']]
            ours = [result['log_probability'] for result in lines[sample['doc_id']]['results'][: len(theirs)]]
            # Rows of other widths are other sums of fp32.
            np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)
        for metric in ('acc', 'acc_norm'):
            score = np.mean([sample[metric] for sample in found[f'own_{name}']])
            assert score == pytest.approx(results[name][metric]), (name, metric)


@pytest.mark.slow
def test_chats_are_those_of_the_library(server, shared_data, tmp_path):
    address, _, client = server
    file = tmp_path / 'asked.jsonl'
    asked = ['Tell me of a dog.', 'Who is Lily?', 'Say: yes.']
    file.write_text(''.join(json.dumps({'text': text, 'answer': 'x'}) + '\n' for text in asked))
    write_task(
        tmp_path, 'talk', file, output_type='generate_until', doc_to_text='{{text}}', doc_to_target='{{answer}}',
        metric_list=[{'metric': 'exact_match'}], generation_kwargs={'until': ['.'], 'max_gen_toks': 16},
    )  # fmt: skip
    chat = f'{address}/v1/chat/completions'
    found = run_harness(tmp_path, ['talk'], 'local-chat-completions', chat, '--apply_chat_template')['talk']
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    for text, sample in zip(asked, found, strict=True):
        ids = Chat(tokenizer, '').encode_prompt([{'role': 'user', 'content': text}])
        (choice,) = client.completions.create(
            model='stories', prompt=ids, temperature=0, max_tokens=16, stop=['.']
        ).choices
        assert sample['resps'] == [[choice.text]]
