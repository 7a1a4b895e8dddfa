"""What cuts a text into words before a byte-level vocabulary merges letters: the patterns that Llamas come with.

GGUF names them (by its key `pre`), a tokenizer.json spells them out. Both as in llama.cpp's llama-vocab.cpp.
"""

import dataclasses
from typing import Any

# Meta's: llama3/llama/tokenizer.py, Tokenizer.pat_str.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2_PATTERN = LLAMA3_PATTERN.replace(r'\p{N}{1,3}', r'\p{N}')
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Splitter:
    """One way to cut.

    Attributes:
      pattern: of words.
      whole_words: whether a word that is a token is that token, whatever the merges say.
      add_bos: whether BOS is put where a GGUF does not say so.
      others: further names of the same.
    """

    pattern: str
    whole_words: bool = False
    add_bos: bool = False
    others: tuple[str, ...] = ()


SPLITTERS = {
    'llama-bpe': Splitter(
        LLAMA3_PATTERN, True, True,
        ('llama3', 'llama-v3', 'falcon3', 'falcon-h1', 'pixtral', 'midm-2.0', 'lfm2'),
    ),
    'smaug-bpe': Splitter(LLAMA3_PATTERN, others=('dbrx',)),
    'qwen2': Splitter(_QWEN2_PATTERN, others=('deepseek-r1-qwen', 'kormo', 'stablelm2', 'megrez')),
    'gpt-2': Splitter(_GPT2_PATTERN, others=('phi-2', 'mpt', 'olmo', 'jais', 'gigachat', 'mellum', 'exaone4')),
}  # fmt: skip


def splitter_named(name: str) -> str:
    """The splitter's own name, for any of its names; '' where it is not known."""
    return next((own for own, s in SPLITTERS.items() if name == own or name in s.others), '')


def splitter_of(pre_tokenizer: Any, whole_words: bool) -> str:
    """The splitter of a tokenizer.json's `pre_tokenizer`; '' where it is none of these."""
    parts = pre_tokenizer.get('pretokenizers') if isinstance(pre_tokenizer, dict) else None
    parts = parts if isinstance(parts, list) else [pre_tokenizer]
    patterns = []
    for part in parts:
        if not isinstance(part, dict) or part.get('add_prefix_space'):
            return ''
        if part.get('type') == 'ByteLevel':
            patterns += [_GPT2_PATTERN] * (part.get('use_regex', True) is not False)
        elif part.get('type') == 'Split' and part.get('behavior') == 'Isolated' and not part.get('invert'):
            pattern = part.get('pattern')
            patterns.append(pattern.get('Regex') if isinstance(pattern, dict) else None)
        else:
            return ''
    for name, splitter in SPLITTERS.items():
        if patterns == [splitter.pattern] and splitter.whole_words == whole_words:
            return name
    # Words that are tokens need no merges where these are made of the ids, so the other one will do where ids agree.
    return next((name for name, s in SPLITTERS.items() if patterns == [s.pattern]), '')


def pre_tokenizer_of(name: str) -> dict[str, Any]:
    """A tokenizer.json's `pre_tokenizer`."""
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
    split = {
        'type': 'Split',
        'pattern': {'Regex': SPLITTERS[name].pattern},
        'behavior': 'Isolated',
        'invert': False,
    }
    return {'type': 'Sequence', 'pretokenizers': [split, level]}
