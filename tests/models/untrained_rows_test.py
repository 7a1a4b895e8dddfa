import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.models.untrained_rows import fill_untrained, find_untrained
from tests.toy import make_model, make_params


def test_rows_that_nothing_taught_become_the_mean():
    params = jax.tree.map(jnp.array, make_params(make_model()))
    untaught = {'embed': [5], 'head': [5, 9]}
    for name, rows in untaught.items():
        params[name] = params[name].at[jnp.array(rows)].multiply(1e-4)
    before = jax.device_get(params)
    assert find_untrained(params, [3, 5, 9]) == [5, 9]
    after = jax.device_get(fill_untrained(params, [3, 5, 9]))
    for name, rows in untaught.items():
        others = [row for row in range(len(before[name])) if row not in rows]
        np.testing.assert_array_equal(after[name][others], before[name][others])
        for row in rows:  # fp32 sums of 64 rows in another order
            np.testing.assert_allclose(after[name][row], before[name].mean(axis=0), atol=1e-6)
    assert all(
        (after['blocks']['mlp'][k] == before['blocks']['mlp'][k]).all() for k in before['blocks']['mlp']
    )
    assert (
        find_untrained({'embed': {'a': 0, 'b': 0}}, [3])
        == []
        == find_untrained(jax.tree.map(jnp.array, after), [5, 9])
    )
