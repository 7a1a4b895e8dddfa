"""Rollouts: answers drawn from a policy, with the log-probabilities that they were drawn with.

Plain sampling at a temperature from all of the vocabulary, so that these log-probabilities are of the very distribution
that a ratio is taken of. What a prompt's samples are follows from the weights, the seed, the prompt's number and the
sample's alone: not from what is drawn beside them, from the mesh, or from what was drawn before a restart.

    with sampler_weights(model, params) as weights:
        drawn = rollouts(model, weights, tokenizer, prompts, sampling=Sampling(samples=8), seed=0, stop_ids=ids)
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import InputError
from llama_jax.inference.completion import Row, Watch
from llama_jax.inference.generator import Generator
from llama_jax.inference.prompts import check_prompts
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.models.unstacked import unstack
from llama_jax.ops.linear import Representation
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.types import Params

# Prompts wait for a slot until so many times the slots are asked for; more would only take the host's memory.
_AHEAD = 2
_MOST = 1 << 20  # answers or tokens that anything is drawn of


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the answers to a prompt are drawn.

    Attributes:
      temperature: divides the logits.
      max_new_tokens: of an answer, its stop token included.
      samples: answers to a prompt, at each temperature.
      num_slots: answers that are drawn together, which is what fits into memory.
      ladder: further temperatures, at each of which as many samples follow.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    samples: int = 1
    num_slots: int = 64
    ladder: tuple[float, ...] = ()

    def __post_init__(self):
        """Raises InputError where a setting is out of range."""
        for name, value in (('temperature', self.temperature), *(('ladder', value) for value in self.ladder)):
            if not 1e-6 <= value < math.inf:
                raise InputError(
                    f'{name} is {value}; answers are drawn at random, so it must be above 0 and finite'
                )
        for name in ('max_new_tokens', 'samples', 'num_slots'):
            if not 1 <= (value := getattr(self, name)) <= _MOST:
                raise InputError(f'{name} is {value}; it must be from 1 to {_MOST:,}')

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All of them, each once for every sample: that of sample `i` stands at `i`."""
        return tuple(value for value in (self.temperature, *self.ladder) for _ in range(self.samples))


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One answer to one prompt.

    Attributes:
      record: number of the prompt.
      sample: number of the answer among those to the prompt.
      prompt: token ids.
      answer: token ids, the stop token that ended it included.
      log_probabilities: of each token of the answer by the sampler, at the temperature that it was drawn with.
      stopped: a stop token ended it; otherwise it was cut.
      text: of the answer, without the stop token; '' where there is no tokenizer.
    """

    record: int
    sample: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    stopped: bool
    text: str


def rollouts(
    model: LlamaForCausalLM,
    weights: Params,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seed: int,
    stop_ids: Sequence[int],
    records: Sequence[int] | None = None,
) -> list[Rollout]:
    """All answers to all prompts, in the order of (record, sample); see `rollouts_by_record`."""
    found = rollouts_by_record(
        model, weights, tokenizer, prompts, sampling=sampling, seed=seed, stop_ids=stop_ids, records=records
    )
    return [one for group in sorted(found, key=lambda group: group[0].record) for one in group]


def rollouts_by_record(
    model: LlamaForCausalLM,
    weights: Params,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    seed: int,
    stop_ids: Sequence[int],
    records: Sequence[int] | None = None,
) -> Iterator[list[Rollout]]:
    """The answers to a prompt in their order, as soon as the last of them has ended. A prompt is read once.

    Every process of a job makes the same call and gets all of them.

    Args:
      model: the policy's architecture and compute dtype; its partitioner, where it has one, places the rows.
      weights: of the sampler: what `sampler_weights` gives, or any that `inference` takes.
      tokenizer: makes the texts; None: there are none.
      prompts: token ids.
      sampling: how answers are drawn.
      seed: any whole number; another one gives other answers.
      stop_ids: any of these ends an answer.
      records: numbers of the prompts, each once; None: their places. An answer's draw follows from it.

    Raises:
      InputError: by the call: a prompt leaves no room for an answer, or is none of this model.
    """
    check_room(prompts, sampling.max_new_tokens, model.config.max_seq_len)
    check_prompts(prompts, model.config)
    numbers = list(range(len(prompts)) if records is None else records)
    assert len(set(numbers)) == len(prompts), 'a number for each prompt'
    return _drawn(
        model, weights, tokenizer, prompts, numbers, sampling=sampling, seed=seed, stop_ids=tuple(stop_ids)
    )


def check_room(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    """Refuses prompts behind which an answer of full length has no room.

    Raises:
      InputError: says how many there are, and how long the longest is.
    """
    most = max(0, max_seq_len - max_new_tokens)
    if long := [len(prompt) for prompt in prompts if len(prompt) > most]:
        raise InputError(
            f'{len(long)} of {len(prompts)} prompts are longer than {most} tokens, which is the context of '
            f'{max_seq_len} less max_new_tokens, {max_new_tokens}: the longest has {max(long)}; leave them out, or '
            'give answers less room'
        )


def draw_seed(seed: int, record: int, sample: int) -> int:
    """What decides the draws of one answer: 31 bits that tell nothing of each other."""
    digest = hashlib.sha256(json.dumps([seed, record, sample]).encode()).digest()
    return int.from_bytes(digest[:4], 'big') >> 1


@contextlib.contextmanager
def sampler_weights(model: LlamaForCausalLM, params: Params) -> Iterator[Params]:
    """One copy of a policy's weights as its sampler reads them, in its dtype and layout, gone afterwards.

    Gathered once it is read in every step; the policy's own, split as training likes them, would be gathered for each
    token anew.

    Args:
      model: of the sampler: its partitioner may be another one than training's, on the same devices, or None, which
        leaves the weights where they are.
      params: the policy's; adapters beside a base (`lora.combine`) stay so, where the mesh is training's. Merge them
        before (`lora.merge`) for another.

    Raises:
      InputError: adapters, or weights in integers, are to move to another mesh.
    """
    places = _places(model, params)
    narrow = jax.tree.map(lambda leaf: _cast(leaf, model.dtype), params, is_leaf=_is_representation)
    copy = jax.device_put(narrow, places, may_alias=False)
    del narrow
    weights = unstack(copy, model.dtype, delete=True)
    del copy
    try:
        yield weights
    finally:
        for leaf in jax.tree.leaves(weights):
            if not leaf.is_deleted():
                leaf.delete()


def _places(model: LlamaForCausalLM, params: Params) -> Any:
    """A sharding for each array of the params."""
    own = jax.tree.map(lambda leaf: leaf.sharding, params)
    if model.partitioner is None:
        return own
    shardings = model.partitioner.tree_shardings(*abstract_params_and_axes(model))

    def place(sharding: Any, weight: Any) -> Any:
        if not isinstance(weight, Representation):
            return sharding
        there = {leaf.sharding.device_set == sharding.device_set for leaf in jax.tree.leaves(weight)}
        meshes = {getattr(leaf.sharding, 'mesh', sharding.mesh) for leaf in jax.tree.leaves(weight)}
        if there != {True} or meshes != {sharding.mesh}:
            raise InputError(
                'adapters and weights in integers do not move to a mesh of the sampler; merge them first, or sample on '
                "training's mesh"
            )
        return jax.tree.map(lambda leaf: leaf.sharding, weight)

    return jax.tree.map(place, shardings, params)


def _cast(weight: Any, dtype: jax.typing.DTypeLike) -> Any:
    """A matrix in at most the width of the sampler's type, before it travels; norms as they are."""
    if _is_representation(weight) or weight.ndim < 2 or not jnp.issubdtype(weight.dtype, jnp.floating):
        return weight
    return weight.astype(dtype) if jnp.dtype(dtype).itemsize < weight.dtype.itemsize else weight


def _is_representation(node: Any) -> bool:
    return isinstance(node, Representation)


@dataclasses.dataclass
class _Group:
    """The answers to one prompt, while they are drawn."""

    record: int
    prompt: tuple[int, ...]
    rows: list[Row]

    @property
    def ended(self) -> bool:
        return all(row.ended for row in self.rows)


def _drawn(
    model: LlamaForCausalLM,
    weights: Params,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    records: Sequence[int],
    *,
    sampling: Sampling,
    seed: int,
    stop_ids: tuple[int, ...],
) -> Iterator[list[Rollout]]:
    temperatures = sampling.temperatures
    # Prompts are read one by one, and there are as many slots however few prompts are left: else last bits would depend
    # on the company.
    generator = Generator(
        model,
        weights,
        num_slots=sampling.num_slots,
        is_watched=False,
        reads_together=False,
        log_probabilities=0,
    )
    waiting, open_rows = list(zip(records, prompts, strict=True))[::-1], 0
    place_of: dict[int, tuple[_Group, int]] = {}  # of each request that has not ended
    while waiting or place_of:
        while waiting and open_rows < _AHEAD * sampling.num_slots:
            record, prompt = waiting.pop()
            group = _Group(record, tuple(prompt), [Row() for _ in temperatures])
            first = None
            for sample, temperature in enumerate(temperatures):
                sampler = Sampler(temperature, seed=draw_seed(seed, record, sample))
                number = generator.submit(
                    CompletionRequest(group.prompt, sampling.max_new_tokens, sampler, stop_ids, like=first)
                )
                place_of[number] = group, sample
                first = number if first is None else first
                open_rows += 1
        for progress in generator.advance():
            group, sample = place_of[progress.number]
            group.rows[sample].take(progress)
            if progress.ended is None:
                continue
            del place_of[progress.number]
            open_rows -= 1
            if group.ended:
                yield [_rollout(tokenizer, group, number) for number in range(len(group.rows))]


def _rollout(tokenizer: Tokenizer | None, group: _Group, sample: int) -> Rollout:
    row = group.rows[sample]
    stop = () if row.stop_id is None else (row.stop_id,)
    values = [score.filtered_log_probability for score in row.scores]
    assert len(values) == len(row.tokens) + len(stop) and None not in values
    return Rollout(
        record=group.record,
        sample=sample,
        prompt=group.prompt,
        answer=(*row.tokens, *stop),
        log_probabilities=tuple(float(value) for value in values if value is not None),
        stopped=bool(stop),
        text=Watch(tokenizer, group.prompt).completion(row).text,
    )
