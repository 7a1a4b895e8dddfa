"""Supervised fine-tuning, model and recipe as argument: --config=configs/sft.py:llama2_7b, :llama2_7b,alpaca, ...

Without a recipe as Llama 2-Chat was trained (Llama 2 paper, section 3.1), of whose first stage no score is published.
The others: `alpaca` (Stanford Alpaca), `alpaca_lora`, `guanaco` (QLoRA, arxiv.org/abs/2305.14314), `tulu2`
(arxiv.org/abs/2311.10702). A batch is so many rows, each of which holds as many examples as fit.
"""

from ml_collections import ConfigDict

from configs import sections


def get_config(argument: str = 'llama2_7b') -> ConfigDict:
    """`configs/sections.py` with what the recipe sets differently."""
    model, recipe = sections.model_and_recipe(argument, _RECIPES)
    config = sections.fine_tuning(model)
    config.data.loss_on = 'all'  # answers that count by their record; last: the last of them alone
    config.data.train = 'data/conversations.jsonl'
    config.data.validation_fraction = 0.01
    config.data.seq_len = 4096
    config.train.batch_size = 64
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 20  # not published
    config.checkpoint.every = 200
    config.eval.every = 100
    if model in ('tiny', 'nano') or model.startswith('stories'):
        _small(config)
    if recipe:
        _RECIPES[recipe](config)
    return config


def _alpaca(config: ConfigDict) -> None:
    """stanford_alpaca, README: 7B's; 13B took 1e-5 and 5 epochs.

    Expect 24 hours of an A100 for LLaMA 7B: three on eight (crfm.stanford.edu/2023/03/13/alpaca.html).
    """
    config.data.train = 'data/alpaca_data.json'
    config.data.format = 'alpaca'
    config.data.seq_len = 512
    config.data.too_long = 'cut'
    config.train.batch_size = 128
    config.train.num_epochs = 3.0
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 37  # 3 % of the 1,219 steps that 52,002 examples took
    config.optimizer.final_fraction = 0.0


def _alpaca_lora(config: ConfigDict) -> None:
    """alpaca-lora's defaults: adapters of queries and values.

    Expect hours on one RTX 4090 (README of github.com/tloen/alpaca-lora); no score is published.
    """
    _alpaca(config)
    config.data.seq_len = 256
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 100
    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.lora.targets = 'q,v'


def _guanaco(config: ConfigDict) -> None:
    """QLoRA's script for 7B: adapters of all linears beside a base in nf4; 65B took 1e-4 and dropout 0.05.

    Expect 87.0 % of ChatGPT's score on the Vicuna benchmark for 7B, 99.3 % for 65B, the latter after 24 hours of one
    GPU of 48 GB (QLoRA paper, Table 6 and abstract).
    """
    config.data.train = 'data/openassistant_guanaco.jsonl'
    config.data.format = 'vicuna'
    config.data.seq_len = 512
    config.data.too_long = 'cut'
    config.train.batch_size = 16
    config.train.num_epochs = 0.0
    config.train.num_steps = 1875
    config.optimizer.learning_rate = 2e-4
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.3
    config.optimizer.warmup_steps = 56
    config.optimizer.final_fraction = 1.0
    config.model.weights = 'nf4'
    config.lora.rank = 64
    config.lora.alpha = 16.0
    config.lora.dropout = 0.1


def _tulu2(config: ConfigDict) -> None:
    """Tulu 2 paper, appendix; with a cosine for its linear decay, and rows of the 4,096 tokens that Llama 2 reads.

    Expect MT-Bench 6.30, 6.70, 7.49 and AlpacaEval 73.9, 78.9, 86.6 % of 7B, 13B, 70B (its paper); no hours.
    """
    config.data.train = 'data/tulu-v2-sft-mixture/*.parquet'
    config.data.format = 'tulu'
    config.data.too_long = 'cut'
    config.train.batch_size = 128
    config.optimizer.learning_rate = 1e-5 if config.model.preset.endswith('70b') else 2e-5
    config.optimizer.beta2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.warmup_steps = 153  # 3 % of 2 passes over 326,154 conversations
    config.optimizer.final_fraction = 0.0


def _small(config: ConfigDict) -> None:
    """For one small machine."""
    config.data.seq_len = 256
    config.model.dtype = 'float32'
    config.model.remat = 'attention'
    config.train.batch_size = 16
    config.train.loss_chunks = 4
    config.optimizer.learning_rate = 1e-3


_RECIPES = {'alpaca': _alpaca, 'alpaca_lora': _alpaca_lora, 'guanaco': _guanaco, 'tulu2': _tulu2}
