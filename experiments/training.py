"""What every training does around its objective: sizes, model and train step of a config, benchmarks on the way."""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import optax
from ml_collections import ConfigDict

from experiments import launch
from llama_jax import xla_options
from llama_jax.eval.engine import Engine
from llama_jax.eval.harness import Exam, evaluate, prepare
from llama_jax.eval.task import Judges
from llama_jax.eval.tasks import find_task
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS, with_vocab_size
from llama_jax.partitioning import MESH_AXES, Partitioner, make_mesh, parse_rules
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.train.loop import Measurement
from llama_jax.train.optimizer import OptimizerConfig
from llama_jax.train.state import TrainState
from llama_jax.train.step import compile_train_step
from llama_jax.types import InputError, LossFn, did_you_mean

logger = logging.getLogger('llama_jax.training')


# Keys with the least that they may be, and the most (exclusive): most are used late, and all are checked first.
_RANGES: dict[str, tuple[float, float]] = {
    'seed': (0, 2**31 - 1),
    'model.vocab_size': (0, math.inf),
    'model.unroll': (1, math.inf),
    'data.validation_fraction': (0, 1),
    'data.seq_len': (1, math.inf),
    'train.num_steps': (1, math.inf),
    'train.batch_size': (1, math.inf),
    'train.num_microbatches': (1, math.inf),
    'train.loss_chunks': (1, math.inf),
    'train.z_loss': (0, math.inf),
    'checkpoint.every': (0, math.inf),
    'checkpoint.keep': (0, math.inf),
    'eval.every': (0, math.inf),
    'eval.max_rows': (0, math.inf),
    'eval.sample_tokens': (0, math.inf),
    'eval.tasks_every': (0, math.inf),
    'eval.limit': (0, math.inf),
    'log.every': (0, math.inf),
    'log.profile_start': (0, math.inf),
    'log.profile_steps': (0, math.inf),
}


def check_settings(config: ConfigDict) -> None:
    """What is wrong with a setting by itself, in a line that names its key: before anything is read or written."""
    known = launch.flatten(config)
    for key, (least, end) in _RANGES.items():
        if key in known and not least <= known[key] < end:  # a NaN is in no range
            above = '' if end == math.inf else f' and below {end}'
            raise InputError(
                f'--config.{key}={known[key]} is out of range: it must be at least {least}{above}'
            )
    start, steps = config.log.profile_start, config.log.profile_steps
    if steps and start >= config.train.num_steps:
        raise InputError(
            f'--config.log.profile_start={start} is not before the last of --config.train.num_steps='
            f'{config.train.num_steps}: nothing would be traced'
        )
    if config.log.wandb and importlib.util.find_spec('wandb') is None:
        raise InputError(
            f"--config.log.wandb={config.log.wandb} needs the package wandb: pip install 'llama_jax[wandb]'"
        )
    make_optimizer_config(config)


def check_prompt(config: ConfigDict, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """What is completed at the end of the run must fit then."""
    if config.eval.sample_tokens:
        with launch.flags_named('--config.eval.prompt'):
            length = len(tokenizer.encode(config.eval.prompt, bos=True))
            if length >= max_seq_len:
                raise InputError(
                    f'the prompt has {length} tokens; the model reads {max_seq_len}, so shorten it'
                )


def make_partitioner(config: ConfigDict, devices: Sequence[Any] | None = None) -> Partitioner:
    """The mesh of these devices (all there are) with the axis rules of `config.mesh`."""
    with launch.flags_named('--config.mesh.*'):
        mesh = make_mesh({name: config.mesh[name] for name in MESH_AXES}, devices)
    with launch.flags_named('--config.mesh.axis_rules'):
        return Partitioner(mesh, parse_rules(config.mesh.axis_rules))


def make_model(config: ConfigDict, llama: LlamaConfig, partitioner: Partitioner) -> LlamaForCausalLM:
    """The model of an architecture with the knobs of `config.model`."""
    if config.model.dtype not in launch.DTYPES:
        raise InputError(
            f'unknown --config.model.dtype={config.model.dtype}; choose from {sorted(launch.DTYPES)}'
        )
    return LlamaForCausalLM(
        llama,
        dtype=launch.DTYPES[config.model.dtype],
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention_implementation=config.model.attention,
        partitioner=partitioner,
    )


def check_sizes(config: ConfigDict, max_seq_len: int, partitioner: Partitioner) -> None:
    """The row must fit the model and divide into loss chunks, the batch into microbatches and over the devices."""
    if config.data.seq_len > max_seq_len:
        raise InputError(
            f'--config.data.seq_len={config.data.seq_len} is longer than {config.model.preset} reads: at most '
            f'{max_seq_len} tokens'
        )
    size, parts = config.train.batch_size, config.train.num_microbatches
    if parts < 1 or size < 1 or size % parts:
        raise InputError(
            f'--config.train.batch_size={size} does not divide into --config.train.num_microbatches={parts}'
        )
    devices = partitioner.axis_size('batch')
    if parts > 1 and size // parts % devices:
        fewer = [n for n in range(1, parts) if size % (n * devices) == 0]
        raise InputError(
            f'--config.train.batch_size={size} in --config.train.num_microbatches={parts} are {size // parts} rows at '
            f'a time, which do not divide over the {devices} devices that share a batch; make the batch a multiple of '
            f'{parts * devices}' + (f', or take it in {fewer[-1]}' if fewer else '')
        )
    with launch.flags_named('--config.train.batch_size', '--config.data.seq_len'):
        partitioner.batch_sharding(size // parts, config.data.seq_len)
    if config.train.loss_chunks < 1 or config.data.seq_len % config.train.loss_chunks:
        raise InputError(
            f'--config.data.seq_len={config.data.seq_len} does not divide into '
            f'--config.train.loss_chunks={config.train.loss_chunks}'
        )


def make_train_step(
    config: ConfigDict,
    model: LlamaForCausalLM,
    target: TrainState,
    tx: optax.GradientTransformation,
    xla_options: str,
) -> tuple[LossFn, Callable]:
    """(the loss of pretraining, the jitted update) that the config describes, for a state like `target`."""
    loss_fn = language_model_loss(model, z_loss=config.train.z_loss, num_chunks=config.train.loss_chunks)
    assert model.partitioner is not None
    step_fn = compile_train_step(
        target, loss_fn=loss_fn, tx=tx, num_microbatches=config.train.num_microbatches,
        compiler_options=compiler_options(xla_options, model.partitioner),
    )  # fmt: skip
    return loss_fn, step_fn


@functools.cache
def compiler_options(text: str, partitioner: Partitioner) -> dict[str, Any]:
    """What --xla_options sets, checked with the compiler for these devices."""
    with launch.flags_named('--xla_options'):
        return xla_options.parse(text, partitioner.mesh)


def find_preset(name: str) -> LlamaConfig:
    """The preset of that name, or a line with the nearest ones."""
    if name not in PRESETS:
        raise InputError(f'unknown model {name!r}; {did_you_mean(name, PRESETS)}')
    return PRESETS[name]


def fit_vocabulary(config: ConfigDict, llama: LlamaConfig, tokenizer_size: int) -> LlamaConfig:
    """The architecture with room for every id of the tokenizer."""
    wanted = config.model.vocab_size or max(llama.vocab_size, tokenizer_size)
    if wanted < tokenizer_size:
        raise InputError(
            f'--config.model.vocab_size={wanted} is less than the tokenizer needs: {tokenizer_size} ids; '
            'raise it, or 0 to fit'
        )
    return with_vocab_size(llama, wanted)


def make_optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """`config.optimizer` as the dataclass that the library takes."""
    with launch.flags_named(*(f'--config.optimizer.{name}' for name in config.optimizer)):
        return OptimizerConfig(**config.optimizer)


def prepare_exams(config: ConfigDict) -> list[Exam]:
    """The benchmarks that `config.eval` names, read before anything is trained."""
    exams = []
    for name in launch.split_list(config.eval.tasks):
        with launch.flags_named('--config.eval.tasks'):
            task = find_task(name)
            if task.executes_code:
                raise InputError(
                    f'task {task.name} executes generated code, which a training run does not; leave it to '
                    'experiments.evaluate'
                )
            task.check(Judges())
        if not config.eval.data_dir and not name.startswith('perplexity:'):
            raise InputError(f'--config.eval.tasks={config.eval.tasks} needs --config.eval.data_dir=DIR')
        with launch.flags_named('--config.eval.tasks', '--config.eval.data_dir'):
            exams.append(prepare(task, config.eval.data_dir, limit=config.eval.limit))
    return exams


def take_exams(
    config: ConfigDict, exams: Sequence[Exam], model: LlamaForCausalLM, tokenizer: Tokenizer
) -> Measurement:
    """The benchmarks, evaluated on the training mesh: {'TASK/METRIC': value}."""
    rows = config.train.batch_size // config.train.num_microbatches
    model = model.clone(remat='none')

    def measure(state: TrainState, step: int) -> dict[str, float]:
        engine = Engine(model, state.params, tokenizer, batch_tokens=rows * config.data.seq_len)
        figures = {}
        for exam in exams:
            found = evaluate(exam, engine, progress=False)
            kept = {metric: found[metric] for metric in exam.task.metrics if metric in found}
            figures |= {f'{exam.task.name}/{metric}': value for metric, value in kept.items()}
        shown = ', '.join(f'{name} {value:.4f}' for name, value in figures.items())
        logger.info('step %d: %s', step, shown)
        return figures

    names = tuple(f'{exam.task.name}/{metric}' for exam in exams for metric in exam.task.metrics)
    return Measurement(config.eval.tasks_every or config.train.num_steps, measure, names)
