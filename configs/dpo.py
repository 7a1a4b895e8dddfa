"""Direct preference optimisation of a policy: --config=configs/dpo.py:llama3_8b, :MODEL,tulu2, ,tulu3 or ,kto.

Without more: the Llama 3 paper, section 4.1.4, with its two changes, stop tokens masked and a likelihood beside the
loss. tulu2 (Ivison et al. 2023): sums of log-probabilities at 5e-7. tulu3 (Lambert et al. 2024): normalised by length.
kto (Ethayarajh et al. 2024): answers that were judged alone. Rows hold whole pairs; `train.batch_size` counts rows.
Expect of tulu2 on Tulu 2's 7B, 13B, 70B: MT-Bench 6.29, 7.00, 7.89 and AlpacaEval 85.1, 89.5, 95.1 % (its paper), where
they had 73.9, 78.9, 86.6 before. Of the other stages alone neither scores nor hours are published.
"""

from ml_collections import ConfigDict

from configs import sections


def get_config(recipe: str = 'llama3_8b') -> ConfigDict:
    """MODEL, MODEL,tulu2, MODEL,tulu3 or MODEL,kto."""
    model, kind = sections.model_and_recipe(recipe, ('tulu2', 'tulu3', 'kto'))
    config = sections.preferences(model)
    config.data.train = 'data/preferences.jsonl'
    config.train.batch_size = 48  # rows: some 128 pairs of 1,600 tokens
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 150
    config.optimizer.weight_decay = 0.0
    del config.data.weights, config.lora.rslora, config.lora.layers
    config.loss = ConfigDict()
    config.loss.kind = (
        'sigmoid'  # robust, hinge, ipo, sigmoid_norm, simpo, orpo, kto: llama_jax/losses/dpo.py
    )
    config.loss.beta = 0.1  # how much a log-probability counts
    config.loss.constants = ''  # label_smoothing=0.1 (sigmoid, robust), margin=1 (simpo), desirable=1.3 (kto)
    config.loss.nll = 0.2  # weight of the chosen answer's -log-probability a token
    config.loss.mask_format = True  # stop tokens and the like are not compared
    config.loss.reference = 'live'  # or kept: its log-probabilities are computed once, into the workdir
    if kind:
        config.train.num_epochs = 3.0 if kind == 'tulu2' else 1.0
        config.loss.nll = 0.0
        config.loss.mask_format = False
        config.optimizer.learning_rate = 5e-7
        config.optimizer.final_fraction = 0.0
    if kind == 'tulu3':
        config.loss.kind = 'sigmoid_norm'
        config.loss.beta = 5.0
    if kind == 'kto':
        config.loss.kind = 'kto'
        config.data.train = 'data/judged.jsonl'
    return config
