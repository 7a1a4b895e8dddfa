"""What a command says of an error, and the status it ends with: whether the user, the machine or we are to blame."""

import errno
import os
import re
from collections.abc import Iterable

from llama_jax import storage
from llama_jax.errors import InputError, SystemFailure, SystemRefusal

# Nothing is wrong with the command or the program: the device, the cable.
_MACHINE_ERRORS = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE)


def describe_failure(error: Exception, given: Iterable[str]) -> tuple[str, int]:
    """(the one line, exit status) of what the user (2) has to mend or the machine (1) failed at; 0: a defect of ours.

    Args:
      error: what a command ended with.
      given: paths, or several by commas, that the user named: what is missing there is theirs.
    """
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, FloatingPointError | SystemFailure):
        return str(error), 2 if isinstance(error, SystemRefusal) else 1
    if isinstance(error, BrokenPipeError):
        return 'what read the output has closed it', 1
    if reason := storage.bucket_reason(error):
        return f'a bucket cannot be used: {reason}', 2 if storage.is_closed(error) else 1
    if not isinstance(error, OSError) or error.errno is None:
        return '', 0
    line = ': '.join(str(part) for part in (error.filename, error.strerror) if part)
    # A permission may be asked for by a defect of ours, but for that of a file.
    if error.errno in storage.REMEDIES and (error.filename or not isinstance(error, PermissionError)):
        return describe_failure(storage.failure(line, error.errno), given)
    if error.errno in _MACHINE_ERRORS:
        return line, 1
    theirs = isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)
    return (line, 2) if theirs and error.filename and _is_of(os.fsdecode(error.filename), given) else ('', 0)


def _is_of(file: str, given: Iterable[str]) -> bool:
    """Whether a path is one of those that are given, lies in one, or leads to one."""
    file = os.path.abspath(file)
    for part in (part for text in given for part in text.split(',')):
        place = os.path.abspath(re.split(r'[*?[]', part)[0])
        if f'{file}/'.startswith(f'{place}/') or f'{place}/'.startswith(f'{file}/'):
            return True
    return False
