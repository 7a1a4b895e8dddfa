"""One description of a vocabulary, and any tokenizer in any format's words: Meta's file, Hugging Face's folder, GGUF.

Two families: sentencepiece BPE (LLaMA 1 and 2), whose pieces carry scores, and byte-level BPE (Llama 3), whose ids are
its ranks. Both merge the neighbours that make the best token, so that a list of pairs says the same as the scores do.
"""

import base64
import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from llama_jax.json_file import parse_object
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    MAX_TOKEN,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
    write_model,
)
from llama_jax.tokenizer.text_pieces import without_surrogates
from llama_jax.tokenizer.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    llama3_special_names,
)
from llama_jax.types import InputError

_MAX_SCORE = 3.4e38  # what sentencepiece's float32 holds


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer knows.

    Attributes:
      family: which of the two.
      tokens: by id; sentencepiece's pieces, or GPT-2's spelling of bytes and the names of special tokens.
      types: by id.
      scores: by id, the best merge has the highest; empty if byte-level.
      bos_id: begins a document.
      eos_id: ends it.
      add_dummy_prefix: whether a text is read as if a space came before it (sentencepiece).
      remove_extra_whitespaces: whether outer spaces go and inner ones are squeezed; not so in Llama (sentencepiece).
    """

    family: Literal['sentencepiece', 'byte-level']
    tokens: list[str]
    types: list[int]
    scores: list[float]
    bos_id: int
    eos_id: int
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False

    def merges(self) -> list[tuple[str, str]]:
        """Every pair of tokens that makes a token, the best first."""
        order = [i for i, kind in enumerate(self.types) if kind == NORMAL]
        if self.scores:
            order.sort(key=lambda i: -self.scores[i])
        ids = {self.tokens[i]: i for i in order}
        pairs = []
        for token in map(self.tokens.__getitem__, order):
            cuts = (cut for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids)
            found = [(token[:cut], token[cut:]) for cut in cuts]
            pairs += sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]])) if len(found) > 1 else found
        return pairs


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer of what reads or writes text.

    Raises:
      InputError: it is None, as that of a checkpoint without one.
    """
    if tokenizer is None:
        raise InputError(
            'text needs a tokenizer, and the checkpoint has none; give the one that the weights were trained with'
        )
    return tokenizer


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The description of any tokenizer.

    Raises:
      InputError: it is of neither family, or does what a vocabulary cannot say.
    """
    tokenizer = _native(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = read_model(tokenizer.file_bytes, tokenizer.path)
        tokens, scores, types = (list(column) for column in zip(*model.pieces, strict=True))
        return Vocabulary(
            'sentencepiece', tokens, types, scores, tokenizer.bos_id, tokenizer.eos_id,
            model.add_dummy_prefix, model.remove_extra_whitespaces,
        )  # fmt: skip
    names = list(tokenizer.special_tokens)
    if names == llama3_special_names():
        names = llama3_special_names(huggingface=True)  # GGUF's are those too
    lines = tokenizer.file_bytes.split()[::2]
    tokens = [base64.b64decode(line).decode('latin1').translate(_SPELLING) for line in lines]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(names)
    return Vocabulary('byte-level', tokens + names, types, [], tokenizer.bos_id, tokenizer.eos_id)


def model_file(tokenizer: Tokenizer) -> bytes:
    """The bytes of a `tokenizer.model` that gives the same ids; those of its own file, where it has one.

    Raises:
      InputError: such a file cannot say what the tokenizer does.
    """
    native = _native(tokenizer)
    if isinstance(native, TiktokenTokenizer) and len(native.special_tokens) != 256:
        raise InputError(
            f'{tokenizer.path} has {len(native.special_tokens)} special tokens; a tokenizer.model of Llama 3 '
            'stands for 256, so keep its tokenizer.json'
        )
    return native.file_bytes


def gguf_vocabulary(
    tokenizer: Tokenizer, chat_template: str = '', vocab_size: int = 0
) -> dict[str, str | int | bool | list[str] | list[int] | list[float]]:
    """The `tokenizer.*` keys of a GGUF file, as llama.cpp's convert_hf_to_gguf.py writes them.

    Args:
      tokenizer: any.
      chat_template: Jinja, as in `chat_format`; '' for none.
      vocab_size: rows of the embedding; the ids that the tokenizer lacks become unused tokens.

    Raises:
      InputError: as `vocabulary_of`.
    """
    vocabulary = vocabulary_of(tokenizer)
    size = len(vocabulary.tokens)
    padding = range(size, max(size, vocab_size))
    keys: dict[str, Any] = {
        'ggml.model': 'llama' if vocabulary.scores else 'gpt2',
        'ggml.pre': 'default' if vocabulary.scores else 'llama-bpe',
        'ggml.tokens': vocabulary.tokens + [f'[PAD{i}]' for i in padding],
        'ggml.token_type': vocabulary.types + [UNUSED] * len(padding),
    }
    if vocabulary.scores:
        keys['ggml.scores'] = vocabulary.scores + [-1000.0] * len(padding)
        keys['ggml.unknown_token_id'] = vocabulary.types.index(UNKNOWN)
        keys['ggml.add_space_prefix'] = vocabulary.add_dummy_prefix
        if vocabulary.remove_extra_whitespaces:
            keys['ggml.remove_extra_whitespaces'] = True
    else:
        keys['ggml.merges'] = [f'{left} {right}' for left, right in vocabulary.merges()]
    keys |= {
        'ggml.bos_token_id': vocabulary.bos_id,
        'ggml.eos_token_id': end_of_turn(vocabulary) if chat_template else vocabulary.eos_id,
        'ggml.add_bos_token': True,
        'ggml.add_eos_token': False,
    }
    if chat_template:
        keys['chat_template'] = chat_template
    return {f'tokenizer.{key}': value for key, value in keys.items()}


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describe.

    Args:
      metadata: keys and values of the file, `tokenizer.*` among them.
      path: of the file.

    Raises:
      InputError: they describe none of Llama's, or contradict themselves.
    """
    model = metadata.get('tokenizer.ggml.model')
    if model not in ('llama', 'gpt2'):
        raise InputError(f'{path}: tokenizer.ggml.model is {model!r}; Llama has llama or gpt2')
    tokens = _list(metadata, path, 'tokens', str)
    types = _list(metadata, path, 'token_type', int, len(tokens))
    if wrong := set(types) - set(range(NORMAL, BYTE + 1)):
        raise InputError(f'{path}: tokenizer.ggml.token_type holds {min(wrong)}; the types are 1 to 6')
    size = len(tokens)
    while size and types[size - 1] == UNUSED and tokens[size - 1] == f'[PAD{size - 1}]':
        size -= 1
    tokens, types = tokens[:size], types[:size]
    _check_lengths(tokens, path)
    if len(set(tokens)) != size:
        raise InputError(f'{path}: tokenizer.ggml.tokens repeats a token; each has one id')
    if without_surrogates(joined := ''.join(tokens)) != joined:
        raise InputError(f'{path}: tokenizer.ggml.tokens holds what is no Unicode; its strings are UTF-8')
    bos_id = _id(metadata, path, 'bos_token_id', size)
    eos_id = _id(metadata, path, 'eos_token_id', size)
    if model == 'llama':
        scores = [float(score) for score in _list(metadata, path, 'scores', (int, float))]
        if len(scores) < size or not all(abs(score) <= _MAX_SCORE for score in scores):
            raise InputError(
                f'{path}: tokenizer.ggml.scores holds {len(scores)} values for {size} tokens, or one that is '
                'not finite in float32'
            )
        flags = {
            name: metadata.get(f'tokenizer.ggml.{key}', default) is True
            for name, key, default in (
                ('add_dummy_prefix', 'add_space_prefix', True),
                ('remove_extra_whitespaces', 'remove_extra_whitespaces', False),
            )
        }
        return _build(
            Vocabulary('sentencepiece', tokens, types, scores[:size], bos_id, eos_id, **flags), path
        )
    splitter = metadata.get('tokenizer.ggml.pre', 'llama-bpe')  # the first files of Llama 3 say nothing
    if splitter not in ('llama-bpe', 'llama3', 'llama-v3'):
        raise InputError(f'{path}: tokenizer.ggml.pre is {splitter!r}; Llama 3 has llama-bpe')
    pairs = [tuple(merge.split(' ')) for merge in _list(metadata, path, 'merges', str)]
    return _build(
        Vocabulary('byte-level', tokens, types, [], bos_id, eos_id), path, [p for p in pairs if len(p) == 2]
    )


def end_of_turn(vocabulary: Vocabulary) -> int:
    """What ends a turn in a chat: Llama 3 has a token for it."""
    name = '<|eot_id|>'
    return vocabulary.tokens.index(name) if name in vocabulary.tokens else vocabulary.eos_id


def _native(tokenizer: Tokenizer) -> SentencePieceTokenizer | TiktokenTokenizer:
    """The tokenizer itself, or the one with a file of Meta's that gives a `tokenizer.json`'s ids."""
    if isinstance(tokenizer, SentencePieceTokenizer | TiktokenTokenizer):
        return tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise InputError(f'{tokenizer.path}: a {type(tokenizer).__name__} has no vocabulary to write')
    definition = parse_object(tokenizer.file_bytes, tokenizer.path)
    model, added = definition['model'], definition.get('added_tokens', [])
    if 'merges' not in model:
        raise InputError(f'{tokenizer.path} is no BPE but {model.get("type")}; only BPE converts')
    merges = [tuple(merge.split(' ') if isinstance(merge, str) else merge) for merge in model['merges']]
    ids = model['vocab'] | {token['content']: token['id'] for token in added}
    if sorted(ids.values()) != list(range(len(ids))):
        raise InputError(
            f'{tokenizer.path} leaves out ids or gives one twice; its {len(ids)} must be 0, 1, 2, ...'
        )
    tokens = sorted(ids, key=ids.__getitem__)
    _check_lengths(tokens, tokenizer.path)
    special = tokenizer.special_tokens
    kinds = {
        name: CONTROL if name in special else USER_DEFINED for token in added if (name := token['content'])
    }
    kinds |= dict.fromkeys(special, CONTROL)
    ends = (tokenizer.bos_id, tokenizer.eos_id)
    if not model.get('byte_fallback'):
        types = [kinds.get(token, NORMAL) for token in tokens]
        candidates = [Vocabulary('byte-level', tokens, types, [], *ends)]
    else:
        kinds |= {f'<0x{byte:02X}>': BYTE for byte in range(256)} | {model.get('unk_token'): UNKNOWN}
        rank = {}
        for index, (left, right) in enumerate(merges):
            rank.setdefault(left + right, index)
        types = [kinds.get(token, NORMAL) for token in tokens]
        scores = [
            -float(rank.get(token, len(merges))) * (kind == NORMAL)
            for token, kind in zip(tokens, types, strict=True)
        ]
        candidates = [
            Vocabulary('sentencepiece', tokens, types, scores, *ends, *flags)
            for flags in ((True, False), (False, False), (True, True))
        ]
    # Metaspace puts no space before a text that begins with one. Those texts apart, it is sentencepiece all the same.
    spaced = 'Metaspace' in json.dumps(definition.get('pre_tokenizer'))
    probes = [text for text in _PROBES if not (spaced and text.startswith(' '))]
    for candidate in candidates:
        native = _build(candidate, tokenizer.path, merges)
        if all(native.encode(text) == tokenizer.encode(text) for text in probes):
            return native
    raise InputError(
        f"{tokenizer.path} splits texts differently from Llama's tokenizers, so no other format can hold it; "
        'keep the tokenizer.json'
    )


def _build(
    vocabulary: Vocabulary, path: str, merges: Iterable[tuple[str, ...]] = ()
) -> SentencePieceTokenizer | TiktokenTokenizer:
    """The tokenizer of a description from outside; `merges` must be in the order of the ids, as in Llama 3."""
    tokens = vocabulary.tokens
    if vocabulary.family == 'sentencepiece':
        pieces = list(zip(tokens, vocabulary.scores, vocabulary.types, strict=True))
        model = SentencePieceModel(
            pieces, tokens[vocabulary.bos_id], tokens[vocabulary.eos_id],
            vocabulary.add_dummy_prefix, vocabulary.remove_extra_whitespaces,
        )  # fmt: skip
        return SentencePieceTokenizer(path, write_model(model))
    count = next((i for i, kind in enumerate(vocabulary.types) if kind != NORMAL), len(tokens))
    if NORMAL in vocabulary.types[count:]:
        raise InputError(
            f'{path}: token {tokens[count]!r} of id {count} is not normal, but some after it are'
        )
    id_of = {token: i for i, token in enumerate(tokens[:count])}
    results = [id_of.get(''.join(pair), -1) for pair in merges]
    if results != sorted(results) or -1 in results:
        raise InputError(f'{path}: its merges are not in the order of its ids, as those of Llama 3 are')
    lines = []
    for i, token in enumerate(tokens[:count]):
        spelled = token.translate(_BYTES)
        if not token or max(spelled) > '\xff' or spelled.translate(_SPELLING) != token:
            raise InputError(f'{path}: token {i} is {token[:40]!r}, which spells no bytes')
        lines.append(base64.b64encode(spelled.encode('latin1')) + b' %d\n' % i)
    tokenizer = TiktokenTokenizer(path, b''.join(lines), tokens[count:])
    if tokenizer.bos_id != vocabulary.bos_id:
        raise InputError(
            f'{path} gives {vocabulary.bos_id} for BOS, but <|begin_of_text|> is {tokenizer.bos_id}'
        )
    return tokenizer


def _check_lengths(tokens: list[str], path: str) -> None:
    """The time to find a token's merges grows with the square of its length."""
    longest = max(tokens, key=len, default='')
    if len(longest) > MAX_TOKEN:
        raise InputError(f'{path} holds a token of {len(longest)} characters; at most {MAX_TOKEN} are read')


def _spelling() -> dict[int, int]:
    """GPT-2's letter for each byte (gpt-2/src/encoder.py): itself where it prints, else one from U+0100 on."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printing]
    return {byte: byte for byte in printing} | {byte: 256 + i for i, byte in enumerate(rest)}


_SPELLING = _spelling()
_BYTES = {letter: byte for byte, letter in _SPELLING.items()}

# What tokenizers disagree about: spaces, digits, case, contractions, scripts, bytes, control characters, tags.
_PROBES = (
    '', 'Hello world', 'Hello, World!', 'a', 'a  b', 'two\n\nlines\r\n', '\tx = 1\n\n\n  y', "I'll don'T WE'RE'",
    '1234567 3.14', 'naïve café', 'Привет, мир', '日本語の文章です。', 'العربية', 'हिन्दी', '😀',
    'e\u0301 \u00a0 \u3000', '\x00\x07', 'if (x[i] != y) { return; }', 'https://a.b/c?d=e',
    '<s> </s> <|eot_id|>', ' leading', '   three', ' ' * 37 + 'z', 'trailing  ',
    'ſ\u2028ǅ½Ⅷ', 'supercalifragilisticexpialidocious',
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


def _id(metadata: Mapping[str, Any], path: str, name: str, size: int) -> int:
    value = metadata.get(f'tokenizer.ggml.{name}')
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < size:
        raise InputError(f'{path}: tokenizer.ggml.{name} is {value!r}; it must be an id, 0 to {size - 1}')
    return value
