"""Settings of the XLA compiler, checked against the compiler at hand before anything is run.

Given as environment variables (XLA_FLAGS, LIBTPU_INIT_ARGS), one unknown flag ends the process, and flags come and go
with every jaxlib. Given to one compilation, as here, an unknown one is an error that can be told in a line.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax.errors import InputError

Value = bool | int | float | str


def parse(text: str, mesh: Mesh) -> dict[str, Value]:
    """The settings of a list such as 'xla_tpu_scoped_vmem_limit_kib=65536,...', proved to be known.

    Args:
      text: NAME=VALUE by commas, later ones outweighing earlier; '' for none.
      mesh: the devices that will be compiled for.

    Raises:
      InputError: one is not NAME=VALUE, or this compiler does not know or take it.
    """
    options: dict[str, Value] = {}
    for item in filter(None, (part.strip() for part in text.split(','))):
        name, equals, value = item.partition('=')
        if not equals:
            raise InputError(f'the XLA option {item!r} has no value; write NAME=VALUE')
        options[name.lstrip('-')] = _value(value)
    if refused := _unknown(options, mesh):
        raise InputError(
            f'this compiler (jaxlib {version("jaxlib")}) refuses the XLA options {", ".join(refused)}; '
            'leave them out, or install the version that they are of'
        )
    return options


def _unknown(options: Mapping[str, Value], mesh: Mesh) -> list[str]:
    """Which of the options the compiler for these devices does not know, or does not take the value of."""
    replicated = NamedSharding(mesh, PartitionSpec())
    lowered = jax.jit(lambda x: x, in_shardings=replicated).lower(jax.ShapeDtypeStruct((), 'float32'))

    def compiles(names: Sequence[str]) -> bool:
        try:
            chosen: dict[str, Any] = {name: options[name] for name in names}
            lowered.compile(compiler_options=chosen)
        except (jax.errors.JaxRuntimeError, ValueError, TypeError):
            return False
        return True

    if not options or compiles(list(options)):
        return []
    return [name for name in options if not compiles([name])]


def _value(text: str) -> Any:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
