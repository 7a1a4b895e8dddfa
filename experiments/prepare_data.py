"""Tokenises and packs text once, before training: shards of fixed-length rows, and manifests that describe them.

    python -m experiments.prepare_data --input=GLOB[,GLOB] --tokenizer=FILE --seq_len=T --output=DIR
    python -m experiments.prepare_data --config=configs/prepare_data.py:llama --output=data

Point --config.data.train at the folder. Killed, the same command goes on, with any number of workers. What is in a
folder, in one of its rows or in the batch of a run's step, and where each document came from, is shown by

    python -m experiments.prepare_data --inspect=DIR [--row=N] [--tokenizer=FILE] [--output=FILE.png]
    python -m experiments.prepare_data --inspect=WORKDIR --step=N
"""

import os
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from experiments import launch
from experiments.preparation.inspection import inspect
from experiments.preparation.progress_line import Progress
from experiments.preparation.report import describe_report, draw_report
from experiments.run.config_file import split_list
from experiments.run.workdir import hold_folder
from llama_jax import pretrained, runtime, storage
from llama_jax.data.preparation import Machine, Preparation, TextSource
from llama_jax.data.prepare import prepare
from llama_jax.data.prepared import VALIDATION, PreparedRows, is_prepared
from llama_jax.data.sources import Reading, check_source
from llama_jax.data.units import UNIT_BYTES
from llama_jax.errors import InputError
from llama_jax.tokenizer.tokenizer import load_tokenizer

_CONFIG = config_flags.DEFINE_config_file('config', None, 'recipe of several sources: FILE.py:RECIPE')
_INPUT = launch.define_path('input', None, 'sources, comma-separated: files, globs, tfds:NAME')
_TOKENIZER = launch.define_path('tokenizer', None, 'its file, or a checkpoint that has one')
_SEQ_LEN = flags.DEFINE_integer('seq_len', None, 'tokens in a row')
_OUTPUT = launch.define_path('output', None, 'folder to write, local or gs://...; of --inspect a picture')
_TEXT_KEY = flags.DEFINE_string(
    'text_key', 'text', 'the field of records that holds the text; a.b for b within a'
)
_SEPARATOR = flags.DEFINE_string('separator', '', 'what divides documents in a text file')
_VERIFY = flags.DEFINE_bool('verify', False, 'read what was written back and compare it with its hashes')
_UNIT_BYTES = flags.DEFINE_integer('unit_bytes', None, 'of text that is packed together, into one shard')
_ON_ERROR = flags.DEFINE_string('on_error', None, 'stop at a record without text, or skip it')
_MAX_ERRORS = flags.DEFINE_integer('max_errors', None, 'records that may be left out in all; 0: any number')
_NUM_WORKERS = flags.DEFINE_integer(
    'num_workers', 0, 'processes on this machine; 0: one a core', lower_bound=0
)
_NUM_SHARDS = flags.DEFINE_integer('num_shards', 1, 'machines that write this output together', 1, 1 << 16)
_SHARD_INDEX = flags.DEFINE_integer('shard_index', 0, 'which of them this is', lower_bound=0)
_INSPECT = launch.define_path('inspect', None, 'show a prepared folder, or what a step of a workdir reads')
_ROW = flags.DEFINE_integer('row', None, 'of --inspect: a row, decoded where there is a --tokenizer')
_STEP = flags.DEFINE_integer('step', None, 'of --inspect: the step of a run, whose documents are named')


def main() -> None:
    """Reads, tokenises, packs, writes; or shows what was written."""
    jax.config.update('jax_platforms', 'cpu')  # an accelerator has no part in it, and may be a training's
    launch.find_devices()
    if _INSPECT.value is not None:
        for flag in (_CONFIG, _INPUT, _SEQ_LEN, _TEXT_KEY, _SEPARATOR, _VERIFY, _UNIT_BYTES, _ON_ERROR, _MAX_ERRORS,
                     _NUM_WORKERS, _NUM_SHARDS, _SHARD_INDEX):  # fmt: skip
            if flag.present:
                raise InputError(
                    f'--{flag.name} is for preparing; --inspect takes --row, --step, --tokenizer, --output'
                )
        with launch.flags_named('--inspect', '--row', '--step', '--tokenizer', '--output'):
            print(inspect(_INSPECT.value, _ROW.value, _STEP.value, _TOKENIZER.value, _OUTPUT.value))
        return
    for flag in (_ROW, _STEP):
        if flag.value is not None:
            raise InputError(f'--{flag.name} is of --inspect=DIR; give that too')
    if _OUTPUT.value is None:
        raise InputError('--output is required, the folder to write')
    runtime.free_memory_at_once()
    storage.check_place(_OUTPUT.value, folder=True)
    asked = {
        'seq_len': _SEQ_LEN.value, 'unit_bytes': _UNIT_BYTES.value, 'on_error': _ON_ERROR.value,
        'max_errors': _MAX_ERRORS.value,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    if _CONFIG.value is None:
        for name, value in (
            ('input', _INPUT.value),
            ('tokenizer', _TOKENIZER.value),
            ('seq_len', _SEQ_LEN.value),
        ):
            if value in (None, ''):
                raise InputError(f'--{name} is required, or --config=configs/prepare_data.py:RECIPE')
        reading = Reading(_TEXT_KEY.value, _SEPARATOR.value)
        sources, tokenizer_file = (
            (TextSource('documents', split_list(_INPUT.value), reading),),
            _TOKENIZER.value,
        )
        asked = {'unit_bytes': UNIT_BYTES} | asked
    else:
        for flag in (_INPUT, _TEXT_KEY, _SEPARATOR):
            if flag.present:
                raise InputError(
                    f'--{flag.name} and --config are both given; set --config.sources.NAME.{flag.name} instead'
                )
        sources, of_recipe = read_recipe(_CONFIG.value)
        asked, tokenizer_file = of_recipe | asked, _TOKENIZER.value or _CONFIG.value.tokenizer
    with launch.flags_named(*(f'--{name}' for name in asked)):
        preparation = Preparation(_OUTPUT.value, sources, **asked)
    if _MAX_ERRORS.present and preparation.on_error != 'skip':
        raise InputError('--max_errors counts what --on_error=skip leaves out; give that too')
    with launch.flags_named('--tokenizer'):
        tokenizer = pretrained.load_tokenizer(tokenizer_file)
    # What opens all checkpoints takes workers half a second and 30 MB to import; the vocabulary of a GGUF needs it.
    is_gguf = storage.read_range(epath.Path(tokenizer.path), 0, 4) == b'GGUF'
    opens = pretrained.load_tokenizer if is_gguf else load_tokenizer
    with launch.flags_named('--shard_index', '--num_shards'):
        machine = Machine(_SHARD_INDEX.value, _NUM_SHARDS.value)
    if machine.count == 1:  # several tell each other what is wrong
        with launch.flags_named('--input'):
            for source in preparation.sources:
                for text in source.inputs:
                    check_source(text)
    flags_of_rows = (
        _CONFIG, _INPUT, _TEXT_KEY, _SEPARATOR, _TOKENIZER, _SEQ_LEN, _UNIT_BYTES, _ON_ERROR, _MAX_ERRORS, _OUTPUT
    )  # fmt: skip
    output = epath.Path(_OUTPUT.value)
    mark = '' if machine.count == 1 else f'-{machine.index}-of-{machine.count}'
    hold_folder(output.parent / f'{output.name}{mark}', beside=True)
    with (
        Progress() as progress,
        launch.flags_named(*(f'--{flag.name}' for flag in flags_of_rows if flag.present)),
    ):
        report = prepare(
            preparation, tokenizer, num_workers=_NUM_WORKERS.value or len(os.sched_getaffinity(0)), machine=machine,
            open_tokenizer=opens, advance=progress.advance, draw=draw_report,
        )  # fmt: skip
    if _VERIFY.value:
        for source in preparation.sources:
            folder = preparation.folder(source)
            PreparedRows(folder).verify()
            if is_prepared(str(folder / VALIDATION)):
                PreparedRows(folder / VALIDATION).verify()
    print(describe_report(report, _OUTPUT.value) + (', read back and found equal' if _VERIFY.value else ''))


def read_recipe(config: ConfigDict) -> tuple[tuple[TextSource, ...], dict[str, Any]]:
    """(its sources, what else is prepared as it says)."""
    sources = tuple(
        TextSource(name, split_list(section.input), Reading(section.text_key, section.separator))
        for name, section in config.sources.items()
        if section.input
    )
    if not sources:
        raise InputError('no source has an input; set --config.sources.NAME.input to files')
    names = ('seq_len', 'unit_bytes', 'on_error', 'max_errors', 'validation_fraction')
    return sources, {name: config[name] for name in names}


if __name__ == '__main__':
    launch.run(main, find=False)
