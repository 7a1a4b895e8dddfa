"""What would make a program fit, found by compiling: the smallest changes first, a bounded number of them."""

import dataclasses
from collections.abc import Callable, Iterator

from llama_jax.types import InputError

# From most memory to least; each step down recomputes more.
_REMAT_LADDER = ('none', 'projections', 'attention', 'full')


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What may be changed without changing what is learnt.

    Attributes:
      remat: what the backward pass recomputes.
      num_microbatches: parts of the batch taken one after the other.
      loss_chunks: parts of the sequence whose logits are held at a time.
      data: copies of the weights in a slice; the others of `fsdp` x `data` devices split them.
      fsdp: parts of the weights.
    """

    remat: str
    num_microbatches: int
    loss_chunks: int
    data: int
    fsdp: int


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How a compilation with some knobs ended; bytes of one device.

    Attributes:
      knobs: that were tried.
      fits: whether XLA found room.
      state: bytes of parameters, optimiser state and batch.
      gradients: bytes of one copy.
      temporaries: that the program asks for, gradients among them; 0 where XLA does not say.
      available: what there is.
    """

    knobs: Knobs
    fits: bool
    state: int
    gradients: int
    temporaries: int
    available: int


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What limits the knobs.

    Attributes:
      batch_size: rows of an update.
      batch_parts: devices that a batch is split over.
      seq_len: tokens of a row.
      logit_bytes: of one row's logits on one device.
    """

    batch_size: int
    batch_parts: int
    seq_len: int
    logit_bytes: int


def smaller(attempt: Attempt, bounds: Bounds) -> Iterator[Knobs]:
    """Knobs that need less memory than one that failed, the least costly for speed first."""
    knobs = attempt.knobs
    if attempt.state + attempt.gradients > attempt.available:
        if knobs.data > 1:  # copies of the weights are what there is to save on
            yield dataclasses.replace(knobs, data=1, fsdp=knobs.data * knobs.fsdp)
        return
    rows = bounds.batch_size // (bounds.batch_parts * knobs.num_microbatches)
    chunks = knobs.loss_chunks
    # In fp32, with their gradient beside them: a tenth of the memory is enough for them.
    while (
        2 * rows * bounds.logit_bytes // chunks > attempt.available // 10
        and bounds.seq_len % (2 * chunks) == 0
    ):
        chunks *= 2
    knobs = dataclasses.replace(knobs, loss_chunks=chunks)
    if knobs.remat in _REMAT_LADDER[:-1]:
        knobs = dataclasses.replace(knobs, remat=_REMAT_LADDER[_REMAT_LADDER.index(knobs.remat) + 1])
        yield knobs
        knobs = dataclasses.replace(knobs, remat='full')
    elif chunks != attempt.knobs.loss_chunks:
        yield knobs
    possible = [
        parts
        for parts in range(knobs.num_microbatches + 1, bounds.batch_size + 1)
        if bounds.batch_size % parts == 0 and (bounds.batch_size // parts) % bounds.batch_parts == 0
    ]
    for parts in possible:
        if _expected(attempt, parts) <= attempt.available:
            yield dataclasses.replace(knobs, num_microbatches=parts)
    if possible and _expected(attempt, possible[-1]) > attempt.available:
        yield dataclasses.replace(knobs, num_microbatches=possible[-1])


def _expected(attempt: Attempt, num_microbatches: int) -> int:
    """Memory with more microbatches: activations shrink with the rows, and gradients are summed beside fresh ones."""
    activations = max(0, attempt.temporaries - attempt.gradients) * attempt.knobs.num_microbatches
    return attempt.state + 2 * attempt.gradients + activations // num_microbatches


def find_fit(
    failed: Attempt, bounds: Bounds, attempt: Callable[[Knobs], Attempt], max_tries: int
) -> tuple[list[Attempt], Attempt | None]:
    """Tries knobs until one fits.

    Args:
      failed: the attempt that did not.
      bounds: of the knobs.
      attempt: compiles with these knobs; raises `InputError` where they are impossible.
      max_tries: compilations at most.

    Returns:
      What was tried, and the one that fits; None where nothing did.
    """
    tried: list[Attempt] = []
    seen = {failed.knobs}
    while len(tried) < max_tries:
        knobs = next((knobs for knobs in smaller(failed, bounds) if knobs not in seen), None)
        if knobs is None:
            break
        seen.add(knobs)
        try:
            found = attempt(knobs)
        except InputError:
            continue
        tried.append(found)
        if found.fits:
            return tried, found
        failed = found
    return tried, None
