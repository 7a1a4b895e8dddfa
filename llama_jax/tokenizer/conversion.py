"""Any tokenizer as a vocabulary, a vocabulary as a tokenizer, and either as the files that hold it.

A conversion that would change an id is refused: what was made is tried beside the original on texts that tokenizers
disagree about, and on the original's own added tokens.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from llama_jax.errors import InputError
from llama_jax.tokenizer.huggingface_statements import AddedToken
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    read_model,
    write_model,
)
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_jax.tokenizer.splitters import SPLITTERS
from llama_jax.tokenizer.tiktoken_tokenizer import TiktokenTokenizer, llama3_special_names
from llama_jax.tokenizer.tokenizer_json import candidates_of, definition_of
from llama_jax.tokenizer.vocabulary import BYTES, SPELLING, Ends, Vocabulary, check_tokens

# What tokenizers disagree about: spaces, digits, case, contractions, scripts, bytes, control characters, tags.
_PROBES = (
    '', 'Hello world', 'Hello, World!', 'a', 'a  b', 'two\n\nlines\r\n', '\tx = 1\n\n\n  y', "I'll don'T WE'RE'",
    '1234567 3.14', 'naïve café', 'Привет, мир', '日本語の文章です。', 'العربية', 'हिन्दी', '😀',
    'e\u0301 \u00a0 \u3000', '\x00\x07', 'if (x[i] != y) { return; }', 'https://a.b/c?d=e',
    '<s> </s> <unk> <|eot_id|>', ' leading', '   three', ' ' * 37 + 'z', 'trailing  ',
    'ſ\u2028ǅ½Ⅷ', 'supercalifragilisticexpialidocious',
)  # fmt: skip
_MOST_NAMES = 40  # of added tokens that are tried


def probes_of(tokenizer: Tokenizer) -> list[str]:
    """Texts by which tokenizers are told apart, some of them made of this one's own added tokens."""
    names = [*getattr(tokenizer, 'added_tokens', {}), *getattr(tokenizer, 'special_tokens', {})][:_MOST_NAMES]
    own = [text for name in names for text in (f'a{name}b', f'{name} c\n{name}')]
    return [*_PROBES, *own]


def comparable_probes(tokenizer: Tokenizer) -> list[str]:
    """Those of `probes_of` that every format reads alike."""
    # Metaspace puts no space before a text that begins with one. Those texts apart, it is sentencepiece all the same.
    spaced = isinstance(tokenizer, HuggingFaceTokenizer) and b'Metaspace' in tokenizer.file_bytes
    return [text for text in probes_of(tokenizer) if not (spaced and text.startswith(' '))]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The description of any tokenizer.

    Raises:
      InputError: it is of no family, or does what a vocabulary cannot say.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = read_model(tokenizer.file_bytes, tokenizer.path)
        tokens, scores, types = (list(column) for column in zip(*model.pieces, strict=True))
        check_tokens(tokens, tokenizer.path)
        return Vocabulary(
            'unigram' if model.is_unigram else 'sentencepiece', tokens, types, tokenizer.ends, scores,
            add_dummy_prefix=model.add_dummy_prefix, remove_extra_whitespaces=model.remove_extra_whitespaces,
            charsmap=model.charsmap, unk_id=types.index(UNKNOWN),
        )  # fmt: skip
    if isinstance(tokenizer, TiktokenTokenizer):
        names = list(tokenizer.special_tokens)
        if names == llama3_special_names():
            names = llama3_special_names(huggingface=True)  # GGUF's are those too
        lines = tokenizer.file_bytes.split()[::2]
        tokens = [base64.b64decode(line).decode('latin1').translate(SPELLING) for line in lines]
        check_tokens(tokens, tokenizer.path)
        types = [NORMAL] * len(tokens) + [CONTROL] * len(names)
        return Vocabulary('byte-level', tokens + names, types, tokenizer.ends, splitter='llama-bpe')
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _of_json(tokenizer)[0]
    raise InputError(f'{tokenizer.path}: a {type(tokenizer).__name__} has no vocabulary to write')


def _of_json(tokenizer: HuggingFaceTokenizer) -> tuple[Vocabulary, Tokenizer]:
    """The vocabulary that gives the same ids, and its tokenizer."""
    probes = comparable_probes(tokenizer)
    expected = [tokenizer.encode(text) for text in probes]
    differing = ''
    for candidate in candidates_of(tokenizer):
        native = tokenizer_of(candidate, tokenizer.path)
        found = (text for text, ids in zip(probes, expected, strict=True) if native.encode(text) != ids)
        if (text := next(found, None)) is None:
            return candidate, native
        differing = differing or text
    raise InputError(
        f"{tokenizer.path} splits texts differently from Llama's tokenizers (such as {differing[:40]!r}), so no other "
        'format can hold it; keep the tokenizer.json'
    )


def tokenizer_of(vocabulary: Vocabulary, path: str) -> Tokenizer:
    """The tokenizer of a vocabulary: of Meta's own kinds where these can say it, else as a tokenizer.json.

    Raises:
      InputError: it contradicts itself.
    """
    has_holes = UNUSED in vocabulary.types
    if vocabulary.family == 'byte-level':
        _check_bytes(vocabulary, path)
        count = next((i for i, kind in enumerate(vocabulary.types) if kind != NORMAL), len(vocabulary.tokens))
        if _are_ranks(vocabulary, count):
            lines = (
                base64.b64encode(token.translate(BYTES).encode('latin1')) + b' %d\n' % i
                for i, token in enumerate(vocabulary.tokens[:count])
            )
            return TiktokenTokenizer(path, b''.join(lines), vocabulary.tokens[count:], vocabulary.ends)
    elif USER_DEFINED not in vocabulary.types and not has_holes:
        return SentencePieceTokenizer(path, write_model(_model_of(vocabulary)), vocabulary.ends)
    definition = json.dumps(definition_of(vocabulary), ensure_ascii=False).encode()
    return HuggingFaceTokenizer(path, definition, stating_files_of(vocabulary))


def with_added(vocabulary: Vocabulary, added: Mapping[int, AddedToken]) -> Vocabulary | None:
    """The vocabulary with further tokens, or others of its ids' names; None where it has them all."""
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    names = set(tokens)
    changed = False
    for id, token in sorted(added.items()):
        kinds = (CONTROL, UNKNOWN) if token.special else (USER_DEFINED,)
        if id < len(tokens) and tokens[id] == token.content and (types[id] in kinds or types[id] != CONTROL):
            continue  # what is listed without being flagged is what it was
        if token.content in names:
            continue  # transformers lets the first have the name
        for hole in range(len(tokens), id + 1):
            tokens.append(f'[PAD{hole}]')
            types.append(UNUSED)
        tokens[id], types[id] = token.content, kinds[0]
        changed = True
    if not changed:
        return None
    scores = vocabulary.scores + [0.0] * (len(tokens) - len(vocabulary.scores)) * bool(vocabulary.scores)
    return dataclasses.replace(vocabulary, tokens=tokens, types=types, scores=scores)


def _model_of(vocabulary: Vocabulary) -> SentencePieceModel:
    unknown = vocabulary.unk_id
    if unknown is None:
        unknown = vocabulary.types.index(UNKNOWN) if UNKNOWN in vocabulary.types else 0
    types = [CONTROL if kind == UNKNOWN else kind for kind in vocabulary.types]
    if types:
        types[unknown] = UNKNOWN
    ends, tokens = vocabulary.ends, vocabulary.tokens
    return SentencePieceModel(
        list(zip(tokens, vocabulary.scores, types, strict=True)),
        '' if ends.bos_id is None else tokens[ends.bos_id], tokens[ends.eos_id],
        vocabulary.add_dummy_prefix, vocabulary.remove_extra_whitespaces, vocabulary.family == 'unigram',
        vocabulary.charsmap,
    )  # fmt: skip


def _check_bytes(vocabulary: Vocabulary, path: str) -> None:
    """A byte-level vocabulary spells every byte, or texts would lose what it cannot spell."""
    letters = set(SPELLING.values())
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == NORMAL and not (token and letters.issuperset(map(ord, token))):
            raise InputError(f'{path}: token {i} is {token[:40]!r}, which spells no bytes')
    single = {token for token in vocabulary.tokens if len(token) == 1}
    if missing := [byte for byte in range(256) if chr(SPELLING[byte]) not in single]:
        raise InputError(
            f'{path} lacks {len(missing)} of the 256 single-byte tokens, the first one {missing[0]}'
        )


def _are_ranks(vocabulary: Vocabulary, count: int) -> bool:
    """Whether the ids of the first tokens are the order of their merges, as in Llama 3, and all others special."""
    names = vocabulary.tokens[count:]
    if not (
        SPLITTERS[vocabulary.splitter] == SPLITTERS['llama-bpe']
        and set(vocabulary.types[count:]) == {CONTROL}
        and {'<|begin_of_text|>', '<|end_of_text|>'} <= set(names)
    ):
        return False
    if not vocabulary.pairs:
        return True
    rank = {token: i for i, token in enumerate(vocabulary.tokens[:count])}
    made = [rank.get(left + right, -1) for left, right in vocabulary.pairs]
    plain = Vocabulary('byte-level', vocabulary.tokens[:count], vocabulary.types[:count], vocabulary.ends)
    return made == sorted(made) and set(plain.merges()) == set(map(tuple, vocabulary.pairs))


def stating_files_of(vocabulary: Vocabulary) -> dict[str, bytes]:
    """What `huggingface_statements` reads these ends from, by name."""
    ends, tokens = vocabulary.ends, vocabulary.tokens
    named = {'bos_token': ends.bos_id, 'eos_token': ends.eos_id, 'pad_token': ends.pad_id}
    names = {key: tokens[id] for key, id in named.items() if id is not None}
    if vocabulary.unk_id is not None:
        names['unk_token'] = tokens[vocabulary.unk_id]
    flags = {'add_bos_token': ends.add_bos, 'add_eos_token': ends.add_eos}
    return {
        'tokenizer_config.json': _json(names | flags),
        'generation_config.json': _json(generation_config(ends)),
    }


def generation_config(ends: Ends) -> dict[str, Any]:
    """Keys that `generation_config.json` and `config.json` share."""
    stops = [ends.eos_id, *(id for id in ends.stop_ids if id != ends.eos_id)]
    stops = sorted(stops)
    ids = {'bos_token_id': ends.bos_id, 'eos_token_id': stops if len(stops) > 1 else stops[0]}
    return ids | ({} if ends.pad_id is None else {'pad_token_id': ends.pad_id})


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode() + b'\n'


def model_file(tokenizer: Tokenizer) -> bytes:
    """The bytes of a `tokenizer.model` that gives the same ids and ends; those of its own file, where it has one.

    Raises:
      InputError: such a file cannot say what the tokenizer does.
    """
    native = _of_json(tokenizer)[1] if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer
    if reason := _lost_in_model_file(native):
        raise InputError(
            f'{tokenizer.path} {reason}, which a tokenizer.model cannot say; convert to another format, which keeps '
            'its tokenizer.json'
        )
    assert isinstance(native, SentencePieceTokenizer | TiktokenTokenizer)
    return native.file_bytes


def _lost_in_model_file(native: Tokenizer) -> str:
    """What a `tokenizer.model` alone would lose; '' for nothing."""
    if isinstance(native, TiktokenTokenizer):
        names = list(native.special_tokens)
        if len(names) != 256:
            return f'has {len(names)} special tokens where Llama 3 has 256'
        known = (llama3_special_names(), llama3_special_names(huggingface=True))
        if names not in known:
            differ = next(n for n, usual in zip(names, known[1], strict=True) if n != usual)
            return f'has special tokens of its own names ({differ!r})'
        plain = TiktokenTokenizer(native.path, native.file_bytes)
    elif isinstance(native, SentencePieceTokenizer):
        try:
            plain = SentencePieceTokenizer(native.path, native.file_bytes)
        except InputError:
            return 'has no BOS'
    else:
        return 'has added tokens or merges of its own'
    if plain.bos_id != native.bos_id or plain.eos_id != native.eos_id:
        return f'begins and ends with the ids {native.bos_id} and {native.eos_id}'
    if plain.add_bos != native.add_bos:
        return 'puts no BOS before a text'
    if native.ends.add_eos:
        return 'puts EOS behind a text'
    if not set(native.stop_ids) <= set(plain.stop_ids):
        return f'stops at the ids {", ".join(map(str, native.stop_ids))}'
    return ''


def own_files(tokenizer: Tokenizer, chat_template: str = '') -> dict[str, bytes]:
    """The files of our own format: `tokenizer.model` where that says all, else `tokenizer.json` and what it needs.

    Args:
      tokenizer: any that was read from files.
      chat_template: Jinja; '' for none.
    """
    native = tokenizer
    files: dict[str, bytes] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer) and b'Metaspace' not in tokenizer.file_bytes:
        try:
            native = _of_json(tokenizer)[1]
        except InputError:
            native = tokenizer  # kept as it is
        if any(
            native.encode(t, special=True) != tokenizer.encode(t, special=True) for t in probes_of(tokenizer)
        ):
            native = tokenizer
    if isinstance(native, SentencePieceTokenizer | TiktokenTokenizer) and not _lost_in_model_file(native):
        plain = type(native)(native.path, native.file_bytes)
        files['tokenizer.model'] = native.file_bytes
        if set(plain.stop_ids) != set(native.stop_ids) or plain.ends.pad_id != native.ends.pad_id:
            files['generation_config.json'] = _json(generation_config(native.ends))
    elif isinstance(native, SentencePieceTokenizer):
        said = stating_files_of(vocabulary_of(native))
        files = {'tokenizer.model': native.file_bytes, **said}
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        files = {'tokenizer.json': tokenizer.file_bytes, **_kept_statements(tokenizer)}
    else:
        vocabulary = vocabulary_of(tokenizer)
        definition = json.dumps(definition_of(vocabulary), ensure_ascii=False).encode()
        files = {'tokenizer.json': definition, **stating_files_of(vocabulary)}
    if chat_template:
        files['chat_template.jinja'] = chat_template.encode()
    return files


def _kept_statements(tokenizer: HuggingFaceTokenizer) -> dict[str, bytes]:
    """Files that say the same of the ends as those beside it, without what belongs to its folder alone."""
    ends = tokenizer.ends
    named = {'bos_token': ends.bos_id, 'eos_token': ends.eos_id, 'pad_token': ends.pad_id}
    names = {key: tokenizer.token(id) for key, id in named.items() if id is not None}
    flags = {'add_bos_token': ends.add_bos, 'add_eos_token': ends.add_eos}
    return {
        'tokenizer_config.json': _json(names | flags),
        'generation_config.json': _json(generation_config(ends)),
    }
