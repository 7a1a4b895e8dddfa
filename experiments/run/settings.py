"""A configuration as what the library takes: checked before anything is read or written, a key named in each line."""

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.prompting.checkpoint import DTYPES
from experiments.run.config_file import flatten, split_list
from llama_jax import xla_options
from llama_jax.errors import InputError, did_you_mean
from llama_jax.eval.harness import PreparedTask, prepare
from llama_jax.eval.task import Graders
from llama_jax.eval.tasks import find_task
from llama_jax.lora import LoraConfig
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS, with_vocab_size
from llama_jax.models.remat import REMAT_POLICIES
from llama_jax.ops.attention import IMPLEMENTATIONS
from llama_jax.partitioning import MESH_AXES, Partitioner, make_mesh, parse_rules
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.train.optimizer import OptimizerConfig

# Numbers are at least 0, these at least 1 or below something. Most are used late, and all are checked first; those of
# `mesh` and `optimizer` by who takes them, and the size of a tokenizer by its training, the first thing that is done.
_POSITIVE = (
    'model.unroll', 'data.seq_len', 'train.num_steps', 'train.batch_size', 'train.num_microbatches',
    'train.loss_chunks',
)  # fmt: skip
_MOST_TOKENS = 2**31  # a hundred times what the largest runs take
_BELOW = {'seed': 2**31 - 1, 'data.validation_fraction': 1}
_CHECKED_ELSEWHERE = ('mesh.', 'optimizer.', 'data.vocab_size')


def check_settings(config: ConfigDict) -> None:
    """What is wrong with a setting by itself, in a line that names its key: before anything is read or written."""
    for key, value in flatten(config).items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or key.startswith(_CHECKED_ELSEWHERE)
        ):
            continue
        by_epochs = key == 'train.num_steps' and config.train.get('num_epochs')
        least = int(key in _POSITIVE and not by_epochs)
        end = _BELOW.get(key, 2**31 if isinstance(value, int) else math.inf)
        if not least <= value < end:  # a NaN is in no range
            above = '' if end == math.inf else f' and below {end}'
            raise InputError(f'--config.{key}={value} is out of range: it must be at least {least}{above}')
    if config.train.num_steps and config.train.get('num_epochs'):
        raise InputError(
            f'--config.train.num_steps={config.train.num_steps} and --config.train.num_epochs='
            f'{config.train.num_epochs} are both given; set one of them to 0'
        )
    start, steps = config.log.get('profile_start', 0), config.log.get('profile_steps', 0)
    if steps and 0 < config.train.num_steps <= start:
        raise InputError(
            f'--config.log.profile_start={start} is not before the last of --config.train.num_steps='
            f'{config.train.num_steps}: nothing would be traced'
        )
    if config.log.wandb and importlib.util.find_spec('wandb') is None:
        raise InputError(
            f"--config.log.wandb={config.log.wandb} needs the package wandb: pip install 'llama_jax[wandb]'"
        )
    make_optimizer_config(config)
    make_lora_config(config)


def check_prompt(config: ConfigDict, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """What is completed at the end of the run must fit then."""
    if 'prompt' in config.eval and config.eval.sample_tokens:
        with flags_named('--config.eval.prompt'):
            length = len(tokenizer.encode(config.eval.prompt, bos=True))
            if length >= max_seq_len:
                raise InputError(
                    f'the prompt has {length} tokens; the model reads {max_seq_len}, so shorten it'
                )


def make_partitioner(config: ConfigDict, devices: Sequence[Any] | None = None) -> Partitioner:
    """The mesh of these devices (all there are) with the axis rules of `config.mesh`."""
    with flags_named('--config.mesh.*'):
        mesh = make_mesh({name: config.mesh[name] for name in MESH_AXES}, devices)
    with flags_named('--config.mesh.axis_rules'):
        return Partitioner(mesh, parse_rules(config.mesh.axis_rules))


def make_model(config: ConfigDict, llama: LlamaConfig, partitioner: Partitioner) -> LlamaForCausalLM:
    """The model of an architecture with the knobs of `config.model`."""
    for key, known in ('dtype', DTYPES), ('remat', REMAT_POLICIES), ('attention', IMPLEMENTATIONS):
        if (name := config.model[key]) not in known:
            raise InputError(f'unknown --config.model.{key}={name}; choose from {", ".join(sorted(known))}')
    return LlamaForCausalLM(
        llama,
        dtype=DTYPES[config.model.dtype],
        remat=config.model.remat,
        unroll=config.model.unroll,
        attention_implementation=config.model.attention,
        partitioner=partitioner,
    )


def check_sizes(config: ConfigDict, max_seq_len: int, partitioner: Partitioner) -> None:
    """The row must fit the model and divide into loss chunks, the batch into microbatches and over the devices."""
    if config.data.seq_len > max_seq_len:
        raise InputError(
            f'--config.data.seq_len={config.data.seq_len} is more tokens than the model reads '
            f'({config.model.preset}); set it to {max_seq_len} or less'
        )
    size, parts = config.train.batch_size, config.train.num_microbatches
    if size * config.data.seq_len > _MOST_TOKENS:
        raise InputError(
            f'--config.train.batch_size={size} rows of --config.data.seq_len={config.data.seq_len} are more than '
            f'{_MOST_TOKENS:,} tokens a step; make them fewer'
        )
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
    with flags_named('--config.train.batch_size', '--config.data.seq_len'):
        partitioner.batch_sharding(size // parts, config.data.seq_len)
    if config.train.loss_chunks < 1 or config.data.seq_len % config.train.loss_chunks:
        raise InputError(
            f'--config.data.seq_len={config.data.seq_len} does not divide into '
            f'--config.train.loss_chunks={config.train.loss_chunks}'
        )


@functools.cache
def compiler_options(text: str, partitioner: Partitioner) -> dict[str, Any]:
    """What --xla_options sets, checked with the compiler for these devices."""
    with flags_named('--xla_options'):
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
    with flags_named(*(f'--config.optimizer.{name}' for name in config.optimizer)):
        return OptimizerConfig(**config.optimizer)


def make_lora_config(config: ConfigDict) -> LoraConfig | None:
    """`config.lora` as the dataclass that the library takes; None where all weights are trained."""
    if 'lora' not in config or not config.lora.rank:
        return None
    section = config.lora
    with flags_named(*(f'--config.lora.{name}' for name in section)):
        return LoraConfig(
            rank=section.rank, alpha=float(section.alpha), dropout=float(section.get('dropout', 0.0)),
            targets=tuple(split_list(section.targets)), rslora=section.get('rslora', False),
            layers=_layers(section.get('layers', '')),
            train_whole=tuple(split_list(section.get('train_whole', ''))),
        )  # fmt: skip


def _layers(text: str) -> tuple[int, ...]:
    """'0-3,8' as the numbers of the layers."""
    try:
        spans = [[int(end) for end in part.split('-')] for part in split_list(text)]
        return tuple(layer for first, *last in spans for layer in range(first, (*last, first)[0] + 1))
    except ValueError:
        raise InputError(
            f'layers is {text!r}; write numbers of layers, or spans of them, as in 0-15,31'
        ) from None


def prepare_tasks(config: ConfigDict) -> list[PreparedTask]:
    """The benchmarks that `config.eval` names, read before anything is trained."""
    prepared_tasks = []
    for name in split_list(config.eval.get('tasks', '')):
        with flags_named('--config.eval.tasks'):
            task = find_task(name)
            if task.executes_code:
                raise InputError(
                    f'task {task.name} executes generated code, which a training run does not; leave it to '
                    'experiments.evaluate'
                )
            task.check(Graders())
        if not config.eval.data_dir and not name.startswith('perplexity:'):
            raise InputError(f'--config.eval.tasks={config.eval.tasks} needs --config.eval.data_dir=DIR')
        with flags_named('--config.eval.tasks', '--config.eval.data_dir'):
            prepared_tasks.append(prepare(task, config.eval.data_dir, limit=config.eval.get('limit', 0)))
    return prepared_tasks


def partitioner_of_flags(mesh: list[str], axis_rules: str) -> Partitioner:
    """Of --mesh and --axis_rules, on all devices."""
    with flags_named('--mesh'):
        made = make_mesh(mesh_sizes(mesh, '--mesh'))
    with flags_named('--axis_rules'):
        return Partitioner(made, parse_rules(axis_rules))


def mesh_sizes(items: Sequence[str], flag: str) -> dict[str, int]:
    """['fsdp=-1', 'tensor=2'] as numbers."""
    try:
        return {name.strip(): int(size) for name, size in (item.split('=') for item in items)}
    except ValueError as error:
        raise InputError(f"{flag}={','.join(items)}: write sizes as in 'fsdp=4,tensor=2'") from error
