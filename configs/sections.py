"""The sections that all configurations share: every key with its meaning, and the value that most tasks take.

A task has `sections.all_of(MODEL)` and sets what is different in it; what it alone needs is a section of its own.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict

from llama_jax.errors import InputError, did_you_mean


def model_and_recipe(argument: str, recipes: Iterable[str]) -> tuple[str, str]:
    """'MODEL,RECIPE' -> (MODEL, RECIPE); 'MODEL' -> (MODEL, '').

    Raises:
      InputError: there is no such recipe.
    """
    model, comma, recipe = argument.partition(',')
    if comma and recipe not in recipes:
        raise InputError(f'unknown recipe {recipe!r}; {did_you_mean(recipe, recipes)}')
    return model, recipe


def all_of(preset: str) -> ConfigDict:
    """A configuration of all sections."""
    config = ConfigDict()
    config.seed = 0  # of the weights' initial values and of the data's order
    config.model = model(preset)
    config.data = data()
    config.train = train()
    config.optimizer = optimizer()
    config.mesh = mesh()
    config.checkpoint = checkpoint()
    config.eval = evaluation()
    config.log = log()
    return config


def fine_tuning(preset: str) -> ConfigDict:
    """A configuration of runs on records (`llama_jax/data/records.py`), which are short and begin with a checkpoint."""
    config = all_of(preset)
    for name in ('weights', 'skip', 'text_key', 'separator', 'vocab_size'):
        del config.data[name]
    for name in ('prompt', 'max_rows', 'tasks_every'):
        del config.eval[name]
    del config.train.z_loss
    config.data.update(records())
    config.train.num_steps = 0  # those of `num_epochs`
    config.train.num_epochs = 2.0  # passes over the data; 0: `num_steps` updates
    config.data.tokenizer = ''  # the checkpoint's
    add_adapters(config)
    return config


def preferences(preset: str) -> ConfigDict:
    """A configuration of runs on pairs of answers (`llama_jax/data/preferences.py`)."""
    config = fine_tuning(preset)
    config.data.weights = ''  # of the sources; '': by size
    config.data.share_prompt = False  # a prompt stands once in a row, with all its answers behind it
    config.data.update(seq_len=4096, validation_fraction=0.01)
    config.train.update(num_epochs=1.0)
    for name in ('sample_tokens', 'tasks', 'data_dir', 'limit'):
        del config.eval[name]
    if preset in ('tiny', 'nano') or preset.startswith('stories'):
        _small(config)
    return config


def policies(preset: str) -> ConfigDict:
    """A configuration of runs on answers that the policy draws itself (`experiments/ppo.py`)."""
    config = fine_tuning(preset)
    del config.train.num_epochs, config.data.too_long, config.data.on_error
    for name in ('rslora', 'layers', 'dropout', 'train_whole'):
        del config.lora[name]
    del config.eval.sample_tokens, config.eval.limit, config.log.profile_start, config.log.profile_steps
    config.data.update(train='data/prompts.jsonl', seq_len=4096, validation_fraction=0.01)
    config.train.update(batch_size=64, num_steps=2400)
    config.optimizer.update(learning_rate=1e-6, warmup_steps=0, final_fraction=1.0)
    config.checkpoint.update(every=80)
    config.eval.update(every=80)
    config.rollout = rollout()
    config.algorithm = algorithm()
    if preset in ('tiny', 'nano') or preset.startswith('stories'):
        _small(config)
        config.rollout.update(batch_size=64, max_new_tokens=64)
    return config


def rollout() -> ConfigDict:
    """How answers are drawn from the policy."""
    section = ConfigDict()
    section.batch_size = 512  # answers in an iteration
    section.samples = 1  # answers to a prompt
    section.max_new_tokens = 1024  # of an answer, its stop token included
    section.temperature = 1.0  # the policy is what is drawn at it
    section.slots = 64  # answers that are drawn together, on all devices
    section.mesh = ''  # of the sampler, as in fsdp=2,tensor=4; '': training's
    section.axis_rules = ''  # of the sampler, where it has a mesh of its own
    return section


def algorithm() -> ConfigDict:
    """What is made of answers: docs/reinforcement.md."""
    section = ConfigDict()
    section.name = 'ppo'  # reinforce, rloo, grpo, dr_grpo, dapo, gspo, cispo: llama_jax/losses/policy.py
    section.rewards = 'missing_stop'  # reward models, task:NAME, FILE.py:function, each with =WEIGHT
    section.beta = 0.01  # what a nat of divergence from the reference costs
    section.values_from = ''  # a reward model that values begin as; '' or zero: the policy's trunk
    section.constants = ''  # what overrides the preset and what all have: clip_high=0.28,epochs=2
    return section


def _small(config: ConfigDict) -> None:
    """For one small machine."""
    config.data.update(seq_len=256, validation_fraction=0.05)
    config.model.update(dtype='float32', remat='none')
    config.train.update(loss_chunks=1, batch_size=16)


def model(preset: str) -> ConfigDict:
    """The architecture and how it is computed."""
    section = ConfigDict()
    section.preset = preset  # a name in llama_jax.PRESETS; checkpoint: the sizes of the one that is given
    section.vocab_size = 0  # 0: the preset's, or the tokenizer's where that is larger
    section.dtype = 'bfloat16'  # of the computation; weights stay float32
    section.remat = 'full'  # full, attention, projections (or NAME_offload), none: docs/preflight.md
    section.unroll = 1  # layers per step of the scan
    section.attention = 'auto'  # kernel: auto, reference, chunked, splash (TPU), cudnn (GPU)
    return section


def add_adapters(config: ConfigDict) -> None:
    """The keys of runs that may train adapters in the place of all weights."""
    config.model.weights = 'bfloat16'  # of a base beside adapters: float32, bfloat16, int8, int4, nf4
    config.lora = lora()


def lora() -> ConfigDict:
    """Adapters, and what else is trained beside a frozen base."""
    section = ConfigDict()
    section.rank = 0  # 0: all weights are trained
    section.alpha = 16.0  # their weight is alpha / rank
    section.dropout = 0.0  # share of activations that adapters do not see
    section.targets = 'all'  # q,k,v,o,gate,up,down (all of these), embed, head
    section.rslora = False  # their weight is alpha / sqrt(rank)
    section.layers = ''  # those with adapters, as in 0-15,31; '': all
    section.train_whole = ''  # weights trained as they are: embed, head, norms, score
    return section


def data() -> ConfigDict:
    """What is read, and the tokenizer that reads it."""
    section = ConfigDict()
    section.train = ''  # sources: files, globs, tfds:NAME, prepared folders
    section.weights = ''  # of the sources; '': by size; '3,1; 2000: 1,1': from step 2000 on others
    section.skip = ''  # steps whose rows are left out, as in 11000-11200
    section.validation = ''  # sources to validate on; '': what was held out, or a part of the documents
    section.validation_fraction = 0.001  # of the documents, where `validation` is ''
    section.text_key = 'text'  # the field of JSONL and TFDS records that holds the text
    section.separator = ''  # what divides documents in a text file; '': a file is a document
    section.tokenizer = 'data/tokenizer.model'  # sentencepiece or tiktoken; '': train one
    section.vocab_size = 32_000  # of the tokenizer, where one is trained
    section.seq_len = 2048  # tokens in a row
    return section


def records() -> ConfigDict:
    """How records become rows."""
    section = ConfigDict()
    section.format = ''  # llama2, llama3, alpaca, tulu, vicuna, hh, plain; '': of the tokenizer's family
    section.key_map = ''  # where records have other keys: instruction=question,output=answer
    section.on_error = 'stop'  # at the first bad record; skip: leave them out, count and name them
    section.too_long = 'drop'  # what no row holds; oldest: it loses its first turns, cut: its end
    return section


def train() -> ConfigDict:
    """How long, and in what pieces."""
    section = ConfigDict()
    section.num_steps = 238_419  # updates
    section.batch_size = 2048  # rows in an update, over all devices: 4M tokens
    section.num_microbatches = 1  # parts of the batch taken one after the other, to save memory
    section.loss_chunks = 8  # parts of the sequence whose logits are held at a time
    section.z_loss = 0.0  # weight of the squared log-normaliser; nll is then logged beside loss
    return section


def optimizer() -> ConfigDict:
    """LLaMA's."""
    section = ConfigDict()
    section.name = 'adamw'  # adamw, adafactor, lion, muon
    section.learning_rate = 3e-4  # peak
    section.warmup_steps = 2000  # linear from 0
    section.final_fraction = 0.1  # of the peak, at the end of the cosine
    section.beta1 = 0.9  # of the running mean of gradients
    section.beta2 = 0.95  # of the running mean of their squares
    section.eps = 1e-5  # Llama 2's; LLaMA 1 does not publish its own
    section.weight_decay = 0.1  # not on norms
    section.clip_norm = 1.0  # global gradient norm; 0: no clipping
    return section


def mesh() -> ConfigDict:
    """How devices share the work: docs/preflight.md, docs/launch.md."""
    section = ConfigDict()
    section.dcn_data = 1  # TPU slices joined by the data-centre network, each with a copy of the model
    section.data = 1  # copies of the model
    section.fsdp = -1  # parts of weights, optimiser state and batch; -1: all other devices
    section.context = 1  # parts of the sequence
    section.tensor = 1  # parts of heads and mlp units
    section.axis_rules = ''  # overrides such as 'kv_heads=' (replicate), 'vocab=tensor'
    return section


def checkpoint() -> ConfigDict:
    """What is kept."""
    section = ConfigDict()
    section.every = 1000  # steps
    section.keep = 3  # the newest N; 0: all
    section.verify = True  # compare every file with its checksum before a checkpoint is restored
    return section


def evaluation() -> ConfigDict:
    """What is measured on the way."""
    section = ConfigDict()
    section.every = 1000  # steps between validations, and exams without `tasks_every`; 0: at the end only
    section.max_rows = 0  # validate on the first N rows; 0: all
    section.prompt = ''  # completed at the end of the run
    section.sample_tokens = 128  # of the completion; 0: none
    section.tasks = ''  # benchmarks, as for `experiments.evaluate`: piqa,hellaswag
    section.tasks_every = 5000  # steps between their evaluations; 0: at the end only
    section.data_dir = ''  # folder of the benchmarks
    section.limit = 0  # the first N items of each; 0: all
    return section


def log() -> ConfigDict:
    """What is written of a run beside its checkpoints."""
    section = ConfigDict()
    section.every = 10  # steps
    section.tensorboard = True  # its files, beside metrics.jsonl
    section.wandb = ''  # project name; '': off
    section.profile_start = 0  # first step of a profiler trace
    section.profile_steps = 0  # its length; 0: none
    section.compilation_cache = ''  # folder of compiled programs; '': the user's cache, 'off': none
    return section
