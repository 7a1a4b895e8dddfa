"""Answers drawn from the present policy and judged; those that teach nothing are replaced, where that is wanted."""

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence

import jax
import numpy as np

from experiments.launch import flags_named
from experiments.policy.objective import recipe_of
from experiments.policy.prompts import Prompts
from experiments.run.settings import make_lora_config
from experiments.training import Run
from llama_jax import runtime, storage
from llama_jax.errors import InputError
from llama_jax.lora import merge
from llama_jax.losses.policy import policy_of
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.rl import advantages
from llama_jax.rl.rewards import Rewarded, Weighted, judge
from llama_jax.rl.rollout import Rollout, Sampling, rollouts, sampler_weights
from llama_jax.train.state import TrainState

SAMPLES = 'samples'  # folder of a workdir
_MOST_REFILLS = 10
_SHOWN = 16  # answers in a file of samples

logger = logging.getLogger('llama_jax.drawing')


@dataclasses.dataclass
class Drawn:
    """Answers with what they are worth, before they are looked at by the policy."""

    rollouts: list[Rollout]  # their record is the number of the prompt in the run
    rewarded: Rewarded

    def only(self, groups: set[int]) -> 'Drawn':
        """What was drawn for some records."""
        kept = [place for place, one in enumerate(self.rollouts) if one.record in groups]
        parts = {name: values[kept] for name, values in self.rewarded.parts.items()}
        return Drawn([self.rollouts[place] for place in kept], Rewarded(self.rewarded.total[kept], parts))

    def with_more(self, other: 'Drawn') -> 'Drawn':
        """Both, one behind the other."""
        parts = {
            name: np.concatenate([values, other.rewarded.parts[name]])
            for name, values in self.rewarded.parts.items()
        }
        total = np.concatenate([self.rewarded.total, other.rewarded.total])
        return Drawn([*self.rollouts, *other.rollouts], Rewarded(total, parts))


class Drawing:
    """Draws answers with the weights of a state, which are copied for it and gone afterwards."""

    def __init__(self, run: Run, sampler: LlamaForCausalLM, prompts: Prompts, rewards: Sequence[Weighted]):
        """Args: run: begun. sampler: its partitioner places what draws. prompts, rewards: read."""
        config = run.plan.config
        self._run, self._config, self._sampler = run, config, sampler
        self._prompts, self._rewards = prompts, rewards
        self._refill = recipe_of(config).algorithm.refill
        self._sampling = Sampling(
            config.rollout.temperature, config.rollout.max_new_tokens, config.rollout.samples,
            config.rollout.slots,
        )  # fmt: skip

    def draw(self, state: TrainState, cursor: int) -> tuple[Drawn, int, int]:
        """(answers, the prompts taken after them, how often others were drawn in the place of some)."""
        wanted, samples = self._config.rollout.batch_size, self._config.rollout.samples
        kept: Drawn | None = None
        for refills in range(_MOST_REFILLS + 1):
            missing = wanted // samples - (len(kept.rollouts) // samples if kept else 0)
            numbers = list(range(cursor, cursor + missing))
            cursor += missing
            taken = [self._prompts.taken(number) for number in numbers]
            drawn = self.answers(state, taken, numbers)
            if not self._refill:
                return drawn, cursor, 0
            groups = np.array([one.record for one in drawn.rollouts])
            drawn = drawn.only(advantages.differing(drawn.rewarded.total, groups))
            kept = kept.with_more(drawn) if kept else drawn
            if len(kept.rollouts) == wanted:
                return kept, cursor, refills
        assert kept is not None
        raise InputError(
            f'{_MOST_REFILLS} times others were drawn, and still {(wanted - len(kept.rollouts)) // samples} of '
            f'{wanted // samples} groups of --config.rollout.samples={samples} answers have no variance in '
            '--config.algorithm.rewards: their prompts are too easy or too hard, or the reward is the same for all'
        )

    def answers(
        self, state: TrainState, taken: Sequence[int], numbers: Sequence[int], *, samples: int = 0
    ) -> Drawn:
        """Answers to some prompts, judged."""
        prompts = self._prompts
        sampling = dataclasses.replace(self._sampling, samples=samples or self._sampling.samples)
        assert self._sampler.partitioner is not None
        with jax.set_mesh(self._sampler.partitioner.mesh), self._weights(state) as weights:
            found = rollouts(
                self._sampler, weights, self._run.plan.tokenizer, [prompts.ids[one] for one in taken],
                sampling=sampling, seed=self._config.seed, stop_ids=prompts.stop_ids, records=numbers,
            )  # fmt: skip
        place = dict(zip(numbers, taken, strict=True))
        named = [dataclasses.replace(one, record=place[one.record]) for one in found]
        with flags_named('--config.algorithm.rewards'):
            rewarded = judge(self._rewards, named, [prompts.records[one.record] for one in named])
        return Drawn(found, rewarded)

    def _weights(self, state: TrainState):
        """The sampler's, which are gone afterwards: adapters merged where its mesh is another than training's."""
        plan, objective, lora = self._run.plan, self._run.objective, make_lora_config(self._config)
        if lora is None or self._sampler.partitioner == plan.partitioner:
            return sampler_weights(self._sampler, objective.weights(state))
        merged = jax.jit(functools.partial(merge, scale=lora.scale))(
            policy_of(state.params), objective.frozen
        )
        return sampler_weights(self._sampler, merged)

    def write(self, name: str, drawn: Drawn) -> None:
        """The first answers with their scores, as people read them."""
        if not runtime.is_main_process():
            return
        lines = []
        for place, one in enumerate(drawn.rollouts[:_SHOWN]):
            scores = {name: float(values[place]) for name, values in drawn.rewarded.parts.items()}
            lines.append(
                {
                    'prompt': self._run.plan.tokenizer.decode(one.prompt), 'answer': one.text,
                    'reward': float(drawn.rewarded.total[place]), 'rewards': scores, 'stopped': one.stopped,
                }
            )  # fmt: skip
        folder = self._run.plan.workdir / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
        storage.write_atomically(folder / f'{name}.jsonl', text)
