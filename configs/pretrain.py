"""Pretraining, the model as argument: --config=configs/pretrain.py:tiny, :llama2_7b, :llama3_1_405b, ...

`tiny` (2.2M weights) needs no data: it reads the source code of the running Python's standard library and trains its
own tokenizer on it. The others are the papers' recipes (LLaMA paper section 2.3 and Table 2, Llama 2 paper
section 2.2 and Table 1, Llama 3 paper section 3.4 and Table 3); point `data.train` and `data.tokenizer` at your own.

Every key may be set on the command line: --config.optimizer.learning_rate=1e-3
"""

from ml_collections import ConfigDict

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
    """Every key with its meaning, then what the model's family sets differently."""
    config = ConfigDict()
    config.seed = 0  # of the weights' initial values and of the data's order

    config.model = ConfigDict()
    config.model.preset = model  # a name in llama_jax.PRESETS
    config.model.vocab_size = 0  # 0: the preset's, or the tokenizer's where that is larger
    config.model.dtype = 'bfloat16'  # of the computation; weights stay float32
    config.model.remat = 'full'  # full, attention, projections (or NAME_offload), none: docs/preflight.md
    config.model.unroll = 1  # layers per step of the scan
    config.model.attention = 'auto'  # kernel: auto, reference, chunked, splash (TPU), cudnn (GPU)

    config.data = ConfigDict()
    config.data.train = ','.join(LLAMA_MIXTURE)  # sources: files, globs, tfds:NAME, prepared folders
    config.data.weights = ','.join(map(str, LLAMA_MIXTURE.values()))  # of the sources; '': by size
    config.data.validation = ''  # sources to validate on; '': hold out a part of the training documents
    config.data.validation_fraction = 0.001  # of the documents, where `validation` is ''
    config.data.text_key = 'text'  # the field of JSONL and TFDS records that holds the text
    config.data.separator = ''  # what divides documents in a text file; '': a file is a document
    config.data.tokenizer = 'data/tokenizer.model'  # sentencepiece or tiktoken; '': train one
    config.data.vocab_size = 32_000  # of the tokenizer, where one is trained
    config.data.seq_len = 2048  # tokens in a row

    config.train = ConfigDict()
    config.train.num_steps = 238_419  # updates
    config.train.batch_size = 2048  # rows in an update, over all devices: 4M tokens
    config.train.num_microbatches = 1  # parts of the batch taken one after the other, to save memory
    config.train.loss_chunks = 8  # parts of the sequence whose logits are held at a time
    config.train.z_loss = 0.0  # weight of the squared log-normaliser; nll is then logged beside loss

    config.optimizer = ConfigDict()
    config.optimizer.name = 'adamw'  # adamw, adafactor, lion, muon
    config.optimizer.learning_rate = 3e-4  # peak
    config.optimizer.warmup_steps = 2000  # linear from 0
    config.optimizer.final_fraction = 0.1  # of the peak, at the end of the cosine
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.eps = 1e-5  # Llama 2's; LLaMA 1 does not publish its own
    config.optimizer.weight_decay = 0.1  # not on norms
    config.optimizer.clip_norm = 1.0  # global gradient norm; 0: no clipping

    config.mesh = ConfigDict()
    config.mesh.dcn_data = 1  # TPU slices joined by the data-centre network, each with a copy of the model
    config.mesh.data = 1  # copies of the model
    config.mesh.fsdp = -1  # parts of weights, optimiser state and batch; -1: all other devices
    config.mesh.context = 1  # parts of the sequence
    config.mesh.tensor = 1  # parts of heads and mlp units
    config.mesh.axis_rules = ''  # overrides such as 'kv_heads=' (replicate), 'vocab=tensor'

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000  # steps
    config.checkpoint.keep = 3  # the newest N; 0: all
    config.checkpoint.verify = (
        True  # read every file of a checkpoint and compare its checksum, before it is restored
    )

    config.eval = ConfigDict()
    config.eval.every = 1000  # steps between validations; 0: at the end only
    config.eval.max_rows = 0  # validate on the first N rows; 0: all
    config.eval.prompt = ''  # completed at the end of the run
    config.eval.sample_tokens = 128  # of the completion; 0: none
    config.eval.tasks = ''  # benchmarks, as for `experiments.evaluate`: piqa,hellaswag
    config.eval.tasks_every = 5000  # steps between their evaluations; 0: at the end only
    config.eval.data_dir = ''  # folder of the benchmarks
    config.eval.limit = 0  # the first N items of each; 0: all

    config.log = ConfigDict()
    config.log.every = 10  # steps
    config.log.tensorboard = True
    config.log.wandb = ''  # project name; '': off
    config.log.profile_start = 0  # first step of a profiler trace
    config.log.profile_steps = 0  # its length; 0: none
    config.log.compilation_cache = ''  # folder of compiled programs; '': the user's cache, 'off': none

    _RECIPES[_family(model)](config, model)
    return config


def _llama_1(config: ConfigDict, model: str) -> None:
    large = model in ('llama_33b', 'llama_65b')
    config.optimizer.learning_rate = 1.5e-4 if large else 3e-4
    config.train.num_steps = 333_786 if large else 238_419  # 1.4T and 1.0T tokens


def _llama_2(config: ConfigDict, model: str) -> None:
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.train.num_steps = 476_837  # 2.0T tokens
    config.optimizer.learning_rate = 1.5e-4 if model in ('llama2_34b', 'llama2_70b') else 3e-4


def _code_llama(config: ConfigDict, model: str) -> None:
    """Code Llama paper, section 2: Llama 2 continued (--checkpoint) for 500B tokens."""
    config.data.seq_len = 4096
    config.train.batch_size = 1024
    config.train.num_steps = 119_209
    config.optimizer.learning_rate = 1.5e-4 if model == 'code_llama_34b' else 3e-4
    config.optimizer.warmup_steps = 1000
    config.optimizer.final_fraction = 1 / 30


def _llama_3(config: ConfigDict, model: str) -> None:
    """Published for 405B only; the smaller ones, said to be trained alike, take its schedule at their own peaks."""
    config.data.seq_len = 8192
    config.train.batch_size = 2048  # 16M tokens, the last stage of 405B's ramp
    config.train.num_steps = 1_200_000
    size = model.rpartition('_')[2]
    config.optimizer.learning_rate = {'405b': 8e-5, '70b': 1.5e-4}.get(size, 3e-4)
    config.optimizer.warmup_steps = 8000
    config.optimizer.final_fraction = 0.01
    config.data.vocab_size = 128_000


def _small(config: ConfigDict, model: str) -> None:
    """The stories models, on TinyStories-like text; sizes and learning rates are for one small machine."""
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
