"""What would make a program fit, found by compiling: the smallest changes first, a bounded number of them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from llama_jax.errors import InputError

# From most memory to least; each step down recomputes more, and the last keeps the layers' inputs in the host's memory.
_REMAT_LADDER = ('none', 'projections', 'attention', 'full', 'full_offload')


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What may be changed without changing what is learnt.

    Attributes:
      remat: what the backward pass recomputes.
      num_microbatches: parts of the batch taken one after the other.
      loss_chunks: parts of the sequence whose logits are held at a time.
      data: copies of the weights in a slice; the others of `fsdp` x `data` devices split them.
      fsdp: parts of the weights, and of the batch.
      context: parts of the weights, and of a row.
      axis_rules: what differs from the default ones.
    """

    remat: str
    num_microbatches: int
    loss_chunks: int
    data: int
    fsdp: int
    context: int = 1
    axis_rules: str = ''


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How a compilation with some knobs ended; bytes of one device.

    Attributes:
      knobs: that were tried.
      fits: whether there is room.
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

    @property
    def total(self) -> int:
        """Bytes on a device."""
        return self.state + self.temporaries


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What limits the knobs.

    Attributes:
      batch_size: rows of an update.
      parts: of rows and of tokens of a row together, each on a device (or on several that hold the same).
      seq_len: tokens of a row.
      logit_bytes: of one whole row's logits, split over the vocabulary where they are.
      rules_over_slices: axis rules that split the weights over slices too; '' where there is one slice.
    """

    batch_size: int
    parts: int
    seq_len: int
    logit_bytes: int
    rules_over_slices: str = ''


def smaller(attempt: Attempt, bounds: Bounds) -> Iterator[Knobs]:
    """Knobs that need less memory than one that failed, the least costly for speed first."""
    if attempt.state + attempt.gradients > attempt.available:
        yield from _weights_split_further(attempt.knobs, bounds)
        return
    knobs = dataclasses.replace(attempt.knobs, loss_chunks=_loss_chunks(attempt, bounds))
    if knobs.remat in _REMAT_LADDER[:-2]:
        yield dataclasses.replace(knobs, remat=_REMAT_LADDER[_REMAT_LADDER.index(knobs.remat) + 1])
        knobs = dataclasses.replace(knobs, remat='full')
    elif knobs != attempt.knobs:
        yield knobs
    yield from _microbatches(attempt, knobs, bounds, [knobs.context])
    if knobs.data > 1:
        yield next(_weights_split_further(knobs, bounds))
    if knobs.remat != 'full_offload':
        knobs = dataclasses.replace(knobs, remat='full_offload')
        yield knobs
    # With fewer rows at a time than devices, a row is split over several of them.
    doubled = [knobs.context * 2**n for n in range(1, knobs.fsdp.bit_length()) if knobs.fsdp % 2**n == 0]
    yield from _microbatches(attempt, knobs, bounds, doubled)
    yield from _weights_split_further(knobs, bounds)


def _weights_split_further(knobs: Knobs, bounds: Bounds) -> Iterator[Knobs]:
    """Instead of copies in a slice, then of copies in every slice."""
    if knobs.data > 1:
        knobs = dataclasses.replace(knobs, data=1, fsdp=knobs.data * knobs.fsdp)
        yield knobs
    if bounds.rules_over_slices not in ('', knobs.axis_rules):
        yield dataclasses.replace(knobs, axis_rules=bounds.rules_over_slices)


def _loss_chunks(attempt: Attempt, bounds: Bounds) -> int:
    """So many that logits, in fp32 with their gradient beside them, take a tenth of the memory at most."""
    chunks = attempt.knobs.loss_chunks
    logits = 2 * bounds.batch_size * bounds.logit_bytes // (bounds.parts * attempt.knobs.num_microbatches)
    while logits // chunks > attempt.available // 10 and bounds.seq_len % (2 * chunks) == 0:
        chunks *= 2
    return chunks


def _microbatches(attempt: Attempt, knobs: Knobs, bounds: Bounds, contexts: Sequence[int]) -> Iterator[Knobs]:
    """More microbatches that are expected to fit, with the first of `contexts` that takes so few rows at a time.

    The most there can be where none is expected to.
    """
    possible = []
    for number in range(knobs.num_microbatches + 1, bounds.batch_size + 1):
        for context in contexts:
            rows = bounds.batch_size // number * context  # as many whole ones as the devices could hold
            divides = bounds.batch_size % number == 0 and rows % bounds.parts == 0
            if divides and (
                context == 1 or bounds.seq_len % (2 * context) == 0
            ):  # see `Partitioner.batch_sharding`
                fsdp = knobs.fsdp * knobs.context // context
                found = dataclasses.replace(knobs, num_microbatches=number, context=context, fsdp=fsdp)
                possible.append(found)
                break
    expected = [k for k in possible if _expected(attempt, k.num_microbatches) <= attempt.available]
    yield from expected or possible[-1:]


def _expected(attempt: Attempt, num_microbatches: int) -> int:
    """Memory with more microbatches: activations shrink with the tokens, and gradients are summed beside fresh ones."""
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
