"""The least time that a step can take: the longest of computing, moving memory, and communicating, all overlapped.

No term can be undercut by a better schedule of the same program, so the utilisation that follows is an upper bound.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama_jax.preflight.costs import Collective, Costs
from llama_jax.preflight.topology import Topology


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device stands: its slice and its chip's coordinates there."""

    slice_index: int
    coordinates: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one execution of a collective, for one chip.

    Attributes:
      ici_bytes: that a device sends within its slice.
      dcn_bytes: that a device sends to other slices.
      ici_seconds: with all links towards the group busy.
      dcn_seconds: with the chip's share of its host's network busy; None where its bandwidth is not known.
    """

    ici_bytes: float
    dcn_bytes: float
    ici_seconds: float
    dcn_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step that each resource needs at least.

    Attributes:
      compute: matrix products at the peak rate.
      hbm: bytes of main memory at its bandwidth.
      ici: collectives within a slice.
      dcn: collectives between slices; None where there are some, on a network of unknown bandwidth.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float | None

    @property
    def bound(self) -> str:
        """The name of the longest term that is known."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1] or 0.0)[0]

    @property
    def seconds(self) -> float:
        """The longest of all, which bounds the step."""
        return max(seconds or 0.0 for seconds in dataclasses.asdict(self).values())


def traffic(collective: Collective, topology: Topology, places: Sequence[Place]) -> Traffic:
    """What one execution sends and how long its links need, in the group that needs longest.

    Args:
      collective: its groups count the devices in the order of `places`.
      topology: of the devices.
      places: of every device of the program, which on TPUs is one slice.
    """
    if collective.between_slices:
        sent = collective.sent_bytes
        return Traffic(0.0, sent, 0.0, _dcn_seconds(topology, sent * topology.chip.devices))
    if collective.kind == 'collective-permute':
        return _permute_traffic(collective, topology, places)
    found = {
        _group_traffic(collective, topology, shape) for shape in _group_shapes(collective.groups, places)
    }
    return max(found, key=lambda t: (t.ici_seconds + (t.dcn_seconds or 0.0), t.dcn_bytes))


def _dcn_seconds(topology: Topology, chip_bytes: float) -> float | None:
    """Of what one chip sends to other slices."""
    bandwidth = topology.torus.dcn_bandwidth
    return chip_bytes / bandwidth if bandwidth else None if chip_bytes else 0.0


def _group_shapes(groups: np.ndarray, places: Sequence[Place]) -> set[tuple[int, int, int, tuple[int, ...]]]:
    """Of every group: slices, its chips in one of them, its devices a chip, and chips along each dimension."""
    shapes = set()
    for group in groups:
        members = [places[device] for device in group]
        slices = len({place.slice_index for place in members})
        chips = {(place.slice_index, place.coordinates) for place in members}
        extents = tuple(len(set(axis)) for axis in zip(*(p.coordinates for p in members), strict=True))
        shapes.add((slices, len(chips) // slices, len(members) // len(chips), extents))
    return shapes


def _group_traffic(
    collective: Collective, topology: Topology, shape: tuple[int, int, int, tuple[int, ...]]
) -> Traffic:
    slices, chips, sharing, extents = shape
    chip = topology.chip
    rounds = 2 if collective.kind == 'all-reduce' else 1
    # Groups that run side by side on the devices of one chip share its links; devices of one group use them once.
    groups_per_chip = chip.devices / sharing
    if collective.kind == 'all-to-all':
        ici = collective.bytes * (chips - 1) / (slices * chips)
        dcn = collective.bytes * (slices - 1) / slices
        # Along a ring of n an element goes n / 4 links on average, along a line n / 3; both ways are used.
        seconds = 0.0
        for axis, extent in enumerate(extents[: len(topology.shape)]):
            hops = extent / 4 if _closed(topology, axis, extent) else (extent * extent - 1) / (3 * extent)
            seconds = max(
                seconds, collective.bytes * chip.devices * hops / (2 * topology.torus.link_bandwidth)
            )
        dcn_chip = dcn * chip.devices
    else:
        ici = rounds * collective.bytes * (chips - 1) / chips
        dcn = rounds * collective.bytes * (slices - 1) / slices / (chips * sharing)
        bandwidth = sum(
            (2 if _closed(topology, axis, extent) else 1) * topology.torus.link_bandwidth
            for axis, extent in enumerate(extents[: len(topology.shape)])
            if extent > 1
        )
        seconds = ici * groups_per_chip / bandwidth if bandwidth else 0.0
        dcn_chip = dcn * sharing * groups_per_chip
    return Traffic(ici, dcn, seconds, _dcn_seconds(topology, dcn_chip))


def _closed(topology: Topology, axis: int, extent: int) -> bool:
    """Whether a group reaches round the whole ring of a dimension."""
    return extent == topology.shape[axis] and topology.wraps(axis)


def _permute_traffic(collective: Collective, topology: Topology, places: Sequence[Place]) -> Traffic:
    chip, size = topology.chip, float(collective.bytes)
    pairs = [(places[source], places[target]) for source, target in collective.groups]
    crosses = any(source.slice_index != target.slice_index for source, target in pairs)
    moves = any(
        source.slice_index == target.slice_index and source.coordinates != target.coordinates
        for source, target in pairs
    )
    # One hop at least; the two devices of a chip share a link.
    ici_seconds = size * chip.devices / topology.torus.link_bandwidth if moves else 0.0
    across = size if crosses else 0.0
    return Traffic(size if moves else 0.0, across, ici_seconds, _dcn_seconds(topology, across * chip.devices))


def link_seconds(
    collectives: Sequence[Collective], topology: Topology, places: Sequence[Place]
) -> tuple[float, float | None, dict[str, dict[str, Any]]]:
    """Seconds of a step on (ICI, DCN), and per kind: how many are executed, and the bytes that a device sends on each.

    Shifts along a ring go both ways at once and over all dimensions: they count by their sum over the ring's links.
    """
    ici = shifts = 0.0
    dcn: float | None = 0.0
    kinds: dict[str, dict[str, Any]] = collections.defaultdict(
        lambda: {'count': 0, 'ici_bytes': 0.0, 'dcn_bytes': 0.0}
    )
    known: dict[tuple, Traffic] = {}
    for collective in collectives:
        key = (collective.kind, collective.between_slices, collective.bytes, collective.groups.tobytes())
        one = known.get(key) or known.setdefault(key, traffic(collective, topology, places))
        if collective.kind == 'collective-permute' and not collective.between_slices:
            shifts += collective.times * one.ici_seconds
        else:
            ici += collective.times * one.ici_seconds
        if dcn is not None:
            dcn = None if one.dcn_seconds is None else dcn + collective.times * one.dcn_seconds
        kinds[collective.kind]['count'] += collective.times
        kinds[collective.kind]['ici_bytes'] += collective.times * one.ici_bytes
        kinds[collective.kind]['dcn_bytes'] += collective.times * one.dcn_bytes
    return ici + shifts / topology.torus.links, dcn, dict(kinds)


def roofline(costs: Costs, ici_seconds: float, dcn_seconds: float | None, topology: Topology) -> Roofline:
    """Of one device's costs and the seconds that its chip's links are busy."""
    chip = topology.chip
    return Roofline(
        compute=costs.flops * chip.devices / chip.peak_flops,
        hbm=costs.hbm_bytes * chip.devices / chip.hbm_bandwidth,
        ici=ici_seconds,
        dcn=dcn_seconds,
    )
