"""The command line alone: flags, one line and a status for what is wrong, the same command on all processes."""

import atexit
import contextlib
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

from experiments.run import config_file
from experiments.run.failures import describe_failure
from llama_jax import runtime, signals
from llama_jax.errors import InputError, SystemFailure, error_line

# What is defined here is the flag of the command that asks for it, and stands in its --help.
flags.disclaim_key_flags()


class _PathParser(flags.ArgumentParser):
    """A path or several, by commas; '~' stands for the user's folder, which no shell expands within --name=value."""

    def __init__(self, default: str | None = ''):
        """Args: default: that of the flag; '' where it names nothing."""
        super().__init__()
        self._default = default

    def parse(self, argument: str | None) -> str | None:
        if argument is not None and argument != self._default:  # an empty one would be the current folder
            if not argument.strip():
                raise ValueError('it is empty; name something')
            if not all(map(str.strip, argument.split(','))):
                raise ValueError('it names an empty path beside a comma')
        return argument and config_file.expand_paths(argument)

    def flag_type(self) -> str:
        return 'path'


def define_path(name: str, default: str | None, help: str, required: bool = False) -> flags.FlagHolder:
    """A flag that names a file, a folder or a bucket's, or several by commas."""
    return flags.DEFINE(
        _PathParser(default), name, default, help, serializer=flags.ArgumentSerializer(), required=required
    )


def define_config() -> flags.FlagHolder:
    """--config=configs/TASK.py:MODEL, with --config.SECTION.KEY=VALUE for any of its keys."""
    holder = config_flags.DEFINE_config_file(
        'config', None, 'configuration file, FILE.py:MODEL; any of its settings is --config.SECTION.KEY=VALUE'
    )
    flags.mark_flag_as_required('config')
    return holder


def define_xla_options() -> flags.FlagHolder:
    """--xla_options, for the commands that compile a train step; see `xla_options.parse`."""
    text = 'settings of the compiler for the train step: NAME=VALUE by commas'
    return flags.DEFINE_string('xla_options', '', text)


class Flags:
    """Several flags as one."""

    def __init__(self, **holders: flags.FlagHolder):
        self._holders = holders

    @property
    def value(self) -> dict[str, Any]:
        """By the names of the flags."""
        return {name: holder.value for name, holder in self._holders.items()}

    def is_given(self, name: str) -> bool:
        """Whether the command line has it, be it as the default is."""
        return self._holders[name].present

    def check_owners(self, **owners: str) -> None:
        """Refuses a flag that is given where the one that it says more of, its owner by name, is not."""
        for name, owner in owners.items():
            if self.is_given(name) and not self._holders[owner].value:
                raise InputError(f'--{name} is of --{owner}, which is not given')


def define_run() -> Flags:
    """--workdir and what else a training takes beside --config; see `training.plan`."""
    define_processes()
    return Flags(
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
    atexit.register(_flush)

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
            message, status = describe_failure(error, _given_paths())
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


def refuse_missing(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """Ends a command in a line, whose imports need a package that the extra would have brought."""
    package = (error.name or '').partition('.')[0]
    if package in ('llama_jax', 'experiments', ''):
        raise error
    _fail(f"this command needs the package {package}: pip install 'llama_jax[{extra}]'", 2)


def _flush() -> None:
    """What was printed is out, however this process ends."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()


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


def _given_paths() -> list[str]:
    """Those of the command line and of its configuration, several in one by commas."""
    known = [flags.FLAGS[name] for name in flags.FLAGS]
    given = [flag.value for flag in known if flag.flag_type() == 'path']
    if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
        keys = config_file.flatten(flags.FLAGS.config)
        given += [value for key, value in keys.items() if config_file.is_path(key)]
    return [path for path in given if path]


@contextlib.contextmanager
def flags_named(*names: str) -> Iterator[None]:
    """Puts the flag into what the library refuses within, as it knows none.

    Before a line that begins with a setting's own name, 'beta1 is 2' becoming '--config.optimizer.beta1 is 2'; else
    behind it all that may have led to it: flags that are given, settings that are not empty.
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
        blamed = list(filter(_is_set, names)) or names
        raise InputError(f'{line} (set by {", ".join(blamed)})') from error


def _is_set(name: str) -> bool:
    """Whether a flag is given, or a setting of the configuration has a value; all of a section, SECTION.*, always."""
    name, values = name.removeprefix('--'), flags.FLAGS
    section, _, key = name.partition('.')
    if not key or section not in values:
        return name in values and values[name].present > 0
    return key.endswith('*') or config_file.flatten(values[section].value or {}).get(key, '') not in ('', ())


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
        _fail(config_file.describe_error(error, argv) if of_config else _in_words(str(error)), 2)
    except flags.Error as error:
        _fail(str(error), 2)
    except Exception as error:  # a configuration file may raise anything
        if isinstance(error, OSError) and error.errno and not error.filename:  # of standard output, by --help
            message, status = describe_failure(error, ())
            _fail(message or error_line(error), status or 2)
        _fail(config_file.describe_error(error, argv), 2)


def _in_words(line: str) -> str:
    """What absl says of a flag's value, without what Python says of it."""
    line = re.sub(r'invalid literal for int\(\).*', 'it must be a whole number', line)
    return re.sub(r'could not convert string to float.*', 'it must be a number', line)


def _fail(message: str, status: int, at_once: bool = False) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr, flush=True)
    if at_once or not runtime.leave_job():  # who waits for this process would wait for ever
        os._exit(status)
    sys.exit(status)
