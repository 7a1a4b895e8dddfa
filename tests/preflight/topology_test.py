"""Topologies by libtpu's names and by those of accelerator types."""

import pytest

from llama_jax.errors import InputError
from llama_jax.preflight.topology import Topology


def test_topologies_in_chips():
    topology = Topology.parse('2xv5p:4x4x8')
    assert (topology.chip_name, topology.shape, topology.num_slices) == ('v5p', (4, 4, 8), 2)
    assert topology.num_chips == 256 and str(topology) == '2xv5p:4x4x8'
    assert Topology.parse('v5e:16x16').wraps(0) and not Topology.parse('v5e:8x16').wraps(0)
    assert Topology.parse('v5p:4x4x8').wraps(2) and not Topology.parse('v5p:2x4x4').wraps(2)


@pytest.mark.parametrize(
    ('name', 'topology'),
    [
        # docs.cloud.google.com/tpu/docs/{v2,v3}: TensorCores, two a chip.
        ('v2-8', 'v2:2x2'), ('v2-256', 'v2:8x16'), ('v2-512', 'v2:16x16'),
        ('v3-8', 'v3:2x2'), ('v3-32', 'v3:4x4'), ('v3-64', 'v3:4x8'), ('v3-2048', 'v3:32x32'),
        # .../{v5e,v6e}: chips.
        ('v5litepod-1', 'v5e:1x1'), ('v5litepod-4', 'v5e:2x2'), ('v5litepod-8', 'v5e:2x4'),
        ('v5litepod-16', 'v5e:4x4'), ('v5litepod-128', 'v5e:8x16'), ('v5e-256', 'v5e:16x16'),
        ('v6e-8', 'v6e:2x4'), ('v6e-32', 'v6e:4x8'), ('v6e-256', 'v6e:16x16'),
        # .../{v4,v5p,tpu7x}: TensorCores, two a chip; of all shapes the one most like a cube.
        ('v4-8', 'v4:2x2x1'), ('v4-16', 'v4:2x2x2'), ('v4-64', 'v4:2x4x4'), ('v4-1536', 'v4:8x8x12'),
        ('v4-4096', 'v4:8x16x16'), ('v5p-8', 'v5p:2x2x1'), ('v5p-32', 'v5p:2x2x4'), ('v5p-128', 'v5p:4x4x4'),
        ('v5p-256', 'v5p:4x4x8'), ('v5p-384', 'v5p:4x4x12'), ('v5p-1152', 'v5p:4x12x12'),
        ('v5p-1280', 'v5p:4x8x20'), ('v5p-1408', 'v5p:4x4x44'), ('v5p-3072', 'v5p:8x12x16'),
        ('v5p-12288', 'v5p:16x16x24'), ('v5p-17920', 'v5p:16x20x28'), ('tpu7x-2', 'tpu7x:1x1x1'),
        ('tpu7x-16', 'tpu7x:2x2x2'), ('tpu7x-128', 'tpu7x:4x4x4'), ('tpu7x-18432', 'tpu7x:16x24x24'),
        ('2xv6e-256', '2xv6e:16x16'),
    ],
)  # fmt: skip
def test_accelerator_types(name, topology):
    assert str(Topology.parse(name)) == topology


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('v5e', 'write CHIP:AxB'),
        ('v5e:4', 'accelerator type, as v5litepod-16 or v5p-256'),
        ('h100:4x4', "unknown chip 'h100'; choose from v2, v3, v4, v5e"),
        ('v5p:4x4', '3 dimensions'),
        ('0xv5e:4x4', '2 dimensions'),
        ('v5e:0x4', '2 dimensions'),
        (
            'v5litepod-12',
            'v5litepod counts chips: 1, 4, 8, 16, 32, 64, 128, 256. Another shape is written as v5e:4x4',
        ),
        ('v3-16', 'v3 counts TensorCores, two a chip: 8, 32, 64'),
        ('v5p-9', 'TensorCores, two a chip: 8, 16, 32, 64, and multiples of 128 up to 17920'),
        ('tpu7x-4', 'TensorCores, two a chip: 2, 8, 16, 32, 64, and'),
        ('h100-8', "unknown chip 'h100'"),
    ],
)
def test_other_topologies_are_refused(text, message):
    with pytest.raises(InputError) as raised:
        Topology.parse(text)
    assert message in str(raised.value)
