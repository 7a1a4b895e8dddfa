"""A vocabulary as the keys `tokenizer.*` of a GGUF file, both ways, as llama.cpp writes and reads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.errors import InputError
from llama_jax.json_file import show_json
from llama_jax.tokenizer.conversion import tokenizer_of, vocabulary_of
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED
from llama_jax.tokenizer.splitters import SPLITTERS, USUAL_NAMES
from llama_jax.tokenizer.text_pieces import without_surrogates
from llama_jax.tokenizer.vocabulary import Ends, Family, Vocabulary, check_tokens, is_hole

_MAX_SCORE = 3.4e38  # what sentencepiece's float32 holds
_NO_SCORE = -1000.0  # of an id without a token
_MODELS: dict[str, Family] = {'llama': 'sentencepiece', 't5': 'unigram', 'gpt2': 'byte-level'}

# What llama.cpp takes for the end of an answer by its name alone, whatever the keys say, and then for a control token.
_END_NAMES = (
    '</s>', '<|eot_id|>', '<|im_end|>', '<|end|>', '<|return|>', '<|call|>', '<|flush|>', '<|calls|>', '<end_of_turn>',
    '<|endoftext|>', '<|eom_id|>', '<EOT>', '_<EOT>', '[EOT]', '[EOS]', '<eos>', '<turn|>', '<|tool_response>', '[e~[',
    '<|end_of_text|>', '<end_of_utterance>', '<｜end▁of▁sentence｜>', '<|fim_pad|>', '<fim-pad>', '<fim_pad>', '<PAD>',
    '[PAD]', '<|fim_repo|>', '<|repo_name|>', '<fim-repo>', '<REPO>', '<reponame>', '<|file_sep|>',
)  # fmt: skip


def gguf_vocabulary(
    tokenizer: Tokenizer, chat_template: str = '', vocab_size: int = 0
) -> dict[str, str | int | bool | list[str] | list[int] | list[float]]:
    """The `tokenizer.*` keys of a GGUF file, as llama.cpp's convert_hf_to_gguf.py writes them.

    Args:
      tokenizer: any.
      chat_template: Jinja, as in `chat_format`; '' for none.
      vocab_size: rows of the embedding; the ids that the tokenizer lacks become unused tokens.

    Raises:
      InputError: as `vocabulary_of`; or llama.cpp would read another vocabulary in these keys, or stop elsewhere.
    """
    vocabulary = vocabulary_of(tokenizer)
    ends, path = vocabulary.ends, tokenizer.path
    size = len(vocabulary.tokens)
    padding = range(size, max(size, vocab_size))
    tokens = vocabulary.tokens + [f'[PAD{i}]' for i in padding]
    if len(set(tokens)) != len(tokens):
        raise InputError(
            f'{path} has a token of the name [PAD...] of an id without one; llama.cpp needs each once'
        )
    keys: dict[str, Any] = {
        'ggml.model': next(model for model, family in _MODELS.items() if family == vocabulary.family),
        'ggml.pre': vocabulary.splitter or 'default',
        'ggml.tokens': tokens,
        'ggml.token_type': vocabulary.types + [UNUSED] * len(padding),
    }
    if vocabulary.family == 'byte-level':
        keys['ggml.merges'] = [f'{left} {right}' for left, right in vocabulary.merges()]
    else:
        if vocabulary.charsmap:
            raise InputError(f"{path} normalizes characters, which no Llama's GGUF does; keep its own file")
        if (BYTE in vocabulary.types) == (vocabulary.family == 'unigram'):
            what = 'spells bytes in a Unigram' if BYTE in vocabulary.types else 'has no tokens for bytes'
            raise InputError(f'{path} {what}, which llama.cpp cannot; keep its own file')
        keys['ggml.scores'] = vocabulary.scores + [_NO_SCORE] * len(padding)
        if vocabulary.unk_id is not None:
            keys['ggml.unknown_token_id'] = vocabulary.unk_id
        keys['ggml.add_space_prefix'] = vocabulary.add_dummy_prefix
        if vocabulary.remove_extra_whitespaces:
            keys['ggml.remove_extra_whitespaces'] = True
    eos_id = end_of_turn(vocabulary) if chat_template else ends.eos_id
    keys |= _end_keys(vocabulary, eos_id, path)
    keys |= {'ggml.add_bos_token': ends.add_bos, 'ggml.add_eos_token': ends.add_eos}
    if chat_template:
        keys['chat_template'] = chat_template
    return {f'tokenizer.{key}': value for key, value in keys.items()}


def _end_keys(vocabulary: Vocabulary, eos_id: int, path: str) -> dict[str, int]:
    """The ids of BOS, EOS and all other ends, of which GGUF has room for two without a name that llama.cpp knows."""
    ends = vocabulary.ends
    keys = {'ggml.eos_token_id': eos_id}
    if ends.bos_id is not None:
        keys['ggml.bos_token_id'] = ends.bos_id
    if ends.pad_id is not None and ends.pad_id < len(vocabulary.tokens):
        keys['ggml.padding_token_id'] = ends.pad_id
    others = [
        id for id in ends.stop_ids
        if id != eos_id and id < len(vocabulary.tokens) and vocabulary.tokens[id] not in _END_NAMES
    ]  # fmt: skip
    if len(others) > 2:
        raise InputError(
            f'{path} ends answers at the ids {", ".join(map(str, ends.stop_ids))}; GGUF has room for three'
        )
    return keys | dict(zip(('ggml.eot_token_id', 'ggml.eom_token_id'), others, strict=False))


def end_of_turn(vocabulary: Vocabulary) -> int:
    """What ends a turn in a chat: Llama 3 has a token for it, where EOS is not stated to be another."""
    ends, tokens = vocabulary.ends, vocabulary.tokens
    if tokens[ends.eos_id] != '<|end_of_text|>':
        return ends.eos_id
    return next((id for id in ends.stop_ids if id < len(tokens) and tokens[id] == '<|eot_id|>'), ends.eos_id)


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe.

    Args:
      metadata: keys and values of the file, `tokenizer.*` among them.
      path: of the file.

    Raises:
      InputError: they describe none of Llama's, or contradict themselves.
    """
    return tokenizer_of(vocabulary_from_gguf(metadata, path), path)


def vocabulary_from_gguf(metadata: Mapping[str, Any], path: str) -> Vocabulary:
    """The vocabulary that a GGUF file's metadata describe; see `tokenizer_from_gguf`."""
    model = metadata.get('tokenizer.ggml.model')
    if model not in ('llama', 'gpt2', 't5'):
        raise InputError(f'{path}: tokenizer.ggml.model is {model!r}; Llama has llama or gpt2')
    tokens = _list(metadata, path, 'tokens', str)
    if metadata.get('tokenizer.ggml.token_type') is None:
        types = [NORMAL] * len(tokens)
    else:
        types = _list(metadata, path, 'token_type', int, len(tokens))
    if wrong := set(types) - set(range(NORMAL, BYTE + 1)):
        raise InputError(f'{path}: tokenizer.ggml.token_type holds {min(wrong)}; the types are 1 to 6')
    size = len(tokens)
    while size and is_hole(tokens[size - 1], types[size - 1], size - 1):
        size -= 1
    tokens, types = tokens[:size], types[:size]
    check_tokens(tokens, path)
    if len(set(tokens)) != size:
        raise InputError(f'{path}: tokenizer.ggml.tokens repeats a token; each has one id')
    if without_surrogates(joined := ''.join(tokens)) != joined:
        raise InputError(f'{path}: tokenizer.ggml.tokens holds what is no Unicode; its strings are UTF-8')
    named = {token: id for id, token in enumerate(tokens) if token in _END_NAMES}
    for id in named.values():
        types[id] = CONTROL if types[id] not in (CONTROL, UNKNOWN) else types[id]
    splitter = ''
    if model == 'gpt2':
        splitter = metadata.get('tokenizer.ggml.pre', 'llama-bpe')  # the first files of Llama 3 say nothing
        if not isinstance(splitter, str) or splitter not in SPLITTERS:
            raise InputError(
                f'{path}: tokenizer.ggml.pre is {show_json(splitter)}; known are {", ".join(USUAL_NAMES)} and other '
                'names of these, so give the tokenizer.json that the weights were trained with as their tokenizer'
            )
    vocabulary = Vocabulary(
        _MODELS[model], tokens, types, _ends(metadata, path, model, splitter, named, size), splitter=splitter
    )
    if model == 'gpt2':
        merges = _list(metadata, path, 'merges', str)
        pairs = [(merge[:cut], merge[cut + 1 :]) for merge in merges if (cut := merge.find(' ', 1)) > 0]
        return dataclasses.replace(vocabulary, pairs=pairs)
    scores = _list(metadata, path, 'scores', float)
    if len(scores) < size or not all(abs(score) <= _MAX_SCORE for score in scores):
        raise InputError(
            f'{path}: tokenizer.ggml.scores holds {len(scores)} values for {size} tokens, or one that is '
            'not finite in float32'
        )
    unknown = _id(
        metadata, path, 'unknown_token_id', size, default=types.index(UNKNOWN) if UNKNOWN in types else 0
    )
    # Sentencepiece believes all of it, and it comes from anybody.
    if metadata.get('tokenizer.ggml.precompiled_charsmap') is not None:
        raise InputError(
            f'{path}: tokenizer.ggml.precompiled_charsmap normalizes characters, which no Llama does; give the '
            'tokenizer.model that the weights were trained with as their tokenizer'
        )
    return dataclasses.replace(
        vocabulary,
        scores=scores[:size],
        add_dummy_prefix=_flag(metadata, path, 'add_space_prefix', default=True),
        remove_extra_whitespaces=_flag(metadata, path, 'remove_extra_whitespaces', default=False),
        unk_id=unknown,
    )


def _ends(
    metadata: Mapping[str, Any], path: str, model: str, splitter: str, named: Mapping[str, int], size: int
) -> Ends:
    """How texts begin and end, with llama.cpp's defaults."""
    usual = {'llama': (1, 2), 't5': (None, 1), 'gpt2': (None, named.get('<|end_of_text|>'))}[model]
    bos_id = _id(metadata, path, 'bos_token_id', size, default=usual[0])
    eos_id = _id(metadata, path, 'eos_token_id', size, default=usual[1])
    if eos_id is None:
        raise InputError(f'{path}: tokenizer.ggml.eos_token_id is None; it must be an id, 0 to {size - 1}')
    others = [_id(metadata, path, f'{name}_token_id', size, default=None) for name in ('eot', 'eom')]
    stop_ids = {eos_id, *named.values(), *(id for id in others if id is not None)}
    puts = SPLITTERS[splitter].add_bos if splitter else model == 'llama'
    return Ends(
        bos_id, eos_id, tuple(sorted(stop_ids)),
        _flag(metadata, path, 'add_bos_token', default=puts) and bos_id is not None,
        _flag(metadata, path, 'add_eos_token', default=model == 't5'),
        _id(metadata, path, 'padding_token_id', size, default=None),
    )  # fmt: skip


def _list(metadata: Mapping[str, Any], path: str, name: str, kind: Any, length: int = 0) -> list[Any]:
    """A list of the metadata, its elements and length checked."""
    value = metadata.get(f'tokenizer.ggml.{name}')
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        found = 'missing' if value is None else f'of type {type(value).__name__}'
        raise InputError(f'{path}: tokenizer.ggml.{name} is {found}; a list belongs there')
    for element in value:
        if not isinstance(element, kind) or isinstance(element, bool):
            raise InputError(
                f'{path}: tokenizer.ggml.{name} holds a {type(element).__name__}: {element!r:.40}'
            )
    if length and len(value) != length:
        raise InputError(f'{path}: tokenizer.ggml.{name} has {len(value)} elements for {length} tokens')
    return value


def _id(metadata: Mapping[str, Any], path: str, name: str, size: int, *, default: int | None) -> int | None:
    value = metadata.get(f'tokenizer.ggml.{name}', default)
    if value is None and f'tokenizer.ggml.{name}' not in metadata:
        return None
    if name == 'padding_token_id' and isinstance(value, int) and value >= size:
        return None  # of an id without a token
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
        raise InputError(f'{path}: tokenizer.ggml.{name} is {value!r}; it must be an id, 0 to {size - 1}')
    return value


def _flag(metadata: Mapping[str, Any], path: str, name: str, *, default: bool) -> bool:
    value = metadata.get(f'tokenizer.ggml.{name}', default)
    if not isinstance(value, bool):
        raise InputError(f'{path}: tokenizer.ggml.{name} is {value!r}; it must be true or false')
    return value
