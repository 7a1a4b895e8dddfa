"""Random descriptions of a vocabulary through every format and every pair of them: the same again, or one line."""

import dataclasses
import functools
import json
import random

import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.conversion import (
    generation_config,
    model_file,
    own_files,
    tokenizer_of,
    vocabulary_of,
)
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary, tokenizer_from_gguf
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED
from llama_jax.tokenizer.splitters import USUAL_NAMES
from llama_jax.tokenizer.tokenizer import tokenizer_of_files
from llama_jax.tokenizer.vocabulary import Ends, Vocabulary
from tests.tokenizer import kinds

pytest.importorskip('tokenizers', reason="needs tokenizers: pip install 'llama_jax[hf]'")


@functools.cache
def bases():
    """A sentencepiece BPE and a byte-level vocabulary without what is added to them."""
    spm = vocabulary_of(tokenizer_of_files('spm', {'tokenizer.model': kinds.sentencepiece_file()}))
    byte = vocabulary_of(
        tokenizer_of_files('byte', kinds.files(kinds.byte_json(['<e>'], bos=None), eos='<e>'))
    )
    cut = len(byte.tokens) - 1
    return spm, dataclasses.replace(byte, tokens=byte.tokens[:cut], types=byte.types[:cut])


def random_description(draw):
    """One of a base's with tokens of any kind before, between and behind, and ends among them."""
    base = draw.choice(bases())
    is_byte = base.family == 'byte-level'
    names = [f'{a}{draw.choice(["tag", "é", " a b", "x|y", "▁z"])}{i}{b}' for i in range(draw.randrange(1, 9))
             for a, b in [draw.choice(['<>', '[]', ('<|', '|>'), '  ', ('', '')])]]  # fmt: skip
    types = [draw.choice([CONTROL, CONTROL, CONTROL, USER_DEFINED, UNUSED, NORMAL]) for _ in names]
    if is_byte:  # a normal token spells bytes
        types = [CONTROL if kind == NORMAL else kind for kind in types]
    types[0] = CONTROL
    tokens, kinds_, scores = list(base.tokens), list(base.types), list(base.scores)
    first = is_byte and draw.random() < 0.3
    for name, kind in zip(names, types, strict=True):
        place = draw.choice([0, len(tokens)]) if first else len(tokens)
        tokens.insert(place, name)
        kinds_.insert(place, kind)
        if scores:
            scores.insert(place, -1000.0)
    for place, (token, kind) in enumerate(zip(tokens, kinds_, strict=True)):
        if kind == UNUSED and token in names:  # only a GGUF tells an unused token from an id without one
            tokens[place] = f'[PAD{place}]'
    while types and kinds_[-1] == UNUSED:  # behind all others there is no id
        tokens.pop(), kinds_.pop(), scores and scores.pop()
    controls = [i for i, kind in enumerate(kinds_) if kind == CONTROL]
    eos = draw.choice(controls)
    stops = sorted({eos, *draw.sample(controls, min(len(controls), draw.randrange(3)))})
    bos = draw.choice([*controls, None]) if is_byte else draw.choice(controls)
    pad = draw.choice([None, *controls])
    add_bos = bos is not None and draw.random() < 0.7
    ends = Ends(bos, eos, tuple(stops), add_bos, draw.random() < 0.1, pad)
    flags = {} if is_byte else {'add_dummy_prefix': draw.random() < 0.7, 'remove_extra_whitespaces': False}
    splitter = draw.choice(USUAL_NAMES) if is_byte else ''
    pairs = base.merges() if is_byte else []
    return dataclasses.replace(
        base, tokens=tokens, types=kinds_, scores=scores, ends=ends, splitter=splitter, pairs=pairs, **flags
    )


def through(tokenizer, to):
    """Written to a format and read again."""
    match to:
        case 'own':
            return tokenizer_of_files('own', own_files(tokenizer))
        case 'huggingface':
            ids = {'generation_config.json': json.dumps(generation_config(tokenizer.ends)).encode()}
            return tokenizer_of_files('hf', huggingface_files(tokenizer, max_seq_len=64) | ids)
        case 'gguf':
            return tokenizer_from_gguf(gguf_vocabulary(tokenizer), 'a.gguf')
        case 'meta':
            return tokenizer_of_files('meta', {'tokenizer.model': model_file(tokenizer)})


def facts(vocabulary: Vocabulary):
    """What every format must keep; scores are kept in their order, which merges say."""
    v = vocabulary
    return (
        v.family,
        v.tokens,
        v.types,
        v.ends,
        v.merges(),
        v.add_dummy_prefix,
        v.remove_extra_whitespaces,
        v.unk_id,
    )


def ends_after(description: Vocabulary, formats):
    """llama.cpp stops at </s>, if there is one; what fills rows is nothing that Meta's files say."""
    ends, named = description.ends, [i for i, token in enumerate(description.tokens) if token == '</s>']
    stops = {*ends.stop_ids, *(named if 'gguf' in formats else ())}
    return dataclasses.replace(
        ends, stop_ids=tuple(sorted(stops)), pad_id=None if 'meta' in formats else ends.pad_id
    )


def check(description: Vocabulary):
    """Each format, and each pair of formats; the pairs that could not say it."""
    refused = []
    original = tokenizer_of(description, 'made')
    texts = [*kinds.PROBES, *(f'a{name}b {name}' for name in description.added())]
    wanted = [original.encode(text) for text in texts]
    for first in ('own', 'huggingface', 'gguf', 'meta'):
        once = said_again(original, first, refused)
        if once is None:
            continue
        for second in ('own', 'huggingface', 'gguf', 'meta'):
            twice = said_again(once, second, refused)
            for tokenizer in (once, *([] if twice is None else [twice])):
                found, expected = vocabulary_of(tokenizer), description
                assert facts(found)[:3] == facts(expected)[:3], (first, second)
                assert found.merges() == expected.merges() or found.family != 'byte-level'
                assert (found.add_dummy_prefix, found.unk_id) == (expected.add_dummy_prefix, expected.unk_id)
                assert found.ends == ends_after(expected, {first, second} if tokenizer is twice else {first})
                assert [tokenizer.encode(text) for text in texts] == wanted, (first, second)
    return refused


def said_again(tokenizer, to, refused):
    try:
        return through(tokenizer, to)
    except InputError as error:
        refused.append(f'{to}: {error}')
        return None


@pytest.mark.parametrize(
    'seed', [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 45))]
)
def test_a_description_comes_back_the_same_or_is_refused_in_one_line(seed):
    for line in check(random_description(random.Random(seed))):
        assert '\n' not in line
