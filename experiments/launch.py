"""The command line alone: flags, one line and a status for what is wrong, the same command on all processes."""

import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax.numpy as jnp
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from llama_jax import pretrained, runtime, signals, storage
from llama_jax.types import InputError, SystemFailure, error_line

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float16': jnp.float16}

_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'host:port of process 0, to join several processes by hand'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'processes of the job, with --coordinator')
XLA_OPTIONS = flags.DEFINE_string(
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


def run(main: Callable[[], None], *, resumable: bool = False) -> None:
    """Parses the command line and runs `main`; what the user got wrong is one line and status 2.

    Args:
      main: the command.
      resumable: stopped by a signal it has ended well, with status 0: given again it goes on.
    """
    interrupts = signals.Interrupts(resumable)

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f'unexpected argument {argv[1]!r}; every option is given as --name=value', 2)
        logging.set_verbosity(logging.ERROR)  # JAX and Orbax narrate through absl at INFO
        existed: dict[epath.Path, bool] = {}
        try:
            interrupts.install()
            existed = _new_folders()
            runtime.initialize_distributed(
                _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _INITIALIZATION_TIMEOUT.value
            )
            interrupts.install()
        except InputError as error:
            _fail(str(error), 2, at_once=True)  # JAX may still wait for processes, and would tell at length
        except signals.Interrupted as error:
            interrupts.end(error)
        try:
            runtime.setup_logging()
            _check_same_command()
            main()
        except InputError as error:
            if runtime.is_main_process():
                _discard(existed)
            _fail(str(error), 2)
        except signals.Interrupted as error:
            interrupts.end(error)
        except (FloatingPointError, SystemFailure) as error:
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


def open_with_tokenizer(checkpoint: str, tokenizer: str) -> pretrained.Checkpoint:
    """--checkpoint opened, for a command that reads or writes text; its weights are still in their files.

    Raises:
      InputError: it has no tokenizer, and --tokenizer gives none; or as `pretrained.open`.
    """
    opened = pretrained.open(checkpoint)
    if not tokenizer and opened.tokenizer is None:
        raise InputError(
            f'{checkpoint} has no tokenizer; give the one that the weights were trained with by --tokenizer'
        )
    return opened


def split_list(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(filter(None, (part.strip() for part in text.split(','))))
