"""Tokenises and packs text once, before training: ArrayRecord shards of fixed-length rows, and a manifest.

    python -m experiments.prepare_data --input=GLOB[,GLOB] --tokenizer=FILE --seq_len=T --output=DIR

Point --config.data.train at the folder.
"""

import itertools
import logging
import time

import tqdm
from absl import flags
from etils import epath

from experiments import launch
from experiments.config_file import split_list
from experiments.workdir import hold_folder
from llama_jax import storage
from llama_jax.data.prepared import PreparedRows, write_prepared
from llama_jax.data.sources import check_source, read_documents
from llama_jax.pretrained import load_tokenizer

_INPUT = launch.define_path('input', None, 'sources, comma-separated: files, globs, tfds:NAME', required=True)
_TOKENIZER = launch.define_path('tokenizer', None, 'sentencepiece or tiktoken file', required=True)
_SEQ_LEN = flags.DEFINE_integer('seq_len', None, 'tokens in a row', required=True)
_OUTPUT = launch.define_path('output', None, 'folder to write, local or gs://...', required=True)
_TEXT_KEY = flags.DEFINE_string('text_key', 'text', 'the field of JSONL and TFDS records that holds the text')
_SEPARATOR = flags.DEFINE_string('separator', '', 'what divides documents in a text file')
_VERIFY = flags.DEFINE_bool('verify', False, 'read what was written back and compare it with its hashes')

_SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger('llama_jax.prepare_data')


def main() -> None:
    """Reads, tokenises, packs, writes."""
    storage.check_place(_OUTPUT.value, folder=True)
    with launch.flags_named('--tokenizer'):
        tokenizer = load_tokenizer(_TOKENIZER.value)
    sources = split_list(_INPUT.value)
    with launch.flags_named('--input'):
        for source in sources:
            check_source(source)
    documents = itertools.chain.from_iterable(
        read_documents(source, text_key=_TEXT_KEY.value, separator=_SEPARATOR.value) for source in sources
    )
    # Without a terminal a bar would be one endless line: there it is a line of the log now and then.
    hold_folder(epath.Path(_OUTPUT.value), beside=True)
    with tqdm.tqdm(unit='B', unit_scale=True, disable=None) as bar:
        said = time.monotonic()

        def progress(num_documents: int, num_bytes: int) -> None:
            nonlocal said
            if not bar.disable:
                bar.set_postfix_str(f'{num_documents:,} documents')
                bar.update(num_bytes - bar.n)
            elif time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                logger.info('tokenised %s documents, %.1f MB', f'{num_documents:,}', num_bytes / 1e6)

        manifest = write_prepared(documents, tokenizer, _SEQ_LEN.value, _OUTPUT.value, progress=progress)
    if _VERIFY.value:
        PreparedRows(_OUTPUT.value).verify()
    print(
        f'{_OUTPUT.value}: {manifest["num_rows"]:,} rows of {_SEQ_LEN.value} tokens from '
        f'{manifest["num_documents"]:,} documents, {manifest["num_bytes"] / 1e6:.1f} MB'
        + (', read back and found equal' if _VERIFY.value else '')
    )


if __name__ == '__main__':
    launch.run(main)
