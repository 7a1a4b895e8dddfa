"""From flags and ConfigDict to dataclasses, mesh and resumption: the only place where the two worlds meet."""

import difflib
import functools
import json
import logging as stdlib_logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
import optax
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from llama_jax import pretrained, runtime, storage, xla_options
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
from llama_jax.train.loop import Callback
from llama_jax.train.optimizer import OptimizerConfig
from llama_jax.train.state import TrainState
from llama_jax.train.step import compile_train_step
from llama_jax.types import InputError, LossFn, error_line

CONFIG_FILE = 'config.json'

logger = stdlib_logging.getLogger('llama_jax.launch')

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}

_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'host:port of process 0, to join several processes by hand'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'processes of the job, with --coordinator')
_XLA_OPTIONS = flags.DEFINE_string(
    'xla_options', '', 'settings of the compiler for the train step: preset names and NAME=VALUE, by commas'
)
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'number of this process, with --coordinator')
_INITIALIZATION_TIMEOUT = flags.DEFINE_float(
    'initialization_timeout', 300.0, 'seconds to wait for the other processes of the job', lower_bound=1
)


def define_config() -> flags.FlagHolder:
    """--config=configs/TASK.py:MODEL, with --config.SECTION.KEY=VALUE for any of its keys."""
    holder = config_flags.DEFINE_config_file(
        'config', None, 'configuration file, and the model as its argument'
    )
    flags.mark_flag_as_required('config')
    return holder


def run(main: Callable[[], None]) -> None:
    """Parses the command line and runs `main`; what the user got wrong is one line and status 2."""

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f'unexpected argument {argv[1]!r}; every option is given as --name=value', 2)
        logging.set_verbosity(logging.ERROR)  # JAX and Orbax narrate through absl at INFO
        existed: dict[epath.Path, bool] = {}
        try:
            existed = _new_folders()
            runtime.initialize_distributed(
                _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _INITIALIZATION_TIMEOUT.value
            )
        except InputError as error:
            _fail(str(error), 2, at_once=True)  # JAX may still wait for processes, and would tell at length
        try:
            runtime.setup_logging()
            _check_same_command()
            main()
        except InputError as error:
            if runtime.is_main_process():
                _discard(existed)
            _fail(str(error), 2)
        except FloatingPointError as error:
            _fail(str(error), 1)
        except OSError as error:
            if error.filename is None:
                raise
            _fail(f'{error.filename}: {error.strerror}', 2)  # a file that may not be read, a folder not made

    app.run(guarded, flags_parser=_parse_flags)


def _check_same_command() -> None:
    """Refuses processes that were not given the same flags: each would compile, and wait for, another program."""
    values = flags.FLAGS.flag_values_dict()
    config = values.pop('config', None)
    own = {f'--{name}': str(value) for name, value in values.items() if not name.startswith('config.')}
    own |= {f'--config.{name}': str(value) for name, value in flatten(config or {}).items()}
    differ = ('--process_id', '--coordinator', '--initialization_timeout', '--config.log.')  # may
    own = {name: value for name, value in own.items() if not name.startswith(differ)}
    first, *others = map(json.loads, runtime.gather_texts(json.dumps(own)))
    for process, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise InputError(
                    f'process {process} was started with {name}={other.get(name)}, process 0 with '
                    f'{name}={first.get(name)}; start all with the same command'
                )


def _new_folders() -> dict[epath.Path, bool]:
    """What --workdir and --output name where nothing is in it yet, and whether the empty folder is there."""
    named = [flags.FLAGS[name].value for name in ('workdir', 'output') if name in flags.FLAGS]
    for name in filter(None, named):
        storage.enable_bucket(name)
    folders = [epath.Path(name) for name in named if name]
    existed = {folder: folder.exists() for folder in folders}
    return {
        folder: there for folder, there in existed.items()
        if not there or (folder.is_dir() and not any(folder.iterdir()))
    }  # fmt: skip


def _discard(existed: Mapping[epath.Path, bool]) -> None:
    """Takes away what a refused command began, unless a checkpoint is among it; a folder that existed stays."""
    for folder, stays in existed.items():
        checkpoints = folder / pretrained.CHECKPOINTS
        saved = checkpoints.exists() and any(path.name.isdigit() for path in checkpoints.iterdir())
        if folder.is_dir() and not saved:
            for path in folder.iterdir() if stays else [folder]:
                path.rmtree() if path.is_dir() else path.unlink()


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if 'config' in flags.FLAGS:
            flags.FLAGS.config.to_dict()  # a file that failed to load says so only when it is looked at
        return rest
    except flags.IllegalFlagValueError as error:
        name = str(error).removeprefix('flag --').partition('=')[0]
        if 'must have a value other than None' in str(error):
            _fail(f'--{name} is required', 2)
        _fail(_describe_config_error(error, argv) if name.startswith('config.') else str(error), 2)
    except flags.Error as error:
        _fail(str(error), 2)
    except Exception as error:  # a configuration file may raise anything
        _fail(_describe_config_error(error, argv), 2)


def _describe_config_error(error: Exception, argv: Sequence[str]) -> str:
    """ml_collections names a bad key deep in a traceback: find the argument, and the keys it might have meant."""
    path = next((arg.removeprefix('--config=') for arg in argv if arg.startswith('--config=')), '')
    file = path.partition(':')[0]
    if not epath.Path(file).exists():
        return f'--config={path}: there is no file {file}; name one such as configs/pretrain.py:tiny'
    try:
        known = flatten(_load_config_file(path))
    except Exception as cause:
        return f'--config={path} cannot be loaded: {type(cause).__name__}: {error_line(cause)}'
    settings = {
        arg: arg.removeprefix('--config.').split('=', 1) for arg in argv if arg.startswith('--config.')
    }
    for key, *_ in settings.values():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or sorted(known)[:5]
            return f'unknown config key --config.{key}; did you mean {" or ".join(near)}?'
    text = str(error)
    for arg in sorted(
        settings, key=lambda arg: f'flag {arg}:' not in text
    ):  # the one that is named comes first
        key, *value = settings[arg]
        kind = type(known[key]).__name__
        if f'flag {arg}:' in text or kind in text or repr(''.join(value)) in text:
            return f'{arg}: the value must be of type {kind}, as {known[key]!r} is'
    return f'configuration: {error_line(error)}'


def _load_config_file(path: str) -> ConfigDict:
    import runpy

    file, _, argument = path.partition(':')
    get_config = runpy.run_path(file)['get_config']
    return get_config(argument) if argument else get_config()


def _fail(message: str, status: int, at_once: bool = False) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
    if at_once:
        os._exit(status)
    sys.exit(status)


def flatten(values: Any, prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in values.items():
        if hasattr(value, 'items'):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[f'{prefix}{key}'] = value
    return flat


def make_partitioner(config: ConfigDict, devices: Sequence[Any] | None = None) -> Partitioner:
    """The mesh of these devices (all there are) with the axis rules of `config.mesh`."""
    mesh = make_mesh({name: config.mesh[name] for name in MESH_AXES}, devices)
    return Partitioner(mesh, parse_rules(config.mesh.axis_rules))


def make_model(config: ConfigDict, llama: LlamaConfig, partitioner: Partitioner) -> LlamaForCausalLM:
    """The model of an architecture with the knobs of `config.model`."""
    if config.model.dtype not in DTYPES:
        raise InputError(f'unknown --config.model.dtype={config.model.dtype}; choose from {sorted(DTYPES)}')
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
            f'--config.data.seq_len={config.data.seq_len} is longer than {config.model.preset} reads: at most '
            f'{max_seq_len} tokens'
        )
    size, parts = config.train.batch_size, config.train.num_microbatches
    if parts < 1 or size < 1 or size % parts:
        raise InputError(
            f'--config.train.batch_size={size} does not divide into --config.train.num_microbatches={parts}'
        )
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
) -> tuple[LossFn, Callable]:
    """(the loss of pretraining, the jitted update) that the config describes, for a state like `target`."""
    loss_fn = language_model_loss(model, z_loss=config.train.z_loss, num_chunks=config.train.loss_chunks)
    assert model.partitioner is not None
    step_fn = compile_train_step(
        target, loss_fn=loss_fn, tx=tx, num_microbatches=config.train.num_microbatches,
        compiler_options=compiler_options(model.partitioner),
    )  # fmt: skip
    return loss_fn, step_fn


@functools.cache
def compiler_options(partitioner: Partitioner) -> dict[str, Any]:
    """What --xla_options sets, checked with the compiler for these devices."""
    return xla_options.parse(_XLA_OPTIONS.value, partitioner.mesh)


def find_preset(name: str) -> LlamaConfig:
    """The preset of that name, or a line with the nearest ones."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or sorted(PRESETS)
        raise InputError(f'unknown model {name!r}; did you mean {" or ".join(near)}?')
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
    return OptimizerConfig(**config.optimizer)


def split_list(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(filter(None, (part.strip() for part in text.split(','))))


# What a workdir's checkpoints depend on. All else (mesh, lengths, logging, remat) may change between launches.
_IDENTITY = (
    'base_checkpoint', 'seed', 'model.preset', 'model.vocab_size', 'model.dtype', 'data.', 'train.batch_size',
    'train.z_loss', 'optimizer.',
)  # fmt: skip


def check_workdir(workdir: epath.Path, config: ConfigDict, base_checkpoint: str) -> None:
    """Refuses a workdir of another run, naming the first key that differs."""
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f'--workdir={workdir} is a file; name a folder, which is made where it is missing')
    file = workdir / CONFIG_FILE
    if not file.exists():
        return
    try:
        recorded = json.loads(file.read_text())
        before = flatten(recorded['config']) | {'base_checkpoint': recorded['base_checkpoint']}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f'{file} is damaged ({error_line(error)}); start in a new --workdir') from error
    now = flatten(json.loads(config.to_json())) | {'base_checkpoint': base_checkpoint}
    for key in sorted(set(before) | set(now)):
        if key.startswith(_IDENTITY) and before.get(key) != now.get(key):
            flag = '--checkpoint' if key == 'base_checkpoint' else f'--config.{key}'
            raise InputError(
                f'workdir {workdir} belongs to another run: {flag} was {before.get(key)!r} and is '
                f'{now.get(key)!r}; restore it, or choose a new --workdir'
            )


def check_data(workdir: epath.Path, fingerprint: str) -> None:
    """Refuses to go on where the documents themselves have changed."""
    file = workdir / CONFIG_FILE
    if file.exists() and (before := json.loads(file.read_text())['data_fingerprint']) != fingerprint:
        raise InputError(
            f'the data of workdir {workdir} have changed since it was started (fingerprint {before[:12]}, now '
            f'{fingerprint[:12]}): restore the files of --config.data.train, or choose a new --workdir'
        )


def check_same_data(fingerprint: str) -> None:
    """Refuses hosts whose copies of the documents differ."""
    first, *others = runtime.gather_texts(fingerprint)
    for process, other in enumerate(others, start=1):
        if other != first:
            raise InputError(
                f'process {process} finds other documents in --config.data.train than process 0 (fingerprint '
                f'{other[:12]}, not {first[:12]}); give all hosts the same files'
            )


def record_run(
    workdir: epath.Path, config: ConfigDict, base_checkpoint: str, fingerprint: str
) -> dict[str, Any]:
    """Writes config.json and returns what it holds."""
    record = {
        'config': json.loads(config.to_json()),
        'base_checkpoint': base_checkpoint,
        'data_fingerprint': fingerprint,
    }
    if runtime.is_main_process():
        storage.write_atomically(workdir / CONFIG_FILE, json.dumps(record, indent=2) + '\n')
    return record


def prepare_exams(config: ConfigDict) -> list[Exam]:
    """The benchmarks that `config.eval` names, read before anything is trained."""
    exams = []
    for name in split_list(config.eval.tasks):
        task = find_task(name)
        task.check(Judges())
        if not config.eval.data_dir and not name.startswith('perplexity:'):
            raise InputError(f'--config.eval.tasks={config.eval.tasks} needs --config.eval.data_dir=DIR')
        exams.append(prepare(task, config.eval.data_dir, limit=config.eval.limit))
    return exams


def take_exams(
    config: ConfigDict, exams: Sequence[Exam], model: LlamaForCausalLM, tokenizer: Tokenizer
) -> Callback:
    """A callback of the loop that evaluates the benchmarks on the training mesh: {'TASK/METRIC': value}."""
    rows = config.train.batch_size // config.train.num_microbatches
    model = model.clone(remat='none')

    def callback(state: TrainState, step: int) -> dict[str, float]:
        engine = Engine(model, state.params, tokenizer, batch_tokens=rows * config.data.seq_len)
        figures = {}
        for exam in exams:
            found = evaluate(exam, engine, progress=False)
            kept = {metric: found[metric] for metric in exam.task.metrics if metric in found}
            figures |= {f'{exam.task.name}/{metric}': value for metric, value in kept.items()}
        shown = ', '.join(f'{name} {value:.4f}' for name, value in figures.items())
        logger.info('step %d: %s', step, shown)
        return figures

    return callback
