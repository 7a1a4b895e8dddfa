"""Reward models from pairs of answers: --config=configs/reward_model.py:llama2_7b,helpfulness or ,safety.

The recipes of the Llama 2 paper, section 3.2.2, which start from its chat checkpoints: one epoch, AdamW as in
pretraining, 512 pairs in an update. Rows hold whole pairs, two or three at the paper's lengths: `train.batch_size`
counts rows. Point `data.train` at your own files, and `data.weights` at how often each is drawn.
Expect, of 70B, the better answer above the other in 63.2 % of Meta's helpful pairs (helpfulness) and 64.5 % of its safe
ones (safety); of Anthropic's public pairs in 72.0 % of the helpful and 74.7 % of the harmless (Llama 2 paper, Table 7).
"""

from ml_collections import ConfigDict

from configs import sections

# Half is Meta's own helpfulness data; the other half is drawn evenly from safety and public sets, by their sizes.
HELPFULNESS = {
    'data/meta_helpful.jsonl': 1418.0,
    'data/meta_safety.jsonl': 84.4,
    'data/anthropic_helpful.jsonl': 122.4,
    'data/anthropic_harmless.jsonl': 44.0,
    'data/summarize.jsonl': 176.6,
    'data/webgpt.jsonl': 13.3,
    'data/stack_exchange.jsonl': 869.3,
    'data/shp.jsonl': 74.9,
    'data/synthetic_gptj.jsonl': 33.1,
}
# Nine tenths are of safety.
SAFETY = {
    'data/meta_safety.jsonl': 60.0,
    'data/anthropic_harmless.jsonl': 30.0,
    'data/meta_helpful.jsonl': 7.0,
    'data/anthropic_helpful.jsonl': 3.0,
}


def get_config(recipe: str = 'llama2_7b,helpfulness') -> ConfigDict:
    """MODEL, MODEL,helpfulness or MODEL,safety."""
    model, kind = sections.model_and_recipe(recipe, ('helpfulness', 'safety'))
    config = sections.preferences(model)
    config.lora.train_whole = 'score'
    mixture = SAFETY if kind == 'safety' else HELPFULNESS
    config.data.train = ','.join(mixture)
    config.data.weights = ','.join(map(str, mixture.values()))
    config.train.batch_size = 208  # rows: some 512 pairs of 1,600 tokens
    config.optimizer.learning_rate = 5e-6 if model.endswith('70b') else 1e-5
    config.optimizer.warmup_steps = 166  # 3 % of 5,540 steps: at least 5
    config.reward = ConfigDict()
    config.reward.margin = 'large'  # none, small, large: what a rating asks of the difference of scores
    config.reward.centering = 0.0  # weight of the squared sum of a pair's scores
    config.reward.safety = 1.0 if kind == 'safety' else 0.0  # weight of the loss of safe and unsafe answers
    return config
