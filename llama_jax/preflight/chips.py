"""What the chips can do, each figure with its source, and TPU topologies by name.

Sources, read in November 2026: for v5e, v5p, v6e and TPU7x the tables of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,
tpu7x}. They give ICI bandwidth per chip in both directions together: a link's one way is that over links and over 2.
v4's peak and HBM are from docs.cloud.google.com/tpu/docs/v4, its links from the paper of Jouppi et al., 'TPU v4'
(arXiv 2304.01433): six of 50 GB/s each way, which the page's bisection bandwidth (24 TB/s over 512 links) confirms.
"""

import dataclasses
import math
import re

from llama_jax.types import InputError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device or two.

    Attributes:
      peak_flops: dense bf16 FLOP/s.
      hbm_bytes: size of the main memory.
      hbm_bandwidth: bytes/s.
      links: to neighbours, over inter-chip interconnect (ICI).
      link_bandwidth: bytes/s of one link, one way.
      dcn_bandwidth: bytes/s of the data-centre network to other slices, a chip's share of its host's; None: not given.
      dims: of its torus.
      wraps_at: a dimension closes to a ring where its size is a multiple of this.
      devices: JAX devices a chip.
    """

    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    links: int
    link_bandwidth: float
    dcn_bandwidth: float | None
    dims: int
    wraps_at: int
    devices: int = 1


CHIPS: dict[str, Chip] = {
    'v4': Chip(275e12, 32 * GIB, 1200e9, 6, 50e9, None, 3, 4),
    'v5e': Chip(197e12, 16 * GIB, 819e9, 4, 50e9, 6.4e12 / 8 / 256, 2, 16),
    'v5p': Chip(459e12, 95 * GIB, 2765e9, 6, 100e9, 50e9 / 8, 3, 4),
    'v6e': Chip(918e12, 32 * GIB, 1638e9, 4, 100e9, 100e9 / 8, 2, 16),
    'tpu7x': Chip(2307e12, 192 * GIB, 7380e9, 6, 100e9, 100e9 / 8, 3, 4, devices=2),
}


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
        """Reads [SLICESx]CHIP:AxB[xC].

        Raises:
          InputError: another form, an unknown chip, or a shape of the wrong dimensions.
        """
        found = re.fullmatch(r'(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)+)', text)
        if not found:
            raise InputError(f'topology {text!r}: write [SLICESx]CHIP:AxB[xC], as v5e:4x4 or 2xv5p:4x4x8')
        slices, name, shape = int(found[1] or 1), found[2], tuple(map(int, found[3].split('x')))
        name = {'v7x': 'tpu7x', 'tpuv7x': 'tpu7x', 'v5litepod': 'v5e'}.get(name, name)
        if name not in CHIPS:
            raise InputError(f'topology {text!r}: unknown chip {name!r}; choose from {sorted(CHIPS)}')
        if len(shape) != CHIPS[name].dims or not slices or not all(shape):
            raise InputError(
                f'topology {text!r}: {name} chips stand in {CHIPS[name].dims} dimensions, as '
                f'{name}:{"x".join(["4"] * CHIPS[name].dims)}'
            )
        return cls(name, shape, slices)

    def __str__(self) -> str:
        slices = f'{self.num_slices}x' if self.num_slices > 1 else ''
        return f'{slices}{self.chip_name}:{"x".join(map(str, self.shape))}'

    @property
    def chip(self) -> Chip:
        return CHIPS[self.chip_name]

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.shape)

    def wraps(self, dimension: int) -> bool:
        """Whether the links along a dimension close to a ring: on v4, v5p and TPU7x in slices of whole cubes only."""
        chip = self.chip
        cubes = chip.dims == 2 or all(size % chip.wraps_at == 0 for size in self.shape)
        return cubes and self.shape[dimension] % chip.wraps_at == 0
