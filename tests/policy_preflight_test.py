"""What of a policy's memory lies beside its programs; the programs themselves are compiled in ppo_command_test."""

import jax
import jax.numpy as jnp

from configs import ppo, sft
from experiments.policy.preflight import unread, with_beside
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
