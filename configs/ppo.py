"""PPO of a policy on its own answers: --config=configs/ppo.py:llama2_7b.

The Llama 2 paper, section 3.2.3: 512 answers an iteration in minibatches of 64, one pass, clip 0.2, a constant learning
rate of 1e-6, AdamW as in pretraining with eps 1e-5, beta 0.01 for 7B and 13B, 0.005 for 34B and 70B, 200 to 400
iterations. Values and their horizon are not published. `train.batch_size` counts answers, of which a row holds as many
as fit. Expect some 330 seconds an iteration of 70B, as the paper says of its own cluster.
"""

from ml_collections import ConfigDict

from configs import sections


def get_config(model: str = 'llama2_7b') -> ConfigDict:
    """`configs/sections.py` with what PPO sets differently."""
    config = sections.policies(model)
    config.algorithm.beta = 0.005 if model.endswith(('34b', '70b')) else 0.01
    return config
