"""Text to token ids and back: LLaMA 1/2's sentencepiece, Llama 3's tiktoken and Hugging Face's files, one protocol.

BOS and EOS come from flags only. Text that spells a special token is encoded as ordinary characters, so no input can
smuggle one in, unless the caller says so. Tokens that were added without being special are read whole.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.errors import InputError, error_line
from llama_jax.json_file import MAX_BYTES, parse_object, read_at_most
from llama_jax.storage import enable_bucket
from llama_jax.tokenizer.conversion import tokenizer_of, vocabulary_of, with_added
from llama_jax.tokenizer.huggingface_statements import (
    STATING_FILES,
    Statements,
    read_statements,
    stating_files,
)
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.llama2c_vocabulary import is_llama2c, model_of_llama2c
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_jax.tokenizer.tiktoken_tokenizer import RANK_LINE, TiktokenTokenizer
from llama_jax.tokenizer.vocabulary import with_ends

logger = logging.getLogger(__name__)

_JSON, _MODEL, _LLAMA2C = 'tokenizer.json', 'tokenizer.model', 'tokenizer.bin'


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Opens a tokenizer file; the content, never the name, tells sentencepiece, tiktoken and JSON apart.

    Args:
      path: the file, or a directory that holds `tokenizer.model`, `tokenizer.json`, exactly one `*.model`, or
        llama2.c's `tokenizer.bin`. Of a `tokenizer.model` and a `tokenizer.json` the one is taken that says more and
        agrees with the rows that a `config.json` there tells of. Hugging Face's files beside it say more of its tokens.

    Raises:
      InputError: nothing is there, several files fit, or the file is none of these.
    """
    enable_bucket(path)
    file = epath.Path(path)
    folder = file if file.is_dir() else file.parent
    if not file.is_dir():
        return parse_tokenizer(os.fspath(file), _read(file), stating_files(folder))
    names = {p.name for p in file.iterdir()}
    models = sorted(name for name in names if name.endswith('.model') or name in (_JSON, _LLAMA2C))
    chosen = (
        [name for name in (_MODEL, _JSON) if name in names] or [n for n in models if n != _LLAMA2C] or models
    )
    if len(chosen) != 1 and _MODEL not in chosen:
        found = ', '.join(models) or 'no *.model file'
        raise InputError(
            f'no tokenizer in {path}: looked for tokenizer.model, tokenizer.json or a single *.model, '
            f'found {found}; give the file itself'
        )
    return tokenizer_of_files(folder, {name: _read(folder / name) for name in chosen} | stating_files(folder))


def tokenizer_of_files(folder: str | os.PathLike, files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of a folder's files, given by their names.

    Args:
      folder: for messages.
      files: `tokenizer.model`, `tokenizer.json` or both, or one other file; and those that say more of its tokens.

    Raises:
      InputError: something is damaged.
    """
    place = os.fspath(folder)
    beside = {name: data for name, data in files.items() if name in STATING_FILES}
    named = [name for name in files if name not in STATING_FILES and not name.endswith('.jinja')]
    if not named:
        raise InputError(f'no tokenizer in {place}: looked for {_MODEL} or {_JSON}')
    chosen = named[0]
    if len(named) > 1:
        chosen, agree = _richer(place, files[_MODEL], files[_JSON], read_statements(beside, place))
        if not agree:
            logger.info(
                '%s: the tokenizer is %s, which says more of its tokens than the other', place, chosen
            )
    return parse_tokenizer(os.path.join(place, chosen), files[chosen], beside)


def parse_tokenizer(path: str, data: bytes, beside: Mapping[str, bytes] | None = None) -> Tokenizer:
    """The tokenizer of a file's content.

    Args:
      path: names it in errors.
      data: the content.
      beside: contents of `STATING_FILES` by name; None: those that stand beside the path.

    Raises:
      InputError: it is of no kind, or damaged.
    """
    folder = epath.Path(path).parent
    beside = stating_files(folder) if beside is None else beside
    if data[:4096].lstrip().startswith(b'{'):
        return HuggingFaceTokenizer(path, data, beside)
    if is_llama2c(data):
        data = model_of_llama2c(data, path)
    is_ranks = bool(RANK_LINE.match(data[:4096]))
    native = TiktokenTokenizer(path, data) if is_ranks else SentencePieceTokenizer(path, data)
    if not beside:
        return native
    said = read_statements(beside, str(folder))
    if (vocabulary := with_added(vocabulary_of(native), said.added) if said.added else None) is None:
        ends = said.ends(native.id_of, path, native.special_tokens, size=native.vocab_size, own=native.ends)
        return with_ends(native, ends)
    ids = {name: id for id, name in enumerate(vocabulary.tokens)}
    ends = said.ends(ids.get, path, vocabulary.special_ids(), size=len(ids), own=native.ends)
    return tokenizer_of(dataclasses.replace(vocabulary, ends=ends), path)


def _richer(place: str, model: bytes, definition: bytes, said: Statements) -> tuple[str, bool]:
    """Which of two descriptions says more and agrees with the embedding's rows; whether both say the same."""
    try:
        parsed = parse_object(definition, f'{place}/{_JSON}')
        by_id, added = _names_in(parsed)
        puts = _puts(parsed.get('post_processor'))
    except (InputError, TypeError, ValueError, AttributeError, LookupError) as error:
        logger.warning('%s/%s is passed over for %s: %s', place, _JSON, _MODEL, error_line(error))
        return _MODEL, False
    vocabulary = vocabulary_of(parse_tokenizer(f'{place}/{_MODEL}', model, {}))
    names, types = vocabulary.tokens, vocabulary.types
    if said.rows and max(by_id, default=0) >= said.rows >= len(names):
        return _MODEL, False
    if puts != (said.add_bos is not False, said.add_eos is True):
        return _JSON, False
    same = all(id < len(names) and names[id] == name for id, name in by_id.items())
    kinds = {True: (CONTROL, UNKNOWN), False: (USER_DEFINED,)}
    agree = same and all(types[id] in kinds[special] for id, special in added.items())
    return (_MODEL if agree else _JSON), agree


def _puts(processor: Any) -> tuple[bool, bool]:
    """Whether the last step of a tokenizer.json puts tokens before a text, and behind it."""
    steps = [processor, *((processor or {}).get('processors') or [])]
    templates = [list(map(dict, step['single'])) for step in steps if step and 'single' in step]
    before = any('SpecialToken' in template[0] for template in templates)
    return before, any('SpecialToken' in template[-1] for template in templates)


def _names_in(definition: dict[str, Any]) -> tuple[dict[int, str], dict[int, bool]]:
    """The tokens of a tokenizer.json by id, and of those that were added whether they are special."""
    vocab = definition['model']['vocab']
    listed = (
        enumerate(piece[0] for piece in vocab)
        if isinstance(vocab, list)
        else ((i, t) for t, i in vocab.items())
    )
    by_id = {int(id): str(token) for id, token in listed}
    added = {}
    for token in definition.get('added_tokens') or []:
        by_id[int(token['id'])] = str(token['content'])
        added[int(token['id'])] = bool(token.get('special'))
    return by_id, added


def _read(file: epath.Path) -> bytes:
    try:
        with file.open('rb') as opened:
            data = read_at_most(opened, MAX_BYTES + 1)
        reason = 'the file is empty'
    except OSError as error:
        data, reason = b'', error.strerror or type(error).__name__
    if len(data) > MAX_BYTES:
        raise InputError(f'{file} has more than {MAX_BYTES >> 20} MiB; no tokenizer is that large')
    if not data:
        raise InputError(f'no tokenizer at {file}: {reason}; give a tokenizer.model or its directory')
    return data
