"""The loop of policy gradients: answers are drawn from the present policy, judged, and learnt from in minibatches.

An iteration's answers and their numbers are kept in WORKDIR/rollouts/STEP.npz, so that a run that was ended within one
goes on in it; which prompts come next, and what a nat costs, stand in every checkpoint.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from experiments.policy.drawing import Drawing, Drawn
from experiments.policy.objective import (
    is_compared,
    make_scorer,
    recipe_of,
    shape_of,
    values_begin_as_a_judge,
    with_scaled_values,
)
from experiments.policy.prompts import Prompts
from experiments.training import METRICS_FILE, Run
from llama_jax import runtime, storage
from llama_jax.checkpoint.model_file import CHECKPOINTS
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.partitioning import place_whole
from llama_jax.rl import advantages
from llama_jax.rl.iteration import Iteration
from llama_jax.rl.rewards import Weighted
from llama_jax.train.loop import Ended, Measurement
from llama_jax.train.metrics import read_metrics
from llama_jax.train.state import TrainState
from llama_jax.types import PolicyBatch

ROLLOUTS = 'rollouts'  # folder of a workdir
HELD_OUT = 'held_out_reward'

logger = logging.getLogger('llama_jax.iterations')


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the loop stands; what every checkpoint says of it."""

    begun: int = -1  # updates done before the iteration's first; -1: none was begun
    number: int = -1  # of the iteration
    prompts: int = 0  # taken so far
    beta: float = 0.0  # of the next iteration


class Iterations:
    """Gives the loop its minibatches, and the figures of the iterations that they are of."""

    def __init__(
        self,
        run: Run,
        value_model: LlamaForRewardModel,
        sampler: LlamaForCausalLM,
        prompts: Prompts,
        rewards: Sequence[Weighted],
    ):
        """Args: run: begun. value_model: see `policy_objective`. sampler: places rollouts. prompts, rewards: read."""
        config = run.plan.config
        self._run, self._config = run, config
        self._drawing = Drawing(run, sampler, prompts, rewards)
        self._held_out_prompts = prompts.held_out
        self._recipe, self._shape = recipe_of(config), shape_of(config, run.plan.partitioner)
        self._course = self._recipe.course
        self._score = make_scorer(config, value_model)
        known = run.restored.get('policy')
        self._place = _Place(**known) if known else _Place(beta=config.algorithm.beta)
        self._iteration: Iteration | None = None
        self._num_rows = 0
        self._seconds: dict[str, float] = {}
        self._since = time.perf_counter()
        if self._place.begun >= 0 and run.start_step > self._place.begun:
            self._restore()

    # ---- what the loop calls

    def prepare(self, state: TrainState, step: int) -> TrainState:
        """Begins a new iteration where the last one is through; the state that learns from it."""
        index = step - self._place.begun
        if self._iteration is None or index >= self._num_minibatches or self._is_far(state, index):
            self._end_if_no_better(step)
            state = self._begin(state, step)
        return state

    def next_batch(self, state: TrainState, step: int) -> PolicyBatch:
        """The next minibatch of what is prepared."""
        return self._minibatch(step - self._place.begun)[0]

    def measurements(self) -> list[Measurement]:
        """Figures of each iteration at its end; the mean reward of held-out prompts."""
        # Where iterations may end early nobody knows their last step beforehand: their first has the figures.
        every = 1 if self._course.kl_limit else self._per_iteration()
        made = [Measurement(every, self._figures, ('reward',))]
        if self._held_out_prompts:
            made.append(Measurement(self._config.eval.every, self._held_out, (HELD_OUT,)))
        return made

    # ---- an iteration

    def _begin(self, state: TrainState, step: int) -> TrainState:
        started = time.perf_counter()
        self._seconds['all'] = started - self._since
        self._since = started
        number, cursor = self._place.number + 1, self._place.prompts
        drawn, cursor, refills = self._drawing.draw(state, cursor)
        rolled = time.perf_counter()
        found, beta = self._looked_at(state, drawn, step, number), self._place.beta
        fitted: dict[str, float] = {}
        if step == 0 and values_begin_as_a_judge(self._config):
            state, fitted = self._with_fitted_values(state, drawn, found, beta)
            found = self._looked_at(state, drawn, step, number)
        iteration = self._with_advantages(drawn, found, beta)
        away = _sums(iteration.old, iteration.reference)
        if self._course.beta_target and is_compared(self._config):
            beta = advantages.next_beta(beta, float(np.mean(away)), self._course.beta_target, 10)
        figures = self._figures_of(drawn, iteration, away) | {'refills': float(refills)} | fitted
        self._iteration = dataclasses.replace(iteration, figures=figures)
        self._place = _Place(step, number, cursor, beta)
        self._run.record['policy'] = dataclasses.asdict(self._place)
        self._num_rows = self._iteration.num_rows(self._shape, self._course.epochs)
        self._keep()
        every = self._config.eval.every
        if every and step % every == 0:
            self._drawing.write(f'{step:08}', drawn)
        ended = time.perf_counter()
        self._seconds |= {'rollout': rolled - started, 'score': ended - rolled}
        logger.info(
            'step %d: iteration %d, reward %.4f, %.0f tokens an answer, %.0f %% stopped', step, number,
            figures['reward'], figures['answer_length'], 100 * figures['stopped'],
        )  # fmt: skip
        return state

    def _looked_at(self, state: TrainState, drawn: Drawn, step: int, number: int) -> Iteration:
        """The answers with their log-probabilities and values by the forward pass of training."""
        answers = [np.array(one.answer, np.int32) for one in drawn.rollouts]
        empty = [np.zeros(len(one)) for one in answers]
        bare = Iteration(
            step, number, [np.array(one.prompt, np.int32) for one in drawn.rollouts], answers,
            [np.array(one.log_probabilities) for one in drawn.rollouts], empty, empty, empty, empty, empty, empty, 0.0,
            {},
        )  # fmt: skip
        num_rows = bare.num_rows(self._shape, 1)
        found: dict[str, list[np.ndarray]] = {name: list(empty) for name in ('old', 'reference', 'values')}
        for index in range(bare.num_minibatches(self._shape, 1)):
            batch, places = bare.minibatch(self._shape, index, num_rows, self._recipe.algorithm)
            of_batch = self._score(state.params, self._run.objective.frozen, self._placed(batch))
            for name, values in jax.device_get(of_batch).items():
                for answer, row, slots in places:
                    found[name][answer] = np.asarray(values[row, slots], np.float32)
        if not is_compared(self._config):
            found['reference'] = found['old']
        return dataclasses.replace(bare, **found)

    def _with_fitted_values(
        self, state: TrainState, drawn: Drawn, iteration: Iteration, beta: float
    ) -> tuple[TrainState, dict[str, float]]:
        """(the state with values on the scale of what came, what is logged of it).

        A judge's scores are on another, and of half an answer at no level in particular. They are brought to returns by
        Monte Carlo, `trace` 1, for what GAE returns has the values in it that are not yet on any scale.
        """
        came = self._advantages_of(drawn, iteration, beta).came
        slope = advantages.value_slope(iteration.values, came)
        before, after = (
            advantages.explained_variance([scale * one for one in iteration.values], came)
            for scale in (1.0, slope)
        )
        logger.info(
            "values begin as %.4g times the judge's scores: they explain %.3f of what came, before that %.3f",
            slope, after, before,
        )  # fmt: skip
        if not slope:
            logger.warning("values begin at zero: the judge's scores do not rise with what came")
        scaled = dataclasses.replace(state, params=with_scaled_values(state.params, slope))
        return scaled, {'value_slope': slope, 'explained_variance_before': before}

    def _with_advantages(self, drawn: Drawn, iteration: Iteration, beta: float) -> Iteration:
        made = self._advantages_of(drawn, iteration, beta)
        limit = self._course.importance
        importance = [np.ones(len(one)) for one in iteration.answers]
        if limit:
            importance = advantages.truncated_importance(iteration.old, iteration.sampled, limit)
        return dataclasses.replace(
            iteration, advantages=made.advantages, returns=made.returns, importance=importance, beta=beta
        )

    def _advantages_of(self, drawn: Drawn, iteration: Iteration, beta: float) -> advantages.Advantages:
        pairs = zip(iteration.old, iteration.reference, strict=True)
        return advantages.make_advantages(
            self._recipe.algorithm, drawn.rewarded.total, [old.astype(np.float64) - ref for old, ref in pairs],
            beta=beta, groups=np.array([one.record for one in drawn.rollouts]), values=iteration.values,
            horizon=self._recipe.horizon,
        )  # fmt: skip

    def _figures_of(self, drawn: Drawn, iteration: Iteration, away: np.ndarray) -> dict[str, float]:
        gap = np.abs(np.concatenate(iteration.old) - np.concatenate(iteration.sampled))
        figures = {
            'reward': drawn.rewarded.total.mean(), 'reward_std': drawn.rewarded.total.std(),
            **{f'reward/{name}': values.mean() for name, values in drawn.rewarded.parts.items()},
            'answer_length': np.mean([len(one) for one in iteration.answers]),
            'stopped': np.mean([one.stopped for one in drawn.rollouts]),
            'sampler_gap': gap.mean(), 'sampler_gap_max': gap.max(), 'beta': iteration.beta,
        }  # fmt: skip
        if is_compared(self._config):
            figures['kl'] = away.mean()  # nats an answer
        if self._recipe.algorithm.has_values:
            figures['explained_variance'] = advantages.explained_variance(iteration.values, iteration.returns)
        return {name: float(value) for name, value in figures.items()}

    # ---- minibatches

    @property
    def _num_minibatches(self) -> int:
        assert self._iteration is not None
        return self._iteration.num_minibatches(self._shape, self._course.epochs)

    def _minibatch(self, index: int) -> tuple[PolicyBatch, list[tuple[int, int, slice]]]:
        assert self._iteration is not None
        batch, places = self._iteration.minibatch(self._shape, index, self._num_rows, self._recipe.algorithm)
        return self._placed(batch), places

    def _placed(self, batch: PolicyBatch) -> PolicyBatch:
        """On the devices; every process has all of it."""
        target = self._run.objective.batch
        return jax.tree.map(lambda array, leaf: place_whole(array, leaf.sharding), batch, target)

    def _is_far(self, state: TrainState, index: int) -> bool:
        """Whether the policy has moved too far for another minibatch of the same answers."""
        limit = self._course.kl_limit
        if not limit or not index:
            return False
        batch, places = self._minibatch(index)
        values = jax.device_get(self._score(state.params, self._run.objective.frozen, batch)['old'])
        assert self._iteration is not None
        moved = [self._iteration.old[one] - values[row, slots] for one, row, slots in places]
        # Schulman's k3 of the policy now to that which the answers are of; an answer's, as `kl` is.
        far = float(np.mean([np.sum(np.expm1(-one) + one) for one in moved]))
        if far > limit:
            logger.info(
                'iteration %d ends after %d minibatches: %.3g nats', self._iteration.number, index, far
            )
        return far > limit

    # ---- files

    def _file(self, begun: int):
        return self._run.plan.workdir / ROLLOUTS / f'{begun:08}.npz'

    def _keep(self) -> None:
        """Writes the iteration; those that no checkpoint is within go."""
        if not runtime.is_main_process():
            return
        assert self._iteration is not None
        folder = self._run.plan.workdir / ROLLOUTS
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_atomically(self._file(self._place.begun), self._iteration.to_bytes())
        begun = sorted(int(path.stem) for path in folder.iterdir() if path.stem.isdigit())
        checkpoints = self._run.plan.workdir / CHECKPOINTS
        saved = [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]
        within = {max((one for one in begun if one < step), default=-1) for step in saved}
        for one in begun[:-2]:
            if one not in within:
                self._file(one).unlink()

    def _restore(self) -> None:
        """The iteration that the checkpoint is within, or at the end of."""
        file = self._file(self._place.begun)
        try:
            self._iteration = Iteration.from_bytes(file.read_bytes())
        except (OSError, ValueError) as error:
            self._iteration = None
            if (self._run.start_step - self._place.begun) % self._per_iteration():
                logger.warning(
                    '%s cannot be read (%s): what was left of its iteration is left out',
                    file,
                    type(error).__name__,
                )
            return
        self._num_rows = self._iteration.num_rows(self._shape, self._course.epochs)

    def _per_iteration(self) -> int:
        config = self._config
        return self._course.epochs * (config.rollout.batch_size // config.train.batch_size)

    # ---- figures

    def _figures(self, state: TrainState, step: int, pause: Callable[[], None]) -> dict[str, float]:
        if self._iteration is None or (self._course.kl_limit and step != self._place.begun + 1):
            return {}
        whole = time.perf_counter() - self._since
        known = {name: value for name, value in self._seconds.items() if name != 'all'}
        shares = {f'share_{name}': seconds / whole for name, seconds in known.items()}
        return self._iteration.figures | (
            {**shares, 'share_update': 1 - sum(shares.values())} if shares else {}
        )

    def _held_out(self, state: TrainState, step: int, pause: Callable[[], None]) -> dict[str, float]:
        """The mean reward of one answer to each held-out prompt, the same draws at every step."""
        held_out = self._held_out_prompts
        numbers = [-1 - place for place in range(len(held_out))]  # no prompt of training has one below 0
        drawn = self._drawing.answers(state, held_out, numbers, samples=1)
        mean = float(drawn.rewarded.total.mean())
        self._drawing.write(f'{step:08}.held_out', drawn)
        logger.info('step %d: held-out reward %.4f', step, mean)
        return {HELD_OUT: mean} | {
            f'held_out_reward/{name}': float(values.mean()) for name, values in drawn.rewarded.parts.items()
        }

    def _end_if_no_better(self, step: int) -> None:
        """Ends a run whose held-out reward has had no new best for so many measurements."""
        patience = self._course.patience
        if not patience or not self._held_out_prompts:
            return
        found: list[float] = []
        if runtime.is_main_process():
            lines = read_metrics(self._run.plan.workdir / METRICS_FILE)
            found = [line[HELD_OUT] for line in lines if line['step'] <= step and HELD_OUT in line]
        found = json.loads(runtime.gather_texts(json.dumps(found))[0])
        if len(found) > patience and max(found[-patience:]) <= max(found[:-patience]):
            raise Ended(
                f'the held-out reward had its best, {max(found):.4f}, {patience} measurements ago; training ends'
            )


def _sums(old: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> np.ndarray:
    """Of each answer log pi - log pi_ref, in nats."""
    pairs = zip(old, reference, strict=True)
    return np.array([math.fsum(np.asarray(a, np.float64) - b) for a, b in pairs])
