"""Damaged copies of a file, and what a reader may do with them: refuse in one line, or read."""

import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

from llama_jax.types import InputError

# 8-byte little-endian numbers that readers of lengths, counts and offsets trip over.
_HOSTILE_NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_SLACK = 32 << 20  # bytes that a reader may use whatever the file's size


def mutations(data: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """`count` damaged copies: truncated, bits flipped, numbers replaced, pieces copied, cut out or filled."""
    header = min(len(data), 4096)  # most of what a reader parses; the rest is values, where anything is valid
    for _ in range(count):
        copy = bytearray(data)
        place = int(rng.integers(header if rng.random() < 0.7 else len(data)))
        match int(rng.integers(7)):
            case 0:
                del copy[int(rng.integers(len(data))) :]
            case 1:
                copy[place] ^= 1 << int(rng.integers(8))
            case 2:
                number = _HOSTILE_NUMBERS[int(rng.integers(len(_HOSTILE_NUMBERS)))]
                size = int(rng.choice([4, 8]))
                copy[place : place + size] = (number % 256**size).to_bytes(size, 'little')
            case 3:
                copy[place : place + 1] = bytes(
                    rng.integers(0, 256, size=int(rng.integers(1, 9)), dtype=np.uint8)
                )
            case 4:
                del copy[place : place + int(rng.integers(1, 65))]
            case 5:
                source = int(rng.integers(len(data)))
                piece = data[source : source + int(rng.integers(1, 257))]
                copy[place : place + len(piece)] = piece
            case 6:
                copy[place : place + int(rng.integers(1, 65))] = b'\0' * int(rng.integers(1, 65))
        yield bytes(copy)


def refused_or_read(read: Callable[[], object], size: int, seconds: float = 5.0) -> str:
    """Runs a reader on damaged input of `size` bytes; the message of its refusal, or '' where it read.

    Fails on any other exception, on a message of several lines, on more memory than a few copies of the file, and on
    more time than a hang would explain.
    """
    tracemalloc.start()
    start = time.perf_counter()
    message = ''
    try:
        read()
    except InputError as error:
        message = str(error)
        assert message and '\n' not in message, f'not one line: {message!r}'
        assert len(message) < 1000, f'{len(message)} characters: {message[:200]!r}'
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * size + _SLACK, f'{peak} bytes for a file of {size}'
    assert time.perf_counter() - start < seconds, 'too slow: a hang?'
    return message
