"""The Llama architecture: Attention, MLP, Block, Transformer, and the language-model head.

Linen modules over plain-dict parameters: `apply({'params': params}, tokens) -> (logits, cache)`. All mathematics is in
`ops`; here stand only the weights (shape, logical axes and initialiser on one line each) and the order of the layers.
The layers are one scanned block, their weights stacked on a leading `layers` axis whatever the unrolling or remat; with
a cache, or with weights that are `unstacked`, they are applied one by one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.models.kv_cache import KVCache, LayerCache, LayerPages
from llama_jax.models.remat import REMAT_POLICIES
from llama_jax.models.tokens import check_tokens
from llama_jax.models.unstacked import layers_of
from llama_jax.ops.activations import swiglu
from llama_jax.ops.attention import IMPLEMENTATIONS, attention, first_attention
from llama_jax.ops.attention_reference import attention_probabilities, causal_mask, weighted_values
from llama_jax.ops.context_parallel import context_shard, from_balanced, to_balanced
from llama_jax.ops.linear import Weight, einsum, take
from llama_jax.ops.normalization import rms_norm
from llama_jax.ops.rope import apply_rope, inverse_frequencies, kept_tables, rope_tables
from llama_jax.partitioning import LogicalAxes, Partitioner
from llama_jax.types import Params, PyTree, float_dtype

RopeTables = tuple[Float[Array, 'B T H2'], Float[Array, 'B T H2']]

# Meta publishes no initialisation. Normal(0.02) is the convention (Hugging Face's `initializer_range`); the two
# projections that write to the residual stream are scaled down with its depth, as in GPT-2.
_INIT_STDDEV = 0.02


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: LogicalAxes, init: Callable) -> Any:
    """A master weight (fp32) that carries its logical axes; Linen takes it out of its box.

    In its place the params may hold any `ops.linear.Representation` of it.
    """
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


class _Layer(nn.Module):
    """What every layer knows: sizes, compute dtype, kernel, placement."""

    config: LlamaConfig
    dtype: jax.typing.DTypeLike
    attention_implementation: str
    partitioner: Partitioner | None
    tap: Callable[[str, Array], Array] | None = None

    def seen(self, name: str, value: Array) -> Array:
        """A value within the layer as somebody who looks on gives it back (`models.inspect`)."""
        return value if self.tap is None else self.tap(name, value)

    def shard(self, x: Array, *axes: str) -> Array:
        return x if self.partitioner is None else self.partitioner.shard(x, axes, f'{self.name} activation')

    @property
    def residual_init(self) -> Callable:
        return nn.initializers.normal(_INIT_STDDEV / (2 * self.config.num_layers) ** 0.5)


_normal = nn.initializers.normal(_INIT_STDDEV)
_ones = nn.initializers.ones_init()


class Attention(_Layer):
    """Grouped-query self-attention with rotary positions."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        rope: RopeTables,
        segment_ids: Int[Array, 'B T'] | None,
        cache: LayerCache | LayerPages | None,
    ) -> tuple[Float[Array, 'B T D'], LayerCache | LayerPages | None]:
        c = self.config
        D, N, K, H = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        w_q = weight(self, 'q', (D, N, H), ('embed', 'heads', 'head_dim'), _normal)
        w_k = weight(self, 'k', (D, K, H), ('embed', 'kv_heads', 'head_dim'), _normal)
        w_v = weight(self, 'v', (D, K, H), ('embed', 'kv_heads', 'head_dim'), _normal)
        w_o = weight(self, 'o', (N, H, D), ('heads', 'head_dim', 'embed'), self.residual_init)

        q = self.shard(einsum('btd,dnh->btnh', x, w_q), 'batch', 'length', 'heads', 'head_dim')
        k = self.shard(einsum('btd,dkh->btkh', x, w_k), 'batch', 'length', 'kv_heads', 'head_dim')
        v = self.shard(einsum('btd,dkh->btkh', x, w_v), 'batch', 'length', 'kv_heads', 'head_dim')
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)

        if cache is not None:
            cache = cache.write(k, v)
            k, v = cache.as_held(k, v)
        if self.tap is not None:
            mask = causal_mask(q.shape[1], q.shape[1])
            if segment_ids is not None:
                mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
            probabilities = self.seen('attention', attention_probabilities(q, k, mask))
            attended = self.seen('heads', weighted_values(probabilities, v))
        elif cache is None:
            attended = attention(
                q, k, v, q_segment_ids=segment_ids, kv_segment_ids=segment_ids,
                implementation=self.attention_implementation, partitioner=self.partitioner,
            )  # fmt: skip
        elif cache.is_empty:
            attended = first_attention(q, k, v, self.attention_implementation, self.partitioner)
        else:
            attended = cache.attend(q, self.partitioner)
        # `jnp.einsum` contracts by the order of the alphabet: heads before their dimensions, the weight is read as it
        # lies; the other way, by which training's results are known to the bit, a CPU transposes it first.
        contraction = 'btnh,nhd->btd' if cache is None else 'btgh,ghd->btd'
        out = einsum(contraction, attended, w_o)
        return self.shard(out, 'batch', 'length', 'act_embed'), cache


class MLP(_Layer):
    """The SwiGLU feed-forward layer."""

    @nn.compact
    def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        D, F = self.config.embed_dim, self.config.mlp_dim
        w_gate = weight(self, 'gate', (D, F), ('embed', 'mlp'), _normal)
        w_up = weight(self, 'up', (D, F), ('embed', 'mlp'), _normal)
        w_down = weight(self, 'down', (F, D), ('mlp', 'embed'), self.residual_init)
        gate = self.shard(einsum('btd,df->btf', x, w_gate), 'batch', 'length', 'mlp')
        up = self.shard(einsum('btd,df->btf', x, w_up), 'batch', 'length', 'mlp')
        return self.shard(einsum('btf,fd->btd', swiglu(gate, up), w_down), 'batch', 'length', 'act_embed')


class Block(_Layer):
    """One layer: x + Attention(RMSNorm(x)), then x + MLP(RMSNorm(x)). The signature is that of a scan's body."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B T D'],
        rope: RopeTables,
        segment_ids: Int[Array, 'B T'] | None,
        cache: LayerCache | LayerPages | None = None,
    ) -> tuple[Float[Array, 'B T D'], LayerCache | LayerPages | None]:
        x = checkpoint_name(x, 'block_input')
        knobs = (self.config, self.dtype, self.attention_implementation, self.partitioner, self.tap)
        attention_norm = weight(self, 'attention_norm', (self.config.embed_dim,), ('norm',), _ones)
        mlp_norm = weight(self, 'mlp_norm', (self.config.embed_dim,), ('norm',), _ones)
        normed = rms_norm(x, attention_norm, self.config.norm_eps)
        attended, cache = Attention(*knobs, name='attention')(normed, rope, segment_ids, cache)
        x = x + attended
        fed_forward = MLP(*knobs, name='mlp')(rms_norm(x, mlp_norm, self.config.norm_eps))
        x = x + self.seen('mlp', fed_forward)
        return self.seen('hidden', x), cache


def compute_dtype() -> jax.typing.DTypeLike:
    """What a model computes in where it is not told: float32 on a CPU; bfloat16, or float16 where a GPU has none."""
    older = getattr(jax.devices()[0], 'compute_capability', '') in ('7.0', '7.2', '7.5')  # V100, Xavier, T4
    return jnp.float32 if jax.default_backend() == 'cpu' else jnp.float16 if older else jnp.bfloat16


class Transformer(nn.Module):
    """Embedding, layers and final norm: the trunk under every head.

    Attributes:
      config: the architecture.
      dtype: of the computation, by default the device's `compute_dtype`; weights stay fp32, as do softmax, norms,
        RoPE and logits.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      unroll: layers per step of the scan; changes speed and compile time, never the weights' layout.
      attention_implementation: see `ops.attention.attention`.
      partitioner: where activations are constrained to; None leaves placement to the compiler.
      cache_dtype: of what is generated with it, one of `kv_cache.CACHE_DTYPES`.
      tap: (layer, name, value) -> the value to go on with: `models.inspect` looks into the layers by it.
    """

    config: LlamaConfig
    dtype: jax.typing.DTypeLike = dataclasses.field(default_factory=compute_dtype)
    remat: str = 'none'
    unroll: int = 1
    attention_implementation: str = 'auto'
    partitioner: Partitioner | None = None
    cache_dtype: str = 'auto'
    tap: Callable[[int, str, Array], Array] | None = None

    def __post_init__(self):
        if not isinstance(self.config, LlamaConfig):
            raise InputError(
                f"config is {repr(self.config)[:60]}; give a LlamaConfig, as PRESETS['tiny'] or load's"
            )
        if isinstance(self.dtype, str):
            self.dtype = float_dtype(self.dtype)
        super().__post_init__()

    def setup(self):
        V, D = self.config.vocab_size, self.config.embed_dim
        self.embed = weight(self, 'embed', (V, D), ('vocab', 'embed'), _normal)
        self.final_norm = weight(self, 'final_norm', (D,), ('norm',), _ones)
        self.blocks = self._scanned_block()(*self._block_knobs)

    @property
    def _block_knobs(self) -> tuple[Any, ...]:
        return self.config, self.dtype, self.attention_implementation, self.partitioner

    def _scanned_block(self):
        _check_knobs(self)
        block = Block
        if (policy := REMAT_POLICIES[self.remat]) is not None:
            # Inside a scan nothing can be merged across the two passes, so XLA needs no barrier against it.
            block = nn.remat(Block, policy=policy, prevent_cse=False)
        in_axes: Any = (nn.broadcast, nn.broadcast)
        return nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=in_axes,
            length=self.config.num_layers,
            unroll=min(self.unroll, self.config.num_layers),
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )

    def hidden(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'] | None = None,
        segment_ids: Int[Array, 'B T'] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, 'B T D'], KVCache | None]:
        """The normalised output of the last layer, and the cache with these tokens written but not yet counted."""
        check_tokens(
            tokens, self.config, may_be_long=positions is not None or cache is not None,
            positions=positions, segment_ids=segment_ids,
        )  # fmt: skip
        if segment_ids is not None and cache is not None:
            raise ValueError(
                'segment_ids with a cache: the cache does not know the segments of the tokens it holds'
            )
        if positions is None:
            start = jnp.zeros((1,), jnp.int32) if cache is None else cache.length
            positions = jnp.broadcast_to(start[:, None] + jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        split_over = self.partitioner if context_shard(self.partitioner) is not None else None
        if split_over is not None:
            if cache is not None:
                raise InputError(
                    'generation with rows split over devices is not supported: use a mesh with context=1'
                )
            row = ('batch', 'length')
            tokens, positions = (to_balanced(x, row, split_over) for x in (tokens, positions))
            segment_ids = None if segment_ids is None else to_balanced(segment_ids, row, split_over)
        c, s = self.config, self.config.rope_scaling
        scaling: dict[str, Any] = {} if s is None else dataclasses.asdict(s)
        scale = scaling.pop('attention_factor', 1.0)
        rope = rope_tables(positions, inverse_frequencies(c.head_dim, c.rope_theta, **scaling), scale)
        x = self.embed_tokens(tokens)
        blocks = None if self.is_initializing() else self.get_variable('params', 'blocks')
        if cache is None and not isinstance(blocks, tuple) and self.tap is None:
            x, _ = self.blocks(x, rope, segment_ids)
        else:
            x, cache = self._by_layer(blocks, x, rope, segment_ids, cache)
        final_norm = self.final_norm
        if x.dtype != final_norm.dtype:
            # Backwards: the gradient of this weight is not to wait for the layers', with all that it is made of.
            x, final_norm = jax.lax.optimization_barrier((x, final_norm))
        x = rms_norm(x, final_norm, c.norm_eps)
        if split_over is not None:
            x = from_balanced(x, ('batch', 'length', 'act_embed'), split_over)
        return x, cache

    def _by_layer(
        self,
        blocks: Any,
        x: Float[Array, 'B T D'],
        rope: RopeTables,
        segment_ids: Int[Array, 'B T'] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, 'B T D'], KVCache | None]:
        """One layer after the other, each with arrays of its own: no scan, which would copy them."""
        caches = []
        rope = jax.lax.platform_dependent(*rope, cpu=kept_tables, default=lambda *tables: tables)
        for layer, weights in enumerate(layers_of(blocks, self.config.num_layers)):
            tap = None if self.tap is None else functools.partial(self.tap, layer)
            block = Block(*self._block_knobs, tap=tap, name='block', parent=None)
            self.sow('residual', 'into_layer', x)  # kept where somebody asks: `inference.hidden_states`
            # Of alike layers the first alone is traced; the compiler sees each where it stands.
            apply = block.apply if tap else functools.partial(jax.jit(Block.apply, static_argnums=0), block)
            x, layer_cache = apply({'params': weights}, x, rope, segment_ids, cache and cache.layer(layer))
            caches.append(layer_cache)
        return x, None if cache is None else cache.with_layers(caches)

    def embed_tokens(self, tokens: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        x = take(self.embed, tokens, self.dtype, self.partitioner)
        return x if self.partitioner is None else self.partitioner.shard(x, ('batch', 'length', 'act_embed'))


class LlamaForCausalLM(Transformer):
    """The trunk with its next-token head."""

    def setup(self):
        super().setup()
        if self.config.scalar_head:
            raise InputError('this is a reward model, which gives scores and no text; give a language model')
        if not self.config.tie_embeddings:
            V, D = self.config.vocab_size, self.config.embed_dim
            self.head = weight(self, 'head', (V, D), ('vocab', 'embed'), _normal)

    def __call__(
        self,
        tokens: Int[Array, 'B T'],
        positions: Int[Array, 'B T'] | None = None,
        segment_ids: Int[Array, 'B T'] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, 'B T V'], KVCache | None]:
        """Next-token logits.

        Args:
          tokens: ids.
          positions: what RoPE rotates by; by default consecutive, after those in the cache.
          segment_ids: documents packed in a row do not see each other; not to be combined with a cache.
          cache: tokens read before; T new ones are appended to it.

        Returns:
          fp32 logits, and the cache with the new tokens counted (None where none was given).
        """
        hidden, cache = self.hidden(tokens, positions, segment_ids, cache)
        head = self.embed if self.config.tie_embeddings else self.head
        logits = einsum('btd,vd->btv', hidden, head, jnp.float32)
        if self.partitioner is not None:
            logits = self.partitioner.shard(logits, ('batch', 'length', 'vocab'), 'logits')
        return logits, None if cache is None else cache.advance(tokens.shape[1])


def head_weight(params: Params) -> Weight:
    """The weight that makes logits of hidden states: the head, or the embedding where the two are tied."""
    return params['head'] if 'head' in params else params['embed']


def init_params(model: Transformer, rng: Array) -> Params:
    """Freshly drawn fp32 weights as a plain nested dict (under `jax.jit`, born with its output shardings)."""
    return nn.meta.unbox(_plain(model).init(rng, jnp.zeros((1, 1), jnp.int32))['params'])


def abstract_params(model: Transformer) -> Params:
    """Shapes and dtypes of the weights, without memory."""
    return jax.tree.map(lambda box: box.value, _abstract_boxes(model), is_leaf=_is_box)


def param_axes(model: Transformer) -> PyTree:
    """Logical axes of every weight: a tree like the params with a tuple of names at each leaf."""
    return jax.tree.map(lambda box: tuple(box.names), _abstract_boxes(model), is_leaf=_is_box)


def abstract_params_and_axes(model: Transformer) -> tuple[Params, PyTree]:
    """What a training state is made of: `abstract_params` and `param_axes`."""
    return abstract_params(model), param_axes(model)


def _plain(model: Transformer) -> Transformer:
    """Without what does not change the weights: one token tells their shapes, and would not divide over a mesh."""
    _check_knobs(model)
    return model.clone(
        dtype=jnp.float32, partitioner=None, remat='none', unroll=1, attention_implementation='auto', tap=None
    )


def _abstract_boxes(model: Transformer) -> PyTree:
    return _abstract_boxes_of(_plain(model))  # pyright: ignore[reportArgumentType] - a module has a hash


@functools.lru_cache(maxsize=16)
def _abstract_boxes_of(plain: Transformer) -> PyTree:
    """The weights with their axes; kept, as tracing the model takes long and a command asks several times."""
    return jax.eval_shape(lambda: plain.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params'])


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _check_knobs(model: Transformer) -> None:
    """Refuses names that mean nothing."""
    for kind, name, known in (
        ('remat policy', model.remat, sorted(REMAT_POLICIES)),
        ('attention implementation', model.attention_implementation, IMPLEMENTATIONS),
    ):
        if name not in known:
            raise InputError(f'unknown {kind} {name!r}; choose from {known}')
