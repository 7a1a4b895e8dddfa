"""What the suite `rl` takes turns with: rollouts, scores and iterations of ours, on random weights."""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import grpo as grpo_config
from experiments.benchmark.convert import make_checkpoint
from experiments.benchmark.peak import run_measured
from experiments.benchmark.turns import Turn
from experiments.policy import drawing as drawing_of_run
from experiments.policy.beginning import begin_policy
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.pretrained import load_tokenizer
from llama_jax.rl.reward_model import ModelReward
from llama_jax.rl.rollout import Rollout, Sampling, rollouts, sampler_weights

_SEED = 0


@dataclasses.dataclass(frozen=True)
class Size:
    """What all parts are of.

    Attributes:
      config: of the model.
      prompts: of an iteration.
      samples: answers to each.
      prompt: tokens of one.
      answer: tokens of one.
    """

    config: LlamaConfig
    prompts: int
    samples: int
    prompt: int
    answer: int

    @property
    def answers(self) -> int:
        """To all prompts."""
        return self.prompts * self.samples

    @property
    def new_tokens(self) -> int:
        """Of all answers."""
        return self.answers * self.answer

    @property
    def row(self) -> int:
        """Tokens of a row of answers with their prompts: four, where the model reads so many."""
        return min(self.config.max_seq_len, 4 * (self.prompt + self.answer))

    @property
    def fitting(self) -> LlamaConfig:
        """The model with room for a prompt and its answer."""
        return dataclasses.replace(
            self.config, max_seq_len=max(self.config.max_seq_len, self.prompt + self.answer)
        )


def random_prompts(size: Size) -> np.ndarray:
    """Token ids, none of which ends a text."""
    rng = np.random.default_rng(_SEED)
    return rng.integers(3, size.config.vocab_size, (size.prompts, size.prompt), dtype=np.int32)


def random_answers(size: Size) -> list[Rollout]:
    """Answers of a quarter of the most tokens up to all, as drawn ones are of many lengths."""
    rng, made = np.random.default_rng(_SEED), []
    for record, prompt in enumerate(random_prompts(size)):
        for sample in range(size.samples):
            length = int(rng.integers(max(1, size.answer // 4), size.answer + 1))
            ids = tuple(rng.integers(3, size.config.vocab_size, length).tolist())
            made.append(Rollout(record, sample, tuple(prompt.tolist()), ids, (0.0,) * length, False, ''))
    return made


def drawing(size: Size, *, together: bool = True) -> Turn:
    """All answers, of full length: a prompt is read once for its answers, or `together` is false."""
    model = LlamaForCausalLM(size.fitting, dtype=jnp.float32)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(_SEED))
    prompts = random_prompts(size).tolist()
    if not together:
        prompts = [prompt for prompt in prompts for _ in range(size.samples)]
    sampling = Sampling(1.0, size.answer, size.samples if together else 1, size.answers)

    def turn() -> None:
        with sampler_weights(model, params) as weights:
            drawn = rollouts(model, weights, None, prompts, sampling=sampling, seed=_SEED, stop_ids=())
        assert sum(len(one.answer) for one in drawn) == size.new_tokens

    return turn


def scoring(size: Size, answers: Sequence[Rollout]) -> Turn:
    """The score of each answer."""
    config = dataclasses.replace(size.fitting, scalar_head=True, tie_embeddings=False)
    model = LlamaForRewardModel(config, dtype=jnp.float32)
    judge = ModelReward(model, jax.jit(functools.partial(init_params, model))(jax.random.key(_SEED)))
    return lambda: judge(answers, [{}] * len(answers))


def grpo(size: Size, model: str, folder: Path, copying: list[float]) -> Turn:
    """An iteration of one update: drawn, judged by how many characters differ, looked at, learnt from.

    Args:
      size: of it.
      model: a preset.
      folder: that is not there yet, for a run.
      copying: takes the seconds that each copy of the sampler's weights takes.
    """
    base, prompts = _files(size, model, folder)
    turn, _ = iterating(grpo_config.get_config(model), size, folder, base, prompts)
    original = drawing_of_run.sampler_weights

    def timed(*given: Any) -> Any:
        start = time.perf_counter()
        made = original(*given)
        weights = made.__enter__()
        jax.block_until_ready(weights)
        copying.append(time.perf_counter() - start)
        return _Entered(made, weights)

    drawing_of_run.sampler_weights = timed
    return turn


def iterating(
    config: ConfigDict, size: Size, folder: Path, base: Path, prompts: Path
) -> tuple[Turn, Callable[[], dict[str, float]]]:
    """(an iteration of one update, what the run tells of the last one: shares of its time by phase among it).

    Args:
      config: of `configs/grpo.py`, in which what follows from the size is set.
      size: of an iteration.
      folder: for the run.
      base: a checkpoint.
      prompts: a file, beside which a reward stands.
    """
    config.data.update(train=str(prompts), format='plain', validation_fraction=0.0)
    config.data.seq_len = size.row
    config.rollout.update(
        batch_size=size.answers, samples=size.samples, max_new_tokens=size.answer, slots=size.answers
    )
    config.train.update(batch_size=size.answers, num_steps=10**6)
    config.algorithm.rewards = f'{prompts.parent / "reward.py"}:score'
    config.log.update(tensorboard=False, compilation_cache='off')
    config.eval.every = 0
    run, iterations = begin_policy(
        config, allow_code=False, workdir=str(folder / 'run'), checkpoint=str(base), fork='', override='',
        xla_options='',
    )  # fmt: skip
    (measurement,) = iterations.measurements()
    state, step, key = run.state, 0, jax.random.key(_SEED)

    def turn() -> None:
        nonlocal state, step
        with jax.set_mesh(run.plan.partitioner.mesh):
            state = iterations.prepare(state, step)
            batch = iterations.next_batch(state, step)
            state, metrics = run.step_fn(state, run.objective.frozen, batch, key)
            jax.block_until_ready(metrics)
        step += 1

    return turn, lambda: measurement.measure(state, step, lambda: None)


@dataclasses.dataclass
class _Entered:
    """A context that was entered already."""

    context: Any
    given: Any

    def __enter__(self) -> Any:
        return self.given

    def __exit__(self, *error: Any) -> Any:
        return self.context.__exit__(*error)


def peaks(size: Size, model: str, folder: Path) -> dict[str, int]:
    """{command: peak bytes of its process} of PPO and SFT with adapters on one base."""
    base, prompts = _files(size, model, folder)
    pairs = folder / 'pairs.jsonl'
    texts = [json.loads(line)['prompt'] for line in prompts.read_text().splitlines()]
    lines = [{'prompt': one, 'chosen': one, 'rejected': one[: len(one) // 2]} for one in texts * size.samples]
    pairs.write_text(''.join(json.dumps(line | {'completion': line['chosen']}) + '\n' for line in lines))
    shared = {
        'data.format': 'plain', 'data.seq_len': size.row,
        'data.validation_fraction': 0.0, 'train.batch_size': size.prompts, 'train.num_steps': 2, 'lora.rank': 8,
        'log.tensorboard': False, 'model.dtype': 'float32', 'model.weights': 'float32', 'eval.every': 0,
        'model.remat': 'attention', 'train.loss_chunks': 4,  # recipes differ in these
    }  # fmt: skip
    own = {
        'reward_model': {'data.train': pairs, 'data.weights': '', 'train.num_epochs': 0, 'reward.margin': 'none'},
        'sft': {'data.train': pairs, 'train.num_epochs': 0},
        'ppo': {
            'data.train': prompts, 'algorithm.rewards': folder / 'reward_model',
            'algorithm.values_from': folder / 'reward_model', 'rollout.batch_size': size.answers,
            'rollout.max_new_tokens': size.answer, 'rollout.slots': size.prompts,
        },
    }  # fmt: skip
    found = {}
    for command, settings in own.items():
        arguments = [f'--config.{key}={value}' for key, value in (shared | settings).items()]
        _, found[command] = run_measured([
            sys.executable, '-m', f'experiments.{command}', f'--config=configs/{command}.py:{model}',
            f'--workdir={folder / command}', f'--checkpoint={base}', *arguments,
        ])  # fmt: skip
    return found


def _files(size: Size, model: str, folder: Path) -> tuple[Path, Path]:
    """(a checkpoint of random weights, a file of prompts of so many tokens); a reward stands beside them."""
    make_checkpoint(model, folder / 'meta')
    words = (folder / 'meta' / 'tokenizer.model').read_bytes().decode('latin-1').split()
    words = [word for word in words if word.isascii() and word.isalpha()] or ['a']
    return folder / 'meta', write_prompts(size, folder / 'meta', words, folder)


def write_prompts(size: Size, checkpoint: Path, words: Sequence[str], folder: Path) -> Path:
    """A file of prompts of so many tokens by a checkpoint's tokenizer, or a word less, with a reward beside it."""
    (folder / 'reward.py').write_text(
        'def score(prompt, answer, record):\n    return len(set(answer)) / 10\n'
    )
    tokenizer = load_tokenizer(checkpoint)
    rng, lines = np.random.default_rng(_SEED), []
    for _ in range(size.prompts):
        text = ''
        while len(tokenizer.encode(f'{text} {words[0]}', bos=True)) < size.prompt:
            text += f' {words[int(rng.integers(len(words)))]}'
        lines.append(json.dumps({'prompt': text.strip()}) + '\n')
    file = folder / 'prompts.jsonl'
    file.write_text(''.join(lines))
    return file
