"""Fine-tunes a Llama on conversations: full weights, on packed rows, with the loss on answers alone.

    python -m experiments.sft --config=configs/sft.py:llama2_7b --workdir=DIR --checkpoint=CKPT

Running the same command again resumes. The workdir is that of `experiments.pretrain`, with the chat template of the
format that was trained on; report.json has one sampled answer for each of some held-out prompts, beside the base's.
"""

import logging

from absl import flags
from ml_collections import ConfigDict

from experiments import launch, training
from experiments.run import held_out_answers as answers
from experiments.run.config_file import split_list
from experiments.run.objective import objective_of
from experiments.run.row_inspection import describe_rows, plot_lengths
from experiments.run.untrained_tokens import with_trained_tokens
from llama_jax import runtime
from llama_jax.data.examples import Encoder, ExampleData, collate_examples, example_dataset
from llama_jax.data.loader import batches
from llama_jax.data.records import check_records, parse_key_map
from llama_jax.tokenizer.chat_format import ChatFormat, chat_format_for
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.train.validation import make_validation

_CONFIG = launch.define_config()
_RUN = launch.define_run()
_INSPECT = flags.DEFINE_integer(
    'inspect',
    0,
    'print so many rows with what is learnt marked, their fill and lengths, and end',
    lower_bound=0,
)

logger = logging.getLogger('llama_jax.sft')


def main() -> None:
    """One run from start to report."""
    config = _CONFIG.value
    plan = training.plan(config, check_data=check_records, **_RUN.value)
    with runtime.refused_by_all():
        chat, data = read_data(config, plan.tokenizer)
    if _INSPECT.value:
        if runtime.is_main_process():
            print(describe_rows(data.rows, plan.tokenizer, _INSPECT.value))
            print(f'lengths: {plot_lengths(data.rows, plan.workdir / "lengths.png")}')
        return
    plan = training.in_epochs(plan, len(data.rows))
    objective = objective_of(plan.config, plan.model, plan.partitioner, plan.base)
    objective = with_trained_tokens(objective, chat, plan.tokenizer)
    run = training.begin(plan, objective, data.fingerprint, chat.template)
    rows = batches(data.train, objective.batch, collate=collate_examples, rows_consumed=run.rows_before)
    measurements = []
    if data.validation:
        measurements.append(make_validation(
            plan.model, data.validation, every=config.eval.every, target=objective.batch, view=objective.weights,
            num_chunks=config.train.loss_chunks, collate=collate_examples,
        ))  # fmt: skip
    asked = answers.held_out(run, chat, data.validation)
    before = answers.of_base(run, asked, measurements)
    trained = training.fit(run, lambda state, step: next(rows), measurements)
    if trained.stopped:
        return
    said = answers.sample(run, trained.state, asked)
    if runtime.is_main_process():  # the others have done their part
        report = {
            'step': trained.step,
            **trained.figures,
            **before,
            'answers': answers.beside(asked, said, before),
        }
        report |= {'examples': data.rows.num_documents, 'rows': len(data.rows), 'fill': data.rows.fill}
        lines = {'base': before['base_loss']} if 'base_loss' in before else {}
        training.write_report(run, report, lines)
        print(answers.describe(report, str(plan.workdir / 'loss.png')))


def read_data(config: ConfigDict, tokenizer: Tokenizer) -> tuple[ChatFormat, ExampleData]:
    """The format, and the conversations of the sources in it as packed rows."""
    with launch.flags_named('--config.data.format'):
        chat = chat_format_for(tokenizer, config.data.format)
    with launch.flags_named('--config.data.key_map'):
        key_map = parse_key_map(config.data.key_map)
    keys = ('train', 'on_error', 'seq_len', 'too_long', 'loss_on')
    with launch.flags_named(*(f'--config.data.{key}' for key in keys)):
        encoder = Encoder(chat, config.data.seq_len, config.data.loss_on, config.data.too_long)
        data = example_dataset(
            split_list(config.data.train), tokenizer, encoder, validation=split_list(config.data.validation),
            validation_fraction=config.data.validation_fraction, key_map=key_map, on_error=config.data.on_error,
            seed=config.seed,
        )  # fmt: skip
    rows = data.rows
    logger.info(
        'training data: %s conversations, %s tokens, %s to learn, in %s rows of %d, %.1f %% full',
        f'{rows.num_documents:,}', f'{rows.num_tokens:,}', f'{rows.num_counted:,}', f'{len(rows):,}', rows.seq_len,
        100 * rows.fill,
    )  # fmt: skip
    return chat, data


if __name__ == '__main__':
    launch.run(main, resumable=True)
