"""A vocabulary as a `tokenizer.json`, and a `tokenizer.json` as the vocabularies that it may be."""

import base64
from typing import Any

from llama_jax.errors import InputError
from llama_jax.json_file import parse_object
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llama_jax.tokenizer.splitters import SPLITTERS, pre_tokenizer_of, splitters_of
from llama_jax.tokenizer.vocabulary import Vocabulary, check_tokens, is_hole

_BYTE_NAMES = [f'<0x{byte:02X}>' for byte in range(256)]


def definition_of(vocabulary: Vocabulary) -> dict[str, Any]:
    """A `tokenizer.json`, as transformers' own converters build it."""
    kept = [
        (i, token)
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if not is_hole(token, kind, i)
    ]
    added = [
        {'id': i, 'content': token, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
         'special': vocabulary.types[i] != USER_DEFINED}
        for i, token in kept
        if vocabulary.types[i] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    template = _template(vocabulary)
    if vocabulary.family == 'byte-level':
        level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
        normalizer, decoder, splitter = None, level, pre_tokenizer_of(vocabulary.splitter)
        processor = {'type': 'Sequence', 'processors': [level, template]} if template else level
        model = _bpe() | {'ignore_merges': SPLITTERS[vocabulary.splitter].whole_words}
        model['merges'] = vocabulary.merges()
        # The library numbers what is not in its vocabulary behind that, whatever ids are stated.
        usual = [i for i, _ in kept if vocabulary.types[i] in (NORMAL, UNUSED)]
        made = {left + right for left, right in model['merges']}  # which may spell an end
        behind = usual == list(range(len(usual))) and kept[-1][0] == len(kept) - 1
        model['vocab'] = {t: i for i, t in kept if not behind or i < len(usual) or t in made}
    else:
        processor = template
        normalizer, splitter, decoder = _sentencepiece_steps(vocabulary)
        has_bytes = BYTE in vocabulary.types
        unknown = vocabulary.unk_id
        if vocabulary.family == 'unigram':
            pieces = zip(vocabulary.tokens, vocabulary.scores, strict=True)
            model = {'type': 'Unigram', 'unk_id': unknown, 'vocab': list(map(list, pieces))}
            model['byte_fallback'] = has_bytes
        else:
            name = None if unknown is None else vocabulary.tokens[unknown]
            model = _bpe() | {'unk_token': name, 'fuse_unk': True, 'byte_fallback': has_bytes}
            model |= {'vocab': {token: i for i, token in kept}, 'merges': vocabulary.merges()}
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': added,
        'normalizer': normalizer,
        'pre_tokenizer': splitter,
        'post_processor': processor,
        'decoder': decoder,
        'model': model,
    }


def _bpe() -> dict[str, Any]:
    return {
        'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
        'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
    }  # fmt: skip


def _template(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts BOS before a text, and EOS behind it; None where neither is put."""
    ends = vocabulary.ends
    begin = [ends.bos_id] if ends.add_bos and ends.bos_id is not None else []
    end = [ends.eos_id] if ends.add_eos else []
    if not begin + end:
        return None
    named = {vocabulary.tokens[id]: id for id in begin + end}

    def around(text: str, type_id: int) -> list[dict[str, Any]]:
        put = lambda ids: [  # noqa: E731
            {'SpecialToken': {'id': vocabulary.tokens[id], 'type_id': type_id}} for id in ids
        ]
        return [*put(begin), {'Sequence': {'id': text, 'type_id': type_id}}, *put(end)]

    return {
        'type': 'TemplateProcessing',
        'single': around('A', 0),
        'pair': around('A', 0) + around('B', 1),
        'special_tokens': {name: {'id': name, 'ids': [id], 'tokens': [name]} for name, id in named.items()},
    }


def _sentencepiece_steps(vocabulary: Vocabulary) -> tuple[Any, Any, Any]:
    """Normalizer, pre-tokenizer and decoder."""
    charsmap = base64.b64encode(vocabulary.charsmap).decode()
    steps: list[dict[str, Any]] = [{'type': 'Precompiled', 'precompiled_charsmap': charsmap}] * bool(charsmap)
    squeeze = [_replace({'Regex': r'\A +|[ ▁]+\z'}, ''), _replace({'Regex': ' {2,}'}, ' ')]
    prefix, replace = {'type': 'Prepend', 'prepend': '▁'}, _replace({'String': ' '}, '▁')
    steps += squeeze * vocabulary.remove_extra_whitespaces + [prefix] * vocabulary.add_dummy_prefix
    strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
    decoders = [_replace({'String': '▁'}, ' '), {'type': 'ByteFallback'}, {'type': 'Fuse'}]
    return (
        {'type': 'Sequence', 'normalizers': [*steps, replace]},
        None,
        {'type': 'Sequence', 'decoders': decoders + [strip] * vocabulary.add_dummy_prefix},
    )


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {'type': 'Replace', 'pattern': pattern, 'content': content}


def candidates_of(tokenizer: HuggingFaceTokenizer) -> list[Vocabulary]:
    """What the tokenizer may be in words that other formats share, the likeliest first; ids must be tried.

    Raises:
      InputError: it is of another family, or its file cannot be understood.
    """
    definition = parse_object(tokenizer.file_bytes, tokenizer.path)
    model, path = definition['model'], tokenizer.path
    kind = model.get('type') or ('BPE' if 'merges' in model else 'Unigram' if 'unk_id' in model else None)
    if kind not in ('BPE', 'Unigram'):
        raise InputError(f'{path} is no BPE and no Unigram but {kind}; only those convert')
    unknown = tokenizer.unk_id
    has_bytes = bool(model.get('byte_fallback'))
    tokens, types = [], []
    special = set(tokenizer.special_tokens.values())
    added = set(tokenizer.added_tokens.values())
    for id in range(tokenizer.vocab_size):
        token = tokenizer.token(id)
        tokens.append(f'[PAD{id}]' if token is None else token)
        types.append(
            UNUSED if token is None
            else UNKNOWN if id == unknown
            else CONTROL if id in special
            else USER_DEFINED if id in added
            else BYTE if has_bytes and token in _BYTE_NAMES
            else NORMAL
        )  # fmt: skip
    check_tokens(tokens, path)
    if len(set(tokens)) != len(tokens):
        raise InputError(f'{path} gives one token several ids; other formats have one each')
    listed = (m.split(' ') if isinstance(m, str) else m for m in model.get('merges', []))
    merges = [(pair[0], pair[-1]) for pair in listed]
    ends = tokenizer.ends
    if kind == 'BPE' and not has_bytes and _is_byte_level(definition):
        if not (names := splitters_of(definition.get('pre_tokenizer'), bool(model.get('ignore_merges')))):
            raise InputError(
                f"{path} splits texts differently from Llama's tokenizers, so no other format can hold it; keep the "
                'tokenizer.json'
            )
        return [Vocabulary('byte-level', tokens, types, ends, pairs=merges, splitter=name) for name in names]
    if kind == 'BPE':
        rank: dict[str, int] = {}
        for index, (left, right) in enumerate(merges):
            rank.setdefault(left + right, index)
        scores = [
            -float(rank.get(token, len(merges))) * (kind_ == NORMAL)
            for token, kind_ in zip(tokens, types, strict=True)
        ]
    else:
        given = {id: float(piece[1]) for id, piece in enumerate(model['vocab'])}
        scores = [given.get(id, 0.0) for id in range(len(tokens))]
    family = 'sentencepiece' if kind == 'BPE' else 'unigram'
    charsmap = _charsmap(definition.get('normalizer'))
    return [
        Vocabulary(
            family, tokens, types, ends, scores, add_dummy_prefix=prefix, remove_extra_whitespaces=squeeze,
            charsmap=charsmap, unk_id=unknown,
        )
        for prefix, squeeze in ((True, False), (False, False), (True, True))
    ]  # fmt: skip


def _is_byte_level(definition: dict[str, Any]) -> bool:
    return 'ByteLevel' in str(definition.get('pre_tokenizer')) or 'ByteLevel' in str(
        definition.get('decoder')
    )


def _charsmap(normalizer: Any) -> bytes:
    """The compiled normalizer of sentencepiece among the steps; empty for none."""
    steps = normalizer.get('normalizers', [normalizer]) if isinstance(normalizer, dict) else []
    for step in steps:
        if isinstance(step, dict) and isinstance(value := step.get('precompiled_charsmap'), str):
            return base64.b64decode(value)
    return b''
