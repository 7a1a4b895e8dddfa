"""What a run starts from: the sizes of its model, its tokenizer, its first weights. Nothing is written here."""

import base64
import dataclasses
import functools
import json
import logging
import tempfile

import jax
from etils import epath
from ml_collections import ConfigDict

from experiments.launch import flags_named
from experiments.run.config_file import split_list
from experiments.run.record import CONFIG_FILE, read_record
from experiments.run.settings import find_preset
from experiments.run.workdir import TOKENIZER_FILES, Fork, open_fork
from llama_jax import pretrained, runtime
from llama_jax.data.datasets import train_tokenizer
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import Transformer, init_params
from llama_jax.models.presets import with_vocab_size
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.tokenizer.conversion import own_files
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer, tokenizer_of_files
from llama_jax.train.state import shardings_of
from llama_jax.types import Params

logger = logging.getLogger('llama_jax.start')


def starting_architecture(
    config: ConfigDict, base: pretrained.Checkpoint | None, from_scores: bool = False
) -> LlamaConfig:
    """The preset, with the vocabulary of --checkpoint where there is one; all other sizes must be the same.

    The preset `checkpoint` has the sizes of whatever Llama is given.

    A context that no preset has, stretched by another way than Llama 3.1's, is the checkpoint's.
    """
    if config.model.preset == 'checkpoint':
        if not base:
            raise InputError('--config.model.preset=checkpoint needs --checkpoint, whose sizes it takes')
        preset = base.config
    else:
        preset = find_preset(config.model.preset)
    if not base:
        return preset
    found = base.config
    if found.scalar_head and not from_scores:
        raise InputError(
            f'--checkpoint={base.path} is a reward model, which gives scores and no text; give the language model that '
            'it was trained from (base_checkpoint in its model.json)'
        )
    # What changes no weight may change: this is how a context is lengthened.
    of_rope = ('max_seq_len', 'rope_theta', 'rope_scaling')
    for name, value in vars(found).items():
        if name not in ('vocab_size', 'scalar_head', *of_rope) and value != getattr(preset, name):
            raise InputError(
                f'the checkpoint {base.path} has {name} {value}, {config.model.preset} has '
                f'{getattr(preset, name)}; choose the preset that the checkpoint was trained with, or checkpoint'
            )
    if 0 < (wanted := config.model.vocab_size) < found.vocab_size:
        raise InputError(
            f'--config.model.vocab_size={wanted} is less than the checkpoint {base.path} has: {found.vocab_size} '
            'ids; raise it, which adds rows to its tables, or 0 to fit'
        )
    if not config.data.tokenizer and base.tokenizer is None:
        raise InputError(
            f'the checkpoint {base.path} has no tokenizer; give the one it was trained with by '
            '--config.data.tokenizer'
        )
    kept = {name: getattr(found, name) for name in of_rope}
    if kept != {name: getattr(preset, name) for name in of_rope}:
        of_checkpoint = found.rope_scaling is not None and found.rope_scaling.kind != 'llama3'
        logger.info(
            "RoPE and context are %s's: %s and %s have others", base.path if of_checkpoint else config.model.preset,
            base.path, config.model.preset,
        )  # fmt: skip
        if of_checkpoint:
            preset = dataclasses.replace(preset, **kept)
    return with_vocab_size(preset, found.vocab_size)


def find_tokenizer(
    given: str, config: ConfigDict, workdir: epath.Path, base: pretrained.Checkpoint | None
) -> Tokenizer:
    """The workdir's tokenizer; of a new run the given or the checkpoint's, or one trained on the data.

    It is written nowhere yet.
    """
    files: dict[str, bytes] = {}
    with runtime.refused_by_all():
        if runtime.is_main_process():
            # Without a config.json no run has begun here, and a tokenizer may be what is left of another attempt.
            if (workdir / CONFIG_FILE).exists() and any(
                (workdir / name).exists() for name in TOKENIZER_FILES
            ):
                files = own_files(load_tokenizer(workdir))
            elif given:
                with flags_named('--config.data.tokenizer'):
                    files = own_files(pretrained.load_tokenizer(given))
            elif base and base.tokenizer:
                files = own_files(base.tokenizer)
            elif 'vocab_size' not in config.data:
                raise InputError(
                    'there is no tokenizer: give the model to start from by --checkpoint, or the file by '
                    '--config.data.tokenizer'
                )
            else:
                logger.info('training a tokenizer of %d ids', config.data.vocab_size)
                with tempfile.TemporaryDirectory() as folder, flags_named('--config.data.vocab_size'):
                    trained = train_tokenizer(
                        split_list(config.data.train), config.data.vocab_size, f'{folder}/tokenizer.model',
                        text_key=config.data.text_key, separator=config.data.separator,
                    )  # fmt: skip
                    files = own_files(trained)
    everywhere = {name: base64.b64encode(data).decode() for name, data in files.items()}
    sent = json.loads(runtime.bytes_from_main_process(json.dumps(everywhere).encode()))
    with runtime.refused_by_all():
        return tokenizer_of_files(workdir, {name: base64.b64decode(data) for name, data in sent.items()})


def open_origin(
    config: ConfigDict, workdir: epath.Path, checkpoint: str, fork: str, begun: bool
) -> tuple[pretrained.Checkpoint | None, Fork | None]:
    """(the checkpoint of sizes, tokenizer and first weights, the step of another run that a new one starts from)."""
    if checkpoint and fork:
        raise InputError('--checkpoint and --fork are both given; a run starts from one of them')
    if checkpoint:
        with flags_named('--checkpoint'):
            return pretrained.open(checkpoint), None
    if begun:
        forked = (read_record(workdir) or {}).get('fork')
        return pretrained.open(workdir) if forked else None, None
    if fork:
        origin = open_fork(fork, workdir, config)
        return pretrained.open(origin.step), origin
    return None, None


def first_params(model: Transformer, base: pretrained.Checkpoint | None, seed: int, target: Params) -> Params:
    """A checkpoint's weights or fresh ones; born sharded as `target`."""
    if base:
        with flags_named('--checkpoint'):
            return base.params(target, grow_vocabulary=True)
    return jax.jit(functools.partial(init_params, model), out_shardings=shardings_of(target))(
        jax.random.key(seed)
    )


def first_scores(
    model: LlamaForRewardModel, base: pretrained.Checkpoint | None, seed: int, target: Params
) -> Params:
    """As `first_params`, of a reward model: the trunk of a language model with a fresh score, or another's with its."""
    if base is None or base.config.scalar_head:
        return first_params(model, base, seed, target)
    trunk = {name: leaf for name, leaf in target.items() if name != 'score'}
    draw = jax.jit(lambda key: init_params(model, key)['score'], out_shardings=target['score'].sharding)
    return first_params(model, base, seed, trunk) | {'score': draw(jax.random.key(seed))}
