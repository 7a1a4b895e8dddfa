"""The command line alone: flags, one line and a status for what is wrong, the same command on all processes."""

import contextlib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.prompting.checkpoint import DTYPES
from experiments.run import config_file
from llama_jax import runtime, signals, storage
from llama_jax.tokenizer.chat_format import FORMATS
from llama_jax.types import InputError, SystemFailure

# Nothing is wrong with the command or the program: the disk, the quota, the cable.
_MACHINE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ESTALE,
)  # fmt: skip


class _PathParser(flags.ArgumentParser):
    """A path or several, by commas; '~' stands for the user's folder, which no shell expands within --name=value."""

    def parse(self, argument: str | None) -> str | None:
        return argument and config_file.expand_paths(argument)

    def flag_type(self) -> str:
        return 'path'


def define_path(name: str, default: str | None, help: str, required: bool = False) -> flags.FlagHolder:
    """A flag that names a file, a folder or a bucket's, or several by commas."""
    return flags.DEFINE(
        _PathParser(), name, default, help, serializer=flags.ArgumentSerializer(), required=required
    )


def define_config() -> flags.FlagHolder:
    """--config=configs/TASK.py:MODEL, with --config.SECTION.KEY=VALUE for any of its keys."""
    holder = config_flags.DEFINE_config_file('config', None, 'configuration file: FILE.py:MODEL')
    flags.mark_flag_as_required('config')
    return holder


def define_xla_options() -> flags.FlagHolder:
    """--xla_options, for the commands that compile a train step; see `xla_options.parse`."""
    text = 'settings of the compiler for the train step: NAME=VALUE by commas'
    return flags.DEFINE_string('xla_options', '', text)


class _Flags:
    """Several flags as one; its value has theirs by name."""

    def __init__(self, **holders: flags.FlagHolder):
        self._holders = holders

    @property
    def value(self) -> dict[str, Any]:
        return {name: holder.value for name, holder in self._holders.items()}


def define_run() -> _Flags:
    """--workdir and what else a training takes beside --config; see `training.plan`."""
    define_processes()
    return _Flags(
        workdir=define_path('workdir', None, 'folder of the run, local or gs://...', required=True),
        checkpoint=define_path('checkpoint', '', 'one whose weights to continue from, with a new optimiser'),
        fork=define_path(
            'fork',
            '',
            'WORKDIR[@STEP] of another run to start from, with its optimiser and place in the data',
        ),
        override=flags.DEFINE_string(
            'override', '', 'config keys, by commas, that may differ from what the run was begun with'
        ),
        xla_options=define_xla_options(),
    )


def define_sampled_policy() -> _Flags:
    """--checkpoint, --rewards and what else says how answers are drawn and judged; see `sampled_policy`."""
    define_processes()
    return _Flags(
        checkpoint=define_path(
            'checkpoint', None, 'the policy: anything that is a Llama, as for generate', required=True
        ),
        rewards=define_path(
            'rewards', None, 'what answers are scored by, each with =WEIGHT: reward models, task:NAME, '
            'FILE.py:function, helpfulness:CKPT with safety:CKPT, missing_stop, overlong:TOKENS', required=True,
        ),
        output=define_path('output', None, 'the file of what is kept, in JSON Lines', required=True),
        samples=flags.DEFINE_integer('samples', 16, 'answers to a prompt, at each temperature'),
        temperatures=flags.DEFINE_list('temperatures', ['1.0'], 'of the draws, by commas'),
        max_new_tokens=flags.DEFINE_integer('max_new_tokens', 256, 'of an answer'),
        chat_format=flags.DEFINE_enum(
            'chat_format', '', ['', *FORMATS],
            "how a conversation is spelled, as data.format in training; '': as the checkpoint was trained",
        ),
        key_map=flags.DEFINE_string('key_map', '', 'keys of records, OURS=THEIRS by commas, as prompt=question'),
        shard=flags.DEFINE_string('shard', '0/1', 'which part of the work, for several commands: 0/4 to 3/4'),
        seed=flags.DEFINE_integer('seed', 0, 'of the draws'),
        batch_size=flags.DEFINE_integer('batch_size', 64, 'answers that are drawn together', lower_bound=1),
        allow_code_execution=flags.DEFINE_boolean(
            'allow_code_execution', False, 'task: may run generated programs, in a sandbox'
        ),
        tokenizer=define_path('tokenizer', '', "tokenizer file, instead of the checkpoint's own"),
        dtype=flags.DEFINE_enum(
            'dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU'
        ),
        mesh=flags.DEFINE_list(
            'mesh', ['fsdp=-1'], 'sizes of the axes data, fsdp, context, tensor; -1: the other devices'
        ),
        axis_rules=flags.DEFINE_string('axis_rules', '', "overrides such as 'kv_heads=' (replicate)"),
    )  # fmt: skip


def define_processes() -> None:
    """The flags of a command that several processes run together; all others run in one."""
    flags.DEFINE_string('coordinator', '', 'host:port of process 0, to join several processes by hand')
    flags.DEFINE_integer('num_processes', 0, 'processes of the job, with --coordinator')
    flags.DEFINE_integer('process_id', -1, 'number of this process, with --coordinator')
    flags.DEFINE_float(
        'initialization_timeout', 300.0, 'seconds to wait for the other processes of the job', lower_bound=1
    )


def run(main: Callable[[], None], *, find: bool = True, resumable: bool = False) -> None:
    """Parses the command line and runs `main`; what the user got wrong is one line and status 2.

    Args:
      main: the command.
      find: `find_devices` before; else `main` does so itself.
      resumable: stopped by a signal it has ended well, with status 0: given again it goes on.
    """
    interrupts = signals.Interrupts(resumable)

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _fail(f'unexpected argument {argv[1]!r}; every option is given as --name=value', 2)
        logging.set_verbosity(logging.ERROR)  # JAX and Orbax narrate through absl at INFO
        try:
            interrupts.install()
            _join_processes()
            interrupts.install()
        except InputError as error:
            _fail(str(error), 2, at_once=True)  # JAX may still wait for processes, and would tell at length
        except signals.Interrupted as error:
            interrupts.end(error)
        try:
            if find:
                find_devices()
            main()
        except signals.Interrupted as error:
            interrupts.end(error)
        except Exception as error:
            message, status = describe_failure(error)
            if status:
                # Threads of a checkpoint that failed may wait for minutes for what will not come.
                _fail(message, status, at_once=isinstance(error, SystemFailure))
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            if not runtime.leave_job():
                os._exit(1)
            sys.exit(1)

    app.run(guarded, flags_parser=_parse_flags)


def find_devices() -> None:
    """JAX takes the devices; logs, and what processes must have in common, need them."""
    runtime.check_devices()
    runtime.setup_logging()
    _check_same_command()


def _join_processes() -> None:
    """Joins the others of a job; refuses several processes of a command that one runs."""
    values = flags.FLAGS
    if 'coordinator' not in values:
        runtime.require_single_process(os.path.basename(sys.argv[0]).removesuffix('.py'))
        return
    with flags_named('--coordinator', '--num_processes', '--process_id', '--initialization_timeout'):
        runtime.initialize_distributed(
            values.coordinator, values.num_processes, values.process_id, values.initialization_timeout
        )


def describe_failure(error: Exception) -> tuple[str, int]:
    """(the one line, exit status) of what the user (2) or the machine (1) got wrong; status 0: a defect of ours."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, FloatingPointError | SystemFailure):
        return str(error), 1
    if isinstance(error, BrokenPipeError):
        return 'what read the output has closed it', 1
    if reason := storage.bucket_reason(error):
        return f'a bucket cannot be used: {reason}', 2 if storage.is_closed(error) else 1
    if not isinstance(error, OSError) or error.errno is None:
        return '', 0
    line = ': '.join(str(part) for part in (error.filename, error.strerror) if part)
    if error.errno in _MACHINE_ERRORS:
        return line, 1
    theirs = isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    )
    return (line, 2) if theirs and error.filename and _is_given(os.fsdecode(error.filename)) else ('', 0)


def _is_given(file: str) -> bool:
    """Whether a path is one that the command line names, lies in one, or leads to one."""
    given = [
        flags.FLAGS[name].value for name in flags.FLAGS if isinstance(flags.FLAGS[name].parser, _PathParser)
    ]
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
        known = config_file.flatten(flags.FLAGS.config)
        given += [value for key, value in known.items() if config_file.is_path(key)]
    file = os.path.abspath(file)
    for text in filter(None, given):
        for part in text.split(','):
            place = os.path.abspath(re.split(r'[*?[]', part)[0])
            if f'{file}/'.startswith(f'{place}/') or f'{place}/'.startswith(f'{file}/'):
                return True
    return False


@contextlib.contextmanager
def flags_named(*names: str) -> Iterator[None]:
    """Puts the flag into what the library refuses within, as it knows none.

    Before a line that begins with a setting's own name, 'beta1 is 2' becoming '--config.optimizer.beta1 is 2'; else
    behind it all that may have led to it.
    """
    try:
        yield
    except InputError as error:
        line = str(error)
        for name in names:
            own = name.removeprefix('--').rpartition('.')[2]
            if line.startswith((f'{own} ', f'{own}=')):
                raise InputError(f'{name}{line.removeprefix(own)}') from error
        if any(name in line for name in names):
            raise
        raise InputError(f'{line} (set by {", ".join(names)})') from error


def _check_same_command() -> None:
    """Refuses processes that were not given the same flags: each would compile, and wait for, another program."""
    values = flags.FLAGS.flag_values_dict()
    config = values.pop('config', None)
    own = {f'--{name}': str(value) for name, value in values.items() if not name.startswith('config.')}
    own |= {f'--config.{name}': str(value) for name, value in config_file.flatten(config or {}).items()}
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


def _parse_flags(argv: Sequence[str]) -> list[str]:
    path = '--config='
    argv = [path + config_file.find(arg.removeprefix(path)) if arg.startswith(path) else arg for arg in argv]
    try:
        rest = flags.FLAGS(argv)
        if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.to_dict()  # a file that failed to load says so only when it is looked at
            config_file.expand_user(flags.FLAGS.config)
        return rest
    except SystemExit:  # of --help and its kin, which have told what was asked
        sys.exit(0)
    except flags.IllegalFlagValueError as error:
        name = str(error).removeprefix('flag --').partition('=')[0]
        if 'must have a value other than None' in str(error):
            such = f', such as --config={config_file.example()}' if name == 'config' else ''
            _fail(f'--{name} is required{such}', 2)
        of_config = name.partition('.')[0] == 'config'
        _fail(config_file.describe_error(error, argv) if of_config else str(error), 2)
    except flags.Error as error:
        _fail(str(error), 2)
    except Exception as error:  # a configuration file may raise anything
        _fail(config_file.describe_error(error, argv), 2)


def _fail(message: str, status: int, at_once: bool = False) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
    if at_once or not runtime.leave_job():  # who waits for this process would wait for ever
        os._exit(status)
    sys.exit(status)
