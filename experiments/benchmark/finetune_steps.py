"""What a suite of fine-tuning takes turns with: updates of ours on made-up conversations and pairs.

Lengths are drawn as they are in real files, in tokens of Llama 2: of LlamaFactory's Alpaca demo, 999 conversations,
in Alpaca's format, and of the 2,303 usable pairs of hh-rlhf's harmless test set.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.turns import Contender, Turn
from experiments.run.settings import find_preset
from llama_jax import pretrained
from llama_jax.data.examples import Example, ExampleRows, collate_examples
from llama_jax.data.lm_batch import lm_batch
from llama_jax.data.preferences import Answer, EncodedPair, PreferenceRows, collate_preferences
from llama_jax.data.record_kinds import Conversation
from llama_jax.lora import LoraConfig, abstract_adapters, init_adapters, with_base
from llama_jax.losses.dpo import PreferenceLoss, preference_loss
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes, init_params
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.quantize.base import base_target
from llama_jax.quantize.forms import NF4, name_of
from llama_jax.quantize.params import quantize
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import TrainState, abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step
from llama_jax.types import LMBatch, LossFn, Params, PreferenceBatch, PyTree

# What all train with; the learning rate is constant.
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, eps=1e-8)
RANK = 8
# Of the shares of a file, the lengths that so many of its prompts and answers do not exceed.
SHARES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
CONVERSATION = (
    (40, 44, 46, 48, 50, 53, 65, 72, 77, 87, 97, 140, 224),
    (2, 13, 22, 38, 71, 120, 179, 251, 325, 405, 459, 563, 664),
)
PAIR = (
    (15, 23, 30, 55, 83, 110, 137, 169, 213, 300, 381, 578, 907),
    (2, 10, 15, 20, 26, 33, 43, 56, 73, 105, 138, 235, 589),
)


def draw_lengths(quantiles: Sequence[int], number: int, seed: int) -> list[int]:
    """So many lengths whose shares are these."""
    drawn = np.random.default_rng(seed).uniform(size=number)
    return [int(length) for length in np.interp(drawn, SHARES, quantiles)]


def draw_examples(number: int, vocab_size: int, longest: int) -> list[Example]:
    """Conversations of random ids, none longer than so many tokens."""
    rng = np.random.default_rng(0)
    prompts, answers = (draw_lengths(part, number, seed) for seed, part in enumerate(CONVERSATION, 1))
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        counts = (np.arange(prompt + answer) >= prompt)[:longest]
        if counts.any():
            ids = rng.integers(vocab_size, size=len(counts), dtype=np.int32)
            made.append(Example(ids, counts, Conversation((), ())))
    return made


def draw_pairs(number: int, vocab_size: int, longest: int) -> list[EncodedPair]:
    """Pairs of random ids, both sides of which are no longer than so many tokens together."""
    lengths = [draw_lengths(part, 16 * number, seed) for seed, part in enumerate((*PAIR, PAIR[1]), 1)]
    fitting = [sizes for sizes in zip(*lengths, strict=True) if 2 * sizes[0] + sizes[1] + sizes[2] <= longest]
    return list(random_pairs(fitting[:number], vocab_size))


def random_pairs(sizes: Any, vocab_size: int) -> Iterator[EncodedPair]:
    """Pairs of random ids with prompts and answers of these lengths."""
    rng = np.random.default_rng(0)
    for prompt, *answers in sizes:
        ids = [rng.integers(vocab_size, size=size, dtype=np.int32) for size in (prompt, *answers)]
        first, second = (Answer(tokens, np.ones(len(tokens), bool)) for tokens in ids[1:])
        yield EncodedPair(ids[0], (first, second))


def packed(examples: Sequence[Example], seq_len: int, batch_size: int, batches: int) -> list[LMBatch]:
    """The first batches of rows that hold as many conversations as fit, and their fill."""
    rows = ExampleRows(examples, seq_len)
    size = min(batch_size, len(rows))
    found = min(batches, len(rows) // size)
    return [collate_examples([rows[n * size + i] for i in range(size)]) for n in range(found)]


def padded(
    examples: Sequence[Example], batch_size: int, batches: int, multiple_of: int
) -> tuple[list[LMBatch], float]:
    """(batches of a conversation a row, as long as the longest of each; the share of all such that is no padding)."""
    found, tokens, slots = [], 0, 0
    for start in range(0, len(examples) - batch_size + 1, batch_size):
        part = examples[start : start + batch_size]
        longest = max(len(example.tokens) for example in part)
        seq_len = -(-(longest - 1) // multiple_of) * multiple_of
        tokens, slots = tokens + sum(len(example.tokens) for example in part), slots + batch_size * longest
        if len(found) < batches:
            found.append(collate_examples([ExampleRows([example], seq_len)[0] for example in part]))
    return found, tokens / slots


def paired(
    pairs: Sequence[EncodedPair], seq_len: int, batch_size: int = 0, *, share_prompt: bool = False
) -> PreferenceBatch:
    """The first rows of whole pairs; 0: all."""
    rows = PreferenceRows(pairs, seq_len, share_prompt=share_prompt)
    return collate_preferences([rows[i] for i in range(min(batch_size or len(rows), len(rows)))])


def num_answers(batches: Sequence[LMBatch | PreferenceBatch]) -> int:
    """Tokens that are learnt."""
    return sum(int(np.sum(batch.loss_mask)) for batch in batches)


def num_pairs(batches: Sequence[PreferenceBatch]) -> int:
    """Pairs that are compared."""
    return sum(int(np.sum(batch.weights)) for batch in batches)


def random_rows(vocab_size: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Rows of one document each, T + 1 tokens, that `--suite=train` trains on too."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch_size, seq_len + 1), dtype=np.int32)


def of_rows(rows: np.ndarray) -> LMBatch:
    """In which all tokens are learnt."""
    return lm_batch(rows, np.ones_like(rows))


@dataclasses.dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
      loss: of a model, as the library's functions of losses.
      kept: what the reference gives was computed before.
      rank: of adapters of all linears; 0: all weights are trained.
      weights: how the base beside adapters is kept.
      optimizer: its name; all else is `OPTIMIZER`.
      loss_chunks: pieces of the sequence whose logits are held at a time.
    """

    loss: str = 'likelihood'
    kept: bool = False
    rank: int = 0
    weights: str = 'float32'
    optimizer: str = 'adamw'
    loss_chunks: int = 4

    def loss_fn(self, model: LlamaForCausalLM) -> LossFn:
        """Of a model's whole weights."""
        if self.loss == 'likelihood':
            return language_model_loss(model, num_chunks=self.loss_chunks)
        return preference_loss(model, PreferenceLoss(), kept=self.kept, num_chunks=self.loss_chunks)


@dataclasses.dataclass(frozen=True)
class Size:
    """What all parts are of.

    Attributes:
      config: the model's.
      remat: see `models.remat.REMAT_POLICIES`.
      dtype: of the computation.
      batch_size: rows in an update.
      packed: tokens of a row of examples or pairs.
      steps: updates in a turn.
    """

    config: LlamaConfig
    remat: str
    dtype: str
    batch_size: int
    packed: int
    steps: int

    @property
    def model(self) -> LlamaForCausalLM:
        """As it is trained."""
        return LlamaForCausalLM(self.config, dtype=self.dtype, remat=self.remat)

    def ours(self, batches: Sequence[Any], amount: float, **training: Any) -> Contender:
        """An update of ours on each batch."""
        return Contender(functools.partial(our_turn, self.model, Training(**training), batches), amount)


def size_of(preset: str, layers: int, *, packed: int, **rest: Any) -> Size:
    """That of a preset with so many layers, 0: its own, for rows as long."""
    config = find_preset(preset)
    longest = max(config.max_seq_len, packed)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers, max_seq_len=longest)
    return Size(config, packed=packed, **rest)


def our_turn(model: LlamaForCausalLM, training: Training, batches: Sequence[Any]) -> Turn:
    """An update on each of the batches, from random weights, on one device; the turn gives the last loss."""
    step, state, frozen = begin(model, training)
    placed_batches = [place(batch) for batch in batches]
    rng = jax.random.key(2)

    def turn() -> float:
        nonlocal state
        for batch in placed_batches:
            state, metrics = step(state, frozen, batch, rng)
        return float(metrics['loss'])

    return turn


def begin(model: LlamaForCausalLM, training: Training) -> tuple[Callable[..., Any], TrainState, PyTree]:
    """(`train_step` compiled for one device, its first state of random weights, what is frozen)."""
    partitioner = one_device()
    model = model.clone(partitioner=partitioner)
    tx = make_optimizer(dataclasses.replace(OPTIMIZER, name=training.optimizer), OPTIMIZER.learning_rate)
    params, axes = abstract_params_and_axes(model)
    placed = abstract_state(params, axes, tx, partitioner).params
    init, frozen, loss_fn = functools.partial(init_params, model), {}, training.loss_fn(model)
    if training.rank:
        lora = LoraConfig(training.rank)
        frozen, loss_fn = random_base(placed, training.weights), with_base(loss_fn, lora)
        params, axes = abstract_adapters(lora, params, axes, partitioner)
        init = functools.partial(init_adapters, lora, placed)
    target = abstract_state(params, axes, tx, partitioner)
    # At once: weights that a state is made of would stand beside it.
    start = jax.jit(lambda key: new_state(init(key), tx), out_shardings=shardings_of(target))
    state = start(jax.random.key(0))
    if not training.rank and training.loss != 'likelihood' and not training.kept:
        # Copied, as an update takes what it is given.
        frozen = kept_as(jax.tree.map(jnp.copy, state.params), placed, jnp.dtype(model.dtype).name)
    return compile_train_step(target, loss_fn=loss_fn, tx=tx), state, frozen


def random_base(placed: Params, dtype: str) -> Params:
    """A base of this type, made where it stands, weight by weight: no more than one of them is there in float32.

    Args:
      placed: abstract params with shardings.
      dtype: one of `quantize.base.BASE_DTYPES`.
    """
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(placed))))

    def made(path: tuple, wanted: jax.ShapeDtypeStruct) -> Any:
        name = name_of(path)
        if name.endswith('norm'):
            weight = jnp.ones(wanted.shape, device=wanted.sharding)
        else:
            draw = jax.jit(
                lambda key: 0.02 * jax.random.normal(key, wanted.shape), out_shardings=wanted.sharding
            )
            weight = draw(next(keys))
        return kept_as({name: weight}, {name: wanted}, dtype)[name]

    return jax.tree_util.tree_map_with_path(made, placed)


def one_device() -> Partitioner:
    """All on the first."""
    return Partitioner(make_mesh({'fsdp': 1}, jax.devices()[:1]))


def place(batch: Any) -> Any:
    """A batch on the device."""
    sharding = one_device().sharding(('batch',))
    return jax.device_put(batch, jax.tree.map(lambda leaf: sharding, batch))


def held_bytes(model: LlamaForCausalLM, training: Training, batch: Any) -> int:
    """What the compiled program of an update holds: its arguments, and the block of all that it computes."""
    step, state, frozen = begin(model, training)
    lowered: Any = step
    memory = lowered.lower(state, frozen, place(batch), jax.random.key(2)).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def kept_as(weights: Params, placed: Params, dtype: str) -> Params:
    """A base, or a reference, of this type."""
    target = base_target(placed, dtype)
    made = quantize(weights, dtype) if dtype == NF4 else weights
    return jax.tree.map(lambda leaf, wanted: leaf.astype(wanted.dtype), made, target)


def rows_of(loss: str, vocab_size: int, batch_size: int, packed_length: int) -> LMBatch | PreferenceBatch:
    """Packed rows that a loss is of: of conversations, or of pairs."""
    if loss == 'likelihood':
        return packed(draw_examples(960, vocab_size, packed_length + 1), packed_length, batch_size, 1)[0]
    return paired(draw_pairs(960, vocab_size, packed_length), packed_length, batch_size)


def train_alone(loss: str, preset: str, layers: int, **sizes: Any) -> None:
    """Three updates of adapters, for a process of its own whose memory is measured."""
    size = size_of(preset, layers, **sizes)
    batch = rows_of(loss, size.config.vocab_size, size.batch_size, size.packed)
    our_turn(size.model, Training(loss, rank=RANK), [batch] * 3)()


def read_base(checkpoint: str) -> None:
    """A checkpoint's weights as nf4, quantised while they are read; for a process of its own as well."""
    opened = pretrained.open(checkpoint)
    partitioner = Partitioner(make_mesh({'fsdp': 1}, jax.devices()[:1]))
    params, axes = abstract_params_and_axes(LlamaForCausalLM(opened.config))
    placed = abstract_state(params, axes, make_optimizer(OPTIMIZER, 0.0), partitioner).params
    jax.block_until_ready(opened.base_params(placed, NF4))
