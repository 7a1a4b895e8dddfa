"""Every splitter that a GGUF may name, against the pattern in the tokenizer.json of a model that is cut by it."""

import functools
import json
import re

import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.conversion import tokenizer_of, vocabulary_of
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary, tokenizer_from_gguf, vocabulary_from_gguf
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.splitters import SPLITTERS, USUAL_NAMES
from llama_jax.tokenizer.tokenizer import tokenizer_of_files
from tests.tokenizer import kinds

tokenizers = pytest.importorskip('tokenizers', reason="needs tokenizers: pip install 'llama_jax[hf]'")

# As the files of these models spell it: Llama 3 8B, SmolLM's base GPT-2, Qwen 2.5, GPT-4o's in Llama 4, Mistral Nemo,
# Qwen 3.5, Seed-Coder, Ling, BLOOM, Jais 2, EXAONE 4 MoE. None is taken from the code under test.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
PATTERNS = {
    'llama-bpe': kinds.LLAMA3_PATTERN,
    'smaug-bpe': kinds.LLAMA3_PATTERN,
    'glm4': kinds.LLAMA3_PATTERN,
    'qwen2': QWEN2,
    'gpt-2': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    'gpt-4o': O200K,
    'tekken': (
        r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
        r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
        r'|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
    'qwen35': (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r'|\s*[\r\n]+|\s+(?!\S)|\s+'
    ),
    'seed-coder': (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+"
        '|\\s+(?!\\S)|\\s+'
    ),
    'ufakzeka': QWEN2.split('|', 7)[-1],
    'bailingmoe': (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    'bloom': r' ?[^(\s|.,!?…。，、।۔،)]+',
    'jais-2': (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r'|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)'
        r'|\s{1,2}(?!\S)|\s{1}'
    ),
    'exaone-moe': (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
        r'| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+'
    ),
}  # fmt: skip
WHOLE_WORDS = ('llama-bpe', 'glm4', 'tekken')
ENDS = ['<|begin_of_text|>', '<|end_of_text|>']


@functools.cache
def merges():
    """Merges over the borders of words, so that ids tell where a text was cut."""
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    texts = [*kinds.TEXT, *(text for text in texts_to_cut() if '<|' not in text)]
    t.train_from_iterator([text[i : i + 30] for text in texts for i in range(0, len(text), 30)], trainer)
    return json.loads(t.to_str())['model']


def texts_to_cut():
    words = [
        "I'll DON'T we've",
        '  a  b\n\n \t c',
        'x1234 56',
        'McDonald ßÜber iPhone',
        '!?\n/\n//\r\n',
        'a (b, c).d',
    ]
    return [
        *words,
        'नमस्ते',
        'o\u0301e\u0301 a a b',
        ' ' * 700 + 'z',
        ' ' * 37,
        *kinds.PROBES,
        *kinds.random_texts(150),
    ]


def keys_of(pre):
    model = merges()
    tokens = sorted(model['vocab'], key=model['vocab'].get)
    size = len(tokens)
    return {
        'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': pre, 'tokenizer.ggml.tokens': tokens + ENDS,
        'tokenizer.ggml.token_type': [1] * size + [3, 3],
        'tokenizer.ggml.merges': [' '.join(pair) for pair in model['merges']],
        'tokenizer.ggml.bos_token_id': size, 'tokenizer.ggml.eos_token_id': size + 1,
    }  # fmt: skip


def library(pattern, whole_words):
    model = merges()
    pairs = [tuple(pair) for pair in model['merges']]
    t = tokenizers.Tokenizer(tokenizers.models.BPE(model['vocab'], pairs, ignore_merges=whole_words))
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return t


@pytest.mark.parametrize('pre', PATTERNS)
def test_a_splitter_cuts_as_the_pattern_of_its_models(pre):
    theirs = library(PATTERNS[pre], pre in WHOLE_WORDS)
    ours = tokenizer_from_gguf(keys_of(pre), 'a.gguf')
    texts = texts_to_cut()
    expected = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert [ours.encode(text) for text in texts] == expected
    assert ours.add_bos == (pre in ('llama-bpe', 'tekken'))
    # Told again by the pattern alone, as from a tokenizer.json; the name that was given is kept where nothing else is.
    again = tokenizer_of_files('a', huggingface_files(ours, max_seq_len=64))
    written = gguf_vocabulary(again)
    assert SPLITTERS[written['tokenizer.ggml.pre']].pattern == SPLITTERS[pre].pattern
    back = tokenizer_from_gguf(written, 'b.gguf')
    assert [back.encode(text) for text in texts] == expected


def test_all_splitters_are_tried_and_other_names_are_kept():
    assert list(PATTERNS) == list(USUAL_NAMES)
    for name in ('llama-v3', 'deepseek-r1-qwen', 'llama4', 'dbrx'):
        vocabulary = vocabulary_from_gguf(keys_of(name), 'a.gguf')
        assert vocabulary.splitter == name
        assert vocabulary_of(tokenizer_of(vocabulary, 'a')).splitter in USUAL_NAMES


@pytest.mark.parametrize('pre', ['smollm', 'starcoder', 'deepseek-coder', 'default', 'superbpe', '', 7])
def test_what_is_cut_in_several_steps_is_refused_by_name(pre):
    with pytest.raises(
        InputError, match=re.escape(f'tokenizer.ggml.pre is {pre!r}; known are llama-bpe, ')
    ) as error:
        tokenizer_from_gguf(keys_of(pre), 'a.gguf')
    assert 'give the tokenizer.json' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('pre', list(SPLITTERS))
def test_a_splitter_cuts_as_llama_cpp(pre, tmp_path):
    llama_cpp = pytest.importorskip(
        'llama_cpp', reason="needs llama-cpp-python: pip install 'llama_jax[parity]'"
    )
    keys = keys_of(pre)
    kinds.write_vocabulary(tmp_path / 'a.gguf', keys)
    theirs = llama_cpp.Llama(str(tmp_path / 'a.gguf'), vocab_only=True, verbose=False)
    ours = tokenizer_from_gguf(keys, 'a.gguf')
    for text in texts_to_cut():
        # Its own patterns stand for those of the files: by letters of English for case, by an older Unicode for kinds.
        if text.isascii() and '\0' not in text:
            assert ours.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=False), text
    assert (
        llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(theirs._model.model))
        == ours.add_bos
    )


def test_an_end_that_merges_spell_is_read():
    """llama.cpp takes it for a control token by its name, and there are merges that make it."""
    keys = keys_of('qwen2')
    for made in ('<E', '<EO', '<EOT', '<EOT>'):
        keys['tokenizer.ggml.tokens'].append(made)
        keys['tokenizer.ggml.token_type'].append(1)
        keys['tokenizer.ggml.merges'].append(f'{made[:-1]} {made[-1]}')
    ours = tokenizer_from_gguf(keys, 'a.gguf')
    last = len(keys['tokenizer.ggml.tokens']) - 1
    assert last in ours.stop_ids and last in ours.special_tokens.values()
    assert tokenizer_from_gguf(gguf_vocabulary(ours), 'b.gguf').encode('x<EOT>') == ours.encode('x<EOT>')
