import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llama_jax.data import loader
from llama_jax.data.loader import PaddedRows, batches
from llama_jax.errors import InputError
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.types import LMBatch
from tests import toy

LENGTH = 4
LAYOUTS = [
    {'data': 1}, {'data': 2}, {'data': 8}, {'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'tensor': 8},
    {'context': 2, 'tensor': 4}, {'fsdp': 4, 'context': 2},
]  # fmt: skip


class Numbered:
    """Row i is i * 100, i * 100 + 1, ...; remembers which rows were read."""

    def __init__(self, size=64):
        self.size, self.read = size, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(int(index))
        tokens = np.arange(LENGTH + 1, dtype=np.int32) + 100 * int(index)
        return {'tokens': tokens, 'segment_ids': np.ones(LENGTH + 1, np.int32)}


def partitioner(sizes):
    return Partitioner(make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]))


def load(rows, sizes=None, count=3, **kwargs):
    target = toy.abstract_batch(partitioner(sizes or {'data': 8}), 8, LENGTH)
    iterator = batches(rows, target, **kwargs)
    return [next(iterator) for _ in range(count)]


def first_tokens(batch):
    return np.asarray(batch.tokens)[:, 0] // 100


def test_rows_come_in_order_and_each_once():
    rows = Numbered()
    loaded = load(rows, count=8)
    np.testing.assert_array_equal(np.concatenate([first_tokens(batch) for batch in loaded]), np.arange(64))
    assert sorted(rows.read) == list(range(64))
    np.testing.assert_array_equal(loaded[0].tokens[1], [100, 101, 102, 103])
    np.testing.assert_array_equal(loaded[0].targets[1], [101, 102, 103, 104])


@pytest.mark.parametrize('consumed', [8, 20, 3])  # also where the batch size was another before
def test_going_on_is_the_rest(consumed):
    loaded = load(Numbered(), rows_consumed=consumed)
    np.testing.assert_array_equal(
        np.concatenate([first_tokens(batch) for batch in loaded]), np.arange(consumed, consumed + 24)
    )


@pytest.mark.parametrize('num_threads', [1, 5])
def test_threads_do_not_change_the_order(num_threads):
    loaded = load(Numbered(), count=8, num_threads=num_threads)
    np.testing.assert_array_equal(np.concatenate([first_tokens(batch) for batch in loaded]), np.arange(64))


def test_of_several_processes_one_reads_what_its_own_devices_hold(monkeypatch):
    # Four devices of eight: rows 2 and 3, in two halves each, and rows 6 and 7.
    own = [(rows, part) for rows in (slice(2, 4), slice(6, 8)) for part in (slice(0, 2), slice(2, 4))]
    sharding = SimpleNamespace(addressable_devices_indices_map=lambda shape: dict(enumerate(own)))
    leaf, rows = SimpleNamespace(shape=(8, LENGTH), sharding=sharding), Numbered(16)
    monkeypatch.setattr(
        loader, 'make_global_array', lambda read, row_of, size, sharding: (read[:, 0], row_of)
    )
    found = list(batches(rows, LMBatch(*[leaf] * 5)))
    assert [(batch.tokens[0] // 100).tolist() for batch in found] == [[2, 3, 6, 7], [10, 11, 14, 15]]
    assert found[0].tokens[1] == {2: 0, 3: 1, 6: 2, 7: 3}
    assert sorted(rows.read) == [2, 3, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize('sizes', LAYOUTS, ids=str)
def test_every_layout_has_the_same_batches_and_each_device_its_part(sizes):
    wanted = 100 * np.arange(24).reshape(3, 8, 1) + np.arange(LENGTH + 1)
    for batch, want in zip(load(Numbered(), sizes), wanted, strict=True):
        np.testing.assert_array_equal(batch.tokens, want[:, :-1])
        np.testing.assert_array_equal(batch.targets, want[:, 1:])
        for shard in batch.tokens.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[:, :-1][shard.index])
        parts = sizes.get('data', 1) * sizes.get('fsdp', 1)
        assert {shard.data.shape for shard in batch.tokens.addressable_shards} == {
            (8 // parts, LENGTH // sizes.get('context', 1))
        }


def test_rows_that_make_no_whole_batch_are_left_out():
    target = toy.abstract_batch(partitioner({'data': 2}), 8, LENGTH)
    assert len(list(batches(Numbered(20), target))) == 2
    assert not list(batches(Numbered(20), target, rows_consumed=16))


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}], ids=str)
def test_batches_of_another_shape_need_no_other_loader(sizes):
    """Pairs of rows with a number each, as preferences are: leaves of several ranks, each with its sharding."""
    placed, rows = partitioner(sizes), Numbered()

    def collate(read):
        pairs = np.stack([np.stack([row['tokens'], -row['tokens']]) for row in read])
        return {'pairs': pairs, 'margin': pairs[:, 0, 0] / np.float32(100)}

    shapes = {
        'pairs': ((8, 2, LENGTH + 1), np.int32, ('batch', None, None)),
        'margin': ((8,), np.float32, ('batch',)),
    }
    target = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placed.sharding(axes, shape, name))
        for name, (shape, dtype, axes) in shapes.items()
    }
    first, second = itertools.islice(batches(rows, target, collate=collate), 2)
    np.testing.assert_array_equal(first['margin'], np.arange(8))
    np.testing.assert_array_equal(
        second['pairs'][:, 1], -100 * np.arange(8, 16)[:, None] - np.arange(LENGTH + 1)
    )
    assert (
        first['pairs'].sharding == target['pairs'].sharding
        and second['margin'].sharding == target['margin'].sharding
    )


def test_padding_makes_the_last_batch_whole_and_counts_for_nothing():
    padded = PaddedRows(Numbered(10), batch_size=8)
    assert len(padded) == 16
    loaded = load(padded, count=2)
    assert loaded[1].loss_mask[:2].all() and not np.any(loaded[1].loss_mask[2:])
    assert not np.any(loaded[1].segment_ids[2:])
    assert len(PaddedRows(Numbered(16), 8)) == 16
    assert len(PaddedRows(Numbered(16), 8, max_rows=5)) == 8
    assert not np.any(PaddedRows(Numbered(16), 8, max_rows=5)[5]['segment_ids'])


def test_a_batch_that_does_not_divide_is_refused_in_one_line():
    with pytest.raises(InputError, match='batch size 8 does not divide over the 3 devices'):
        load(Numbered(), {'data': 3})
    with pytest.raises(InputError, match=r"batch: axis 'length' of size 4 does not divide .* context=8"):
        load(Numbered(), {'context': 8})
