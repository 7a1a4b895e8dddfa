"""What is prepared, by how many machines, and how far it has come."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from llama_jax.data.bad_records import check_on_error
from llama_jax.data.packing import check_seq_len
from llama_jax.data.sources import Reading
from llama_jax.data.units import UNIT_BYTES
from llama_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TextSource:
    """What becomes one folder of rows.

    Attributes:
      name: of the folder.
      inputs: source strings (see `sources`).
      reading: how texts are taken out of files.
    """

    name: str
    inputs: tuple[str, ...]
    reading: Reading = Reading()


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What is prepared; the rows depend on this, the tokenizer and the files, and on nothing else.

    Attributes:
      output: the folder, local or gs://...
      sources: a single one fills `output` itself.
      seq_len: T; a row has T + 1 tokens.
      unit_bytes: of text in a unit, which gives one shard.
      validation_fraction: of the documents, held out by the hash of their text.
      on_error: 'stop' at a record without text, or 'skip' it.
      max_errors: records that may be left out in all; 0: any number.
    """

    output: str
    sources: tuple[TextSource, ...]
    seq_len: int
    unit_bytes: int = UNIT_BYTES
    validation_fraction: float = 0.0
    on_error: str = 'stop'
    max_errors: int = 0

    def __post_init__(self):
        check_seq_len(self.seq_len)
        check_on_error(self.on_error)
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f'validation_fraction is {self.validation_fraction}; it must be from 0 to below 1'
            )
        if self.unit_bytes < 1:
            raise InputError(f'unit_bytes is {self.unit_bytes}; it must be 1 or more')
        if self.max_errors < 0:
            raise InputError(f'max_errors is {self.max_errors}; it must be 0, for any number, or more')

    def folder(self, source: TextSource) -> epath.Path:
        """Of a source's rows."""
        output = epath.Path(self.output)
        return output / source.name if len(self.sources) > 1 else output


@dataclasses.dataclass(frozen=True)
class Machine:
    """One of several that meet in the output folder."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise InputError(
                f'shard_index is {self.index}; of {self.count} machines it is 0 to {self.count - 1}'
            )

    def share(self, tasks: Sequence[Any]) -> list[Any]:
        """Those of the tasks that are this machine's."""
        return list(tasks[self.index :: self.count])


ALONE = Machine()


@dataclasses.dataclass(frozen=True)
class Advance:
    """How far a preparation has come, over all workers of this machine.

    Attributes:
      stage: 'reading' or 'writing'.
      done: files that are read, units that are written.
      tasks: of them, what was to do at the start.
      documents: in those that were done since the start.
      num_bytes: of their text.
      tokens: of them.
      all_bytes: of text in all tasks of the stage that were not done at the start; 0: not known yet.
    """

    stage: str
    done: int
    tasks: int
    documents: int = 0
    num_bytes: int = 0
    tokens: int = 0
    all_bytes: int = 0
