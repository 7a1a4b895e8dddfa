"""What goes wrong inside the libraries that tokenizers are made of, as the one line that it is to a user."""

import contextlib
from collections.abc import Iterator

from llama_jax.errors import InputError, error_line


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Within, a library's error becomes an InputError that begins with `what`.

    Libraries in Rust raise plain Exceptions, and panics, which are none. What says that the caller made a mistake, such
    as a TypeError, passes.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f'{what}: {error_line(error)}') from error
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != 'pyo3_runtime':
            raise
        raise InputError(f'{what}: {error_line(error)}') from error
