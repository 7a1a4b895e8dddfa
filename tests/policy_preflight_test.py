"""What of a policy's memory lies beside its programs; the programs themselves are compiled in ppo_command_test."""

import jax
import jax.numpy as jnp

from configs import ppo, sft
from experiments.policy.memory import gathers_weights
from experiments.policy.preflight import beside_line, unread, with_beside
from experiments.run.objective import Objective


def test_an_update_reads_the_base_of_adapters_but_no_reference():
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    frozen = {'kernel': jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=placed)}
    nothing = {name: None for name in ('params', 'axes', 'first_params', 'loss_fn', 'batch')}
    objective = Objective(**nothing, models=(), frozen=frozen)
    config = ppo.get_config('tiny')
    assert unread(config, objective) == 4 * 8 * 4
    config.lora.rank = 4
    assert unread(config, objective) == 0 == unread(sft.get_config('tiny'), objective)
    report = {'fits': True, 'hbm': {'total': 60, 'available': 100}}
    assert with_beside(report, 40)['fits'] and not with_beside(report, 41)['fits']


def test_weights_that_a_token_brings_from_other_devices_are_told():
    """Reductions of what a token is worth are small beside them."""
    weights = {'kernel': jax.ShapeDtypeStruct((4, 8), jnp.float32)}
    for moved, told in ((64, False), (65, True)):
        collectives = {
            'all-gather': {'ici_bytes': 40, 'dcn_bytes': 0},
            'all-reduce': {'ici_bytes': 0, 'dcn_bytes': moved - 40},
        }
        assert gathers_weights(collectives, weights) == told
    hbm = {'total': 60, 'available': 100}
    line = beside_line({'hbm': hbm, 'beside': 4, 'copy': 8, 'gathers_weights': True})
    assert 'each token brings weights from other devices: place the copy by --config.rollout.mesh' in line
    assert 'each token' not in beside_line({'hbm': hbm, 'beside': 4, 'copy': 8, 'gathers_weights': False})
