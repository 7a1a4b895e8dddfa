"""Pretraining, the model as argument: --config=configs/pretrain.py:tiny, :llama2_7b, :llama3_1_405b, ...

`tiny` (2.2M weights) needs no data: it reads the source code of the running Python's standard library and trains its
own tokenizer on it. The others are the papers' recipes (LLaMA paper section 2.3 and Table 2, Llama 2 paper
section 2.2 and Table 1, Llama 3 paper section 3.4 and Table 3); point `data.train` and `data.tokenizer` at your own.

Every key may be set on the command line: --config.optimizer.learning_rate=1e-3
Each family says below what to expect: hours of a device in all, and a score. `experiments.evaluate --compare=MODEL`
sets yours beside all that was published.
"""

from ml_collections import ConfigDict

from configs import sections

# LLaMA paper, Table 1: the share of each source in a batch, and the folders that `experiments.prepare_data` filled.
LLAMA_MIXTURE = {
    'data/common_crawl': 67.0,
    'data/c4': 15.0,
    'data/github': 4.5,
    'data/wikipedia': 4.5,
    'data/books': 4.5,
    'data/arxiv': 2.5,
    'data/stack_exchange': 2.0,
}


def get_config(model: str = 'tiny') -> ConfigDict:
    """`configs/sections.py` with what the model's family sets differently."""
    config = sections.all_of(model)
    config.data.train = ','.join(LLAMA_MIXTURE)
    config.data.weights = ','.join(map(str, LLAMA_MIXTURE.values()))
    _RECIPES[_family(model)](config, model)
    return config


def _llama_1(config: ConfigDict, model: str) -> None:
    """Expect, of 7B, 13B, 33B, 65B: 82,432, 135,168, 530,432, 1,022,362 hours of an A100 (LLaMA paper, Table 15).

    MMLU with five examples: 35.1, 46.9, 57.8, 63.4 % (its Table 9).
    """
    large = model in ('llama_33b', 'llama_65b')
    config.optimizer.learning_rate = 1.5e-4 if large else 3e-4
    config.train.num_steps = 333_786 if large else 238_419  # 1.4T and 1.0T tokens


def _llama_2(config: ConfigDict, model: str) -> None:
    """Expect, of 7B, 13B, 34B, 70B: 184,320, 368,640, 1,038,336, 1,720,320 hours of an A100 (Llama 2 paper, Table 2).

    MMLU with five examples: 45.3, 54.8, 62.6, 68.9 % (its Table 20).
    """
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.train.num_steps = 476_837  # 2.0T tokens
    config.optimizer.learning_rate = 1.5e-4 if model in ('llama2_34b', 'llama2_70b') else 3e-4


def _code_llama(config: ConfigDict, model: str) -> None:
    """Code Llama paper, section 2: Llama 2 continued (--checkpoint) for 500B tokens.

    Expect, of 7B, 13B, 34B: HumanEval 33.5, 36.0, 48.8 % at the first try (its Table 2). All nine models of the first
    release together took 400,000 hours of an A100 (Meta's model card).
    """
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.train.num_steps = 119_209
    config.optimizer.learning_rate = 1.5e-4 if model == 'code_llama_34b' else 3e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.final_fraction = 1 / 30


def _llama_3(config: ConfigDict, model: str) -> None:
    """Published for 405B only; the smaller ones, said to be trained alike, take its schedule at their own peaks.

    Expect, in million hours of an H100: Llama 3 8B 1.3, 70B 6.4; 3.1 8B 1.46, 70B 7.0, 405B 30.84; 3.2 1B 0.37, 3B 0.46
    (Meta's model cards). MMLU with five examples, in the same order: 66.6, 79.5; 66.7, 79.3, 85.2; 32.2, 58.0 % (same).
    """
    config.data.seq_len = 8192
    config.train.batch_size = 2048  # 16M tokens, the last stage of 405B's ramp
    config.train.num_steps = 1_200_000
    size = model.rpartition('_')[2]
    config.optimizer.learning_rate = {'405b': 8e-5, '70b': 1.5e-4}.get(size, 3e-4)
    config.optimizer.warmup_steps = 8000
    config.optimizer.final_fraction = 0.01
    config.data.vocab_size = 128_000


def _small(config: ConfigDict, model: str) -> None:
    """The stories models, on TinyStories-like text; sizes and learning rates are for one small machine.

    Expect a validation loss of 1.072 (15M) and 0.760 (110M) on TinyStories, the latter after some 96 hours of an A100:
    README of github.com/karpathy/llama2.c, whose schedules are longer.
    """
    config.data.train = 'data/stories.txt'
    config.data.weights = ''
    config.data.separator = '<|endoftext|>'
    config.data.seq_len = 1024 if model == 'stories_110m' else 256
    config.data.validation_fraction = 0.01
    config.train.num_steps = 50_000
    config.train.batch_size = 64
    config.train.loss_chunks = 4
    config.model.remat = 'attention'
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.eps = 1e-8
    config.eval.prompt = 'Once upon a time'


def _tiny(config: ConfigDict, model: str) -> None:
    """Expect minutes on two cores, and a validation loss below those of n-gram models of the same text: README.md."""
    del model
    config.data.train = 'python_stdlib'
    config.data.weights = ''
    config.data.validation_fraction = 0.05
    config.data.tokenizer = ''
    config.data.vocab_size = 2048
    config.data.seq_len = 256
    config.model.dtype = 'float32'  # a CPU has no fast bfloat16
    config.model.remat = 'attention'  # faster than none: fresh memory costs a CPU more than recomputing
    config.train.num_steps = 600
    config.train.loss_chunks = 4
    config.train.batch_size = 8
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.eps = 1e-8
    config.checkpoint.every = 100
    config.eval.every = 200
    config.eval.max_rows = 256
    config.eval.prompt = 'def '
    config.log.every = 5


_RECIPES = {
    'llama': _llama_1,
    'llama2': _llama_2,
    'code_llama': _code_llama,
    'llama3': _llama_3,
    'stories': _small,
    'tiny': _tiny,
}


def _family(model: str) -> str:
    """'llama3_1_8b' -> 'llama3', 'llama_7b' -> 'llama'; names of no family are refused by the run, which lists all."""
    for family in ('code_llama', 'llama2', 'llama3', 'llama', 'stories'):
        if model.startswith(family):
            return family
    return 'tiny'
