"""The trie of blocks beside a dictionary of all beginnings, which is looked through for each answer."""

import dataclasses

import numpy as np
import pytest

from llama_jax.inference.prefix_cache import PrefixCache

BLOCK = 2  # tokens
BYTES = 10  # of a block; budgets have some more than they can use


@dataclasses.dataclass
class Entry:
    is_on_device: bool = True
    used: int = 0
    users: int = 0


class Reference:
    """What `PrefixCache` is to do, from its words: {all tokens up to a block's end: where it is}."""

    def __init__(self, device_room, host_room):
        self.entries: dict[tuple[int, ...], Entry] = {}
        self.device_room, self.host_room, self.now = device_room, host_room, 0

    def places(self, is_on_device):
        return {prefix for prefix, entry in self.entries.items() if entry.is_on_device == is_on_device}

    def oldest(self, prefixes):
        """Of those that nobody has and nothing follows among them."""
        free = [
            p
            for p in prefixes
            if not self.entries[p].users and not any(q != p and q[: len(p)] == p for q in prefixes)
        ]
        return min(free, key=lambda prefix: (self.entries[prefix].used, -len(prefix)), default=None)

    def bring(self, prefix):
        """Whether it is on the devices; it is made where it is not known."""
        if prefix in self.places(True):
            return True
        if len(self.places(True)) >= self.device_room:
            if (victim := self.oldest(self.places(True))) is None:
                return False
            self.entries.pop(prefix, None)
            if not self.host_room:
                del self.entries[victim]
            else:
                if len(self.places(False)) >= self.host_room:
                    del self.entries[self.oldest(self.places(False))]
                self.entries[victim].is_on_device = False
        self.entries[prefix] = Entry()
        return True

    def walk(self, prefixes, make_from):
        """The first of them that are, or can be brought, on the devices; those from `make_from` on are made."""
        found = []
        for index, prefix in enumerate(prefixes):
            if (prefix not in self.entries and index < make_from) or not self.bring(prefix):
                break
            self.entries[prefix].users += 1
            found.append(prefix)
        return found

    def release(self, prefixes):
        self.now += 1
        for prefix in prefixes:
            self.entries[prefix].users -= 1
            self.entries[prefix].used = self.now


def prefixes_of(tokens):
    return [tuple(tokens[:end]) for end in range(BLOCK, len(tokens) + 1, BLOCK)]


def blocks_of(cache):
    """{all tokens up to the block's end: the block}, of a whole trie."""
    found, open_ones = {}, [((), cache._first)]
    while open_ones:
        prefix, block = open_ones.pop()
        for tokens, following in block.following.items():
            assert following.tokens == tokens and following.before is block
            found[prefix + tokens] = following
            open_ones.append((prefix + tokens, following))
    return found


def make_cache(device_room, host_room):
    def to_host(payload):
        assert payload[0] == 'device'
        return 'host', payload[1]

    def to_device(payload):
        assert payload[0] == 'host'
        return 'device', payload[1]

    return PrefixCache(BLOCK, BYTES, device_room * BYTES + 9, host_room * BYTES + 9, to_host, to_device)


@pytest.mark.parametrize(('device_room', 'host_room'), [(0, 5), (1, 0), (3, 1), (6, 4), (4, 20)])
def test_blocks_are_those_of_a_dictionary_of_all_beginnings(device_room, host_room):
    rng = np.random.default_rng(device_room * 31 + host_room)
    cache, reference, taken = make_cache(device_room, host_room), Reference(device_room, host_room), []
    matched = 0
    for _ in range(600):
        tokens = rng.integers(0, 2, size=rng.integers(1, 12)).tolist()
        prefixes = prefixes_of(tokens)
        match rng.choice(['match', 'insert', 'release'], p=[0.35, 0.3, 0.35]):
            case 'match':
                blocks = cache.match(tokens)
                want = reference.walk(prefixes_of(tokens[:-1]), make_from=99)
                assert [block.payload for block in blocks] == [('device', prefix) for prefix in want]
                taken.append((blocks, want))
                matched += len(blocks)
            case 'insert':
                begin = int(rng.integers(len(prefixes) + 1))
                cache.insert(tokens, [('device', prefix) for prefix in prefixes[begin:]], begin)
                reference.release(reference.walk(prefixes, make_from=begin))
            case 'release' if taken:
                blocks, want = taken.pop(rng.integers(len(taken)))
                cache.release(blocks)
                reference.release(want)
        held = blocks_of(cache)
        for is_on_device, name, room in ((True, 'device', device_room), (False, 'host', host_room)):
            there = {prefix for prefix, block in held.items() if block.payload == (name, prefix)}
            assert there == reference.places(is_on_device) and len(there) <= room
        assert len(held) == len(reference.entries)
        assert {p: b.users for p, b in held.items()} == {p: e.users for p, e in reference.entries.items()}
    assert matched > 30 or not device_room  # else nothing was shown


def test_a_match_leaves_a_token_to_read():
    cache = make_cache(4, 0)
    cache.insert([1, 2, 3, 4], [('device', 0), ('device', 1)])
    assert [len(cache.match(prompt)) for prompt in ([1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 2, 3])] == [
        0,
        1,
        2,
        0,
    ]
