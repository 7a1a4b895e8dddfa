"""Policies trained on their own answers by the command: resuming, adapters, what is refused."""

import json
import pathlib

import pytest

from llama_jax.rl.iteration import Iteration
from tests.command_line import saved_steps
from tests.policy_runs import arguments, begin, logged


@pytest.fixture(scope='module')
def begun(commands, folder, corpus) -> tuple[pathlib.Path, pathlib.Path]:
    return begin(commands, folder, corpus)


@pytest.fixture(scope='module')
def base(begun) -> pathlib.Path:
    return begun[0]


@pytest.fixture(scope='module')
def prompts(begun) -> pathlib.Path:
    return begun[1]


@pytest.mark.slow
@pytest.mark.parametrize('recipe', ['ppo.py:nano', 'grpo.py:nano'])
def test_a_policy_is_trained_and_resumes_within_an_iteration(commands, folder, base, prompts, recipe):
    name = recipe.partition('.')[0]
    options = {'recipe': recipe, 'data__validation': prompts}
    whole, broken = folder / f'{name}_whole', folder / f'{name}_broken'
    shown = commands.run('ppo', *arguments(whole, base, prompts, **options)).succeeded()
    assert 'reward' in shown.stdout
    planned, drawn = shown.stderr.index('generate holds'), shown.stderr.index('step 0: iteration 0')
    assert planned < shown.stderr.index('update holds') < drawn, 'memory is told before an answer is drawn'
    assert 'waiting for' not in shown.stderr
    commands.run('ppo', *arguments(broken, base, prompts, **options, train__num_steps=3)).succeeded()
    assert saved_steps(broken) == [2, 3]  # the last is within an iteration
    commands.run('ppo', *arguments(broken, base, prompts, **options)).succeeded()
    lines, again = logged(whole), logged(broken)
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    times = ('tokens_per', 'mfu', 'share_', 'data_wait')
    for one, other in zip(lines, again, strict=True):
        for key in one.keys() - {'learning_rate'}:
            if not key.startswith(times) and (one['step'], key) != (3, 'held'):
                assert other[key] == one[key], (one['step'], key)
    first, last = lines[0], lines[-1]
    assert first['ratio_gap'] < 1e-5 and first['clipped_low'] == first['clipped_high'] == 0
    assert abs(first['k1']) < 1e-6
    assert {'reward', 'kl', 'sampler_gap', 'held_out_reward', 'share_rollout', 'stopped'} <= last.keys()
    assert last['sampler_gap_max'] < 1e-4
    assert (whole / 'reward_over_kl.png').stat().st_size and (whole / 'samples').is_dir()
    iteration = Iteration.from_bytes((whole / 'rollouts/00000002.npz').read_bytes())
    assert len(iteration.answers) == 16
    commands.run('generate', f'--checkpoint={whole}', '--prompt=ba', '--max_new_tokens=2').succeeded()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('weights', 'temperature', 'mesh'),
    [('nf4', 0.7, {}), ('nf4', 1.2, {'mesh__fsdp': 2, 'mesh__tensor': 2})],
)
def test_adapters_begin_at_their_base_and_move(commands, folder, base, prompts, weights, temperature, mesh):
    """Policy, reference and values beside one base, at a temperature, on one device or on fsdp x tensor."""
    workdir, exam = folder / f'lora_{weights}_{temperature}', folder / 'exam.txt'
    exam.write_text('ba dio fa ku gilly')
    run = arguments(
        workdir, base, prompts, lora__rank=4, model__weights=weights, rollout__temperature=temperature,
        algorithm__constants='epochs=2', train__num_steps=4, eval__tasks=f'perplexity:{exam}', eval__every=2,
        **mesh,
    )  # fmt: skip
    commands.run('ppo', *run, num_devices=4 if mesh else 1).succeeded()
    first, *_, last = logged(workdir)
    assert first['ratio_gap'] < 1e-5 and first['clipped_low'] == first['clipped_high'] == 0
    assert abs(first['k1']) < 1e-6 and abs(first['k3']) < 1e-6
    assert last['ratio_gap'] > 1e-4 and last['k3'] > 0
    assert last['sampler_gap'] < 1e-4
    taken = {
        line['step']: line[name] for line in logged(workdir) for name in line if 'word_perplexity' in name
    }
    assert taken.keys() == {2, 4} and len(set(taken.values())) == 2, 'exams are of the weights on the way'
    shown = commands.run('generate', f'--checkpoint={workdir}', '--prompt=ba', '--max_new_tokens=2')
    shown.succeeded()


@pytest.mark.slow
def test_preflight_compiles_the_three_programs(commands, folder):
    file = folder / 'preflight.json'
    shown = commands.run(
        'preflight', '--config=configs/ppo.py:nano', '--topology=v5e:2x2', '--config.data.seq_len=128',
        '--config.data.tokenizer=', '--config.model.vocab_size=512', '--config.rollout.mesh=tensor=4',
        '--config.rollout.slots=4', f'--json={file}', '--config.lora.rank=2',
    ).succeeded()  # fmt: skip
    assert "the sampler's copy of the weights" in shown.stdout
    report = json.loads(file.read_text())
    for name in ('train', 'generate', 'score'):
        assert report[name]['fits'] and 'all-gather' in report[name]['collectives']
    matrices, norms = 106_816 - 5 * 64, 5 * 64  # of nano; a device has a fourth of matrices, and whole norms
    adapters = (
        2 * 4_096 + 64
    )  # of the policy and of the values, whose score is trained whole; all split in four
    # Small models compute in float32.
    assert not report['generate']['gathers_weights'], 'each device keeps its share of the copy'
    assert report['generate']['copy'] == 4 * matrices / 4 + 4 * norms
    # The base is in bfloat16, adapters and the optimiser's two moments of them in float32; it counts its steps twice.
    state = 2 * 4 * adapters / 4 + 2 * 4
    assert report['generate']['beside'] == 2 * matrices / 4 + 4 * norms + 4 * adapters / 4 + state
    assert report['score']['beside'] == state


REFUSED = {
    'no score': ({'algorithm__rewards': 'BASE'}, 'has no score: it is a language model'),
    'no values': ({'algorithm__values_from': 'BASE'}, 'is a language model, which has no score'),
    'no room': (
        {'data__seq_len': 8},
        '4 of 4 prompts are longer than 3 tokens, which is the context of 9 less max_new_tokens, 6',
    ),
    'no variance': (
        {'recipe': 'grpo.py:nano,dapo', 'algorithm__rewards': 'missing_stop=0', 'rollout__max_new_tokens': 1},
        '10 times others were drawn, and still',
    ),
    'no memory': (
        {'rollout__slots': 10**8},
        '--config.rollout.mesh=tensor=N, or take more devices',
    ),
    'another sampler': ({'rollout__mesh': 'tensor=3'}, 'tensor=3'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', REFUSED)
def test_what_is_wrong_is_told_in_a_line(commands, folder, base, prompts, case):
    overrides, message = REFUSED[case]
    overrides = {key: str(base) if value == 'BASE' else value for key, value in overrides.items()}
    run = arguments(folder / f'refused_{case.replace(" ", "_")}', base, prompts, **overrides)
    assert message in commands.run('ppo', *run).error()


@pytest.mark.slow
def test_a_run_is_not_gone_on_with_otherwise(commands, folder, base, prompts):
    workdir = folder / 'fixed'
    commands.run('ppo', *arguments(workdir, base, prompts, train__num_steps=1)).succeeded()
    for key, value in {
        'algorithm__name': 'reinforce', 'algorithm__rewards': 'missing_stop', 'rollout__samples': 2
    }.items():  # fmt: skip
        error = commands.run('ppo', *arguments(workdir, base, prompts, **{key: value})).error()
        assert f'--config.{key.replace("__", ".")} was' in error
