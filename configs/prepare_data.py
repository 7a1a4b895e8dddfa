"""Preparing text, the recipe as argument: --config=configs/prepare_data.py:plain, :llama, and no other.

`llama` makes the seven folders that `configs/pretrain.py` names (LLaMA paper, Table 1) from files that lie as
RedPajama-1T's do; `plain` makes one of whatever it is given. Every key may be set on the command line, a source's too.
"""

from ml_collections import ConfigDict

from llama_jax.data.units import UNIT_BYTES
from llama_jax.errors import InputError

# The folder of each source, and where RedPajama-1T has its files.
_REDPAJAMA = {
    'common_crawl': 'redpajama/common_crawl/*/*.jsonl.zst',
    'c4': 'redpajama/c4/*.jsonl',
    'github': 'redpajama/github/*.jsonl',
    'wikipedia': 'redpajama/wikipedia/*.jsonl',
    'books': 'redpajama/book/*.jsonl',
    'arxiv': 'redpajama/arxiv/*.jsonl',
    'stack_exchange': 'redpajama/stackexchange/*.jsonl',
}


def get_config(recipe: str = 'plain') -> ConfigDict:
    """The sources of a recipe, and what they have in common."""
    config = ConfigDict()
    config.tokenizer = 'data/tokenizer.model'  # sentencepiece or tiktoken file, or a checkpoint that has one
    config.seq_len = 2048  # tokens in a row; training may read them in whole parts
    config.validation_fraction = 0.0  # of the documents, held out by the hash of their text
    config.unit_bytes = UNIT_BYTES  # of text that is packed together, into one shard
    config.on_error = 'stop'  # at the first record without a text; skip: leave them out, count and name them
    config.max_errors = 0  # records that may be left out in all; 0: any number
    config.sources = ConfigDict()  # a single one fills the output folder itself, several a folder each
    if recipe == 'llama':
        config.validation_fraction = 0.001
        for name, files in _REDPAJAMA.items():
            config.sources[name] = source(files)
    elif recipe == 'plain':
        config.sources.documents = source('')
    else:
        raise InputError(f'unknown recipe {recipe!r}; there are llama and plain')
    return config


def source(files: str) -> ConfigDict:
    """Text that becomes one folder of rows."""
    section = ConfigDict()
    section.input = files  # sources, by commas: files, globs, tfds:NAME; '': this source is left out
    section.text_key = 'text'  # the field of records that holds the text; a.b for b within a
    section.separator = ''  # what divides documents in a text file; '': a file is a document
    return section
