"""Reward models and policies trained on pairs by the commands: files, resuming, what is refused."""

import json
import pathlib

import numpy as np
import pytest

from tests.command_line import tiny_run

WORDS = ('bad', 'ban', 'balla', 'dio', 'dun', 'fa', 'farst', 'gen', 'gilly', 'ku')


@pytest.fixture(scope='module')
def base(commands, folder, corpus) -> pathlib.Path:
    """A language model of a few steps."""
    commands.run('pretrain', *tiny_run(folder / 'base', corpus, train__num_steps=2)).succeeded()
    return folder / 'base'


@pytest.fixture(scope='module')
def pairs(folder) -> pathlib.Path:
    """Preferred are answers of the first words."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(60):
        better, worse = (
            ' '.join(rng.choice(half, size=rng.integers(2, 5))) for half in (WORDS[:5], WORDS[5:])
        )
        rating = ('significantly better', 'slightly better')[number % 2]
        lines.append(
            {
                'prompt': f'{number} {rng.choice(WORDS)}',
                'chosen': better,
                'rejected': worse,
                'rating': rating,
                'chosen_safe': True,
            }
        )
    file = folder / 'pairs.jsonl'
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return file


def arguments(command: str, recipe: str, workdir, base, pairs, **overrides) -> list[str]:
    config = {
        'data__train': pairs, 'data__format': 'plain', 'data__seq_len': 128, 'data__validation_fraction': 0.2,
        'train__batch_size': 4, 'train__num_steps': 4, 'train__num_epochs': 0,
        'model__dtype': 'float32',
        'optimizer__learning_rate': 1e-3, 'optimizer__warmup_steps': 1, 'checkpoint__every': 2, 'log__every': 1,
        'log__tensorboard': False, 'model__vocab_size': 320,
    } | overrides  # fmt: skip
    config |= {'data__weights': ''} if command == 'reward_model' else {}
    return [
        command, f'--config=configs/{command}.py:{recipe}', f'--workdir={workdir}', f'--checkpoint={base}',
        *(f'--config.{key.replace("__", ".")}={value}' for key, value in config.items()),
    ]  # fmt: skip


def logged(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_a_reward_model_is_trained_resumed_and_read_again(commands, folder, base, pairs):
    workdir = folder / 'reward'
    run = arguments('reward_model', 'nano,helpfulness', workdir, base, pairs)
    commands.run(*run, '--config.train.num_steps=2').succeeded()
    shown = commands.run(*run).succeeded()
    steps = logged(workdir)
    assert [item['step'] for item in steps] == [1, 2, 3, 4]
    assert {'accuracy', 'margin', 'validation_accuracy'} <= steps[-1].keys()
    report, model = (json.loads((workdir / name).read_text()) for name in ('report.json', 'model.json'))
    assert report['accuracy_by_margin'].keys() == {'1', '3'} and 0 <= report['bag_of_words'] <= 1
    assert (
        model['scores'] == {'mean': report['mean'], 'std': report['std']} and model['config']['scalar_head']
    )
    assert (workdir / 'preferences.png').stat().st_size and 'the longer is better' in shown.stdout
    assert 'Anthropic Harmless' in shown.stdout

    # It is what it is: no model of text, but a start for another reward model; and transformers reads it.
    assert 'is a reward model' in commands.run(
        'generate', f'--checkpoint={workdir}', '--prompt=ba', '--max_new_tokens=2'
    ).error()  # fmt: skip
    refused = commands.run(*arguments('dpo', 'nano', folder / 'no', workdir, pairs)).error()
    assert 'is a reward model, which gives scores and no text; give the language model' in refused
    assert not (folder / 'no').exists()
    commands.run(
        'convert', f'--input={workdir}', f'--output={folder / "hf"}', '--to=huggingface', '--verify'
    ).succeeded()  # fmt: skip
    again = arguments(
        'reward_model', 'nano,safety', folder / 'again', folder / 'hf', pairs, train__num_steps=1,
        data__validation=pairs,
    )  # fmt: skip
    commands.run(*again).succeeded()
    (first,) = logged(folder / 'again')
    assert first['step'] == 1 and np.isfinite(first['ranking_loss'])

    # What orders pairs at the end of a run orders them when it is evaluated; a policy does by its log-probabilities.
    report = json.loads((folder / 'again' / 'report.json').read_text())
    task, found = f'preference:{pairs}', {}
    for name, checkpoint, *given in (('scores', folder / 'again'), ('policy', base, '--chat_format=plain')):
        commands.run(
            'evaluate', f'--checkpoint={checkpoint}', f'--tasks={task}', *given, '--dtype=float32',
            f'--output={folder / name}',
        ).succeeded()  # fmt: skip
        found[name] = json.loads((folder / name / 'results.json').read_text())[task]
    assert found['scores']['n'] == found['policy']['n'] == 60
    for name in ('accuracy', 'mean', 'std', 'accuracy_by_margin'):
        assert found['scores']['score'][name] == pytest.approx(report[name], abs=1e-5)
    assert {'accuracy_summed', 'accuracy_mean', 'accuracy_relative'} <= found['policy'].keys()
    (folder / 'text.txt').write_text('ba dio')
    refused = commands.run(
        'evaluate', f'--checkpoint={folder / "again"}', f'--tasks={task},perplexity:{folder}/text.txt',
        f'--output={folder / "o"}',
    ).error()  # fmt: skip
    assert 'is a reward model, which gives scores and no text' in refused


@pytest.mark.slow
@pytest.mark.parametrize('reference', ['live', 'kept'])
def test_a_policy_begins_at_log_2_and_resumes(commands, folder, base, pairs, reference):
    workdir = folder / f'dpo_{reference}'
    run = arguments(
        'dpo', 'nano', workdir, base, pairs, loss__reference=reference, loss__nll=0.0,
        data__share_prompt=reference == 'kept',
    )  # fmt: skip
    commands.run(*run, '--config.train.num_steps=2').succeeded()
    kept = workdir / 'reference.npz'
    before = kept.stat().st_mtime_ns if reference == 'kept' else None
    commands.run(*run).succeeded()
    steps = logged(workdir)
    assert [item['step'] for item in steps] == [1, 2, 3, 4]
    assert steps[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[-1]['loss'] < steps[0]['loss'] and steps[-1]['accuracy'] > 0.5
    if reference == 'kept':
        assert kept.stat().st_mtime_ns == before  # computed once
    refused = commands.run(*run, '--config.loss.beta=0.2').error()
    assert '--config.loss.beta was 0.1 and is 0.2' in refused


@pytest.mark.slow
@pytest.mark.parametrize('reference', ['live', 'kept'])
def test_answers_that_were_judged_alone_train_a_policy(commands, folder, base, reference):
    rng, file, workdir = np.random.default_rng(1), folder / 'judged.jsonl', folder / f'kto_{reference}'
    lines = []
    for number in range(80):
        half = WORDS[5 * (number % 2) :][:5]
        answer = ' '.join(rng.choice(half, size=rng.integers(2, 5)))
        lines.append(
            {'prompt': f'{number} {rng.choice(WORDS)}', 'completion': answer, 'label': number % 2 == 0}
        )
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    run = arguments(
        'dpo', 'nano,kto', workdir, base, file, loss__reference=reference, train__num_microbatches=2
    )
    commands.run(*run, '--config.train.num_steps=2').succeeded()
    shown = commands.run(*run).succeeded()
    steps = logged(workdir)
    assert [item['step'] for item in steps] == [1, 2, 3, 4]
    # 1 - sigmoid(0), with nothing to compare with.
    assert steps[0]['loss'] == pytest.approx(0.5, abs=1e-6) and steps[0]['baseline'] == pytest.approx(
        0, abs=1e-5
    )
    assert steps[-1]['loss'] < 0.5 and steps[-1]['reward'] > 0 and 'validation_reward' in steps[-1]
    assert 'good above others' in shown.stdout
    report = json.loads((workdir / 'report.json').read_text())
    assert 0 <= report['above'] <= 1 and report['answers'] > report['good'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('command', ['reward_model', 'dpo'])
def test_adapters_are_trained_on_pairs_too(commands, folder, base, pairs, command):
    workdir = folder / f'{command}_lora'
    without_margin = {'data__key_map': 'prompt=prompt,chosen=chosen,rejected=rejected'}
    settings = {'loss__nll': 0.0} if command == 'dpo' else without_margin
    run = arguments(command, 'nano', workdir, base, pairs, lora__rank=2, model__weights='int8', **settings)
    commands.run(*run, '--config.train.num_steps=2').succeeded()
    said = commands.run(*run).succeeded().stderr
    assert ('--config.reward.margin=large changes nothing' in said) == (command == 'reward_model')
    steps = logged(workdir)
    assert [item['step'] for item in steps] == [1, 2, 3, 4]
    if command == 'dpo':  # its reference is the base without adapters
        assert steps[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    commands.run(
        'convert', f'--input={workdir}', f'--output={folder / command}', '--to=huggingface'
    ).succeeded()
    if command == 'dpo':  # the reference is the base with the first adapters, beside new ones or all weights
        for rank, kept in ((2, 'int8'), (2, 'bfloat16'), (0, 'int8')):
            own = folder / f'from_adapters_{rank}_{kept}'
            changed = dict(settings, lora__rank=rank, model__weights=kept, train__num_steps=1)
            commands.run(*arguments(command, 'nano', own, workdir, pairs, **changed)).succeeded()
            assert logged(own)[0]['loss'] == pytest.approx(np.log(2), abs=1e-6)
    assert (folder / command / 'model.safetensors').stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ('command', 'recipe', 'has_pass'), [('reward_model', '', 0), ('dpo', '', 0), ('dpo', ',kto', 1)]
)
def test_preflight_compiles_what_is_trained_on_pairs(commands, command, recipe, has_pass):
    shown = commands.run(
        'preflight', f'--config=configs/{command}.py:nano{recipe}', '--topology=v5e:2x2', '--config.data.seq_len=128',
        '--config.train.batch_size=4', '--config.data.tokenizer=', '--config.model.vocab_size=512',
    ).succeeded()  # fmt: skip
    assert shown.stdout.count('fits') == 1 + has_pass
    assert shown.stdout.count('the pass before each update: fits') == has_pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ('command', 'overrides', 'message'),
    [
        ('reward_model', {'reward__margin': 'big'}, "unknown margin 'big'; choose from none, small, large"),
        ('dpo', {'loss__kind': 'sigmod'}, "unknown loss 'sigmod'; did you mean sigmoid"),
        ('dpo', {'loss__reference': 'old'}, '--config.loss.reference=old is neither live nor kept'),
        ('dpo', {'data__too_long': 'cut'}, "too_long is 'cut'; of pairs it is drop or oldest"),
        (
            'dpo',
            {'data__seq_len': 8, 'train__loss_chunks': 1},
            'none fits into a row of 8 tokens: the longest takes',
        ),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    commands, folder, base, pairs, command, overrides, message
):
    run = arguments(command, 'nano', folder / 'refused', base, pairs, **overrides)
    assert message in commands.run(*run).error()
    assert not (folder / 'refused').exists()
