"""Evaluates a checkpoint on benchmarks, as the papers did.

    python -m experiments.evaluate --checkpoint=CKPT --tasks=piqa,hellaswag --data_dir=DIR --output=DIR

The output folder gets results.json ({task: {metric: value, "n": items}}), samples/TASK.jsonl with every item, and
report.md, which is printed too; with --compare=llama2_7b also a plot beside the scores that were published of that
model. The same command again goes on where it was killed.
"""

import contextlib
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from etils import epath

from experiments import launch
from llama_jax import pretrained, runtime, storage
from llama_jax.eval.engine import Engine
from llama_jax.eval.harness import Exam, Sampling, evaluate, prepare
from llama_jax.eval.published import Comparison, compare, published_scores
from llama_jax.eval.report import plot_comparison, to_report
from llama_jax.eval.sample_log import SampleLog
from llama_jax.eval.task import Judges
from llama_jax.eval.tasks import find_task
from llama_jax.eval.text_rating import CommandRating, file_rating
from llama_jax.grading.sandbox import CodeExecution
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.partitioning import Partitioner, make_mesh, parse_rules
from llama_jax.types import InputError

_CHECKPOINT = flags.DEFINE_string(
    'checkpoint', None, 'anything that is a Llama, as for generate', required=True
)
_TASKS = flags.DEFINE_list(
    'tasks', None, "benchmarks, by our names or lm-evaluation-harness's, or perplexity:FILE", required=True
)
_DATA_DIR = flags.DEFINE_string('data_dir', '', 'folder of the benchmarks, or hf:// or tfds://')
_OUTPUT = flags.DEFINE_string('output', None, 'folder for the results, local or gs://...', required=True)
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
_RATINGS = flags.DEFINE_string(
    'ratings', '', 'JSON Lines of {"text", "score"} for tasks whose texts are rated'
)
_RATING_COMMAND = flags.DEFINE_string(
    'rating_command', '', 'program that answers each line, a JSON string, with its score'
)
_TOKENIZER = flags.DEFINE_string('tokenizer', '', "tokenizer file, instead of the checkpoint's own")
_DTYPE = flags.DEFINE_enum(
    'dtype', 'auto', ['auto', *launch.DTYPES], 'of the computation; auto: float32 on a CPU'
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 8192, 'tokens in a batch, padding included: what fits into memory'
)
_MESH = flags.DEFINE_list(
    'mesh', ['fsdp=-1'], 'sizes of the axes data, fsdp, context, tensor; -1: all other devices'
)
_AXIS_RULES = flags.DEFINE_string('axis_rules', '', "overrides such as 'kv_heads=' (replicate)")
_SEED = flags.DEFINE_integer('seed', 0, 'of sampled completions')

logger = logging.getLogger('llama_jax.evaluate')


def main() -> None:
    """Prepares all tasks, then loads the model, then evaluates one task after the other."""
    runtime.enable_compilation_cache()
    output = epath.Path(_OUTPUT.value)
    if _BATCH_SIZE.value < 1:
        raise InputError(f'--batch_size={_BATCH_SIZE.value}: it is a number of tokens, at least 1')
    if _COMPARE.value:
        published_scores(_COMPARE.value)
    with contextlib.ExitStack() as at_exit:
        judges = make_judges(at_exit)
        exams = prepare_exams(judges)
        engine = load_engine()
        results, report = {}, ''
        for exam in exams:
            log = open_log(output, exam, engine, at_exit)
            results[exam.task.name] = found = evaluate(exam, engine, judges=judges, log=log)
            if count := found.get('truncated'):
                logger.warning(
                    '%s: %d items are too long for the model and lost their left end', exam.task.name, count
                )
            if runtime.is_main_process():
                report = write_results(output, results)
    if runtime.is_main_process():
        print(report)


def make_judges(at_exit: contextlib.ExitStack) -> Judges:
    """What scores generated text, as the flags say."""
    if _RATINGS.value and _RATING_COMMAND.value:
        raise InputError('--ratings and --rating_command are both given; texts are rated by one of them')
    rate = file_rating(_RATINGS.value) if _RATINGS.value else None
    if _RATING_COMMAND.value:
        rate = at_exit.enter_context(CommandRating(_RATING_COMMAND.value))
    return Judges(CodeExecution(allowed=True) if _ALLOW_CODE.value else None, rate)


def prepare_exams(judges: Judges) -> list[Exam]:
    """Documents and prompts of every task; what is wrong with any is known before the model is loaded."""
    names = [name.strip() for name in _TASKS.value if name.strip()]
    tasks = {task.name: task for task in map(find_task, names)}
    if not tasks:
        raise InputError('--tasks is empty; name at least one, such as --tasks=piqa,hellaswag')
    if not _DATA_DIR.value and not all(name.startswith('perplexity:') for name in tasks):
        raise InputError('--data_dir is required: the folder of the benchmarks, or hf:// or tfds://')
    for task in tasks.values():
        if task.executes_code and not judges.run_code:
            raise InputError(
                f'task {task.name} executes generated code, which is off; allow it with --allow_code_execution'
            )
        task.check(judges)
    sampling = Sampling(_NUM_SAMPLES.value, _TEMPERATURE.value, _TOP_P.value)
    return [
        prepare(task, _DATA_DIR.value, limit=_LIMIT.value, num_fewshot=_NUM_FEWSHOT.value, sampling=sampling)
        for task in tasks.values()
    ]


def load_engine() -> Engine:
    """The checkpoint on the mesh."""
    automatic = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    dtype = launch.DTYPES[automatic if _DTYPE.value == 'auto' else _DTYPE.value]
    partitioner = Partitioner(make_mesh(parse_mesh(_MESH.value)), parse_rules(_AXIS_RULES.value))
    config, params, tokenizer = pretrained.load(
        launch.open_with_tokenizer(_CHECKPOINT.value, _TOKENIZER.value),
        partitioner=partitioner,
        dtype=jnp.dtype(dtype),
        tokenizer=_TOKENIZER.value,
    )
    logger.info(
        '%s: %s weights on %d devices', _CHECKPOINT.value, f'{config.num_params:,}', jax.device_count()
    )
    model = LlamaForCausalLM(config, dtype=dtype, partitioner=partitioner)
    return Engine(model, params, tokenizer, batch_tokens=_BATCH_SIZE.value, seed=_SEED.value)


def parse_mesh(items: list[str]) -> dict[str, int]:
    """['fsdp=-1', 'tensor=2'] as numbers."""
    try:
        return {name.strip(): int(size) for name, size in (item.split('=') for item in items)}
    except ValueError as error:
        raise InputError(f"--mesh={','.join(items)}: write sizes as in 'fsdp=4,tensor=2'") from error


def open_log(
    output: epath.Path, exam: Exam, engine: Engine, at_exit: contextlib.ExitStack
) -> SampleLog | None:
    """The task's samples, on process 0."""
    # All processes compute it: the weights may be spread over them.
    header = {'task': exam.task.name, 'model': engine.fingerprint, 'seed': engine.seed}
    if not runtime.is_main_process():
        return None
    name = exam.task.name.replace('/', '_')
    return at_exit.enter_context(contextlib.closing(SampleLog(output / 'samples' / f'{name}.jsonl', header)))


def write_results(output: epath.Path, results: dict[str, Any]) -> str:
    """Writes results.json, the report and the plot; returns the report."""
    storage.write_atomically(output / 'results.json', json.dumps(results, indent=2) + '\n')
    rows: list[Comparison] = compare(_COMPARE.value, results) if _COMPARE.value else []
    report = to_report(f'Evaluation of {_CHECKPOINT.value}', results, _COMPARE.value, rows)
    storage.write_atomically(output / 'report.md', report)
    if rows:
        plot_comparison(output / 'comparison.png', _COMPARE.value, rows)
    return report


if __name__ == '__main__':
    launch.run(main)
