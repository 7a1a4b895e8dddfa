"""Evaluates a checkpoint on benchmarks, as the papers did.

    python -m experiments.evaluate --checkpoint=CKPT --tasks=piqa,hellaswag --data_dir=DIR --output=DIR

The output folder gets results.json ({task: {metric: value, "n": items}}), samples/TASK.jsonl with every item, and
report.md, which is printed too; with --compare=llama2_7b also a plot beside the scores that were published of that
model. The same command again goes on where it was killed.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from experiments import launch
from experiments.prompting.loading import define_spread_model, load_weights, make_model, open_model
from experiments.run import preference_files
from experiments.run.config_file import split_list
from experiments.run.results_file import check_results, write_results
from experiments.run.settings import partitioner_of_flags
from experiments.run.trained_format import chat_format_of
from experiments.run.workdir import hold_folder
from llama_jax import runtime, storage
from llama_jax.data.records import check_records
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine
from llama_jax.eval.harness import PreparedTask, Sampling, evaluate, finished_items, prepare
from llama_jax.eval.published import published_scores
from llama_jax.eval.task import Completion, Graders, Task
from llama_jax.eval.tasks import find_task
from llama_jax.eval.text_rating import CommandRating, file_rating
from llama_jax.grading.sandbox import CodeExecution
from llama_jax.item_log import ItemLog
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.reward import model_of
from llama_jax.tokenizer.protocol import required

_MODEL = define_spread_model()
_TASKS = launch.define_path(
    'tasks',
    None,
    "benchmarks, by our names or lm-evaluation-harness's, perplexity:FILE, or preference:FILE",
    required=True,
)
_DATA_DIR = launch.define_path('data_dir', '', 'folder of the benchmarks, or hf:// or tfds://')
_OUTPUT = launch.define_path('output', None, 'folder for the results, local or gs://...', required=True)
_LIMIT = flags.DEFINE_integer('limit', 0, 'the first so many items of each task; 0: all')
_NUM_FEWSHOT = flags.DEFINE_integer(
    'num_fewshot', None, "examples in a prompt; by default each task's own number"
)
_COMPARE = flags.DEFINE_string(
    'compare', '', 'a model whose published scores to set beside ours, e.g. llama2_7b'
)
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', None, 'completions of a prompt, for pass@k and maj1@k')
_TEMPERATURE = flags.DEFINE_float('temperature', None, "of completions; by default the task's")
_TOP_P = flags.DEFINE_float('top_p', None, "of completions; by default the task's")
_ALLOW_CODE = flags.DEFINE_boolean(
    'allow_code_execution', False, 'run generated programs, in a sandbox (human_eval, mbpp)'
)
_RATINGS = launch.define_path(
    'ratings', '', 'JSON Lines of {"text", "score"} for tasks whose texts are rated'
)
_RATING_COMMAND = flags.DEFINE_string(
    'rating_command', '', 'program that answers each line, a JSON string, with its score'
)
_CHAT_FORMAT = flags.DEFINE_string(
    'chat_format', '', "of preference:FILE: a data.format of training; by default the checkpoint's own"
)
_ON_ERROR = flags.DEFINE_enum(
    'on_error',
    'stop',
    ['stop', 'skip'],
    'at a bad record of preference:FILE; skip: leave it out, count and name it',
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 8192, 'tokens in a batch, padding included: what fits into memory'
)
_SEED = flags.DEFINE_integer('seed', 0, 'of sampled completions')

logger = logging.getLogger('llama_jax.evaluate')


def main() -> None:
    """Prepares all tasks, then loads the model, then evaluates one task after the other."""
    given, output = _MODEL.value, epath.Path(_OUTPUT.value)
    runtime.enable_compilation_cache()
    # ---- What is refused before anything is written -----------------------------------------------------------------
    with contextlib.ExitStack() as at_exit:
        with runtime.refused_by_all():
            storage.check_place(_OUTPUT.value, folder=True)
            if _BATCH_SIZE.value < 1:
                raise InputError(f'--batch_size={_BATCH_SIZE.value}: it is a number of tokens, at least 1')
            if _COMPARE.value:
                with launch.flags_named('--compare'):
                    published_scores(_COMPARE.value)
            partitioner = partitioner_of_flags(given['mesh'], given['axis_rules'])
            pair_files, names = preference_files.split_tasks(split_list(_TASKS.value))
            tasks = find_tasks(names, _DATA_DIR.value) if names or not pair_files else []
            idle = [] if tasks else [_NUM_FEWSHOT, _COMPARE]
            idle += [] if pair_files else [_CHAT_FORMAT, _ON_ERROR]
            idle += [] if any(map(has_items, names)) else [_DATA_DIR]
            for flag in idle:
                if flag.present and flag.value != '':
                    raise InputError(f'--{flag.name} is of none of --tasks={_TASKS.value}; leave it out')
            with launch.flags_named('--tasks'):
                check_records(pair_files)
            graders = make_graders(tasks, _ALLOW_CODE.value, _RATINGS.value, _RATING_COMMAND.value, at_exit)
            sampling = Sampling(_NUM_SAMPLES.value, _TEMPERATURE.value, _TOP_P.value)
            settings = {'limit': _LIMIT.value, 'num_fewshot': _NUM_FEWSHOT.value, 'sampling': sampling}
            named = ('tasks', 'data_dir', 'limit', 'num_fewshot', 'num_samples', 'temperature', 'top_p')
            with launch.flags_named(*(f'--{name}' for name in named)):
                prepared_tasks = [prepare(task, _DATA_DIR.value, **settings) for task in tasks]
            of_completions = [
                flag.name for flag in (_NUM_SAMPLES, _TEMPERATURE, _TOP_P, _SEED) if flag.present
            ]
            if _MODEL.is_given('cache_dtype'):
                of_completions.append('cache_dtype')
            check_sampling(prepared_tasks, of_completions)
            if runtime.is_main_process():
                check_results(
                    output, [*(task.name for task in tasks), *map(preference_files.task_of, pair_files)]
                )
        opened = open_model(given)
        # Without tasks it may be a reward model.
        model = make_model(opened, given, partitioner, LlamaForCausalLM if tasks else model_of)
        params, tokenizer = load_weights(opened, given, model)
        tokenizer = required(tokenizer)
        logger.info(
            '%s: %s weights on %d devices', opened.path, f'{model.config.num_params:,}', jax.device_count()
        )
        pairs = {}
        if pair_files:
            seq_len = min(_BATCH_SIZE.value, model.config.max_seq_len)
            with (
                runtime.refused_by_all(),
                launch.flags_named('--chat_format', '--on_error', '--batch_size', '--tasks'),
            ):
                pairs = preference_files.read_pairs(
                    pair_files, tokenizer, chat_format_of(opened, tokenizer, _CHAT_FORMAT.value),
                    _ON_ERROR.value, seq_len, _LIMIT.value,
                )  # fmt: skip
        engine = Engine(model, params, tokenizer, batch_tokens=_BATCH_SIZE.value, seed=_SEED.value)
        # All processes compute it: the weights may be spread over them.
        header = {'model': engine.fingerprint, 'seed': engine.seed}
        header_of_pairs = {'model': header['model'], 'chat_format': _CHAT_FORMAT.value}
        hold_folder(output)
        with runtime.refused_by_all(), launch.flags_named('--output'):
            logs = [open_log(output, prepared, header, at_exit) for prepared in prepared_tasks]
            if runtime.is_main_process():
                for file in pairs:
                    preference_files.check_samples(output, file, header_of_pairs)
        # ---- From here on the output is written to, and nothing in it is taken away ----------------------------------
        results, report = {}, ''
        for prepared, log in zip(prepared_tasks, logs, strict=True):
            try:
                found = evaluate(prepared, engine, graders=graders, log=log)
            except InputError as error:
                raise InputError(f'{prepared.task.name}: {error}; {what_is_kept(output, results)}') from error
            results[prepared.task.name] = found
            if count := found.get('truncated'):
                logger.warning(
                    '%s: %d items are too long for the model and lost their left end',
                    prepared.task.name,
                    count,
                )
            if runtime.is_main_process():
                report = write_results(output, given['checkpoint'], _COMPARE.value, results)
        of_pairs = {}
        for file, of_file in pairs.items():
            figures = preference_files.figures_of(model, params, partitioner, of_file, _BATCH_SIZE.value)
            of_pairs[preference_files.task_of(file)] = preference_files.report(of_file, figures)
            if runtime.is_main_process():
                preference_files.write(output, file, header_of_pairs, of_file, figures)
                report = write_results(output, given['checkpoint'], _COMPARE.value, results, of_pairs)
    if runtime.is_main_process():
        print(report)


def what_is_kept(output: epath.Path, results: dict[str, Any]) -> str:
    """Where an evaluation stands that cannot go on."""
    done = f'{", ".join(results)} done and kept in {output}; ' if results else ''
    return f'{done}the finished items are in {output / "samples"}, and the same command goes on from them'


def has_items(name: str) -> bool:
    """Whether a task reads its items from --data_dir; perplexity:FILE reads its own file."""
    return not name.startswith('perplexity:')


def find_tasks(names: Sequence[str], data_dir: str) -> list[Task]:
    """The tasks, each once."""
    with launch.flags_named('--tasks'):
        tasks = {task.name: task for task in map(find_task, names)}
    if not data_dir and any(map(has_items, tasks)):
        raise InputError('--data_dir is required: the folder of the benchmarks, or hf:// or tfds://')
    return list(tasks.values())


def make_graders(
    tasks: Sequence[Task], allow_code: bool, ratings: str, rating_command: str, at_exit: contextlib.ExitStack
) -> Graders:
    """What scores generated text, as the flags say: all that the tasks need, and nothing that none of them uses."""
    if ratings and rating_command:
        raise InputError('--ratings and --rating_command are both given; texts are rated by one of them')
    if (ratings or rating_command) and not any(task.rates_text for task in tasks):
        name = '--ratings' if ratings else '--rating_command'
        raise InputError(f'{name} is given, and none of --tasks rates texts; leave it out')
    if allow_code and not any(task.executes_code for task in tasks):
        raise InputError('--allow_code_execution is given, and none of --tasks executes code; leave it out')
    rate = None
    if ratings:
        with launch.flags_named('--ratings'):
            rate = file_rating(ratings)
    if rating_command:
        with launch.flags_named('--rating_command'):
            rate = at_exit.enter_context(CommandRating(rating_command))
    graders = Graders(CodeExecution(allowed=True) if allow_code else None, rate)
    with launch.flags_named('--allow_code_execution'):
        for task in tasks:
            task.check(graders)
    return graders


def check_sampling(prepared_tasks: Sequence[PreparedTask], given: Sequence[str]) -> None:
    """Refuses flags of completions, by name, where none is asked for."""
    asked = (request for prepared in prepared_tasks for requests in prepared.requests for request in requests)
    if given and not any(isinstance(request, Completion) for request in asked):
        flags_given = ', '.join(f'--{name}' for name in given)
        raise InputError(f'{flags_given}: none of --tasks generates text; leave it out')


def open_log(
    output: epath.Path, prepared: PreparedTask, header: dict[str, Any], at_exit: contextlib.ExitStack
) -> ItemLog | None:
    """The task's samples, on process 0; refused where they are of another evaluation."""
    if not runtime.is_main_process():
        return None
    file = output / 'samples' / f'{prepared.task.name.replace("/", "_")}.jsonl'
    log = at_exit.enter_context(contextlib.closing(ItemLog(file, {'task': prepared.task.name, **header})))
    finished_items(prepared, log)
    return log


if __name__ == '__main__':
    launch.run(main)
