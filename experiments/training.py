"""What every training does around its objective: `plan` what is asked for, `begin` the run, `fit` it.

All that is wrong with a command is refused by `plan`, before anything is written.
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from etils import epath
from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.run import settings
from experiments.run.adapters import check_base
from experiments.run.config_file import split_list
from experiments.run.data_schedule import schedule_of
from experiments.run.objective import Objective, compile_step
from experiments.run.start import find_tokenizer, open_origin, starting_architecture
from experiments.run.workdir import (
    Fork,
    check_data,
    check_overrides,
    check_own_files,
    check_same_data,
    check_same_fork,
    check_workdir,
    has_checkpoint,
    hold_folder,
    record_run,
)
from llama_jax import pretrained, runtime, storage
from llama_jax.checkpoint.model_file import CHECKPOINTS, save_config
from llama_jax.checkpoint.training import Checkpointer, restore_step
from llama_jax.data.datasets import check_sources
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine
from llama_jax.eval.harness import PreparedTask, evaluate
from llama_jax.inference.generate import generate
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.conversion import own_files
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.train import metrics
from llama_jax.train.loop import LoopConfig, Measurement, Trained, train
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import TrainState, abstract_state, new_state, shardings_of
from llama_jax.train.throughput import peak_flops_per_device
from llama_jax.types import PyTree

METRICS_FILE = 'metrics.jsonl'

logger = logging.getLogger('llama_jax.training')


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run as it was asked for, checked; nothing of it is written."""

    config: ConfigDict
    workdir: epath.Path
    checkpoint: str  # whose weights it starts with, as given; '': those of `fork`, or fresh ones
    overrides: tuple[str, ...]  # keys that may be set otherwise than when it was begun
    begun: bool  # there is a step to go on from
    held: bool  # `workdir` is there, and no other process may write into it
    base: pretrained.Checkpoint | None  # what sizes and tokenizer are of; None: the preset's
    fork: Fork | None  # the step of another run that it starts from
    tokenizer: Tokenizer
    partitioner: Partitioner
    model: LlamaForCausalLM  # with room for the tokenizer's ids
    schedule: Callable[[int], Any]  # update count -> learning rate
    tx: optax.GradientTransformation
    compiler_options: Mapping[str, Any]  # of the train step
    eval_tasks: Sequence[PreparedTask]  # benchmarks to take on the way


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` trains; the workdir is the run's own."""

    plan: Plan
    objective: Objective
    state: TrainState  # at `start_step`; training takes its memory
    start_step: int  # updates done
    rows_before: int  # that they consumed
    step_fn: Callable  # the jitted update
    record: dict[str, Any]  # what config.json and every checkpoint say of the run
    checkpointer: Checkpointer
    writers: Sequence[metrics.Writer]  # on process 0
    restored: Mapping[str, Any]  # what the checkpoint of `start_step` says beside its state


def plan(
    config: ConfigDict,
    *,
    workdir: str,
    checkpoint: str,
    fork: str,
    override: str,
    xla_options: str,
    check_data: Callable[[Sequence[str]], None] = check_sources,
    from_scores: bool = False,
) -> Plan:
    """Checks and opens what a command names; writes nothing.

    All are flags of `launch.define_run`, but for `config`, `check_data`, which refuses sources that cannot be read, and
    `from_scores`: whether the checkpoint may be a reward model.
    """
    runtime.enable_compilation_cache(config.log.compilation_cache)
    folder, overrides = epath.Path(workdir), split_list(override)
    with runtime.refused_by_all():
        storage.check_place(folder, folder=True)
        settings.check_settings(config)
        check_overrides(overrides, config)
        check_workdir(folder, config, checkpoint, overrides, fork)
    begun = has_checkpoint(folder)
    with runtime.refused_by_all():
        base, origin = open_origin(config, folder, checkpoint, fork, begun)
        if settings.make_lora_config(config) and (origin or not base):
            raise InputError(
                f'--config.lora.rank={config.lora.rank} trains adapters beside the weights of --checkpoint; give it'
                + (', and no --fork' if origin else '')
            )
        preset = starting_architecture(config, base, from_scores)
        partitioner = settings.make_partitioner(config)
        settings.check_sizes(config, preset.max_seq_len, partitioner)
        compiler_options = settings.compiler_options(xla_options, partitioner)
        schedule_of(config)
        optimizer = settings.make_optimizer_config(config)
        schedule = make_schedule(optimizer, config.train.num_steps or 1)
        tx = make_optimizer(optimizer, schedule)
        eval_tasks = settings.prepare_tasks(config)
        # Unknown names in `model`, and weights that do not divide over the mesh, show in the shapes alone.
        shapes_and_axes = abstract_params_and_axes(settings.make_model(config, preset, partitioner))
        abstract_state(*shapes_and_axes, tx, partitioner)
        with flags_named('--config.data.train', '--config.data.validation'):
            check_data(split_list(f'{config.data.train},{config.data.validation}'))
    held = hold_folder(folder, only_existing=True)
    tokenizer = find_tokenizer('' if origin else config.data.tokenizer, config, folder, base)
    llama = settings.fit_vocabulary(config, preset, tokenizer.vocab_size)
    settings.check_prompt(config, tokenizer, llama.max_seq_len)
    model = settings.make_model(config, llama, partitioner)
    return Plan(
        config, folder, checkpoint, overrides, begun, held, base, origin, tokenizer, partitioner, model, schedule, tx,
        compiler_options, eval_tasks,
    )  # fmt: skip


def in_epochs(plan: Plan, num_rows: int) -> Plan:
    """The run with as many updates as so many rows take in `train.num_epochs`; the last one may begin a pass anew."""
    if not plan.config.train.num_epochs:
        return plan
    config = plan.config.copy_and_resolve_references()
    passes = config.train.num_epochs * num_rows / config.train.batch_size
    config.train.num_steps = max(1, math.ceil(round(passes, 6)))
    logger.info(
        '%g passes over %s rows are %d steps',
        config.train.num_epochs,
        f'{num_rows:,}',
        config.train.num_steps,
    )
    optimizer = settings.make_optimizer_config(config)
    schedule = make_schedule(optimizer, config.train.num_steps)
    return dataclasses.replace(plan, config=config, schedule=schedule, tx=make_optimizer(optimizer, schedule))


def begin(plan: Plan, objective: Objective, fingerprint: str, template: str | None = None) -> Run:
    """Takes the workdir, records the run in it, and has the state that training goes on from.

    Args:
      plan: what was asked for.
      objective: what is minimised.
      fingerprint: of the data, which must be what they were when the run was begun, and the same on all hosts.
      template: how the model is talked to from now on, in Jinja; None: as its checkpoint is.
    """
    config, workdir, llama, fork = plan.config, plan.workdir, plan.model.config, plan.fork
    with runtime.refused_by_all():
        check_data(workdir, fingerprint, plan.overrides)
        check_base(workdir, objective.provenance)
    check_same_data(fingerprint)
    check_same_fork(fork)
    axes = ', '.join(f'{name} {size}' for name, size in plan.partitioner.mesh.shape.items())
    devices = f'{jax.device_count()} {jax.devices()[0].device_kind} ({axes})'
    logger.info('%s: %s weights on %s', config.model.preset, f'{llama.num_params:,}', devices)
    target, step_fn = compile_step(
        objective, plan.tx, plan.partitioner, config.train.num_microbatches, plan.compiler_options
    )
    # What it starts from may be damaged: it is read before anything is written.
    start = None if plan.begun else _first_state(plan, objective, target)

    # From here on the workdir is written to, and nothing in it is taken away.
    hold_folder(workdir, held=plan.held)
    if template is None:
        template = plan.base.template if plan.base and not config.data.tokenizer else ''
    files = own_files(plan.tokenizer, template)
    with runtime.refused_by_all():  # what another run may have begun there until now
        changes = check_workdir(workdir, config, plan.checkpoint, plan.overrides)
        changes += check_data(workdir, fingerprint, plan.overrides)
        if runtime.is_main_process():
            check_own_files(workdir, files)
    if runtime.is_main_process():
        origin = plan.checkpoint or (str(fork.step) if fork else '')
        # First: whatever else is there then is this run's.
        save_config(workdir, llama, base_checkpoint=origin, **objective.provenance)
        for name, data in files.items():
            storage.write_atomically(workdir / name, data)
    checkpointer = Checkpointer(workdir / CHECKPOINTS, config.checkpoint.keep, config.checkpoint.verify)
    if restored := checkpointer.restore_latest(target):
        step, state, metadata = restored
        logger.info('resuming at step %d of %d', step, config.train.num_steps)
        start, fork = (state, step, metadata), None
    state, step, metadata = start or _first_state(plan, objective, target)
    if fork:
        changes = fork.changes_with(fingerprint)
    record = record_run(workdir, config, plan.checkpoint, fingerprint, step=step, changes=changes, fork=fork)
    rows_before = metadata.get('rows_consumed', 0)
    if fork:  # from here on the other run is no longer needed
        logger.info('started from step %d of %s', step, fork.workdir)
        checkpointer.save(step, state, record | {'rows_consumed': rows_before})
    writers = _make_writers(config, workdir, step, metadata, record['config'])
    return Run(plan, objective, state, step, rows_before, step_fn, record, checkpointer, writers, metadata)


def _first_state(
    plan: Plan, objective: Objective, target: TrainState
) -> tuple[TrainState, int, dict[str, Any]]:
    """(state, updates done, what was saved with it): another run's, or a new one; born sharded."""
    if plan.fork:
        with flags_named('--fork'):
            step, state, metadata = restore_step(plan.fork.step, target)
        return state, step, {'rows_consumed': metadata['rows_consumed']}
    # Donated, for they become the state's: there is no second copy.
    start = functools.partial(new_state, tx=plan.tx)
    params = objective.first_params(target.params)
    return jax.jit(start, out_shardings=shardings_of(target), donate_argnums=0)(params), 0, {}


def _make_writers(
    config: ConfigDict, workdir: epath.Path, step: int, restored: dict[str, Any], record: dict[str, Any]
) -> list[metrics.Writer]:
    """Where the main process writes figures to."""
    if not runtime.is_main_process():
        return []
    writers: list[metrics.Writer] = [metrics.JsonlWriter(workdir / METRICS_FILE, step, restored)]
    if config.log.tensorboard:
        writers.append(
            metrics.Aside('TensorBoard', lambda: metrics.TensorBoardWriter(workdir / 'tensorboard', step))
        )
    if config.log.wandb:
        begun = metrics.WandbWriter(config.log.wandb, workdir, record)  # here, where an error is the user's
        writers.append(metrics.Aside('W&B', lambda: begun))
    return writers


def fit(
    run: Run,
    next_batch: Callable[[TrainState, int], PyTree],
    measurements: Sequence[Measurement] = (),
    described: Callable[[int], Mapping[str, float]] = lambda step: {},
    prepare: Callable[[TrainState, int], TrainState] = lambda state, step: state,
) -> Trained:
    """Trains to the last step; what was trained and measured is on disk when it returns.

    Args:
      run: begun.
      next_batch: (state, updates done) -> the global batch of the next one.
      measurements: the objective's own; benchmarks are taken after them.
      described: step -> what else is logged of it.
      prepare: (state, updates done) -> the state that goes on; what is done before a batch is there.
    """
    plan, objective = run.plan, run.objective
    config = plan.config
    benchmarks = [evaluate_tasks(plan, objective)] if plan.eval_tasks else []
    loop = LoopConfig(
        num_steps=config.train.num_steps, batch_size=config.train.batch_size,
        tokens_per_step=config.train.batch_size * config.data.seq_len,
        flops_per_token=objective.flops_per_token(config.data.seq_len, and_before=True),
        peak_flops=peak_flops_per_device(),
        log_every=config.log.every, checkpoint_every=config.checkpoint.every,
        profile=(config.log.get('profile_start', 0), config.log.get('profile_steps', 0)),
        profile_dir=str(plan.workdir / 'profile'),
    )  # fmt: skip
    with jax.set_mesh(plan.partitioner.mesh):
        trained = train(
            run.state, config=loop, step_fn=run.step_fn, frozen=objective.frozen, next_batch=next_batch,
            prepare=prepare, rng=jax.random.key(config.seed + 1), start_step=run.start_step,
            rows_before=run.rows_before, schedule=plan.schedule, checkpointer=run.checkpointer, metadata=run.record,
            writers=run.writers, measurements=[*measurements, *benchmarks],
            measured=_figures_of(plan.workdir / METRICS_FILE, run.start_step), described=described,
        )  # fmt: skip
    for writer in run.writers:
        writer.close()
    run.checkpointer.check_latest()
    run.checkpointer.close()
    if trained.stopped:
        saved = ' and saved' if trained.step else ''
        logger.info('stopped at step %d%s; run the same command to go on', trained.step, saved)
    return trained


def evaluate_tasks(plan: Plan, objective: Objective) -> Measurement:
    """The benchmarks, evaluated on the training mesh: {'TASK/METRIC': value}."""
    config, eval_tasks = plan.config, plan.eval_tasks
    rows = config.train.batch_size // config.train.num_microbatches
    model = plan.model.clone(remat='none')

    def measure(state: TrainState, step: int, pause: Callable[[], None]) -> dict[str, float]:
        weights = objective.weights(state)
        engine = Engine(model, weights, plan.tokenizer, batch_tokens=rows * config.data.seq_len)
        figures = {}
        for prepared in eval_tasks:
            found = evaluate(prepared, engine, progress=False, pause=pause)
            kept = {metric: found[metric] for metric in prepared.task.metrics if metric in found}
            figures |= {f'{prepared.task.name}/{metric}': value for metric, value in kept.items()}
        shown = ', '.join(f'{name} {value:.4f}' for name, value in figures.items())
        logger.info('step %d: %s', step, shown)
        return figures

    names = tuple(
        f'{prepared.task.name}/{metric}' for prepared in eval_tasks for metric in prepared.task.metrics
    )
    return Measurement(config.eval.get('tasks_every', config.eval.every), measure, names)


def _figures_of(metrics_file: epath.Path, step: int) -> dict[str, float]:
    """What is logged of a step, on all processes; {} where nothing is."""
    lines = metrics.read_metrics(metrics_file) if runtime.is_main_process() and step else []
    logged = next((line for line in lines if line['step'] == step), {})
    return json.loads(runtime.gather_texts(json.dumps(logged))[0])


def sample(run: Run, state: TrainState) -> str:
    """A completion of `eval.prompt` by the trained weights, at temperature 0.8."""
    config, weights = run.plan.config, run.objective.weights(state)
    if not config.eval.sample_tokens:
        return ''
    completion = generate(
        run.plan.model, weights, run.plan.tokenizer, [config.eval.prompt], max_new_tokens=config.eval.sample_tokens,
        temperature=0.8, top_p=0.95, seed=config.seed,
    )  # fmt: skip
    return config.eval.prompt + completion[0]


def write_report(
    run: Run, report: dict[str, Any], lines: Mapping[str, float], unit: str = 'nats per token'
) -> None:
    """report.json, and loss.png, the loss in `unit`, with `lines` to compare with."""
    workdir = run.plan.workdir
    storage.write_atomically(workdir / 'report.json', json.dumps(report, indent=2) + '\n')
    metrics.plot_loss(workdir / 'loss.png', metrics.read_metrics(workdir / METRICS_FILE), dict(lines), unit)
