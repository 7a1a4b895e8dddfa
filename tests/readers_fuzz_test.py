"""Damaged copies of the files that `tests/convert` does not damage: tokenizers, model.json, documents, sample logs."""

import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint.model_file import MODEL_FILE, read_config, save_config
from llama_jax.data.sources import read_documents
from llama_jax.eval.sample_log import SampleLog
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests import toy
from tests.convert.fuzz import mutations, refused_or_read


def read_tokenizer(path):
    tokenizer = load_tokenizer(path)
    tokenizer.encode('Hello world é 12')
    tokenizer.decode(range(min(tokenizer.vocab_size, 300)))
    huggingface_files(tokenizer, max_seq_len=8)
    gguf_vocabulary(tokenizer)


@pytest.fixture
def readers(tmp_path, shared_data):
    """Name: the sound file's content, and what reads a copy."""
    folder = epath.Path(tmp_path)
    sentencepiece = (shared_data / 'weights/stories260K/tok512.model').read_bytes()
    (folder / 'sound.model').write_bytes(sentencepiece)
    files = huggingface_files(load_tokenizer(folder / 'sound.model'), max_seq_len=8)
    save_config(folder, toy.CONFIG)
    log = b'{"header": {"a": 1}}\n' + b''.join(b'{"index": %d, "x": [1.5]}\n' % i for i in range(9))
    return folder, {
        'a.model': (sentencepiece, read_tokenizer),
        'tokenizer.json': (files['tokenizer.json'], read_tokenizer),
        MODEL_FILE: ((folder / MODEL_FILE).read_bytes(), lambda path: read_config(path.parent)),
        'a.jsonl': (
            b'{"text": "h\\u00e9", "n": [1, 2.5, null]}\n' * 9,
            lambda path: list(read_documents(str(path))),
        ),
        'log.jsonl': (log, lambda path: SampleLog(path, {'a': 1}).close()),
    }


def damage(readers, count, seed):
    folder, files = readers
    for name, (sound, read) in files.items():
        path = folder / name
        path.write_bytes(sound)
        read(path)
        refused = 0
        for data in mutations(sound, np.random.default_rng(seed), count):
            path.write_bytes(data)
            refused += bool(refused_or_read(lambda path=path, read=read: read(path), len(data)))
        # A log drops lines that are damaged.
        assert refused > (count // 4 if name != 'log.jsonl' else 0), name


def test_a_damaged_file_is_refused_in_one_line_or_read(readers):
    damage(readers, 12, seed=0)


@pytest.mark.long
def test_thousands_of_damaged_files(readers):
    damage(readers, 2000, seed=1)
