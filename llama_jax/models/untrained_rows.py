"""Tokens that a model has rows for and never read: Llama 3's base models know no header, and no end of a turn."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.types import Array, Params

_UNTRAINED = 0.01  # of the mean length of a table's rows; what was trained is within a few times of it
_TABLES = ('embed', 'head')


def find_untrained(params: Params, ids: Sequence[int]) -> list[int]:
    """Those of `ids` whose row in the embedding or in the head is next to nothing."""
    tables = [params[name] for name in _TABLES if isinstance(params.get(name), jax.Array)]
    if not tables or not ids:
        return []
    mesh = getattr(tables[0].sharding, 'mesh', None)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if mesh else None
    found = jax.jit(
        lambda tables: sum(_is_untrained(table, ids) for table in tables), out_shardings=everywhere
    )(tables)
    return [id for id, untrained in zip(ids, np.asarray(found), strict=True) if untrained]


def fill_untrained(params: Params, ids: Sequence[int]) -> Params:
    """The weights with the mean of all rows in the place of those of `ids` that are next to nothing.

    A table that lies where nobody looks, in an adapter or in integers, stays as it is. Placed as before; `params` is
    given away.
    """
    tables = {name: params[name] for name in _TABLES if isinstance(params.get(name), jax.Array)}
    shardings = {name: table.sharding for name, table in tables.items()}

    def fill(tables: dict[str, Array]) -> dict[str, Array]:
        return {name: _filled(table, ids) for name, table in tables.items()}

    return {**params, **jax.jit(fill, out_shardings=shardings, donate_argnums=0)(tables)}


def _is_untrained(table: Array, ids: Sequence[int]) -> Array:
    lengths = jnp.linalg.norm(table.astype(jnp.float32), axis=-1)
    return lengths[np.array(ids)] < _UNTRAINED * lengths.mean()


def _filled(table: Array, ids: Sequence[int]) -> Array:
    places = np.array(ids)
    untrained = _is_untrained(table, ids)[:, None]
    mean = table.mean(axis=0, keepdims=True, dtype=jnp.float32).astype(table.dtype)
    return table.at[places].set(jnp.where(untrained, mean, table[places]))
