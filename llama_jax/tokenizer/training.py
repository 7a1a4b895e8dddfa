"""Training a tokenizer of the user's own, with the settings of Llama 2's."""

import io
import os
import re
from collections.abc import Iterable, Iterator

from etils import epath

from llama_jax.errors import InputError
from llama_jax.storage import write_atomically
from llama_jax.tokenizer.text_pieces import without_surrogates


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> None:
    """Trains a tokenizer with the settings of Llama 2's own `trainer_spec` and writes it to `path`.

    Trains on at most 4 MiB of lines spread evenly over the texts, so that it takes seconds on any corpus. The
    same texts give the same file, which appears whole or not at all.

    Args:
      texts: documents, read once.
      vocab_size: number of ids, with 259 for unknown, BOS, EOS and the 256 bytes.
      path: file to write, usually `tokenizer.model`.

    Raises:
      InputError: the texts are too few for `vocab_size`, which must also have room for bytes and characters.
    """
    import sentencepiece

    if vocab_size > _MAX_VOCAB:
        raise InputError(f'vocab_size is {vocab_size}; it must be at most {_MAX_VOCAB}')
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(_sample_lines(texts, max_chars=4 << 20)),
            model_writer=model,
            model_type='bpe',
            vocab_size=vocab_size,
            character_coverage=0.99995,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=16,
            max_sentence_length=_MAX_LINE * 4,
            normalization_rule_name='identity',
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=os.cpu_count() or 1,
            minloglevel=4,  # silence
        )
    except RuntimeError as error:
        raise InputError(_why_training_failed(str(error), vocab_size)) from error
    write_atomically(epath.Path(path), model.getvalue())


_MAX_VOCAB = 1 << 24  # no model has more
_MAX_LINE = 1_000  # characters; sentencepiece silently drops a sentence over its limit, which is in bytes


def _sample_lines(texts: Iterable[str], max_chars: int) -> list[str]:
    """Every n-th line of the texts, n a power of two doubled whenever the sample outgrows `max_chars`."""
    lines: list[str] = []
    stride, size, index = 1, 0, -1
    for line in _training_lines(texts):
        index += 1
        if index % stride:
            continue
        lines.append(line)
        size += len(line)
        if size > max_chars and len(lines) > 1:
            stride *= 2
            lines = lines[::2]
            size = sum(map(len, lines))
    return lines


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, the longest ones cut; a newline itself is left to its byte token, as in Llama's vocabulary."""
    for text in texts:
        for line in without_surrogates(text).replace('\0', '').split('\n'):
            if len(line) <= _MAX_LINE:
                if line:
                    yield line
            else:
                yield from (line[i : i + _MAX_LINE] for i in range(0, len(line), _MAX_LINE))


def _why_training_failed(message: str, vocab_size: int) -> str:
    if largest := re.search(r'too high .*<= (\d+)', message):
        return (
            f'vocab_size {vocab_size} is too large for these texts: they give at most {largest[1]} pieces; '
            f'set it to {largest[1]} or lower, or train on more text'
        )
    if smallest := re.search(r'required_chars\. \d+ vs (\d+)', message):
        return (
            f'vocab_size {vocab_size} is too small: these texts need {smallest[1]} ids for the bytes and '
            f'their characters; set it to {smallest[1]} or more'
        )
    return (
        f'no tokenizer of vocab_size {vocab_size} could be trained on these texts: {message.splitlines()[0]}'
    )
