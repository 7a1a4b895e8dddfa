"""TPU topologies by name: as libtpu writes them, in chips, and as the accelerator types that a launch asks for."""

import dataclasses
import math
import re

from llama_jax.chips import CHIPS, TPUS, Chip, Torus
from llama_jax.errors import InputError

# Other names of the same chips, those of accelerator types among them.
_NAMES = {'v5litepod': 'v5e', 'v5lite': 'v5e', 'v7x': 'tpu7x', 'tpuv7x': 'tpu7x'}
# What the number of an accelerator type counts: TensorCores, two a chip, or chips; and the sizes of a slice in chips
# that there are on a plane (docs.cloud.google.com/tpu/docs/{v2,v3,v5e,v6e}).
_CORES_A_CHIP = {'v2': 2, 'v3': 2, 'v4': 2, 'v5e': 1, 'v5p': 2, 'v6e': 1, 'tpu7x': 2}
_FLAT_SIZES = {
    'v2': (4, 16, 64, 128, 256),
    'v3': (4, 16, 32, 64, 128, 256, 512, 1024),
    'v5e': (1, 4, 8, 16, 32, 64, 128, 256),
    'v6e': (1, 4, 8, 16, 32, 64, 128, 256),
}
# In space there are parts of a cube of 64 chips, and blocks of whole cubes up to the pod (.../{v4,v5p,tpu7x}).
_PARTS_OF_A_CUBE = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
_ONE_CHIP = {'tpu7x': {1: (1, 1, 1)}}
_POD_CUBES = {'v4': 64, 'v5p': 140, 'tpu7x': 144}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips: '2xv5p:4x4x8' is two slices of 128 v5p chips each, joined by the data-centre network.

    Attributes:
      chip_name: a key of `CHIPS`.
      shape: chips of a slice along each dimension.
      num_slices: of them.
    """

    chip_name: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @classmethod
    def parse(cls, text: str) -> 'Topology':
        """Reads [SLICESx]CHIP:AxB[xC], or [SLICESx]TYPE-NUMBER as the cloud names accelerator types.

        Raises:
          InputError: another form, an unknown chip, a shape of the wrong dimensions, or a number that no type has.
        """
        found = re.fullmatch(r'(?:(\d+)x)?([a-z]\w*)(?::(\d+(?:x\d+)+)|-(\d+))', text)
        if not found:
            raise InputError(
                f'topology {text!r}: write CHIP:AxB[xC], as v5e:4x4 or v5p:4x4x8, or an accelerator type, as '
                f'v5litepod-16 or v5p-256; 2xv5p:4x4x8 are two slices. CHIP is one of {", ".join(TPUS)}'
            )
        slices, name = int(found[1] or 1), _NAMES.get(found[2], found[2])
        if name not in TPUS:
            raise InputError(f'topology {text!r}: unknown chip {found[2]!r}; choose from {", ".join(TPUS)}')
        shape = tuple(map(int, found[3].split('x'))) if found[3] else _shape(name, found[2], int(found[4]))
        dims = _torus(CHIPS[name]).dims
        if len(shape) != dims or not slices or not all(shape):
            raise InputError(
                f'topology {text!r}: {name} chips stand in {dims} dimensions, as {name}:{"x".join(["4"] * dims)}, '
                'in slices of at least one'
            )
        return cls(name, shape, slices)

    def __str__(self) -> str:
        slices = f'{self.num_slices}x' if self.num_slices > 1 else ''
        return f'{slices}{self.chip_name}:{"x".join(map(str, self.shape))}'

    @property
    def chip(self) -> Chip:
        """What one chip can do."""
        return CHIPS[self.chip_name]

    @property
    def torus(self) -> Torus:
        """How chips of its kind are joined to slices."""
        return _torus(self.chip)

    @property
    def num_chips(self) -> int:
        """In all slices."""
        return self.num_slices * math.prod(self.shape)

    def wraps(self, dimension: int) -> bool:
        """Whether the links along a dimension close to a ring: on v4, v5p and TPU7x in slices of whole cubes only."""
        torus = self.torus
        cubes = torus.dims == 2 or all(size % torus.wraps_at == 0 for size in self.shape)
        return cubes and self.shape[dimension] % torus.wraps_at == 0


def _torus(chip: Chip) -> Torus:
    assert chip.torus is not None
    return chip.torus


def _shape(chip_name: str, type_name: str, number: int) -> tuple[int, ...]:
    """The default topology of an accelerator type: of all with so many chips, the one most like a square or a cube.

    Raises:
      InputError: there is no such type.
    """
    cores = _CORES_A_CHIP[chip_name]
    chips, rest = divmod(number, cores)
    flat = _FLAT_SIZES.get(chip_name)
    if not rest and flat and chips in flat:
        width = 2 ** (chips.bit_length() // 2 - (chips.bit_length() % 2 == 0))
        return width, chips // width
    parts = {} if flat else _ONE_CHIP.get(chip_name, {}) | _PARTS_OF_A_CUBE
    if not rest and chips in parts:
        return parts[chips]
    cubes, more_chips = divmod(chips, 64)
    if not rest and not more_chips and 0 < cubes <= _POD_CUBES.get(chip_name, 0):
        return tuple(4 * side for side in _most_cubic(cubes))
    numbers = [cores * size for size in flat or parts]
    more = '' if flat else f', and multiples of {64 * cores} up to {64 * cores * _POD_CUBES[chip_name]}'
    raise InputError(
        f'topology {f"{type_name}-{number}"!r}: there is no such accelerator type; {type_name} counts '
        f'{"TensorCores, two a chip" if cores == 2 else "chips"}: {", ".join(map(str, numbers))}{more}. '
        f'Another shape is written as {chip_name}:{"x".join(["4"] * _torus(CHIPS[chip_name]).dims)}'
    )


def _most_cubic(volume: int) -> tuple[int, int, int]:
    """Three sides, ascending, with the least surface."""
    sides = [
        (a, b, volume // (a * b))
        for a in range(1, volume + 1)
        if volume % a == 0
        for b in range(a, volume // a + 1)
        if volume // a % b == 0 and b <= volume // (a * b)
    ]
    return min(sides, key=lambda side: side[0] * side[1] + side[1] * side[2] + side[0] * side[2])
