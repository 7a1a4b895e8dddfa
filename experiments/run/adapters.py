"""Any objective with adapters trained beside a frozen base, as `config.lora` says: SFT, rewards, preferences alike."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.run.settings import make_lora_config
from llama_jax import pretrained
from llama_jax.checkpoint.model_file import MODEL_FILE, read_adapters
from llama_jax.lora import LoraConfig, abstract_adapters, combine, init_adapters, with_base
from llama_jax.partitioning import Partitioner
from llama_jax.pretrained.adapters import check_fingerprint
from llama_jax.quantize.base import base_target
from llama_jax.train.state import shardings_of
from llama_jax.types import Params, PyTree

logger = logging.getLogger('llama_jax.adapters')


def adapted(
    objective: Any, config: ConfigDict, partitioner: Partitioner, base: pretrained.Checkpoint | None
) -> Any:
    """The `Objective` with `config.lora`'s adapters in the place of all weights; as it is where there are none.

    Its loss is given the base as what is frozen: the reference of a loss that has one.

    Args:
      objective: of whole weights.
      config: all keys.
      partitioner: places the base and the adapters.
      base: whose weights are frozen; they are read here, as `config.model.weights` says. None: they stay abstract, for
        a step that is compiled and not run.

    Raises:
      InputError: a setting is wrong, or the model has no such weights.
    """
    if (lora := make_lora_config(config)) is None:
        return objective
    with flags_named(*(f'--config.lora.{name}' for name in config.lora)):
        params, axes = abstract_adapters(lora, objective.params, objective.axes, partitioner)
    placed = _placed(objective.params, partitioner.tree_shardings(objective.params, objective.axes))
    # What the base does not have, a score, is trained whole.
    placed = {
        name: leaf for name, leaf in placed.items() if name != 'score' or 'score' not in lora.train_whole
    }
    record: dict[str, Any] = {}
    with flags_named('--config.model.weights'):
        frozen: Params = base_target(placed, config.model.weights)
    if base is not None:
        with flags_named('--checkpoint'):
            is_kept = base.adapters.get('weights') == config.model.weights
            record = _record(lora, 'float32' if is_kept else config.model.weights, base)
            if is_kept:
                frozen = _with_first(base, placed, objective, partitioner)
            else:
                frozen = base.base_params(placed, config.model.weights, grow_vocabulary=True)
    size, whole = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, objective.params))
    logger.info(
        'adapters of rank %d: %s weights are trained beside %s in %s', lora.rank, f'{size:,}', f'{whole:,}',
        config.model.weights,
    )  # fmt: skip

    def first_params(target: Params) -> Params:
        return _first_params(lora, objective, target, config.seed)

    return dataclasses.replace(
        objective, params=params, axes=axes, first_params=first_params, loss_fn=with_base(objective.loss_fn, lora),
        frozen=frozen, beside_base=True, view=lambda params, frozen: combine(params, frozen, lora.scale),
        provenance={**objective.provenance, **({'adapters': record} if record else {})},
    )  # fmt: skip


def _with_first(
    base: pretrained.Checkpoint, placed: Params, objective: Any, partitioner: Partitioner
) -> Params:
    """A base of adapters that has adapters itself, and is kept as theirs was: theirs stand beside it, not merged.

    So its bytes stay what they were, and a reference is the base with the first adapters: there is no second model.
    """
    below = base.base.base_params(placed, base.adapters['weights'], grow_vocabulary=True)
    return beside(below, base, objective.params, objective.axes, partitioner)


def beside(
    below: Params, trained: pretrained.Checkpoint, shapes: Params, axes: PyTree, partitioner: Partitioner
) -> Params:
    """The weights that a workdir's adapters make of a base, which is not copied.

    Args:
      below: the base, as the adapters were trained beside it.
      trained: of a workdir that holds adapters alone.
      shapes: of its model's weights, with the logical `axes` of each.
      axes: see there.
      partitioner: places the adapters.
    """
    record = trained.adapters
    lora = LoraConfig(
        record['rank'], record['alpha'], 0.0, tuple(record['targets']), record['rslora'],
        tuple(record['layers']), tuple(record['train_whole']),
    )  # fmt: skip
    own, own_axes = abstract_adapters(lora, shapes, axes, partitioner)
    target = _placed(own, partitioner.tree_shardings(own, own_axes))
    return combine(trained.trained_params(target), below, record['scale'])


@dataclasses.dataclass(frozen=True)
class SharedBase:
    """The frozen weights that a policy's adapters stand beside, for what else was trained beside the same.

    Attributes:
      record: what model.json says of the policy's adapters.
      weights: the base's.
    """

    record: Mapping[str, Any]
    weights: Params

    def is_of(self, opened: pretrained.Checkpoint) -> bool:
        """Whether a checkpoint's adapters were trained beside it, kept as it is here."""
        held = opened.adapters
        return bool(held) and all(held[name] == self.record[name] for name in ('fingerprint', 'weights'))

    def model_of(
        self, opened: pretrained.Checkpoint, shapes: Params, axes: PyTree, partitioner: Partitioner
    ) -> Params:
        """The whole weights of such a checkpoint, of which its adapters alone take memory; see `beside`."""
        below = {name: leaf for name, leaf in self.weights.items() if name in shapes}
        return beside(below, opened, shapes, axes, partitioner)


def check_base(workdir: epath.Path, provenance: Mapping[str, Any]) -> None:
    """Refuses adapters in a workdir that are of another base than a run's."""
    held = read_adapters(workdir) if (workdir / MODEL_FILE).exists() else {}
    if held and (own := provenance.get('adapters')):
        check_fingerprint(own['fingerprint'], own['base'], held['fingerprint'], workdir)


def _placed(shapes: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _record(lora: LoraConfig, weights: str, base: pretrained.Checkpoint) -> dict[str, Any]:
    """What model.json says of the adapters: enough to find their base, and to make the whole model."""
    path = str(base.path)
    if '://' not in path:
        path = str(epath.Path(path).resolve())
    settings = dataclasses.asdict(lora) | {'targets': lora.adapted, 'scale': float(lora.scale)}
    return {'base': path, 'fingerprint': base.fingerprint, 'weights': weights, **settings}


def _first_params(lora: LoraConfig, objective: Any, target: Params, seed: int) -> Params:
    """Fresh adapters, and the weights that are trained whole as they begin; born sharded as `target`."""
    whole = _whole(target)
    begun = objective.first_params(whole) if whole else {}

    def start(begun: Params) -> Params:
        return init_adapters(lora, _with(objective.params, begun), jax.random.key(seed))

    return jax.jit(start, out_shardings=shardings_of(target))(begun)


def _whole(target: Params) -> Params:
    """Of what is trained, the weights that are no adapters."""
    kept = {}
    for name, node in target.items():
        if not isinstance(node, dict):
            kept[name] = node
        elif node.keys() != {'a', 'b'} and (inner := _whole(node)):
            kept[name] = inner
    return kept


def _with(weights: Params, some: Params) -> Params:
    """The tree with some of its leaves replaced."""
    made = dict(weights)
    for name, node in some.items():
        made[name] = _with(weights[name], node) if isinstance(node, dict) else node
    return made
