"""Pretrains a Llama on text.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=DIR

Running the same command again resumes. The workdir holds config.json, model.json, the tokenizer, checkpoints/STEP/,
metrics.jsonl, tensorboard/, and at the end loss.png and report.json.
"""

import json
import logging
import math
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from experiments import launch, training
from experiments.start import find_tokenizer, first_state, starting_architecture
from experiments.workdir import (
    TOKENIZER_FILE,
    check_data,
    check_overrides,
    check_same_data,
    check_workdir,
    has_checkpoint,
    hold_folder,
    open_fork,
    read_record,
    record_run,
)
from llama_jax import pretrained, runtime, storage
from llama_jax.checkpoint.model_file import CHECKPOINTS, save_config
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.data.datasets import PretrainData, check_sources, pretrain_dataset
from llama_jax.data.loader import batches, read_ahead
from llama_jax.eval.perplexity import fit_baselines, in_time
from llama_jax.inference.generate import generate
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.tokenizer.vocabulary import model_file
from llama_jax.train.loop import LoopConfig, Measurement, train
from llama_jax.train.metrics import (
    Aside,
    JsonlWriter,
    TensorBoardWriter,
    WandbWriter,
    Writer,
    plot_loss,
    read_metrics,
)
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import TrainState, abstract_state
from llama_jax.train.throughput import peak_flops_per_device, training_flops_per_token
from llama_jax.train.validation import count_predicted, make_validation
from llama_jax.types import InputError, LMBatch

_CONFIG = launch.define_config()
_WORKDIR = launch.define_path('workdir', None, 'folder of the run, local or gs://...', required=True)
_CHECKPOINT = launch.define_path(
    'checkpoint', '', 'a checkpoint whose weights to continue from, with a new optimiser'
)
_FORK = launch.define_path(
    'fork',
    '',
    'WORKDIR or WORKDIR@STEP of another run, whose state to start from: optimiser and place in the data too',
)
_OVERRIDE = flags.DEFINE_string(
    'override', '', 'config keys, by commas, that may differ from what the run in --workdir was begun with'
)
_XLA_OPTIONS = launch.define_xla_options()
launch.define_processes()

logger = logging.getLogger('llama_jax.pretrain')

# What the unigram and bigram models are fitted on at most: more takes longer than it tells. One process counts, and the
# others, which have ended, wait for it.
_MAX_BASELINE_ROWS, _MAX_BASELINE_SECONDS = 100_000, 120


def main() -> None:
    """One run from start to report; the banners are its chapters."""
    config, workdir, checkpoint = _CONFIG.value, epath.Path(_WORKDIR.value), _CHECKPOINT.value
    overrides = launch.split_list(_OVERRIDE.value)
    runtime.enable_compilation_cache(config.log.compilation_cache)

    # ---- What is refused before anything is written -----------------------------------------------------------------
    with runtime.refused_by_all():
        storage.check_place(workdir, folder=True)
        training.check_settings(config)
        check_overrides(overrides, config)
        check_workdir(workdir, config, checkpoint, overrides, _FORK.value)
    begun = has_checkpoint(workdir)
    with runtime.refused_by_all():
        fork, base = None, None
        if checkpoint and _FORK.value:
            raise InputError('--checkpoint and --fork are both given; a run starts from one of them')
        if checkpoint:
            with launch.flags_named('--checkpoint'):
                base = pretrained.open(checkpoint)
        elif begun and (read_record(workdir) or {}).get('fork'):
            base = pretrained.open(workdir)
        elif _FORK.value and not begun:
            fork = open_fork(_FORK.value, workdir, config)
            base = pretrained.open(fork.step)
        preset = starting_architecture(config, base)
        partitioner = training.make_partitioner(config)
        training.check_sizes(config, preset.max_seq_len, partitioner)
        training.compiler_options(_XLA_OPTIONS.value, partitioner)
        weights = parse_weights(config)
        optimizer = training.make_optimizer_config(config)
        schedule = make_schedule(optimizer, config.train.num_steps)
        tx = make_optimizer(optimizer, schedule)
        exams = training.prepare_exams(config)
        # Unknown names in `model`, and weights that do not divide over the mesh, show in the shapes alone.
        abstract_state(
            *abstract_params_and_axes(training.make_model(config, preset, partitioner)), tx, partitioner
        )
        with launch.flags_named('--config.data.train', '--config.data.validation'):
            check_sources(launch.split_list(f'{config.data.train},{config.data.validation}'))
    held = hold_folder(workdir, only_existing=True)

    # ---- Data -------------------------------------------------------------------------------------------------------
    tokenizer = find_tokenizer('' if fork else config.data.tokenizer, config, workdir, base)
    with runtime.refused_by_all():
        data = read_data(config, tokenizer, weights)
        check_data(workdir, data.fingerprint, overrides)
    check_same_data(data.fingerprint)

    # ---- Model, optimiser, state ------------------------------------------------------------------------------------
    llama = training.fit_vocabulary(config, preset, tokenizer.vocab_size)
    training.check_prompt(config, tokenizer, llama.max_seq_len)
    model = training.make_model(config, llama, partitioner)
    logger.info(
        '%s: %s weights on %s', config.model.preset, f'{llama.num_params:,}', describe_devices(partitioner)
    )
    target = abstract_state(*abstract_params_and_axes(model), tx, partitioner)
    start = None
    if not begun:  # what it starts from may be damaged: it is read before anything is written
        start = first_state(config, base, fork, target, model, tx)

    # ---- From here on the workdir is written to, and nothing in it is taken away -------------------------------------
    hold_folder(workdir, held=held)
    with runtime.refused_by_all():  # what another run may have begun there until now
        changes = check_workdir(workdir, config, checkpoint, overrides)
        changes += check_data(workdir, data.fingerprint, overrides)
    if runtime.is_main_process():
        storage.write_atomically(workdir / TOKENIZER_FILE, model_file(tokenizer))
        save_config(workdir, llama, base_checkpoint=checkpoint or (str(fork.step) if fork else ''))
    checkpointer = Checkpointer(workdir / CHECKPOINTS, config.checkpoint.keep, config.checkpoint.verify)
    if restored := checkpointer.restore_latest(target):
        step, state, metadata = restored
        logger.info('resuming at step %d of %d', step, config.train.num_steps)
        start, fork = (state, step, metadata), None
    state, start_step, restored = start or first_state(config, base, fork, target, model, tx)
    del start
    rows_before = restored.get('rows_consumed', 0)
    record = record_run(
        workdir, config, checkpoint, data.fingerprint, step=start_step,
        changes=fork.changes_with(data.fingerprint) if fork else changes, fork=fork,
    )  # fmt: skip
    if fork:  # from here on the other run is no longer needed
        logger.info('started from step %d of %s', start_step, fork.workdir)
        checkpointer.save(start_step, state, record | {'rows_consumed': rows_before})

    # ---- Training ---------------------------------------------------------------------------------------------------
    _, step_fn = training.make_train_step(config, model, target, tx, _XLA_OPTIONS.value)
    metrics_file = workdir / 'metrics.jsonl'
    writers = make_writers(config, workdir, metrics_file, start_step, restored, record['config'])
    shape = config.train.batch_size, config.data.seq_len
    batch = LMBatch.abstract(*shape, partitioner.batch_sharding(*shape))
    rows = batches(data.train, batch, rows_consumed=rows_before)
    measurements: list[Measurement] = []
    if data.validation:
        measurements.append(make_validation(
            model, data.validation, every=config.eval.every, target=batch, max_rows=config.eval.max_rows,
            num_chunks=config.train.loss_chunks,
        ))  # fmt: skip
    if exams:
        measurements.append(training.take_exams(config, exams, model, tokenizer))
    with jax.set_mesh(partitioner.mesh):
        trained = train(
            state,
            config=loop_config(config, model, workdir),
            step_fn=step_fn,
            frozen={},
            next_batch=lambda state, step: next(rows),
            rng=jax.random.key(config.seed + 1),
            start_step=start_step,
            rows_before=rows_before,
            schedule=schedule,
            checkpointer=checkpointer,
            metadata=record,
            writers=writers,
            measurements=measurements,
            measured=figures_of(metrics_file, start_step),
        )  # fmt: skip
    for writer in writers:
        writer.close()
    checkpointer.check_latest()
    checkpointer.close()
    state, step = trained.state, trained.step
    if trained.stopped:
        logger.info('stopped at step %d%s; run the same command to go on', step, ' and saved' if step else '')
        return

    # ---- Report -----------------------------------------------------------------------------------------------------
    text = sample(config, model, state, tokenizer)
    if runtime.is_main_process():  # the others have done their part
        rows_consumed = rows_before + (step - start_step) * config.train.batch_size
        report = final_report(config, data, step, rows_consumed, trained.figures, llama.vocab_size)
        report['sample'] = text
        storage.write_atomically(workdir / 'report.json', json.dumps(report, indent=2) + '\n')
        lines = {name: report[name] for name in ('unigram', 'bigram') if name in report}
        plot_loss(workdir / 'loss.png', read_metrics(metrics_file), lines)
        print(describe(report, workdir))


def parse_weights(config: ConfigDict) -> list[float] | None:
    """`data.weights` as numbers; None weighs the sources by their size."""
    given = f'--config.data.weights={config.data.weights!r}'
    try:
        weights = [float(weight) for weight in launch.split_list(config.data.weights)] or None
    except ValueError as error:
        raise InputError(f'{given}: {error}; give numbers or none') from error
    sources = launch.split_list(config.data.train)
    if weights and len(weights) != len(sources):
        raise InputError(
            f'{given} are {len(weights)} weights for {len(sources)} data sources; give one each, or none for all'
        )
    if weights and not all(0 < weight < math.inf for weight in weights):
        raise InputError(f'{given}: each must be a positive number (leave out an unused source)')
    return weights


def describe_devices(partitioner: Partitioner) -> str:
    """'8 cpu (data 1, fsdp 8, ...)'."""
    axes = ', '.join(f'{name} {size}' for name, size in partitioner.mesh.shape.items())
    return f'{jax.device_count()} {jax.devices()[0].device_kind} ({axes})'


def read_data(config: ConfigDict, tokenizer: Tokenizer, weights: list[float] | None) -> PretrainData:
    """Reads, tokenises, packs and mixes the sources."""
    data = pretrain_dataset(
        launch.split_list(config.data.train), tokenizer, config.data.seq_len,
        weights=weights, validation=launch.split_list(config.data.validation),
        validation_fraction=config.data.validation_fraction, text_key=config.data.text_key,
        separator=config.data.separator, seed=config.seed,
        progress=lambda documents, size: logger.info('tokenised %s documents, %.1f MB', f'{documents:,}', size / 1e6),
    )  # fmt: skip
    logger.info(
        'training data: %s documents, %.1f MB, %s tokens, %s rows of %d',
        f'{data.num_train_documents:,}', data.num_train_bytes / 1e6, f'{data.num_train_tokens:,}',
        f'{data.num_train_rows:,}', config.data.seq_len,
    )  # fmt: skip
    return data


def make_writers(
    config: ConfigDict,
    workdir: epath.Path,
    metrics_file: epath.Path,
    start_step: int,
    restored: dict[str, Any],
    record: dict[str, Any],
) -> list[Writer]:
    """Where the main process writes figures to."""
    if not runtime.is_main_process():
        return []
    writers: list[Writer] = [JsonlWriter(metrics_file, start_step, restored)]
    if config.log.tensorboard:
        writers.append(Aside('TensorBoard', lambda: TensorBoardWriter(workdir / 'tensorboard', start_step)))
    if config.log.wandb:
        begun = WandbWriter(config.log.wandb, workdir, record)  # here, where an error is the user's
        writers.append(Aside('W&B', lambda: begun))
    return writers


def loop_config(config: ConfigDict, model: LlamaForCausalLM, workdir: epath.Path) -> LoopConfig:
    """`config` as the dataclass that the loop takes."""
    return LoopConfig(
        num_steps=config.train.num_steps,
        batch_size=config.train.batch_size,
        tokens_per_step=config.train.batch_size * config.data.seq_len,
        flops_per_token=training_flops_per_token(model.config, config.data.seq_len),
        peak_flops=peak_flops_per_device(),
        log_every=config.log.every,
        checkpoint_every=config.checkpoint.every,
        profile=(config.log.profile_start, config.log.profile_steps),
        profile_dir=str(workdir / 'profile'),
    )


def figures_of(metrics_file: epath.Path, step: int) -> dict[str, float]:
    """What is logged of a step, on all processes; {} where nothing is."""
    lines = read_metrics(metrics_file) if runtime.is_main_process() and step else []
    logged = next((line for line in lines if line['step'] == step), {})
    return json.loads(runtime.gather_texts(json.dumps(logged))[0])


def final_report(
    config: ConfigDict,
    data: PretrainData,
    step: int,
    rows_consumed: int,
    figures: dict[str, float],
    vocab_size: int,
) -> dict[str, Any]:
    """Validation loss beside those of count models fitted on the rows that the run was trained on."""
    report: dict[str, Any] = {'step': step}
    rows, max_rows = data.validation, config.eval.max_rows
    if rows is None:
        return report
    used = min(rows_consumed, _MAX_BASELINE_ROWS)
    baselines = fit_baselines(
        in_time(read_ahead(data.train, used), used, _MAX_BASELINE_SECONDS),
        (rows[i] for i in range(min(len(rows), max_rows or len(rows)))),
        vocab_size,
    )
    per_byte = figures['validation_bits_per_byte'] / figures['validation_loss']
    return report | {
        'validation_tokens': count_predicted(rows, max_rows),
        'validation_loss': figures['validation_loss'],
        'validation_bits_per_byte': figures['validation_bits_per_byte'],
        'bigram': baselines.bigram,
        'bigram_bits_per_byte': baselines.bigram * per_byte,
        'unigram': baselines.unigram,
        'unigram_bits_per_byte': baselines.unigram * per_byte,
    }


def sample(config: ConfigDict, model: LlamaForCausalLM, state: TrainState, tokenizer: Tokenizer) -> str:
    """A completion of `eval.prompt` by the trained weights, at temperature 0.8."""
    if not config.eval.sample_tokens:
        return ''
    completion = generate(
        model, state.params, tokenizer, [config.eval.prompt], max_new_tokens=config.eval.sample_tokens,
        temperature=0.8, top_p=0.95, seed=config.seed,
    )  # fmt: skip
    return config.eval.prompt + completion[0]


def describe(report: dict[str, Any], workdir: epath.Path) -> str:
    """The report as people read it."""
    lines = [f'\ntrained {report["step"]} steps']
    if 'validation_loss' in report:
        lines.append(f'{"validation":22}{"nats/token":>12}{"bits/byte":>12}')
        rows = (('this model', 'validation_loss', 'validation_bits_per_byte'),) + tuple(
            (label, name, f'{name}_bits_per_byte')
            for label, name in (('interpolated bigram', 'bigram'), ('unigram', 'unigram'))
        )
        lines += [f'{label:22}{report[loss]:12.4f}{report[bits]:12.4f}' for label, loss, bits in rows]
    if report['sample']:
        lines += ['', 'sample:', report['sample']]
    return '\n'.join([*lines, '', f'loss curve: {workdir / "loss.png"}'])


if __name__ == '__main__':
    launch.run(main, resumable=True)
