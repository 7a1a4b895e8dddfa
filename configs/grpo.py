"""GRPO and kin, which compare the answers to one prompt: --config=configs/grpo.py:llama3_1_8b or :MODEL,ALGORITHM.

ALGORITHM is grpo (Shao et al. 2024: 64 answers to each of 16 prompts, one pass, beta 0.04, here of 8 to each of 64),
dapo (Yu et al. 2025: 16 to each of 32 in use, 1e-6, an overlong penalty over the last part), dr_grpo, gspo, cispo, rloo
or reinforce. Expect of grpo on DeepSeekMath-Instruct 7B: GSM8K from 82.9 to 88.2 %, MATH from 46.8 to 51.7 % (Shao
et al., Table 5); of dapo on Qwen2.5 32B: AIME 2024 at 50 % (Yu et al., abstract). Neither tells the hours.
"""

from ml_collections import ConfigDict

from configs import sections

_KNOWN = ('grpo', 'dapo', 'dr_grpo', 'gspo', 'cispo', 'rloo', 'reinforce')


def get_config(recipe: str = 'llama3_1_8b') -> ConfigDict:
    """MODEL or MODEL,ALGORITHM."""
    model, kind = sections.model_and_recipe(recipe, _KNOWN)
    config = sections.policies(model)
    config.algorithm.name = kind or 'grpo'
    config.algorithm.beta = 0.04
    config.rollout.samples = 8
    if kind == 'dapo':
        config.rollout.samples = 16
        config.algorithm.rewards += f',overlong:{config.rollout.max_new_tokens // 5}'
    return config
