"""The commands, run as a user runs them: what a workdir holds, what goes in and comes out, and what is refused."""

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import llama_jax
from llama_jax import pretrained
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM
from tests.command_line import REPOSITORY, SMALL_FILES, figures, run_python, saved_steps, tiny_run, xla_flags
from tests.convert.peft_test import ours as adapter_by_hand

SHOWN = {'log__tensorboard': True, 'eval__sample_tokens': 8, 'eval__prompt': 'ba'}


@pytest.fixture(scope='module')
def run(folder, commands, corpus):
    """The workdir of a finished run, of twelve steps."""
    workdir = folder / 'run'
    # As the README gives it: from where the command is run.
    relative = os.path.relpath(workdir, REPOSITORY)
    finished = commands.run('pretrain', *tiny_run(relative, corpus, **SHOWN)).succeeded()
    assert all(text in finished.stdout for text in ('this model', 'unigram', 'sample:', 'loss.png'))
    return workdir


def test_what_a_workdir_holds(run, corpus):
    wanted = (
        'config.json model.json tokenizer.model metrics.jsonl report.json loss.png checkpoints tensorboard'
    )
    assert {path.name for path in run.iterdir()} == set(wanted.split())
    assert saved_steps(run) == [4, 8, 12]
    assert len(list((run / 'tensorboard').iterdir())) == 1
    assert (run / 'loss.png').read_bytes().startswith(b'\x89PNG')
    assert json.loads((run / 'config.json').read_text())['config']['data']['train'] == str(corpus)
    assert json.loads((run / 'model.json').read_text())['config']['vocab_size'] == 320
    metrics = logged(run)
    assert [item['step'] for item in metrics] == list(range(1, 13))
    keys = {'step', 'loss', 'learning_rate', 'grad_norm', 'weight', 'tokens_per_second'}
    keys |= {'tokens_per_second_per_device', 'mfu_causal', 'mfu_full', 'data_wait'}
    validated = {'validation_loss', 'validation_bits_per_byte'}
    assert [set(item) - keys for item in metrics] == [set()] * 11 + [validated]
    assert all(keys <= set(item) for item in metrics)
    assert metrics[-1]['loss'] < 0.8 * metrics[0]['loss']
    report = json.loads((run / 'report.json').read_text())
    assert report['step'] == 12 and report['sample'].startswith('ba') and report['bigram'] < report['unigram']
    assert report['validation_loss'] == metrics[-1]['validation_loss']


def logged(run):
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def test_generate_prints_the_completion_alone(commands, run, tmp_path):
    prompts = ['ba', 'dio kurst']
    config, params, tokenizer = llama_jax.load(run)
    greedy = llama_jax.generate(LlamaForCausalLM(config), params, tokenizer, prompts, max_new_tokens=12)
    arguments = [f'--checkpoint={run}', '--max_new_tokens=12', '--prompt=ba']
    relative = f'--checkpoint={os.path.relpath(run, REPOSITORY)}'
    assert run_python('generate', relative, *arguments[1:]).succeeded().stdout == f'{greedy[0]}\n'
    stop = greedy[0][2:4]
    both = ['--prompt=dio kurst', '--format=jsonl', f'--stop={stop}']
    finished = commands.run('generate', *arguments, *both).succeeded()
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert lines == [
        dict(prompt=p, completion=c.partition(stop)[0]) for p, c in zip(prompts, greedy, strict=True)
    ]
    assert lines[0]['completion'] != greedy[0]


@pytest.mark.slow
def test_generate_draws_as_it_is_told(commands, run, tmp_path):
    prompts = ['ba', 'dio kurst']
    config, params, tokenizer = llama_jax.load(run)
    arguments = [f'--checkpoint={run}', '--max_new_tokens=12', '--prompt=ba']
    settings = {
        'temperature': 0.9, 'top_k': 40, 'top_p': 0.95, 'min_p': 0.01, 'repetition_penalty': 1.2,
        'presence_penalty': 0.1, 'frequency_penalty': 0.3, 'min_new_tokens': 3, 'seed': 4,
    }  # fmt: skip
    drawn = llama_jax.generate(
        LlamaForCausalLM(config), params, tokenizer, prompts, max_new_tokens=12, logit_bias={9: -100.0, 8: 1.5},
        **settings,
    )  # fmt: skip
    given = [*(f'--{name}={value}' for name, value in settings.items()), '--logit_bias=9:-100,8:1.5']
    finished = commands.run('generate', *arguments, '--prompt=dio kurst', *given).succeeded()
    assert finished.stdout == f'{drawn[0]}\n{drawn[1]}\n'
    arguments[-1] = f'--messages={tmp_path / "dialog.json"}'
    (tmp_path / 'dialog.json').write_text('[{"role": "user", "content": 7}]')
    assert 'message 0 is' in commands.run('generate', *arguments).error()
    (tmp_path / 'dialog.json').write_text('{"messages": [{"role": "user", "content": "ba"}]}')
    assert commands.run('generate', *arguments).succeeded().stdout


@pytest.mark.slow
def test_generate_completes_a_file(commands, run, tmp_path):
    config, params, tokenizer = llama_jax.load(run)
    lines = [{'prompt': text, 'id': n} for n, text in enumerate(('ba', 'dio kurst', 'b'))]
    lines[2] |= {'temperature': 0.9, 'seed': 5}
    prompts, output = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl'
    prompts.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    samplers = [Sampler(line.get('temperature', 0.0), seed=line.get('seed', 0)) for line in lines]
    texts = [line['prompt'] for line in lines]
    wanted = llama_jax.complete(
        LlamaForCausalLM(config), params, tokenizer, texts, samplers=samplers, max_new_tokens=9
    )
    arguments = [f'--checkpoint={run}', f'--prompts={prompts}', '--max_new_tokens=9', '--batch_size=2']
    assert '%' in commands.run('generate', *arguments, f'--output={output}').succeeded().stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(answer['id'], answer['completion'], answer['stopped']) for answer in answers] == [
        (n, one.text, one.finish_reason == 'stop') for n, (one,) in enumerate(wanted)
    ]
    halves = [
        commands.run('generate', *arguments, f'--shard={part}/2', '--format=jsonl').succeeded()
        for part in (0, 1)
    ]
    found = {
        answer['index']: answer for half in halves for answer in map(json.loads, half.stdout.splitlines())
    }
    assert [found[index] for index in range(3)] == answers
    assert 'is there already' in commands.run('generate', *arguments, f'--output={output}').error()
    none = [*arguments, '--shard=3/4', f'--output={tmp_path}/none.jsonl']  # more parts than lines
    commands.run('generate', *none).succeeded()
    assert (tmp_path / 'none.jsonl').read_text() == ''


@pytest.mark.slow
def test_what_generate_refuses_is_one_line(commands, run, tmp_path):
    (prompts := tmp_path / 'prompts.jsonl').write_text('{"prompt": "ba"}\n')
    one, many = (
        [f'--checkpoint={run}', '--max_new_tokens=12', '--prompt=ba'],
        [f'--checkpoint={run}', f'--prompts={prompts}'],
    )
    for arguments, wrong, words in (
        (one, ['--system=Hi'], '--system says something before a --prompt with --chat'),
        (one, ['--messages=x.json'], '--prompt and --messages are both given'),
        (one, ['--stop='], "--stop is ''"),
        (one, ['--min_p=2'], '--min_p is 2.0; it must be from 0'),
        (one, ['--min_new_tokens=13'], '--min_new_tokens is 13; it must be at most max_new_tokens, 12'),
        (one, ['--logit_bias=9'], "--logit_bias is '9'; it must be ID:BIAS"),
        (one, ['--logit_bias=9:1,9:2'], "--logit_bias is '9:1,9:2'; give each token once"),
        (one, ['--chat', '--special_tokens'], '--special_tokens reads the tags of a --prompt'),
        (one, ['--suffix=a', '--suffix=b'], '--suffix is given 2 times, --prompt 1; a gap needs one of each'),
        (one, ['--suffix=a', '--chat'], '--suffix and --chat are both given'),
        (one, ['--suffix_first'], '--suffix_first is of --suffix, which is not given'),
        (one, ['--suffix=a'], 'has no token ▁<PRE>, so its model fills no gaps'),
        (one, ['--n=2'], '--n is of --format=jsonl, and not of --prompts'),
        (many, ['--logprobs=2', '--format=jsonl'], '--logprobs is of --format=jsonl, and not of --prompts'),
        (one, ['--logprobs=21', '--format=jsonl'], 'candidates of a token are 21; there may be from 0'),
        (one, ['--shard=0/2'], '--shard is of --prompts'),
        (many, ['--output=x.jsonl', '--format=text'], '--format is of standard output'),
        (many, ['--shard=2/2'], "--shard is '2/2'"),
        (many, ['--prompt=a'], '--prompt and --prompts are both given'),
        (many, ['--axis_rules=heads='], '--axis_rules is of --mesh, which is not given'),
        (many, ['--mesh=tensor=3'], '--mesh'),
    ):
        assert words in commands.run('generate', *arguments, *wrong).error()


@pytest.mark.slow
def test_generate_tells_more_of_each_completion(commands, run):
    config, params, tokenizer = llama_jax.load(run)
    settings = {'max_new_tokens': 6, 'temperature': 0.9, 'n': 2, 'echo': True}
    (wanted,) = llama_jax.complete(
        LlamaForCausalLM(config), params, tokenizer, ['dio kurst'], log_probabilities=2, **settings
    )
    flags = [f'--{name}={value}' for name, value in settings.items()]
    done = commands.run(
        'generate', f'--checkpoint={run}', '--prompt=dio kurst', '--format=jsonl', '--logprobs=2', *flags
    ).succeeded()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for choice, (line, completion) in enumerate(zip(lines, wanted, strict=True)):
        told = {'prompt': 'dio kurst', 'choice': choice, **completion.to_json()}
        assert [*line] == [*told]
        for name, value in told.items():
            if name not in ('scores', 'prompt_scores'):
                assert line[name] == value, name
                continue
            for found, score in zip(line[name], value, strict=True):
                assert found['token'] == score['token']
                # Another process has compiled its own program: its sums may differ in their last bits.
                assert found['log_probability'] == pytest.approx(score['log_probability'], abs=1e-4)
                assert [*found] == [*score]
    assert all(len(line['scores']) >= len(line['tokens']) > 0 for line in lines)
    assert len(lines[0]['prompt_scores']) == lines[0]['prompt_tokens'] > 2


@pytest.mark.slow
def test_a_terminal_shows_the_same_completion_while_it_is_made(commands, run):
    arguments = [
        f'--checkpoint={run}',
        '--max_new_tokens=40',
        '--prompt=ba',
        '--temperature=1',
        '--ignore_eos',
    ]
    printed = commands.run('generate', *arguments).succeeded().stdout
    controller, terminal = os.openpty()
    environment = os.environ | {'XLA_FLAGS': ' '.join(xla_flags(num_devices=1))}
    process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.generate', *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=terminal,
    )
    os.close(terminal)
    pieces = []
    with contextlib.suppress(OSError):  # which is how the end of a terminal's output reads
        while piece := os.read(controller, 4096):
            pieces.append(piece)
    os.close(controller)
    assert process.wait() == 0 and len(pieces) > 2
    assert b''.join(pieces).replace(b'\r\n', b'\n').decode() == printed


def test_the_same_command_again_changes_nothing(commands, run, corpus):
    before = contents(run)
    finished = commands.run('pretrain', *tiny_run(run, corpus, **SHOWN)).succeeded()
    assert 'resuming at step 12 of 12' in finished.stderr
    after = contents(run)
    assert before == {path: after[path] for path in before}
    assert all(path.parent.name == 'tensorboard' for path in set(after) - set(before))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_more_steps_go_on_from_the_last(commands, run, corpus, tmp_path):
    shutil.copytree(run, tmp_path / 'longer')
    commands.run('pretrain', *tiny_run(tmp_path / 'longer', corpus, train__num_steps=15)).succeeded()
    longer = figures(tmp_path / 'longer')
    assert longer[:12] == figures(run) and [step for step, *_ in longer] == list(range(1, 16))
    assert saved_steps(tmp_path / 'longer') == [8, 12, 15]


@pytest.mark.slow
def test_a_run_continues_from_weights_with_a_larger_vocabulary_and_with_a_tokenizer_of_its_own(
    commands, run, corpus, tmp_path
):
    shutil.copytree(run, tmp_path / 'base', ignore=lambda folder, names: ['tokenizer.model'])
    size = pretrained.open(run).config.vocab_size
    settings = {'train__num_steps': 2, 'mesh__fsdp': 2, 'mesh__tensor': 4}
    arguments = [
        *tiny_run(tmp_path / 'run', corpus, **settings, model__vocab_size=size + 8),
        f'--checkpoint={tmp_path / "base"}',
    ]
    message = commands.run('pretrain', *arguments, num_devices=8).error()
    assert 'base has no tokenizer; give the one' in message and '--config.data.tokenizer' in message
    tokenizer = f'--config.data.tokenizer={run / "tokenizer.model"}'
    grown = commands.run('pretrain', *arguments, tokenizer, num_devices=8).succeeded()
    assert f'8 rows added to embed, the mean of its {size}' in grown.stderr
    assert pretrained.open(tmp_path / 'run').config.vocab_size == size + 8
    # The new rows take a little of each probability; nothing else changes.
    assert logged(tmp_path / 'run')[0]['loss'] < logged(run)[-1]['loss'] + 0.5
    smaller = [*tiny_run(tmp_path / 'x', corpus, model__vocab_size=size - 8), f'--checkpoint={run}']
    assert f'vocab_size={size - 8} is less than' in commands.run('pretrain', *smaller).error()
    assert not (tmp_path / 'x').exists()


def test_a_new_run_continues_from_the_weights_of_another(commands, run, corpus, tmp_path):
    arguments = tiny_run(tmp_path / 'run', corpus, train__num_steps=4, train__z_loss=1.0)
    commands.run('pretrain', *arguments, f'--checkpoint={run}').succeeded()
    before, after = (logged(folder) for folder in (run, tmp_path / 'run'))
    assert [item['step'] for item in after] == [1, 2, 3, 4]
    # No start from scratch; batches differ by 0.1.
    assert after[0]['nll'] < before[-1]['loss'] + 0.2 < before[0]['loss'] - 1.0
    # What the objective adds is no part of validation.
    assert after[-1]['loss'] > 2 * after[-1]['nll']
    assert after[-1]['validation_loss'] == pytest.approx(after[-1]['nll'], abs=0.5)
    assert (tmp_path / 'run/tokenizer.model').read_bytes() == (run / 'tokenizer.model').read_bytes()
    other = commands.run('pretrain', *arguments).error()
    assert '--checkpoint was' in other


@pytest.mark.slow
def test_a_run_goes_on_with_other_settings_where_that_is_allowed(commands, run, corpus, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(run, workdir)
    other = {'optimizer__learning_rate': 1e-3, 'train__batch_size': 16, 'train__num_steps': 14}
    refused = commands.run('pretrain', *tiny_run(workdir, corpus, **other)).error()
    assert (
        'or choose a new --workdir' in refused
        and 'let it change by --override=optimizer.learning_rate' in refused
    )
    allowed = '--override=optimizer.learning_rate,train.batch_size'
    finished = commands.run('pretrain', *tiny_run(workdir, corpus, **other), allowed).succeeded()
    assert 'resuming at step 12 of 14' in finished.stderr
    assert (
        'from step 12 on optimizer.learning_rate is 0.001, not 0.003: the learning rate follows'
        in finished.stderr
    )
    assert 'from step 12 on train.batch_size is 16, not 8: rows are counted on' in finished.stderr
    record = json.loads((workdir / 'config.json').read_text())
    assert record['config']['train']['batch_size'] == 16
    assert record['history'] == [
        {'step': 12, 'key': 'optimizer.learning_rate', 'before': 3e-3, 'after': 1e-3},
        {'step': 12, 'key': 'train.batch_size', 'before': 8, 'after': 16},
    ]
    assert figures(workdir)[:12] == figures(run)
    saved = json.loads((workdir / 'checkpoints/14/metadata/metadata').read_text())
    assert saved['rows_consumed'] == 12 * 8 + 2 * 16 and saved['history'] == record['history']
    # What it is now, it may go on with as it is; what it was, no more.
    commands.run('pretrain', *tiny_run(workdir, corpus, **other | {'train__num_steps': 15})).succeeded()
    saved = json.loads((workdir / 'checkpoints/15/metadata/metadata').read_text())
    assert saved['rows_consumed'] == 12 * 8 + 3 * 16
    assert 'belongs to another run' in commands.run('pretrain', *tiny_run(workdir, corpus)).error()


@pytest.mark.slow
def test_a_run_starts_from_the_state_of_another(commands, run, corpus, tmp_path):
    before = contents(run)
    workdir, fork = tmp_path / 'a/fork', f'--fork={run}@8'
    other = commands.run('pretrain', *tiny_run(workdir, corpus), fork, f'--checkpoint={run}').error()
    assert '--checkpoint and --fork are both given' in other and not any(tmp_path.iterdir())
    finished = commands.run('pretrain', *tiny_run(workdir, corpus), fork).succeeded()
    assert f'started from step 8 of {run}' in finished.stderr
    assert figures(workdir) == figures(run)[8:]  # the optimiser's state and the place in the data came along
    assert saved_steps(workdir) == [4 * 2, 12] and contents(run) == before
    assert (workdir / 'tokenizer.model').read_bytes() == (run / 'tokenizer.model').read_bytes()
    record = json.loads((workdir / 'config.json').read_text())
    assert record['fork'] == {'from': f'{run}@8', 'workdir': str(run), 'step': 8} and 'history' not in record
    # Given again it goes on by itself, with the flag and without; another origin is refused.
    commands.run('pretrain', *tiny_run(workdir, corpus, train__num_steps=13)).succeeded()
    line = commands.run('pretrain', *tiny_run(workdir, corpus), f'--fork={run}@12').error()
    assert f"belongs to another run: --fork was '{run}@8'" in line
    # Its newest step, with other settings, which are written down.
    workdir = tmp_path / 'b'
    other = {'train__num_steps': 13, 'train__batch_size': 4}
    finished = commands.run('pretrain', *tiny_run(workdir, corpus, **other), f'--fork={run}').succeeded()
    assert 'from step 12 on train.batch_size is 4, not 8' in finished.stderr and saved_steps(workdir) == [
        12,
        13,
    ]
    assert json.loads((workdir / 'config.json').read_text())['history'][0]['key'] == 'train.batch_size'


@pytest.mark.slow
def test_every_form_of_the_same_text_trains_the_same(commands, run, corpus, tmp_path):
    from array_record.python import array_record_module

    documents = corpus.read_text().split('\n<|endoftext|>\n')
    with gzip.open(tmp_path / 'corpus.jsonl.gz', 'wt') as file:
        file.writelines(json.dumps({'text': text}) + '\n' for text in documents)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / 'corpus.array_record'), 'group_size:1')
    for text in documents:
        writer.write(text.encode())
    writer.close()
    prepared = tmp_path / 'prepared'
    finished = commands.run(
        'prepare_data', f'--input={corpus}', '--separator=<|endoftext|>', f'--tokenizer={run}', '--seq_len=64',
        f'--output={prepared}', '--verify',
    ).succeeded()  # fmt: skip
    assert f'{len(documents):,} documents' in finished.stdout and 'found equal' in finished.stdout
    trained = []
    for source in (corpus, tmp_path / 'corpus.jsonl.gz', tmp_path / 'corpus.array_record', prepared):
        workdir = tmp_path / f'run_{source.name}'
        settings = {'data__tokenizer': run, 'data__validation_fraction': 0.0, 'train__num_steps': 3}
        commands.run('pretrain', *tiny_run(workdir, source, **settings)).succeeded()
        trained.append(figures(workdir))
    # What is prepared has the same rows, in an order of its own.
    assert trained[:3] == [trained[0]] * 3 and len(trained[0]) == len(trained[3]) == 3


@pytest.mark.slow
def test_whatever_meets_a_limit_on_the_size_of_files_says_so_and_does_its_work_without(
    commands, run, corpus, tmp_path
):
    settings = {'data__tokenizer': run, 'train__num_steps': 2, 'checkpoint__every': 2}
    for verb, given in (
        ('pretrain', tiny_run(tmp_path / 'run', corpus, **settings)),
        ('convert', (f'--input={run}', f'--output={tmp_path}/gguf', '--to=gguf')),
        ('quantize', (f'--input={run}', f'--output={tmp_path}/int8', '--dtype=int8')),
    ):
        # The limit is of all that a process writes, so of JAX's cache of programs, too.
        before = f"{SMALL_FILES}; import jax; jax.config.update('jax_enable_compilation_cache', False)"
        line = commands.run(verb, *given, before=before).error()
        assert ' cannot be written' in line, line
        assert line.endswith('File too large; allow larger files (ulimit -f), then start again'), line
        commands.run(verb, *given).succeeded()


def test_a_loss_that_is_not_finite_stops_the_run(commands, run, corpus, tmp_path):
    settings = {'optimizer__learning_rate': 1e30, 'checkpoint__every': 1, 'data__tokenizer': run}
    finished = commands.run('pretrain', *tiny_run(tmp_path / 'run', corpus, **settings))
    assert finished.status == 1 and 'Traceback' not in finished.stderr and not finished.stdout
    line = finished.stderr.splitlines()[-1]
    found = re.match(
        r'error: (loss|grad_norm) is (nan|inf) at step (\d+); the last checkpoint is of step (\d+)\.', line
    )
    assert found, line
    # The save that was under way is finished, and nothing later is saved.
    assert [path.name for path in (tmp_path / 'run/checkpoints').iterdir()] == [found[4]]


# What is refused: config keys that differ from a good run's (or arguments, as a list), and what the line says.
REFUSED = {
    'unknown key': (['--config.optimizer.lerning_rate=1'], 'lerning_rate; did you mean optimizer.learning_rate'),
    'wrong type': ({'train__num_steps': 'abc'}, 'train.num_steps=abc: the value must be of type int, as [0-9]+ is'),
    'no configuration': (['--config=configs/none.py:tiny', '--workdir=x'], 'name one such as configs/pretrain.py:'),
    'a family': (['--config=configs/pretrain.py:llama3', '--workdir=x'], "model 'llama3'; did you mean llama3_8b"),
    'no workdir': (['--config=configs/pretrain.py:tiny'], '--workdir is required'),
    'stray argument': (['stray', '--config=configs/pretrain.py:tiny', '--workdir=x'], "unexpected argument 'stray'"),
    'unknown preset': ({'model__preset': 'lama2_7b'}, "unknown model 'lama2_7b'; did you mean llama2_7b"),
    'unknown dtype': ({'model__dtype': 'f16'}, 'dtype=f16; choose from'),
    'unknown attention': ({'model__attention': 'flush'}, 'model.attention=flush; choose from'),
    'unknown optimizer': ({'optimizer__name': 'sgd'}, "optimizer.name is 'sgd', which is no optimizer; choose"),
    'impossible mesh': ({'mesh__tensor': 3}, 'impossible mesh .* tensor=3.* 8 devices'),
    'indivisible heads': ({'mesh__tensor': 8}, "heads' of size 4 does not divide over mesh axes tensor=8"),
    'indivisible batch': ({'train__batch_size': 12}, 'batch size 12 does not divide over the 8 devices'),
    'microbatches': ({'train__num_microbatches': 3}, 'batch_size=8 does not divide into .*num_microbatches=3'),
    'loss chunks': ({'train__loss_chunks': 7}, 'seq_len=64 does not divide into --config.train.loss_chunks=7'),
    'long sequence': ({'data__seq_len': 257}, r'=257 is more tokens than .* reads \(nano\); set it to 256 or less'),
    'weights': ({'data__weights': '1,2'}, '2 weights for 1 data sources'),
    'small vocabulary': ({'model__vocab_size': 100}, 'vocab_size=100 is less than the tokenizer needs: 320'),
    'no tokenizer': ({'data__tokenizer': 'none.model'}, 'no tokenizer at none.model'),
    'no corpus': ({'data__train': 'none.txt'}, "no file 'none.txt'"),
    'empty corpus': ({'data__train': 'empty.txt'}, "empty.txt' holds no text"),
    'not UTF-8': ({'data__train': 'latin.txt'}, 'latin.txt is not UTF-8: byte 0xe9 at offset 3'),
    'truncated ArrayRecord': ({'data__train': 'short.array_record'}, 'short.array_record is cut short'),
    'short prepared rows': ({'data__train': 'prepared'}, 'seq_len 64 is longer than the rows of .*prepared, 16'),
}  # fmt: skip


@pytest.fixture(scope='module')
def broken(folder, commands, run, corpus):
    """Files that cannot be trained on, by name."""
    from array_record.python import array_record_module

    (folder / 'empty.txt').write_text('')
    (folder / 'latin.txt').write_bytes(b'caf\xe9 ' * 100)
    short = folder / 'short.array_record'
    writer = array_record_module.ArrayRecordWriter(str(short), 'group_size:1')
    for number in range(100):
        writer.write(b'document %d' % number)
    writer.close()
    short.write_bytes(short.read_bytes()[: short.stat().st_size // 2])
    commands.run(
        'prepare_data',
        f'--input={corpus}',
        f'--tokenizer={run}',
        '--seq_len=16',
        f'--output={folder}/prepared',
    ).succeeded()
    return {name: folder / name for name in ('empty.txt', 'latin.txt', 'short.array_record', 'prepared')}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_wrong_is_one_line_and_leaves_nothing(commands, run, corpus, broken, tmp_path, case):
    wrong, message = REFUSED[case]
    workdir = tmp_path / 'a/run'
    if isinstance(wrong, list):
        arguments = (
            wrong
            if any(item.startswith('--config=') for item in wrong)
            else tiny_run(workdir, corpus) + wrong
        )
    else:
        wrong = {key: broken.get(value, value) for key, value in wrong.items()}
        arguments = tiny_run(workdir, corpus, **{'data__tokenizer': run} | wrong)
    assert re.search(message, commands.run('pretrain', *arguments, num_devices=8).error())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('key', 'value'),
    [('model.preset', 'stories_15m'), ('data.train', 'latin.txt'), ('seed', 1), ('train.batch_size', 16),
     ('optimizer.beta1', 0.8)],
)  # fmt: skip
def test_the_workdir_of_another_run_is_refused(commands, run, corpus, key, value):
    before = {path: path.stat().st_mtime_ns for path in run.rglob('*')}
    arguments = tiny_run(run, corpus, **{key.replace('.', '__'): value})
    line = commands.run('pretrain', *arguments).error()
    assert f'belongs to another run: --config.{key} was' in line and str(value) in line
    assert ('--override=' in line) == (key != 'model.preset')
    assert {path: path.stat().st_mtime_ns for path in run.rglob('*')} == before


def test_an_empty_folder_that_was_there_stays_so(commands, corpus, tmp_path):
    wrong = tiny_run(tmp_path, corpus, model__vocab_size=100)  # which shows when a tokenizer has been trained
    assert 'vocab_size=100 is less than the tokenizer needs' in commands.run('pretrain', *wrong).error()
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())


def test_changed_documents_are_refused(commands, run, tmp_path, folder, corpus):
    text = corpus.read_text()
    try:
        corpus.write_text(text + ' more')
        assert 'have changed since it was started' in commands.run('pretrain', *tiny_run(run, corpus)).error()
    finally:
        corpus.write_text(text)


def test_other_commands_refuse_in_one_line(commands, run, broken, corpus, tmp_path):
    # Once without the short cut: the status and the output are those of the command itself.
    assert 'is not a checkpoint' in run_python('generate', f'--checkpoint={tmp_path}', '--prompt=a').error()
    assert '--prompt is required' in commands.run('generate', f'--checkpoint={run}').error()
    without = commands.run('serve', before="import sys; sys.modules['starlette.requests'] = None")
    assert "needs the package starlette: pip install 'llama_jax[serve]'" in without.error()
    sources = f'--input={corpus},{broken["latin.txt"]}'
    output = tmp_path / 'a/out'
    line = commands.run(
        'prepare_data', sources, f'--tokenizer={run}', '--seq_len=64', f'--output={output}'
    ).stderr
    assert 'latin.txt is not UTF-8' in line.splitlines()[-1] and 'Traceback' not in line
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_benchmark_writes_its_figures(commands, tmp_path):
    file = tmp_path / 'figures.json'
    small = ['--model=tiny', '--batch_size=2', '--seq_len=64', '--rounds=1', '--steps=1', '--nopeer']
    finished = commands.run('benchmark', '--suite=train', *small, f'--json={file}').succeeded()
    figures = json.loads(file.read_text())
    assert all(not isinstance(value, dict | list) for value in figures.values())
    assert figures['llama_jax_tokens_per_second'] > 0 and 0 < figures['mfu_causal'] < figures['mfu_full']
    assert 'llama_jax' in finished.stdout and figures['device'] in finished.stdout


@pytest.mark.slow
def test_chosen_steps_are_traced(commands, corpus, tmp_path):
    traced = dict(log__profile_start=1, log__profile_steps=2, train__num_steps=4)
    commands.run('pretrain', *tiny_run(tmp_path / 'run', corpus, **traced)).succeeded()
    assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))


def test_wandb_is_asked_for_by_name(commands, corpus, tmp_path):
    arguments = tiny_run(tmp_path / 'run', corpus, log__wandb='project')
    missing = "import sys; sys.modules['wandb'] = None"
    assert "pip install 'llama_jax[wandb]'" in commands.run('pretrain', *arguments, before=missing).error()
    assert not (tmp_path / 'run').exists()


GREEDY = ['--prompt=ba', '--max_new_tokens=16', '--temperature=0']


@pytest.fixture(scope='module')
def completed(commands, run):
    """What the run's model says."""
    return commands.run('generate', f'--checkpoint={run}', *GREEDY).succeeded().stdout


@pytest.mark.parametrize(
    'to', ['orbax', 'huggingface', *(pytest.param(to, marks=pytest.mark.slow) for to in ('meta', 'gguf'))]
)
def test_convert_writes_what_generates_the_same_text(commands, run, completed, tmp_path, to):
    output = tmp_path / ('model.gguf' if to == 'gguf' else 'model')
    line = commands.run(
        'convert', f'--input={run}', f'--output={output}', f'--to={to}', '--verify'
    ).succeeded()
    assert f'weights as {to}, read back and found equal' in line.stdout
    text = commands.run('generate', f'--checkpoint={output}', *GREEDY).succeeded().stdout
    assert text == completed and text.strip()


def test_convert_writes_the_mean_of_steps_of_a_run(commands, run, tmp_path):
    steps, output = [f'{run}/checkpoints/{step}' for step in (8, 12)], tmp_path / 'model.gguf'
    commands.run(
        'convert', f'--input={",".join(steps)}', f'--output={output}', '--to=gguf', '--verify'
    ).succeeded()
    found, *parts = (
        pretrained.open(path).source.tensors['blocks/attention/q'][0].read() for path in (output, *steps)
    )
    np.testing.assert_allclose(
        found, (parts[0] + parts[1]) / 2, atol=1e-7
    )  # fp32's rounding of weights of 0.02


@pytest.mark.slow
def test_convert_writes_adapters_and_what_they_make_of_their_base(commands, run, tmp_path):
    config = pretrained.open(run).config
    adapter_by_hand(
        tmp_path / 'a', {'modules_to_save': ['model.norm']}, config=config, base=tmp_path / 'gone'
    )
    tensors = load_file(tmp_path / 'a/adapter_model.safetensors')
    norm = np.full(config.embed_dim, 2, np.float32)
    save_file(
        tensors | {'base_model.model.model.norm.weight': norm}, tmp_path / 'a/adapter_model.safetensors'
    )
    options = [f'--input={tmp_path}/a', f'--base={run}']
    line = commands.run('convert', *options[:1], f'--output={tmp_path}/x', '--to=meta').error()
    assert 'gone, which is no path here' in line
    line = commands.run('convert', *options, f'--output={tmp_path}/x', '--to=gguf_adapter').error()
    assert 'final_norm was trained whole' in line and not (tmp_path / 'x').exists()
    commands.run('convert', *options, f'--output={tmp_path}/again', '--to=peft').succeeded()
    commands.run(
        'convert', *options, f'--output={tmp_path}/whole', '--to=huggingface', '--verify'
    ).succeeded()
    again, whole = (pretrained.open(tmp_path / name) for name in ('again', 'whole'))
    assert again.base.path == epath.Path(run) and again.tokenizer.encode('def f') == whole.tokenizer.encode(
        'def f'
    )
    for path in ('blocks/attention/q', 'final_norm', 'embed'):
        found, wanted = (checkpoint.source.tensors[path][0].read() for checkpoint in (again, whole))
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_convert_refuses_in_one_line_and_leaves_nothing(commands, run, tmp_path):
    output = f'--output={tmp_path}/a/out'
    for arguments, message in {
        (f'--input={tmp_path}/none', '--to=meta'): 'no checkpoint at',
        (f'--input={run}', '--to=meta', '--dtype=q8_0'): 'dtype q8_0 is not one that meta holds',
        (f'--input={run}', '--to=meta', '--model_parallel=3'): 'model_parallel',
        (
            f'--input={run}',
            '--to=gguf',
            '--model_parallel=3',
        ): "--model_parallel splits files of Meta's format; --to=gguf",
        (f'--input={run}', '--to=orbax', '--chat'): '--chat: orbax has no place for a chat template',
        (f'--input={run}', '--to=meta', '--xla_options=x'): "Unknown command line flag 'xla_options'",
        (f'--input={run}', '--to=torch'): '--to',
        (f'--input={run}/checkpoints/5', '--to=meta'): 'the steps there are [4, 8, 12]',
        (f'--input={run},', '--to=meta'): 'names an empty path',
        (f'--input={run}', '--to=peft'): 'is a whole model; adapters are written so',
        (f'--input={run}', '--to=meta', f'--base={run}'): 'is no adapter; a base',
    }.items():
        assert message in commands.run('convert', *arguments, output).error()
        assert not any(tmp_path.iterdir())
    offline = commands.run(
        'convert',
        '--input=hf://some/model',
        '--to=meta',
        output,
        before="import os; os.environ['HF_HUB_OFFLINE'] = '1'",
    )
    assert 'hf://some/model cannot be downloaded' in offline.error()


def test_a_place_that_cannot_be_written_is_one_line(commands, run, corpus, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    line = commands.run('convert', f'--input={run}', f'--output={tmp_path}/file/out', '--to=meta').error()
    assert f'{tmp_path}/file/out cannot be written' in line
    finished = commands.run('pretrain', *tiny_run(tmp_path / 'file/run', corpus, data__tokenizer=run))
    assert f'file/run cannot be written: {tmp_path}/file is no folder' in finished.error()


@pytest.mark.slow
def test_benchmark_of_conversions_writes_its_figures(commands, tmp_path):
    file = tmp_path / 'figures.json'
    commands.run(
        'benchmark', '--suite=convert', '--convert_models=tiny', f'--scratch={tmp_path}', f'--json={file}'
    ).succeeded()
    figures = json.loads(file.read_text())
    for name in ('meta_to_orbax', 'orbax_to_meta', 'meta_to_huggingface', 'huggingface_to_gguf_q8_0'):
        assert figures[f'tiny_{name}_times_copy'] > 0 and figures[f'tiny_{name}_peak_rss_mb'] > 50
    assert [path.name for path in tmp_path.iterdir()] == ['figures.json']
