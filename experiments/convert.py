"""Converts any Llama to another format, streamed: memory stays small however large the model.

    python -m experiments.convert --input=CKPT --output=PATH --to=huggingface

CKPT is a run's workdir, a folder of Meta or Hugging Face, a .gguf, a .pt or .bin of llama2.c, hf://ORGANISATION/MODEL,
or a folder of PEFT, whose adapter is merged into its base.
Several, `--input=A,B,C`, become one model whose weights are the mean of theirs.
"""

import importlib.util
from collections.abc import Mapping

from absl import flags
from etils import epath
from tqdm import tqdm

from experiments import launch
from experiments.prompting.checkpoint import check_tokenizer
from experiments.run.workdir import hold_folder
from llama_jax import export, pretrained, runtime, storage
from llama_jax.convert.mapping import Source
from llama_jax.convert.weight_mean import mean_of
from llama_jax.errors import InputError
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.conversion import comparable_probes
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.protocol import required

_INPUT = launch.define_path(
    'input',
    None,
    'checkpoint of any format, or several of one model: the mean of their weights',
    required=True,
)
_BASE = launch.define_path(
    'base', '', 'of an adapter: what to merge it into, instead of the base that it names'
)
_OUTPUT = launch.define_path('output', None, 'folder to make; for gguf, the file', required=True)
_TO = flags.DEFINE_enum(
    'to',
    None,
    ['orbax', 'meta', 'huggingface', 'gguf', 'peft', 'gguf_adapter'],
    'format to write',
    required=True,
)
_DTYPE = flags.DEFINE_enum('dtype', '', ['', *export.GGUF_DTYPES], "type to write; '' keeps the input's")
_MODEL_PARALLEL = flags.DEFINE_integer('model_parallel', 1, "number of files of Meta's format")
_TOKENIZER = launch.define_path('tokenizer', '', "tokenizer file or folder, instead of the input's own")
_CHAT = flags.DEFINE_bool(
    'chat', False, "the weights chat: write their family's chat template along, where the input has none"
)
_VERIFY = flags.DEFINE_bool('verify', False, 'read what was written back and compare every value')


def main() -> None:
    """Opens, writes, verifies."""
    runtime.free_memory_at_once()
    storage.check_place(_OUTPUT.value, folder=_TO.value not in ('gguf', 'gguf_adapter'))
    if _CHAT.value and _TO.value not in ('huggingface', 'gguf'):
        raise InputError(f'--chat: {_TO.value} has no place for a chat template; write huggingface or gguf')
    if _MODEL_PARALLEL.value != 1 and _TO.value != 'meta':
        raise InputError(f"--model_parallel splits files of Meta's format; --to={_TO.value} has none")
    with launch.flags_named('--output'):
        storage.check_new(epath.Path(_OUTPUT.value))
    with launch.flags_named('--input', '--base'):
        first, *others = _paths(_INPUT.value)
        checkpoint = pretrained.open(first, _BASE.value)
    if _TO.value == 'gguf' or _CHAT.value:
        check_tokenizer(checkpoint, _TOKENIZER.value)
    is_apart = _TO.value in ('peft', 'gguf_adapter')
    if is_apart and (others or _VERIFY.value):
        raise InputError(f'--to={_TO.value} writes the adapters of one input, and has no --verify')
    if is_apart and not checkpoint.is_adapter:
        raise InputError(
            f'--to={_TO.value}: {first} is a whole model; adapters are written so, of a run that trained some, or of a '
            'folder of PEFT'
        )
    source = _source_of([checkpoint, *map(pretrained.open, others)], any_tokenizer=bool(_TOKENIZER.value))
    tokenizer = pretrained.load_tokenizer(_TOKENIZER.value) if _TOKENIZER.value else checkpoint.tokenizer
    template, files = checkpoint.template, checkpoint.files
    if _CHAT.value and not template:
        template, files = chat_format_for(required(tokenizer)).template, {}
    if _TOKENIZER.value:  # another one's files would contradict it
        files = {}
    hold_folder(epath.Path(_OUTPUT.value), beside=True)
    if is_apart:
        beside = files
        if tokenizer and not files:
            beside = huggingface_files(
                tokenizer, chat_template=template, max_seq_len=source.config.max_seq_len
            )
        _write_adapter(checkpoint, _OUTPUT.value, _TO.value, _DTYPE.value, beside)
        return
    with (
        launch.flags_named('--output', '--to', '--dtype', '--model_parallel'),
        _progress_bar(source, 'writing') as bar,
    ):
        export.save(
            _OUTPUT.value, source, tokenizer, to=_TO.value, dtype=_DTYPE.value, files=files,
            model_parallel=_MODEL_PARALLEL.value, chat_template=template, progress=bar.update,
        )  # fmt: skip
    if _VERIFY.value:
        try:
            with _progress_bar(source, 'verifying') as bar:
                written = pretrained.open(_OUTPUT.value)
                export.verify(written.source, source, dtype=_DTYPE.value, progress=bar.update)
                if importlib.util.find_spec('tokenizers'):  # without it not every format's can be read
                    export.verify_tokenizer(written.tokenizer, tokenizer, _OUTPUT.value)
        except InputError as error:  # what is wrong must not look complete, and is not ours to take away
            output = epath.Path(_OUTPUT.value)
            kept = output.rename(output.with_name(f'{output.name}.damaged'))
            raise InputError(f'{error}; it is now {kept}') from error
    verified = ', read back and found equal' if _VERIFY.value else ''
    without = '' if tokenizer else ', without a tokenizer: there is none in the input'
    print(f'{_OUTPUT.value}: {source.config.num_params:,} weights as {_TO.value}{verified}{without}')


def _paths(text: str) -> list[str]:
    """What --input names: one path, or several with commas between them."""
    return text.split(',') if ',' in text and ('://' in text or not epath.Path(text).exists()) else [text]


def _source_of(checkpoints: list[pretrained.Checkpoint], any_tokenizer: bool) -> Source:
    """The weights of one, or the mean of models that read and write the same tokens.

    Raises:
      InputError: their architectures differ; or their tokenizers, unless any will do.
    """
    first, *others = checkpoints
    if not others:
        return first.source
    source = mean_of([checkpoint.source for checkpoint in checkpoints])
    reference = None if any_tokenizer else first.tokenizer
    for other in others:
        if reference is None or (tokenizer := other.tokenizer) is None:
            continue
        for text in comparable_probes(reference):
            if (found := tokenizer.encode(text)) != (expected := reference.encode(text)):
                raise InputError(
                    f'{other.path} has another tokenizer than {first.path}: {text[:40]!r} is {found[:8]}, there '
                    f'{expected[:8]}; if the weights still mean the same tokens, give one for all by --tokenizer'
                )
    return source


def _write_adapter(
    checkpoint: pretrained.Checkpoint, output: str, to: str, dtype: str, files: Mapping[str, bytes]
) -> None:
    """Writes what a checkpoint of adapters holds beside its base.

    Raises:
      InputError: the format cannot say what was trained.
    """
    adapter, base = checkpoint.adapter, checkpoint.base
    if base.config.vocab_size < checkpoint.config.vocab_size:
        raise InputError(
            f'--to={to}: the vocabulary grew from {base.config.vocab_size} to {checkpoint.config.vocab_size} beside '
            'the adapters; write the whole model, --to=huggingface'
        )
    config = checkpoint.config if checkpoint.config.scalar_head else base.config
    export.save_adapter(
        output, adapter, config, to=to, base=str(base.path), dtype=dtype, files=files,
    )  # fmt: skip
    print(f'{output}: adapters of {len(adapter.low_rank)} matrices as {to}, of the base {base.path}')


def _progress_bar(source: Source, verb: str) -> tqdm:
    """Of bytes, as many as the weights have in the source's type; quantised ones end before the bar does."""
    total = source.config.num_params * source.dtype.itemsize
    return tqdm(total=total, desc=verb, unit='B', unit_scale=True, disable=None, mininterval=0.5)


if __name__ == '__main__':
    launch.run(main)
