"""Pretrains a Llama on text.

    python -m experiments.pretrain --config=configs/pretrain.py:tiny --workdir=DIR

Running the same command again resumes. The workdir holds config.json, model.json, the tokenizer, checkpoints/STEP/,
metrics.jsonl, tensorboard/, and at the end loss.png and report.json.
"""

import itertools
import logging
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments import launch, training
from experiments.run.config_file import split_list
from experiments.run.data_schedule import describe_mixture, schedule_of, seen
from experiments.run.objective import language_modelling
from experiments.run.workdir import unit_bytes_of
from llama_jax import runtime
from llama_jax.data.datasets import PretrainData, pretrain_dataset
from llama_jax.data.loader import batches, read_ahead
from llama_jax.data.units import UNIT_BYTES
from llama_jax.eval.baselines import fit_baselines, in_time
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.train.validation import count_predicted, make_validation

_CONFIG = launch.define_config()
_RUN = launch.define_run()

logger = logging.getLogger('llama_jax.pretrain')

# What the unigram and bigram models are fitted on at most: more takes longer than it tells. One process counts, and the
# others, which have ended, wait for it.
_MAX_BASELINE_ROWS, _MAX_BASELINE_SECONDS = 100_000, 120


def main() -> None:
    """One run from start to report."""
    config = _CONFIG.value
    plan = training.plan(config, **_RUN.value)
    sources = '--config.data.train', '--config.data.validation'
    with runtime.refused_by_all(), launch.flags_named(*sources):
        data = read_data(config, plan.tokenizer, unit_bytes_of(plan.workdir, plan.fork))
    objective = language_modelling(config, plan.model, plan.partitioner, plan.base)
    run = training.begin(plan, objective, data.fingerprint)
    rows = batches(data.train, objective.batch, rows_consumed=run.rows_before)
    measurements = []
    if data.validation:
        measurements.append(make_validation(
            plan.model, data.validation_parts or data.validation, every=config.eval.every,
            target=objective.batch, view=objective.weights,
            max_rows=config.eval.max_rows, num_chunks=config.train.loss_chunks,
        ))  # fmt: skip

    def described(step: int) -> dict[str, float]:
        return seen(data, run.rows_before + (step - run.start_step) * config.train.batch_size)

    trained = training.fit(run, lambda state, step: next(rows), measurements, described)
    if trained.stopped:
        return
    text = training.sample(run, trained.state)
    if runtime.is_main_process():  # the others have done their part
        rows_consumed = run.rows_before + (trained.step - run.start_step) * config.train.batch_size
        report = final_report(
            config, data, trained.step, rows_consumed, trained.figures, plan.model.config.vocab_size
        )
        report['sample'] = text
        training.write_report(
            run, report, {name: report[name] for name in ('unigram', 'bigram') if name in report}
        )
        print(describe(report, plan.workdir))


def read_data(config: ConfigDict, tokenizer: Tokenizer, unit_bytes: int = UNIT_BYTES) -> PretrainData:
    """Reads, tokenises, packs and mixes the sources."""
    schedule = schedule_of(config)
    stages, skips = schedule.in_rows(config.train.batch_size)
    data = pretrain_dataset(
        split_list(config.data.train), tokenizer, config.data.seq_len,
        weights=schedule.weights, stages=stages, skips=skips, validation=split_list(config.data.validation),
        validation_fraction=config.data.validation_fraction, text_key=config.data.text_key,
        separator=config.data.separator, seed=config.seed, unit_bytes=unit_bytes,
        progress=lambda documents, size: logger.info('tokenised %s documents, %.1f MB', f'{documents:,}', size / 1e6),
    )  # fmt: skip
    logger.info(
        'training data: %s documents, %.1f MB, %s tokens, %s rows of %d',
        f'{data.num_train_documents:,}', data.num_train_bytes / 1e6, f'{data.num_train_tokens:,}',
        f'{data.num_train_rows:,}', config.data.seq_len,
    )  # fmt: skip
    logger.info(describe_mixture(data, config.train.num_steps * config.train.batch_size))
    return data


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
    if data.validation is None:
        return report
    parts, max_rows = list(data.validation_parts.values()) or [data.validation], config.eval.max_rows
    used = min(rows_consumed, _MAX_BASELINE_ROWS)
    baselines = fit_baselines(
        in_time(read_ahead(data.train, used), used, _MAX_BASELINE_SECONDS),
        itertools.chain.from_iterable(read_ahead(rows, max_rows or len(rows)) for rows in parts),
        vocab_size,
    )
    per_byte = figures['validation_bits_per_byte'] / figures['validation_loss']
    return report | {
        'validation_tokens': sum(count_predicted(rows, max_rows) for rows in parts),
        'validation_loss': figures['validation_loss'],
        'validation_bits_per_byte': figures['validation_bits_per_byte'],
        'bigram': baselines.bigram,
        'bigram_bits_per_byte': baselines.bigram * per_byte,
        'unigram': baselines.unigram,
        'unigram_bits_per_byte': baselines.unigram * per_byte,
    }


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
