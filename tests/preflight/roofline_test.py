"""Seconds of collectives and of a step, worked out by hand for small topologies."""

import numpy as np
import pytest

from llama_jax.preflight.costs import Collective, Costs
from llama_jax.preflight.roofline import Place, Roofline, link_seconds, roofline, traffic
from llama_jax.preflight.topology import Topology


def grid(topology: Topology) -> list[Place]:
    """The devices of a topology, slice by slice, the last dimension fastest, a chip's devices together."""
    return [
        Place(index, tuple(map(int, coordinates)))
        for index in range(topology.num_slices)
        for coordinates in np.ndindex(topology.shape)
        for _ in range(topology.chip.devices)
    ]


def one(kind: str, size: int, groups, topology: str):
    parsed = Topology.parse(topology)
    return traffic(Collective(kind, size, np.array(groups), 1, ''), parsed, grid(parsed))


ALL16 = [list(range(16))]
GB = 10**9


@pytest.mark.parametrize(
    ('kind', 'groups', 'topology', 'seconds'),
    [
        # v5e: links of 50 GB/s. 4x4 closes no ring, so the corner chip takes all in over two links.
        ('all-gather', ALL16, 'v5e:4x4', 15 / 16 / 100),
        ('reduce-scatter', ALL16, 'v5e:4x4', 15 / 16 / 100),
        ('all-reduce', ALL16, 'v5e:4x4', 2 * 15 / 16 / 100),
        # One row of it: one link.
        ('all-gather', [[0, 1, 2, 3]], 'v5e:4x4', 3 / 4 / 50),
        # 16 in a row close to a ring: both its directions.
        ('all-gather', [list(range(16))], 'v5e:16x16', 15 / 16 / 100),
        # v5p: links of 100 GB/s; a cube of 4 closes in every dimension, a part of one does not.
        ('all-gather', [list(range(64))], 'v5p:4x4x4', 63 / 64 / 600),
        ('all-gather', [list(range(16))], 'v5p:2x2x4', 15 / 16 / 300),
        # Along a ring of four an element goes one link on average, over two directions.
        ('all-to-all', [[0, 1, 2, 3]], 'v5p:4x4x4', 1 / 200),
        ('collective-permute', [[0, 1], [1, 0]], 'v5e:4x4', 1 / 50),
        ('collective-permute', [[0, 0], [1, 1]], 'v5e:4x4', 0),
        # TPU7x: both devices of a chip share its links; a gather among all needs them once for both.
        ('all-gather', [list(range(128))], 'tpu7x:4x4x4', 63 / 64 / 600),
        ('all-gather', [list(range(0, 128, 2)), list(range(1, 128, 2))], 'tpu7x:4x4x4', 2 * 63 / 64 / 600),
        ('all-gather', [[0, 1]], 'tpu7x:4x4x4', 0),
    ],
)
def test_seconds_within_a_slice(kind, groups, topology, seconds):
    found = one(kind, GB, groups, topology)
    assert found.ici_seconds == pytest.approx(seconds)
    assert found.dcn_seconds == 0 and found.dcn_bytes == 0


def test_between_slices():
    """Two slices of 16 v6e chips: within them links of 100 GB/s, between them 12.5 GB/s a chip."""
    pairs = [[i, i + 16] for i in range(16)]
    found = one('all-reduce', GB, pairs, '2xv6e:4x4')
    assert found.dcn_bytes == pytest.approx(GB) and found.ici_bytes == 0
    assert found.dcn_seconds == pytest.approx(1 / 12.5) and found.ici_seconds == 0
    # Among all 32 each chip takes a sixteenth across.
    found = one('all-gather', GB, [list(range(32))], '2xv6e:4x4')
    assert found.ici_seconds == pytest.approx(15 / 16 / 200)
    assert found.dcn_seconds == pytest.approx(1 / 2 / 16 / 12.5)
    found = one('collective-permute', GB, [[0, 16]], '2xv6e:4x4')
    assert found.dcn_seconds == pytest.approx(1 / 12.5) and found.ici_seconds == 0


def test_a_network_of_unknown_speed_is_no_bound():
    """Nobody publishes what v4's hosts send: what crosses is counted, the time is unknown, not nothing."""
    assert one('all-reduce', GB, [[0, 4]], '2xv4:2x2x1').dcn_seconds is None
    assert one('collective-permute', GB, [[0, 4]], '2xv4:2x2x1').dcn_seconds is None
    assert one('all-reduce', GB, [[0, 1]], '2xv4:2x2x1').dcn_seconds == 0
    topology = Topology.parse('2xv4:2x2x1')
    across, within = (
        Collective('all-reduce', GB, np.array(groups), 1, '') for groups in ([[0, 4]], [[0, 1]])
    )
    _, dcn, kinds = link_seconds([across, within], topology, grid(topology))
    assert dcn is None and kinds['all-reduce']['dcn_bytes'] == pytest.approx(GB)
    terms = Roofline(compute=1.0, hbm=2.0, ici=0.5, dcn=dcn)
    assert (terms.bound, terms.seconds) == ('hbm', 2.0)


def test_collectives_of_a_step_add_up():
    topology = Topology.parse('v5e:4x4')
    gather = Collective('all-gather', GB, np.array(ALL16), 3, '')
    shift = Collective('collective-permute', GB, np.array([[0, 1]]), 8, '')
    ici, dcn, kinds = link_seconds([gather, gather, shift], topology, grid(topology))
    # Shifts are spread over all four links, the most there is.
    assert ici == pytest.approx(6 * 15 / 16 / 100 + 8 / 50 / 4) and dcn == 0
    assert kinds['all-gather'] == {'count': 6, 'ici_bytes': pytest.approx(6 * 15 / 16 * GB), 'dcn_bytes': 0}
    assert kinds['collective-permute'] == {'count': 8, 'ici_bytes': 8 * GB, 'dcn_bytes': 0}


def test_terms_and_the_one_that_binds():
    costs = Costs(
        flops=197 * 10**12, hbm_bytes=2 * 819 * 10**9, collectives=[], unknown_loops=0, opaque_kernels={}
    )
    terms = roofline(costs, 0.5, 0.0, Topology.parse('v5e:4x4'))
    assert terms == Roofline(compute=1.0, hbm=2.0, ici=0.5, dcn=0.0)
    assert (terms.bound, terms.seconds) == ('hbm', 2.0)
    # A device of TPU7x is half a chip.
    half = roofline(costs, 0.0, 0.0, Topology.parse('tpu7x:2x2x1'))
    assert half.compute == pytest.approx(2 * 197 / 2307)
