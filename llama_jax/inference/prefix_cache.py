"""Prompts that begin alike are read once: keys and values of their beginnings, kept in blocks of so many tokens.

The blocks are a trie: a block stands for its own tokens behind all those on the way to it, and is found by these
tokens themselves. Those used last lie in the devices' memory, others in the host's, the rest is forgotten. No clock and
no hash decides anything, so that every process of a job which makes the same calls holds the same blocks.
"""

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@dataclasses.dataclass(eq=False)
class Block:
    """Keys and values of some tokens behind those of the blocks before.

    Attributes:
      tokens: of this block.
      before: the block that it follows; None begins a prompt.
      payload: what is kept of them, in the devices' memory or the host's.
      users: how many have it from `match` and not yet given back.
      following: the blocks behind it, by their tokens.
    """

    tokens: tuple[int, ...]
    before: 'Block | None'
    payload: Any = None
    users: int = 0
    following: 'dict[tuple[int, ...], Block]' = dataclasses.field(default_factory=dict)


class PrefixCache:
    """A trie of blocks, within budgets of bytes.

    In both memories the blocks are in the order in which they were last given back, each a moment before the one that
    it follows. So of those that nobody has, the first has nothing behind it in its memory: it can go down, or away.
    All that are on the devices follow such as are there too.
    """

    def __init__(
        self,
        block_tokens: int,
        block_bytes: int,
        device_bytes: int,
        host_bytes: int,
        to_host: Callable[[Any], Any],
        to_device: Callable[[Any], Any],
    ):
        """An empty cache.

        Args:
          block_tokens: of a block.
          block_bytes: that a payload takes, in either memory.
          device_bytes: that all payloads may take on the devices; 0 keeps nothing.
          host_bytes: that those may take which were moved to the host.
          to_host: moves a payload down.
          to_device: moves it up.
        """
        self.block_tokens, self.block_bytes = block_tokens, block_bytes
        self._device_room, self._host_room = device_bytes // block_bytes, host_bytes // block_bytes
        self._to_host, self._to_device = to_host, to_device
        self._first = Block((), None)
        self._on_device: OrderedDict[Block, None] = OrderedDict()
        self._on_host: OrderedDict[Block, None] = OrderedDict()

    def memory_plan(self) -> str:
        """What the blocks may take, for the log."""
        device, host = (room * self.block_bytes / 2**30 for room in (self._device_room, self._host_room))
        return f'beginnings of prompts: {device:.2f} GiB on the devices, {host:.2f} GiB on the host'

    def match(self, tokens: Sequence[int]) -> list[Block]:
        """The longest known beginning of a prompt that leaves a token to read; all of it is on the devices then.

        None of it goes away until `release`.
        """
        found, block = [], self._first
        for key in self._keys(tokens[:-1]):
            if (block := block.following.get(key)) is None or not self._move_up(block):
                break
            block.users += 1  # at once, lest room for the next be made here
            found.append(block)
        return found

    def release(self, blocks: Sequence[Block]) -> None:
        """Gives back what `match` gave: it is used up to now."""
        for block in reversed(blocks):
            assert block.users > 0, 'a block is given back that nobody has'
            block.users -= 1
            self._on_device.move_to_end(block)

    def insert(self, tokens: Sequence[int], payloads: Sequence[Any], begin: int = 0) -> None:
        """Keeps blocks of a prompt, as many as there is room for beside those in use.

        Args:
          tokens: of the prompt, from its beginning.
          payloads: of the blocks behind the first `begin`, each in the devices' memory.
          begin: blocks that are known, as `match` has said; where one of them is not, the others have no place.
        """
        path, block = [], self._first
        for index, key in enumerate(itertools.islice(self._keys(tokens), begin + len(payloads))):
            known = block.following.get(key)
            if known is None:
                if index < begin or not self._has_room():
                    break
                self._make_room()
                known = block.following[key] = Block(key, block, payloads[index - begin])
                self._on_device[known] = None
            elif not self._move_up(known):
                break
            known.users += 1  # as in `match`
            path.append(block := known)
        self.release(path)

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The tokens of each whole block."""
        for end in range(self.block_tokens, len(tokens) + 1, self.block_tokens):
            yield tuple(tokens[end - self.block_tokens : end])

    def _move_up(self, block: Block) -> bool:
        """Whether the block is on the devices now."""
        if block in self._on_device:
            return True
        if not self._has_room():
            return False
        del self._on_host[block]  # so that it does not give way to what makes room for it
        self._make_room()
        block.payload = self._to_device(block.payload)
        self._on_device[block] = None
        return True

    def _has_room(self) -> bool:
        """Whether the devices have room for one more block, or one that nobody has."""
        return len(self._on_device) < self._device_room or any(not block.users for block in self._on_device)

    def _make_room(self) -> None:
        """For one more block on the devices, where there is none: one that nobody has goes down, or away."""
        if len(self._on_device) < self._device_room:
            return
        victim = next(block for block in self._on_device if not block.users)
        del self._on_device[victim]
        if not self._host_room:
            return self._forget(victim)
        if len(self._on_host) == self._host_room:
            self._forget(self._on_host.popitem(last=False)[0])
        victim.payload = self._to_host(victim.payload)
        self._on_host[victim] = None

    def _forget(self, block: Block) -> None:
        assert block.before is not None and not block.following
        del block.before.following[block.tokens]
