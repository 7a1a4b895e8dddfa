"""Low-rank adapters: which weights have one, their first values, and the weights that they make of a base.

Adapters are plain dicts, the tree of the base's paths with {'a', 'b'} at each adapted weight: a [L, in..., r] has the
axes that a product of the weight sums over, b [L, r, out...] those that it keeps; the embedding, which is looked up, is
summed over its rows. Weights that are trained whole are arrays at their own paths. Arithmetic: `ops.lora`.
"""

import dataclasses
import functools
import math
import string
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError, did_you_mean
from llama_jax.ops import linear
from llama_jax.ops.lora import LoraArray
from llama_jax.partitioning import Partitioner
from llama_jax.placement import BlockArray, Index
from llama_jax.types import Array, LossFn, Metrics, Params, PyTree

# The axes of a weight that an adapter's `a` has, counted from the weight's last.
ADAPTED_AXES: dict[str, tuple[int, ...]] = {
    'q': (-3,), 'k': (-3,), 'v': (-3,), 'o': (-3, -2), 'gate': (-2,), 'up': (-2,), 'down': (-2,), 'embed': (-2,),
    'head': (-1,),
}  # fmt: skip
LINEARS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')  # what `all` stands for
_WHOLE = ('embed', 'head', 'norms', 'score')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is trained beside a frozen base.

    Attributes:
      rank: of the adapters.
      alpha: their weight: `scale` is alpha / rank.
      dropout: share of activations that an adapter does not see in training.
      targets: weights with an adapter, keys of `ADAPTED_AXES`; 'all': `LINEARS`.
      rslora: `scale` is alpha / sqrt(rank) (arxiv.org/abs/2312.03732).
      layers: numbers of those with adapters; (): all.
      train_whole: weights that are trained as they are: embed, head, norms, score.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEARS
    rslora: bool = False
    layers: tuple[int, ...] = ()
    train_whole: tuple[str, ...] = ()

    def __post_init__(self):
        """Raises InputError where a setting is out of range; a NaN is out of all."""
        for name, allowed, right in (
            ('rank', 'at least 1', self.rank >= 1),
            ('alpha', 'above 0 and finite', 0 < self.alpha < math.inf),
            ('dropout', 'from 0 to below 1', 0 <= self.dropout < 1),
        ):
            if not right:
                raise InputError(f'{name} is {getattr(self, name)}; it must be {allowed}')
        for name, known in (('targets', (*ADAPTED_AXES, 'all')), ('train_whole', _WHOLE)):
            for one in getattr(self, name):
                if one not in known:
                    raise InputError(
                        f'{name} has {one!r}, which is no such weight; {did_you_mean(one, known)}'
                    )
        if both := set(self.adapted) & set(self.train_whole):
            raise InputError(
                f'targets and train_whole both have {min(both)!r}; train it in one of the two ways'
            )
        if not self.targets and not self.train_whole:
            raise InputError('targets and train_whole are both empty; name what is to be trained')

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of the weights with an adapter."""
        return tuple(dict.fromkeys(n for t in self.targets for n in (LINEARS if t == 'all' else (t,))))

    @property
    def scale(self) -> float:
        """What an adapter is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def abstract_adapters(
    config: LoraConfig, base: Params, axes: PyTree, partitioner: Partitioner | None = None
) -> tuple[Params, PyTree]:
    """(shapes, logical axes) of what is trained: float32, split over devices as the weights are.

    Args:
      config: what is trained.
      base: shapes of a model's weights.
      axes: a tree like `base` with a tuple of logical axes at each leaf.
      partitioner: of the devices that the weights' embedding axis is split over; the side of an adapter that has none
        is split over them as well, where they divide it. None: it stands whole on each of them.

    Raises:
      InputError: the model has no such weight or layer.
    """
    shapes, placed = {}, {}
    for path, weight in _trained(config, base):
        own = functools.reduce(lambda tree, name: tree[name], path, axes)
        if path[-1] in config.adapted:
            parts = _parts(path, tuple(weight.shape), config.rank)
            _put(
                shapes,
                path,
                {part: jax.ShapeDtypeStruct(shape, jnp.float32) for part, shape in parts.items()},
            )
            split = _parts(path, own, None)
            if partitioner is not None:
                split = {part: partitioner.split_also(split[part], parts[part], 'embed') for part in split}
            _put(placed, path, split)
        else:
            _put(shapes, path, jax.ShapeDtypeStruct(weight.shape, jnp.float32))
            _put(placed, path, own)
    return shapes, placed


def init_adapters(config: LoraConfig, base: Params, key: Array) -> Params:
    """Adapters that change nothing yet, as PEFT begins them: a uniform within 1 / sqrt(in), b 0.

    Of the embedding it is `a` that is 0, and b normal: a row of it is looked up, and would hardly be moved otherwise.

    Args:
      config: what is trained.
      base: a model's weights, which those that are trained whole begin with; of the others the shapes alone matter.
      key: of the random values; each weight has its own, whichever others there are.
    """
    made: Params = {}
    for path, weight in _trained(config, base):
        if path[-1] not in config.adapted:
            _put(made, path, linear.materialize(weight).astype(jnp.float32))
            continue
        shapes, own = _parts(path, tuple(weight.shape), config.rank), _key_of(key, path)
        a, b = jnp.zeros(shapes['a']), jnp.zeros(shapes['b'])
        if path[-1] == 'embed':
            b = jax.random.normal(own, b.shape)
        else:
            num_in = len(ADAPTED_AXES[path[-1]])
            bound = 1 / math.sqrt(math.prod(a.shape[-1 - num_in : -1]))
            a = jax.random.uniform(own, a.shape, minval=-bound, maxval=bound)
        _put(made, path, {'a': a, 'b': b})
    return made


def _trained(config: LoraConfig, base: Params) -> list[tuple[tuple[str, ...], Any]]:
    """(path, weight) of all that is trained, by adapter or whole.

    Raises:
      InputError: as `abstract_adapters`.
    """
    weights = dict(_leaves(base))
    kinds = {path: 'norms' if path[-1].endswith('norm') else path[-1] for path in weights}
    for name, wanted in (('targets', config.adapted), ('train_whole', config.train_whole)):
        if missing := [one for one in wanted if one not in kinds.values()]:
            why = '; its head is the embedding' if missing[0] == 'head' else ''
            raise InputError(f'{name} has {missing[0]!r}, which the model does not have{why}')
    num_layers = next(leaf.shape[0] for path, leaf in weights.items() if path[0] == 'blocks')
    if wrong := [layer for layer in config.layers if not 0 <= layer < num_layers]:
        raise InputError(f'layers has {wrong[0]}; the model has the layers 0 to {num_layers - 1}')
    chosen = (*config.adapted, *config.train_whole)
    return [(path, weight) for path, weight in weights.items() if kinds[path] in chosen]


def _parts(path: tuple[str, ...], of_axes: tuple, rank: Any) -> dict[str, tuple]:
    """What a and b have for their axes (sizes, or names), where a weight has `of_axes` for its own."""
    summed = [axis % len(of_axes) for axis in ADAPTED_AXES[path[-1]]]
    stacked = of_axes[:1] if path[0] == 'blocks' else ()
    others = (of_axes[axis] for axis in range(len(stacked), len(of_axes)) if axis not in summed)
    return {'a': (*stacked, *(of_axes[axis] for axis in summed), rank), 'b': (*stacked, rank, *others)}


def _key_of(key: Array, path: tuple[str, ...]) -> Array:
    return jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))


def combine(
    adapters: Params, base: Params, scale: float, *, dropout: float = 0.0, key: Array | None = None
) -> Params:
    """The model's weights: the base's, those with an adapter as `LoraArray`, those trained whole as they are.

    Args:
      adapters: what is trained.
      base: a model's weights in any representation, layers stacked.
      scale: of all adapters, `LoraConfig.scale`.
      dropout: see `LoraConfig`.
      key: of what is dropped; None: nothing is.
    """

    def walk(adapters: Params, base: Params, path: tuple[str, ...]) -> Params:
        made = dict(base)
        for name, own in adapters.items():
            if not isinstance(own, dict):
                made[name] = own
            elif not is_adapter(own):
                made[name] = walk(own, base[name], (*path, name))
            else:
                keys = None
                if key is not None and dropout:
                    keys = _key_of(key, (*path, name))
                    keys = jax.random.split(keys, own['a'].shape[0]) if path[:1] == ('blocks',) else keys
                made[name] = LoraArray(
                    base[name], own['a'], own['b'], keys, scale, ADAPTED_AXES[name], dropout
                )
        return made

    return walk(adapters, base, ())


def merge(adapters: Params, base: Params, scale: float) -> Params:
    """The model's weights, each as one array: base and adapter added in float32, and cast once to the base's type.

    What is an integer in the base is float32.
    """

    def whole(weight: Any) -> Array:
        if not isinstance(weight, LoraArray):
            return linear.materialize(weight)
        made = weight.materialize()
        return made.astype(weight.base.dtype) if isinstance(weight.base, jax.Array) else made

    return jax.tree.map(whole, combine(adapters, base, scale), is_leaf=_is_weight)


def merged_leaves(
    base: Mapping[str, BlockArray],
    trained: Mapping[str, BlockArray],
    shapes: Mapping[str, tuple[int, ...]],
    scale: float,
) -> dict[str, BlockArray]:
    """What `merge` makes, of weights in files: float32 where there is an adapter.

    Args:
      base: by path of the params.
      trained: PATH/a and PATH/b of weights with an adapter, PATH of those that were trained whole.
      shapes: of the model's weights.
      scale: of all adapters.

    Raises:
      InputError: what was trained is no adapter of this model; it is named.
    """
    left, merged = dict(trained), {}
    for path, shape in shapes.items():
        leaf = left.pop(path, None) or base.get(path)
        a, b = left.pop(f'{path}/a', None), left.pop(f'{path}/b', None)
        if leaf is None or tuple(leaf.shape) != shape:
            raise InputError(f'weight {path} has shape {leaf and tuple(leaf.shape)}, the model {shape}')
        if a is None and b is None:
            merged[path] = leaf
            continue
        keys, rank = tuple(path.split('/')), None if a is None else a.shape[-1]
        wanted = _parts(keys, shape, rank) if keys[-1] in ADAPTED_AXES else {'a': None, 'b': None}
        for part, array in (('a', a), ('b', b)):
            if array is None or tuple(array.shape) != wanted[part]:
                found = None if array is None else tuple(array.shape)
                raise InputError(
                    f'adapter {path}/{part} has shape {found}, for its weight it must be {wanted[part]}'
                )
        assert a is not None and b is not None
        a, b = (array.read(tuple(slice(0, size) for size in array.shape)) for array in (a, b))
        merged[path] = _Merged(leaf, a, b, scale, ADAPTED_AXES[keys[-1]], int(keys[0] == 'blocks'))
    if left:
        raise InputError(f'{min(left)} is no weight or adapter of this model')
    return merged


@dataclasses.dataclass(frozen=True, eq=False)
class _Merged:
    """A weight in a file with its adapter added in float32, block by block."""

    base: BlockArray
    a: np.ndarray
    b: np.ndarray
    scale: float
    axes: tuple[int, ...]
    num_stacked: int
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def rows_axis(self) -> int | None:
        return self.base.rows_axis

    def blocks(self) -> Iterable[Index]:
        return self.base.blocks()

    def read(self, index: Index) -> np.ndarray:
        stacked, summed = index[: self.num_stacked], [axis % len(index) for axis in self.axes]
        others = [axis for axis in range(self.num_stacked, len(index)) if axis not in summed]
        a = self.a[(*stacked, *(index[axis] for axis in summed))]
        b = self.b[(*stacked, slice(None), *(index[axis] for axis in others))]
        letters = string.ascii_lowercase[: len(index)]
        of_stacked = letters[: self.num_stacked]
        of_a, of_b = (''.join(letters[axis] for axis in axes) for axes in (summed, others))
        added = np.einsum(f'{of_stacked}{of_a}R,{of_stacked}R{of_b}->{letters}', a, b, optimize=True)
        return self.base.read(index).astype(np.float32) + np.float32(self.scale) * added


def with_base(loss_fn: LossFn, config: LoraConfig) -> LossFn:
    """Any loss of a model, of adapters beside the frozen base: what is differentiated are the adapters alone.

    Args:
      loss_fn: of a model's weights; it is given the base as what is frozen, for a loss that has a reference.
      config: what is trained.
    """

    def adapted_loss(params: Params, frozen: PyTree, batch: Any, rng: Array) -> tuple[Array, Array, Metrics]:
        key, rng = jax.random.split(rng) if config.dropout else (None, rng)
        adapters = only_layers(params, config.layers)
        weights = combine(adapters, frozen, config.scale, dropout=config.dropout, key=key)
        return loss_fn(weights, frozen, batch, rng)

    return adapted_loss


def only_layers(adapters: Params, layers: tuple[int, ...]) -> Params:
    """Adapters whose `b` is 0, and stays it, in all other layers; () leaves them as they are."""
    if not layers:
        return adapters

    def masked(path: tuple, leaf: Array) -> Array:
        if path[0].key != 'blocks' or path[-1].key != 'b':
            return leaf
        chosen = jnp.zeros(leaf.shape[0], leaf.dtype).at[jnp.array(layers)].set(1)
        return leaf * chosen.reshape(-1, *[1] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(masked, adapters)


def is_adapter(node: Any) -> bool:
    """Whether a node of a tree of adapters is one: {'a', 'b'}."""
    return isinstance(node, dict) and node.keys() == {'a', 'b'}


def _is_weight(node: Any) -> bool:
    return isinstance(node, linear.Representation)


def _leaves(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, weight); a representation is one."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name), node


def _put(tree: Params, path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
