"""Looking inside: what the layers of a model make of tokens, and what becomes of the logits where that is changed.

The arrays are those of the model's own block, whatever its weights are and wherever they lie; attention is computed by
its formula, which has the probabilities that the faster kernels never hold.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError, checked_names, did_you_mean
from llama_jax.models.llama import LlamaForCausalLM, head_weight
from llama_jax.models.model_check import check_model
from llama_jax.models.tokens import check_tokens
from llama_jax.ops.cross_entropy import token_log_probabilities as log_probabilities_of
from llama_jax.types import Params

# What there is of a layer, in the order in which it comes to be, with the letters of its axes.
KINDS = {'attention': 'B N T S', 'heads': 'B T N H', 'mlp': 'B T D', 'hidden': 'B T D'}

Edit = Callable[[int, str, Array], Array]


@checked_names()
def inspect(
    model: LlamaForCausalLM,
    params: Params,
    tokens: Int[Array, 'B T'],
    what: str | Sequence[str] = ('hidden', 'attention', 'mlp'),
    layers: Sequence[int] | None = None,
    *,
    segment_ids: Int[Array, 'B T'] | None = None,
    edit: Edit | None = None,
) -> dict[str, Array]:
    """What the layers make of tokens, in fp32, with the logits that come of it.

        seen = llama_jax.inspect(model, params, tokens, what='attention')
        seen['attention'].shape  # layers, rows, heads, queries, keys

    Args:
      model: the architecture; its partitioner, where it has one, places the rows.
      params: its weights, layers stacked or not.
      tokens: ids.
      what: 'hidden', the residual stream behind a layer [B, T, D]; 'attention', how much each head looks at each token
        [B, N, T, S]; 'heads', what each head reads there, before the projection `o` [B, T, N, H]; 'mlp', what the
        feed-forward layer adds to the stream [B, T, D].
      layers: in the order in which they are wanted, negative ones counted from the end; None: all.
      segment_ids: documents packed in a row do not see each other.
      edit: (layer, kind, value) -> the value that the model goes on with, traced: the same one, or another of its
        shape. It is asked for every kind of every layer, so that heads can be ablated and streams patched.

    Returns:
      By kind the layers' arrays as one [layers, B, ...], and 'logits' [B, T, V].

    Raises:
      InputError: there is no such kind or layer, an edited value has another shape, or memory does not hold what is
        asked for.
    """
    check_model(model, params)
    kinds = (what,) if isinstance(what, str) else tuple(what)
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f'what names {kind!r}, which no layer has; {did_you_mean(kind, KINDS)}')
    depth = model.config.num_layers
    wanted = range(depth) if layers is None else layers
    if wrong := [layer for layer in wanted if not -depth <= layer < depth]:
        raise InputError(
            f'layer {wrong[0]} is asked for; the model has {depth}, so it must be from 0 to {depth - 1}, or from -1 '
            f'(the last) to {-depth}'
        )
    check_tokens(tokens, model.config, may_be_long=False)
    model = _with_whole_rows(model)
    _check_memory(model, tokens.shape, kinds, len(wanted))
    return _seen(model, kinds, tuple(layer % depth for layer in wanted), edit, params, tokens, segment_ids)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _seen(
    model: LlamaForCausalLM,
    kinds: tuple[str, ...],
    layers: tuple[int, ...],
    edit: Edit | None,
    params: Params,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None,
) -> dict[str, Array]:
    found: dict[tuple[str, int], Array] = {}

    def tap(layer: int, kind: str, value: Array) -> Array:
        if edit is not None:
            edited = jnp.asarray(edit(layer, kind, value))
            if edited.shape != value.shape:
                raise InputError(
                    f'edit makes {kind} of layer {layer} {edited.shape}; it has to stay {value.shape}, as {KINDS[kind]}'
                )
            value = edited.astype(value.dtype)
        found[kind, layer] = value
        return value

    logits, _ = model.clone(tap=tap).apply({'params': params}, tokens, None, segment_ids)
    result = {kind: jnp.stack([found[kind, layer] for layer in layers]) for kind in kinds} | {
        'logits': logits
    }
    result = {kind: value.astype(jnp.float32) for kind, value in result.items()}
    if model.partitioner is not None:  # so that every process can read all of them
        result = jax.lax.with_sharding_constraint(result, model.partitioner.sharding())
    return result


def _with_whole_rows(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Rows that are split over devices stand in another order within."""
    if (partitioner := model.partitioner) is None:
        return model
    rules = tuple((axis, () if axis == 'length' else mesh_axes) for axis, mesh_axes in partitioner.rules)
    return model.clone(partitioner=dataclasses.replace(partitioner, rules=rules))


def _check_memory(
    model: LlamaForCausalLM, shape: tuple[int, ...], kinds: Sequence[str], num_layers: int
) -> None:
    """Refuses what one device cannot hold: the result, and the probabilities of one layer."""
    c, (batch, length) = model.config, shape
    sizes = {'attention': c.num_heads * length, 'heads': c.num_heads * c.head_dim}
    per_token = num_layers * sum(sizes.get(kind, c.embed_dim) for kind in kinds) + c.vocab_size
    needed = 4 * batch * length * (per_token + sizes['attention'])
    if needed > (available := _device_bytes()):
        raise InputError(
            f'what is asked for of {batch} x {length} tokens takes {needed:,} bytes, a device has {available:,}; ask '
            'for fewer layers or kinds, or give fewer or shorter rows'
        )


def _device_bytes() -> int:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get('bytes_limit') or os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


@checked_names()
def token_log_probabilities(
    model: LlamaForCausalLM,
    params: Params,
    tokens: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B T'] | None = None,
) -> Float[Array, 'B T_minus_1']:
    """Log-probability of every token but the first of a row, given those before it, in nats.

        surprise = -llama_jax.token_log_probabilities(model, params, tokens)

    Args:
      model: the architecture.
      params: its weights.
      tokens: ids.
      segment_ids: documents packed in a row; 0 is padding. What follows no token of its own document has 0.
    """
    check_model(model, params)
    return _log_probabilities(model, params, tokens, segment_ids)


@functools.partial(jax.jit, static_argnums=0)
def _log_probabilities(
    model: LlamaForCausalLM, params: Params, tokens: Array, segment_ids: Array | None
) -> Array:
    hidden, _ = model.apply({'params': params}, tokens, None, segment_ids, method='hidden')
    # All T columns: rows may be split over devices. The last one has no target, and is dropped.
    targets = jnp.roll(tokens, -1, axis=1)
    found = log_probabilities_of(hidden, head_weight(params), targets, 1, model.partitioner)[:, :-1]
    if segment_ids is None:
        return found
    follows = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    return jnp.where(follows, found, 0.0)
