"""Choosing the next token: each row by settings of its own, which are arrays, so that one program serves any mix.

Order, as in transformers and vLLM: the caller's processor; bias, penalties, tokens that may not come yet; temperature;
top-k, top-p, min-p.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from llama_jax.errors import InputError
from llama_jax.inference.filters import keep_best, keep_min_p, keep_top_k, keep_top_p, most_likely
from llama_jax.inference.logits_processor import LogitsProcessor

# Tokens that one request may bias: what OpenAI's service takes.
MAX_BIASED = 300
# Stop ids are padded to so many, or to the next power of two, so that few shapes serve all.
STOP_IDS = 8
# Parts of a vocabulary, of which one is drawn first. Those of Llama are multiples of it: sharded by a power of 2, up to
# this one, each part is whole on a device. On a CPU so many are the fastest.
_PARTS = 128
# Not in any vocabulary: a scatter drops it.
_NO_TOKEN = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How one request's tokens are chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep this many of the most likely tokens, and those as likely as the last of them; 0 keeps all.
      top_p: keep the fewest most likely tokens whose probabilities reach this; 1 keeps all. Of equally likely
        tokens the smaller ids come first.
      min_p: keep tokens at least this times as likely as the most likely one.
      repetition_penalty: logits of tokens of the prompt or the completion are divided by it where positive, else
        multiplied (CTRL, https://arxiv.org/abs/1909.05858).
      presence_penalty: subtracted from the logits of tokens of the completion.
      frequency_penalty: subtracted as often as the completion has the token.
      logit_bias: {token id: what is added to its logit}.
      min_new_tokens: no stop token is drawn before so many.
      seed: of the draws, 32 bits.
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    logit_bias: Mapping[int, float | int] = dataclasses.field(default_factory=dict, hash=False)
    min_new_tokens: int = 0
    seed: int = 0

    def __post_init__(self):
        def check(name: str, low: Any, high: Any, allowed: str, kind: type = numbers.Real):
            value = getattr(self, name)
            # NaN is in no range; a bool is a number to Python alone.
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
                raise InputError(f'{name} is {value!r}; it must be {allowed}')

        if self.temperature != 0:
            # Below, fp32 logits would overflow.
            check('temperature', 1e-6, 1e6, '0 (greedy) or from 1e-06 to 1e+06')
        check('top_k', 0, math.inf, '0 (all tokens) or a larger whole number', numbers.Integral)
        check('top_p', math.ulp(0), 1, 'above 0 and at most 1 (all tokens)')
        check('min_p', 0, 1, 'from 0 (all tokens) to 1')
        check('repetition_penalty', 0.01, 100, 'from 0.01 to 100; 1 changes nothing')
        check('presence_penalty', -2, 2, 'from -2 to 2; 0 changes nothing')
        check('frequency_penalty', -2, 2, 'from -2 to 2; 0 changes nothing')
        check('min_new_tokens', 0, math.inf, '0 or a larger whole number', numbers.Integral)
        check('seed', -(2**31), 2**32 - 1, 'a whole number of 32 bits', numbers.Integral)
        if len(self.logit_bias) > MAX_BIASED:
            raise InputError(f'logit_bias is for {len(self.logit_bias)} tokens; it may be for {MAX_BIASED}')
        for token, bias in self.logit_bias.items():
            if not isinstance(token, numbers.Integral) or token < 0:
                raise InputError(f'logit_bias is for token {token!r}; an id is a whole number, 0 or more')
            if not isinstance(bias, numbers.Real) or not -100 <= bias <= 100:
                raise InputError(f'logit_bias of token {token} is {bias!r}; it must be from -100 to 100')

    @property
    def adjusts(self) -> bool:
        """Whether logits change before the temperature divides them."""
        neutral = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1, 0, 0)
        return bool(self.logit_bias or self.min_new_tokens) or not neutral


@flax.struct.dataclass
class Adjustments:
    """What changes logits before the temperature does, by row; see `Sampler`.

    Attributes:
      biased: ids of `bias`, padded by what is no token.
    """

    repetition_penalty: Float[Any, 'B']
    presence_penalty: Float[Any, 'B']
    frequency_penalty: Float[Any, 'B']
    biased: Int[Any, 'B biased']
    bias: Float[Any, 'B biased']
    min_new_tokens: Int[Any, 'B']

    def changes(self, step: Int[Array, 'B']) -> Bool[Array, 'B']:
        """Whether each row's logits change before its token of this number."""
        of_words = (
            (self.repetition_penalty != 1) | (self.presence_penalty != 0) | (self.frequency_penalty != 0)
        )
        return of_words | (step < self.min_new_tokens) | jnp.any(self.biased != _NO_TOKEN, axis=-1)


@flax.struct.dataclass
class SamplerRows:
    """Settings of a batch, arrays by row, in NumPy on the host and JAX arrays on the devices; see `Sampler`.

    Attributes:
      seed: with `stream` and the number of the token it decides a row's draws, whatever the batch.
      stream: tells rows of one seed apart.
      stop_ids: tokens that end the row, padded by what is no token.
      adjustments: None where no row asks for any, which is another, smaller program.
      processor: changes the logits before all that; of all rows, and of the program.
      state: of each row, its.
    """

    temperature: Float[Any, 'B']
    top_k: Int[Any, 'B']
    top_p: Float[Any, 'B']
    min_p: Float[Any, 'B']
    seed: Int[Any, 'B']
    stream: Int[Any, 'B']
    stop_ids: Int[Any, 'B stops']
    adjustments: Adjustments | None
    processor: LogitsProcessor | None = flax.struct.field(pytree_node=False, default=None)
    state: Any = None

    @classmethod
    def create(
        cls,
        samplers: Sequence[Sampler],
        streams: Sequence[int],
        stop_ids: Sequence[Sequence[int]],
        vocab_size: int,
        *,
        adjusts: bool = False,
        num_stops: int = 1,
    ) -> 'SamplerRows':
        """NumPy arrays of the settings of each row.

        Args:
          samplers: of each row.
          streams: which of the rows of a seed each is.
          stop_ids: of each row; one that the model has no row for is never drawn.
          vocab_size: the model's rows.
          adjusts: with adjustments, though none of these rows may ask for any.
          num_stops: stop ids to have room for at least.

        Raises:
          InputError: a bias is for a token that the model has no row for.
        """
        for sampler in samplers:
            if (largest := max(sampler.logit_bias, default=0)) >= vocab_size:
                raise InputError(
                    f'logit_bias is for token {largest}, for which the model has no row: it has {vocab_size}'
                )

        def column(name: str, dtype: type, most: float | int = math.inf) -> np.ndarray:
            return np.array([min(getattr(sampler, name), most) for sampler in samplers], dtype)

        def padded(rows: Sequence[Sequence[Any]], width: int, filler: int, dtype: type) -> np.ndarray:
            return np.array([[*row, *[filler] * (width - len(row))] for row in rows], dtype)

        adjustments = None
        if adjusts or any(sampler.adjusts for sampler in samplers):
            adjustments = Adjustments(
                column('repetition_penalty', np.float32),
                column('presence_penalty', np.float32),
                column('frequency_penalty', np.float32),
                padded([list(s.logit_bias) for s in samplers], MAX_BIASED, _NO_TOKEN, np.int32),
                padded([list(s.logit_bias.values()) for s in samplers], MAX_BIASED, 0, np.float32),
                column('min_new_tokens', np.int32, _NO_TOKEN),
            )
        stops = [[token for token in row if 0 <= token < vocab_size] for row in stop_ids]
        width = 1 << (max([num_stops, STOP_IDS, *map(len, stops)]) - 1).bit_length()
        return cls(
            column('temperature', np.float32),
            column('top_k', np.int32, vocab_size),
            column('top_p', np.float32),
            column('min_p', np.float32),
            column('seed', np.int64).astype(np.int32),
            np.array(streams, np.int32),
            padded(stops, width, _NO_TOKEN, np.int32),
            adjustments,
        )

    def advance(self, tokens: Int[Array, 'B']) -> 'SamplerRows':
        """After a token more of each row, which its processor hears of."""
        if self.processor is None:
            return self
        return dataclasses.replace(self, state=self.processor.advance(self.state, tokens))

    def widened(self, num_stops: int, adjusts: bool) -> 'SamplerRows':
        """With room for so many stop ids at least, and with adjustments, though none of the rows asks for any."""
        num_rows, width = self.stop_ids.shape
        neutral = SamplerRows.create(
            [Sampler()] * num_rows, [0] * num_rows, [()] * num_rows, 1, adjusts=adjusts, num_stops=num_stops
        )
        stop_ids = jnp.pad(
            self.stop_ids, ((0, 0), (0, max(0, neutral.stop_ids.shape[1] - width))), constant_values=_NO_TOKEN
        )
        return dataclasses.replace(
            self, stop_ids=stop_ids, adjustments=self.adjustments or neutral.adjustments
        )

    def is_stop(self, tokens: Int[Array, 'B']) -> Bool[Array, 'B']:
        """Whether each row's token ends it."""
        return jnp.any(tokens[:, None] == self.stop_ids, axis=-1)

    def adjust(
        self, logits: Float[Array, 'B V'], seen: Int[Array, 'B V'] | None, step: Int[Array, 'B']
    ) -> Float[Array, 'B V']:
        """Logits after bias and penalties; a row that asks for none keeps its bits.

        Args:
          logits: of the model.
          seen: see `seen_in_prompts`; None where nothing is adjusted.
          step: number of the token to be drawn, from 0.
        """
        asked, rows = self.adjustments, jnp.arange(len(logits))[:, None]
        if asked is None:
            return logits
        assert seen is not None

        def adjusted(logits: Array) -> Array:
            logits = logits.at[rows, asked.biased].add(asked.bias, mode='drop')
            repetition = asked.repetition_penalty[:, None]
            repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
            logits = jnp.where(seen > 0, repeated, logits)
            drawn = seen >> 1
            logits -= asked.frequency_penalty[:, None] * drawn
            logits -= asked.presence_penalty[:, None] * (drawn > 0)
            banned = jnp.where((step < asked.min_new_tokens)[:, None], self.stop_ids, _NO_TOKEN)
            return logits.at[rows, banned].set(-jnp.inf, mode='drop')

        return jax.lax.cond(jnp.any(asked.changes(step)), adjusted, lambda logits: logits, logits)

    def filter(self, logits: Float[Array, 'B V']) -> Float[Array, 'B V']:
        """Logits of the distribution that is drawn from: after temperature and filters, -inf for what they drop.

        The filters see the distribution after temperature, as in Meta's generation code. A greedy row keeps its most
        likely token alone.
        """
        is_greedy, size = self.temperature == 0, logits.shape[-1]
        logits = logits / jnp.where(is_greedy, 1, self.temperature)[:, None]
        top_k = jnp.where(is_greedy | (self.top_k == 0), size, self.top_k)
        top_p = jnp.where(is_greedy, 1, self.top_p)
        for is_asked, keep, setting in (
            (top_k < size, keep_top_k, top_k),
            (top_p < 1, keep_top_p, top_p),
            (self.min_p > 0, keep_min_p, self.min_p),
            (is_greedy, keep_best, is_greedy),
        ):
            logits = jax.lax.cond(jnp.any(is_asked), keep, lambda logits, _: logits, logits, setting)
        return logits


@flax.struct.dataclass
class Drawn:
    """A token a row, with the natural logarithms of its probability.

    Attributes:
      token: that is chosen.
      log_probability: by the model, before any setting (as in Meta's generation code).
      filtered_log_probability: by the distribution that it was drawn from; 0 in a greedy row.
    """

    token: Int[Array, 'B']
    log_probability: Float[Array, 'B']
    filtered_log_probability: Float[Array, 'B']


def draw(
    settings: SamplerRows,
    logits: Float[Array, 'B V'],
    step: Int[Array, 'B'] | Int[Array, ''] | int,
    seen: Int[Array, 'B V'] | None = None,
) -> Drawn:
    """One token a row.

    Args:
      settings: of the rows.
      logits: of the model.
      step: number of the token to be drawn, from 0.
      seen: see `seen_in_prompts`; needed where the settings have adjustments.
    """
    logits = logits.astype(jnp.float32)
    step = jnp.broadcast_to(step, settings.seed.shape)
    processed = settings.processor(logits, settings.state) if settings.processor else logits
    adjusted = settings.adjust(processed, seen, step)

    def choose(logits: Array) -> tuple[Array, Array]:
        filtered = settings.filter(logits)
        tokens = draw_tokens(jax.vmap(row_key)(settings.seed, settings.stream, step), filtered)
        return tokens, _log_probability(filtered, tokens)

    def take_best(logits: Array) -> tuple[Array, Array]:
        return most_likely(logits), jnp.zeros(len(logits))

    tokens, log_probability = jax.lax.cond(jnp.any(settings.temperature > 0), choose, take_best, adjusted)
    return Drawn(tokens, _log_probability(logits, tokens), log_probability)


def row_key(seed: Array, stream: Array, step: Array) -> Array:
    """What decides a token's draw."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


@jax.vmap
def draw_tokens(key: Array, logits: Float[Array, 'V']) -> Int[Array, '']:
    """A token of each row by its logits: a part of the vocabulary by its mass, then a token of the part.

    So a row takes as many random numbers as there are parts, and tokens in one, not one for each token.
    """
    size = -(-len(logits) // _PARTS)
    parts = jnp.pad(logits, (0, _PARTS * size - len(logits)), constant_values=-jnp.inf).reshape(_PARTS, size)
    of_part, of_token = jax.random.split(key)
    part = jax.random.categorical(of_part, jax.nn.logsumexp(parts, axis=-1))
    return (part * size + jax.random.categorical(of_token, parts[part])).astype(jnp.int32)


def _log_probability(logits: Float[Array, 'B V'], tokens: Int[Array, 'B']) -> Float[Array, 'B']:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames='n')
def candidates(logits: Float[Array, 'B V'], n: int) -> tuple[Int[Array, 'B n'], Float[Array, 'B n']]:
    """The `n` most likely tokens of each row and their log-probabilities, most likely first, smaller ids before."""
    values, tokens = jax.lax.top_k(logits.astype(jnp.float32), n)
    return tokens, values - jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)


def seen_in_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> UInt8[np.ndarray, 'B V']:
    """For penalties, on the host: 1 where a prompt has a token.

    On the device a count of 2 more follows for each time the completion has it (`count_drawn`); it is then as large as
    the logits: 0.5 MB a row for Llama 3, little beside the row's cache.

    Args:
      prompts: of the rows.
      vocab_size: the model's rows.
    """
    seen = np.zeros((len(prompts), vocab_size), np.uint8)
    for row, prompt in zip(seen, prompts, strict=True):
        row[list(prompt)] = 1
    return seen


def count_drawn(seen: Int[Array, 'B V'], tokens: Int[Array, 'B']) -> Int[Array, 'B V']:
    """`seen` after a token more of each row."""
    return seen.at[jnp.arange(len(tokens)), tokens].add(2)
