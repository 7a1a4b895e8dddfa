"""What accelerators can do, each figure with its source: the one table for training's utilisation and for preflight.

Sources, read in November 2026:
- TPU v5e, v5p, v6e, TPU7x: the tables of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}. They give a chip's ICI
  bandwidth in both directions together: a link's one way is that over links and over 2.
- TPU v4: peak and HBM from docs.cloud.google.com/tpu/docs/v4; links from Jouppi et al., 'TPU v4' (arXiv 2304.01433):
  six of 50 GB/s each way, which the page's bisection bandwidth (24 TB/s over 512 links) confirms.
- TPU v2, v3: peak and HBM from the same site's {v2,v3}; links (four of 496 and 656 Gb/s) from Jouppi et al., 'A
  Domain-Specific Supercomputer for Training Deep Neural Networks' (CACM 63:7, 2020).
- NVIDIA: the data sheets at nvidia.com of A100, H100, H200, HGX B200 and GB200 NVL72. Peaks are those without sparsity
  (the sheets of Hopper and later give twice as much).
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Torus:
    """How the chips of a TPU slice are joined.

    Attributes:
      dims: of the torus.
      links: of one chip to its neighbours, over inter-chip interconnect (ICI).
      link_bandwidth: bytes/s of one link, one way.
      wraps_at: a dimension closes to a ring where its size is a multiple of this.
      dcn_bandwidth: bytes/s of the data-centre network to other slices, a chip's share of its host's; None: not given.
    """

    dims: int
    links: int
    link_bandwidth: float
    wraps_at: int
    dcn_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device or two.

    Attributes:
      kinds: words of JAX's `device_kind`, any of which tells it.
      peak_flops: dense bf16 FLOP/s.
      hbm_bytes: size of the main memory.
      hbm_bandwidth: bytes/s.
      devices: JAX devices a chip.
      torus: that its slices are; None for what is not a TPU.
    """

    kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    devices: int = 1
    torus: Torus | None = None


_GB = 10**9

# `find` takes the first that fits, so 'TPU v5 lite' stands before 'TPU v5', and 'H100 PCIe' before 'H100'.
CHIPS: dict[str, Chip] = {
    'v2': Chip(('TPU v2',), 45e12, 16 * GIB, 600e9, 2, Torus(2, 4, 62e9, 16)),
    'v3': Chip(('TPU v3',), 123e12, 32 * GIB, 900e9, 2, Torus(2, 4, 82e9, 32)),
    'v4': Chip(('TPU v4',), 275e12, 32 * GIB, 1200e9, 1, Torus(3, 6, 50e9, 4)),
    'v5e': Chip(
        ('TPU v5 lite', 'TPU v5e'), 197e12, 16 * GIB, 819e9, 1, Torus(2, 4, 50e9, 16, 6.4e12 / 8 / 256)
    ),
    'v5p': Chip(('TPU v5', 'TPU v5p'), 459e12, 95 * GIB, 2765e9, 1, Torus(3, 6, 100e9, 4, 50e9 / 8)),
    'v6e': Chip(('TPU v6 lite', 'TPU v6e'), 918e12, 32 * GIB, 1638e9, 1, Torus(2, 4, 100e9, 16, 100e9 / 8)),
    'tpu7x': Chip(('TPU7x',), 2307e12, 192 * GIB, 7380e9, 2, Torus(3, 6, 100e9, 4, 100e9 / 8)),
    'gb200': Chip(('GB200',), 2500e12, 186 * _GB, 8000e9),
    'b200': Chip(('B200',), 2250e12, 180 * _GB, 7700e9),
    'h200_nvl': Chip(('H200 NVL',), 835e12, 141 * _GB, 4800e9),
    'h200': Chip(('H200',), 989e12, 141 * _GB, 4800e9),
    'h100_nvl': Chip(('H100 NVL',), 835e12, 94 * _GB, 3900e9),
    'h100_pcie': Chip(('H100 PCIe',), 756e12, 80 * _GB, 2000e9),
    'h100': Chip(('H100',), 989e12, 80 * _GB, 3350e9),
    'a100_80gb_pcie': Chip(('A100 80GB PCIe',), 312e12, 80 * _GB, 1935e9),
    'a100_80gb': Chip(('A100-SXM4-80GB',), 312e12, 80 * _GB, 2039e9),
    'a100': Chip(('A100',), 312e12, 40 * _GB, 1555e9),
}

TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus is not None)


def find(device_kind: str) -> Chip | None:
    """The chip that a JAX device is, or is a part of; None for one that the table does not hold.

    A slice of a GPU (MIG) is none of them: its share of the figures is not the whole's.
    """
    if 'MIG' in device_kind:
        return None
    return next(
        (chip for chip in CHIPS.values() if re.search(rf'\b({"|".join(chip.kinds)})\b', device_kind)), None
    )
