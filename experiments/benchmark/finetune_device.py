"""Parts of the suite `finetune` for one GPU or TPU and a model of full widths, with as many layers as fit.

A base of random weights is made on the device as it is kept, weight by weight; the base of adapters is of the
computation's type where nothing else is said.
"""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark import finetune_steps as steps
from experiments.benchmark.finetune_steps import RANK, Size, Training
from experiments.benchmark.peak import peak_memory_bytes
from experiments.benchmark.turns import compare, of, ratio
from llama_jax.lora import LoraConfig, init_adapters, with_base
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.quantize.forms import NF4
from llama_jax.quantize.params import is_quantized
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import abstract_state
from llama_jax.types import Params


def representations(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Tokens a second of packed conversations: all weights by Adafactor, adapters, adapters beside nf4."""
    del seq_len
    rows = [steps.rows_of('likelihood', size.config.vocab_size, size.batch_size, size.packed)] * size.steps
    tokens = size.steps * rows[0].tokens.size
    contenders = {
        'full': size.ours(rows, tokens, optimizer='adafactor'),
        'lora': size.ours(rows, tokens, rank=RANK, weights=size.dtype),
        'nf4': size.ours(rows, tokens, rank=RANK, weights=NF4),
    }
    rates = compare('qlora', 'tokens/s', contenders, rounds, profile)
    figures = of('qlora', rates) | ratio('qlora_lora_to_full', rates, 'lora', 'full')
    return figures | ratio('qlora_nf4_to_lora', rates, 'nf4', 'lora') | _peak('qlora')


def adapted_preferences(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """Pairs a second of DPO with adapters, whose reference is their base, and what the device held at most."""
    del seq_len
    pairs = steps.draw_pairs(960, size.config.vocab_size, size.packed)
    rows = [steps.paired(pairs, size.packed, size.batch_size)] * size.steps
    lora = size.ours(rows, steps.num_pairs(rows), loss='preferences', rank=RANK, weights=size.dtype)
    rates = compare('dpo_lora', 'pairs/s', {'lora': lora}, rounds, profile)
    return of('dpo', rates) | _peak('dpo_lora')


def gradients(size: Size, seq_len: int, rounds: int, profile: bool) -> dict[str, Any]:
    """How far apart adapters' gradients are, beside nf4 and beside the weights that it stands for, in their norm.

    Both compute in one type. `gradients_nf4` is the largest of all weights' adapters; what rounding makes of the
    same weights' gradients, `gradients_rounding`, is the distance of that type's from float32's.
    """
    del seq_len, rounds, profile
    batch = steps.place(steps.rows_of('likelihood', size.config.vocab_size, size.batch_size, size.packed))
    lora, tx = LoraConfig(RANK), make_optimizer(steps.OPTIMIZER, 0.0)
    placed = abstract_state(*abstract_params_and_axes(size.model), tx, steps.one_device()).params
    base = steps.random_base(placed, NF4)
    adapters = init_adapters(lora, placed, jax.random.key(1))
    # Beside a `b` of zeros `a` has no gradient.
    key = jax.random.key(2)
    adapters = jax.tree.map(
        lambda leaf: jnp.where(leaf == 0, 0.01 * jax.random.normal(key, leaf.shape), leaf), adapters
    )

    def of_base(base: Params, dtype: str) -> Params:
        model = size.model.clone(dtype=jnp.dtype(dtype), partitioner=steps.one_device())
        loss_fn = with_base(Training().loss_fn(model), lora)
        of_adapters = jax.jit(jax.grad(lambda adapters, base: loss_fn(adapters, base, batch, key)[0]))
        return of_adapters(adapters, base)

    found = of_base(base, size.dtype)
    base = _dequantized(base, size.dtype)
    beside = of_base(base, size.dtype)
    distance = _distance(found, beside)
    rounding = _distance(beside, of_base(base, 'float32'))
    print(
        f'gradients beside nf4: {distance:.1e} from those of its weights, which rounding puts {rounding:.1e} off'
    )
    return {'gradients_nf4': distance, 'gradients_rounding': rounding, **_peak('gradients')}


def _dequantized(base: Params, dtype: str) -> Params:
    """A base whose integers are what they stand for, of the type that a product rounds them to; weight by weight."""
    whole = jax.jit(lambda weight: weight.materialize().astype(dtype))
    return jax.tree.map(lambda leaf: whole(leaf) if is_quantized(leaf) else leaf, base, is_leaf=is_quantized)


def _distance(found: Params, expected: Params) -> float:
    """The largest of all leaves: the norm of the difference, in that of what is expected."""

    @jax.jit
    def relative(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return max(float(value) for value in jax.tree.leaves(jax.tree.map(relative, found, expected)))


def _peak(part: str) -> dict[str, int]:
    """Of this process so far: a part that has it to itself is what it is of."""
    peak = peak_memory_bytes()
    print(f'{part}: peak memory {peak / 1e9:,.1f} GB', flush=True)
    return {f'{part}_peak_memory_bytes': peak}
