"""What policy gradients can be told otherwise, by the command: values, meshes, limits, the price of divergence."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import pretrained
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.rl.advantages import next_beta
from llama_jax.rl.iteration import Iteration
from tests.policy_runs import arguments, begin, logged

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def begun(commands, folder, corpus) -> tuple[pathlib.Path, pathlib.Path]:
    return begin(commands, folder, corpus)


@pytest.fixture(scope='module')
def base(begun) -> pathlib.Path:
    return begun[0]


@pytest.fixture(scope='module')
def prompts(begun) -> pathlib.Path:
    return begun[1]


def judge(commands, folder, base, name, **overrides) -> pathlib.Path:
    """A reward model of few steps."""
    pairs = folder / 'pairs.jsonl'
    words = ('dio', 'fa', 'ku', 'gilly', 'bad', 'ban')
    lines = [{'prompt': f'ba {a}', 'chosen': f'{b} ba', 'rejected': f'fa {b}'} for a in words for b in words]
    pairs.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    config = {
        'data__train': pairs, 'data__weights': '', 'data__format': 'plain', 'data__seq_len': 64,
        'data__validation_fraction': 0.1, 'train__batch_size': 4, 'train__num_steps': 4, 'train__num_epochs': 0,
        'model__dtype': 'float32', 'optimizer__learning_rate': 1e-2, 'optimizer__warmup_steps': 1,
        'reward__margin': 'none', 'log__tensorboard': False, 'model__vocab_size': 320,
    } | overrides  # fmt: skip
    workdir = folder / name
    commands.run(
        'reward_model', '--config=configs/reward_model.py:nano', f'--workdir={workdir}', f'--checkpoint={base}',
        *(f'--config.{key.replace("__", ".")}={value}' for key, value in config.items()),
    ).succeeded()  # fmt: skip
    return workdir


def first_iteration(workdir) -> Iteration:
    return Iteration.from_bytes((workdir / 'rollouts/00000000.npz').read_bytes())


def scores(workdir, prompt, answer) -> np.ndarray:
    """By a reward model, before each token of an answer."""
    config, params, _ = pretrained.load(workdir)
    model = LlamaForRewardModel(config, dtype=jnp.float32)
    found = model.apply({'params': params}, jnp.asarray(np.concatenate([prompt, answer])[None]))
    return np.asarray(found)[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize('kind', ['whole', 'adapters'])
def test_values_begin_as_a_reward_model_on_the_scale_of_what_comes(commands, folder, base, prompts, kind):
    """Scaled by the first answers; at a learning rate of 0 they stay so, and so they are where a run goes on."""
    own = {'lora__rank': 4, 'model__weights': 'float32'} if kind == 'adapters' else {}
    model = judge(commands, folder, base, f'judge_{kind}', **own)
    workdir = folder / f'values_{kind}'
    run = arguments(
        workdir, base, prompts, algorithm__values_from=model, algorithm__rewards=model,
        algorithm__constants='value_rate=0', **own,
    )  # fmt: skip
    commands.run('ppo', *run, '--config.train.num_steps=1').succeeded()  # within the first iteration
    shown = commands.run('ppo', *run).succeeded()
    assert ("adapters beside the policy's base, which it shares" in shown.stderr) == (kind == 'adapters')
    iteration = first_iteration(workdir)
    ends = [
        scores(model, prompt, np.append(answer, 0))[-1]
        for prompt, answer in zip(iteration.prompts, iteration.answers, strict=True)
    ]
    assert iteration.figures['reward'] == pytest.approx(np.mean(ends), abs=1e-5)
    came, judged = [], []
    for place, end in enumerate(ends):
        away = iteration.old[place].astype(np.float64) - iteration.reference[place]
        came += [end - iteration.beta * away[token:].sum() for token in range(len(away))]
        judged += [*scores(model, iteration.prompts[place], iteration.answers[place])]
    (slope, _), *_ = np.linalg.lstsq(np.stack([judged, np.ones(len(judged))], 1), np.array(came), rcond=None)
    assert slope > 0.01
    # Of fp32 scores, packed and alone.
    assert iteration.figures['value_slope'] == pytest.approx(slope, rel=1e-3)
    before = 1 - np.var(np.array(came) - judged) / np.var(came)
    assert iteration.figures['explained_variance_before'] == pytest.approx(before, abs=1e-3)
    later = Iteration.from_bytes((workdir / 'rollouts/00000002.npz').read_bytes())
    for drawn, place in ((iteration, 0), (iteration, 7), (later, 3)):
        want = iteration.figures['value_slope'] * scores(model, drawn.prompts[place], drawn.answers[place])
        # Sums of fp32, packed and alone.
        np.testing.assert_allclose(drawn.values[place], want, atol=2e-5)
    assert max(np.ptp(one) for one in iteration.values) > 0.01
    if kind == 'adapters':
        for name, other, message in (
            ('rank', {'lora__alpha': 2.0}, 'adapters of scale 4.0, the policy'),
            ('kept', {'model__weights': 'bfloat16'}, 'adapters of weights float32, the policy'),
        ):
            changed = own | other
            run = arguments(folder / name, base, prompts, algorithm__values_from=model, **changed)
            assert message in commands.run('ppo', *run).error()


def test_a_sampler_of_another_mesh_draws_the_same(commands, folder, base, prompts):
    """Training on fsdp=8; generation there too, or on tensor=8."""
    found = []
    for name, own in (
        ('same', {}), ('other', {'rollout__mesh': 'tensor=8', 'rollout__axis_rules': 'kv_heads='})
    ):  # fmt: skip
        workdir = folder / f'mesh_{name}'
        run = arguments(workdir, base, prompts, mesh__fsdp=8, train__num_steps=2, **own)
        commands.run('ppo', *run, num_devices=8).succeeded()
        found.append((first_iteration(workdir), logged(workdir)))
        begun = found[-1][1][0]
        assert begun['ratio_gap'] < 1e-5 and begun['clipped_low'] == begun['clipped_high'] == 0
    (one, lines), (other, others) = found
    for a, b in zip(one.answers, other.answers, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(one.sampled, other.sampled, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(lines, others, strict=True):
        for name in ('loss', 'k1', 'grad_norm', 'reward', 'entropy'):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), name


def test_an_iteration_ends_at_its_limit_and_each_is_logged(commands, folder, base, prompts):
    workdir = folder / 'limited'
    constants = 'epochs=4,kl_limit=1e-9'
    run = arguments(workdir, base, prompts, algorithm__constants=constants, rollout__batch_size=16)
    commands.run('ppo', *run).succeeded()
    lines = logged(workdir)
    files = sorted(int(file.stem) for file in (workdir / 'rollouts').iterdir())
    assert files[-1] == 3, 'each minibatch is of an iteration of its own'
    assert len({line['reward'] for line in lines}) > 1 and all('kl' in line for line in lines)
    # Off where it is far enough away: all of the eight minibatches are of the first.
    far = folder / 'not_limited'
    commands.run(
        'ppo', *arguments(far, base, prompts, algorithm__constants='epochs=4,kl_limit=1e9')
    ).succeeded()
    assert [file.stem for file in (far / 'rollouts').iterdir()] == ['00000000']


def test_beta_follows_the_divergence(commands, folder, base, prompts):
    workdir, target = folder / 'followed', 0.05
    run = arguments(
        workdir, base, prompts, algorithm__constants=f'beta_target={target}', algorithm__beta=0.2, train__num_steps=8,
        optimizer__learning_rate=3e-3, checkpoint__every=4,
    )  # fmt: skip
    commands.run('ppo', *(part.replace('num_steps=8', 'num_steps=4') for part in run)).succeeded()
    commands.run('ppo', *run).succeeded()  # where it stands outlasts a restart
    of_iterations = [line for line in logged(workdir) if 'beta' in line]
    assert len(of_iterations) == 4 and of_iterations[0]['beta'] == 0.2
    for line, following in zip(of_iterations, of_iterations[1:], strict=False):
        assert following['beta'] == pytest.approx(next_beta(line['beta'], line['kl'], target, 10), rel=1e-6)
    assert len({line['beta'] for line in of_iterations}) == 4


def test_a_run_ends_that_gets_no_better(commands, folder, base, prompts):
    workdir = folder / 'patient'
    run = arguments(
        workdir, base, prompts, data__validation=prompts, algorithm__constants='patience=2', eval__every=2,
        algorithm__rewards='missing_stop=0', train__num_steps=40,
    )  # fmt: skip
    shown = commands.run('ppo', *run).succeeded()
    assert 'measurements ago; training ends' in shown.stderr
    steps = [line['step'] for line in logged(workdir)]
    assert steps[-1] == 6, 'a first measurement, and two that are no better'
    report = json.loads((workdir / 'report.json').read_text())
    assert report['step'] == 6 and report['held_out_reward'] == {'first': 0.0, 'last': 0.0}
    again = commands.run('ppo', *run).succeeded()  # nor later
    assert 'training ends' in again.stderr and logged(workdir)[-1]['step'] == 6
