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
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_NOT_WORDS = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
# Words that go from capitals to small letters; o200k_base of OpenAI's tiktoken has a contraction behind them.
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED_WORDS = rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s'
_O200K_PATTERN = _CASED_WORDS.replace('%s', _CONTRACTION + '?') + r'|\p{N}{1,3}|' + _NOT_WORDS
_TEKKEN_PATTERN = _CASED_WORDS.replace('%s', '') + r'|\p{N}|' + _NOT_WORDS
_BAILING_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r'|\s*[\r\n]|\s+(?!\S)|\s+'
)
_JAIS2_SPACES = '|'.join(rf'\s{{{n}}}(?!\S)' for n in (512, 256, 128, 64, 32, 16, 8, 4, '1,2')) + r'|\s{1}'


@dataclasses.dataclass(frozen=True)
class Splitter:
    """One way to cut.

    Attributes:
      names: in GGUF, the usual one first.
      pattern: of words.
      whole_words: whether a word that is a token is that token, whatever the merges say.
      add_bos: whether BOS is put where a GGUF does not say so.
    """

    names: tuple[str, ...]
    pattern: str
    whole_words: bool = False
    add_bos: bool = False


# Those of llama.cpp that are one pattern. What it cuts by several, one after another, is refused.
_KNOWN = (
    Splitter(
        ('llama-bpe', 'llama3', 'llama-v3', 'falcon3', 'falcon-h1', 'pixtral', 'midm-2.0', 'lfm2', 'jina-v5-nano'),
        LLAMA3_PATTERN, True, True,
    ),
    Splitter(('smaug-bpe', 'dbrx', 'chatglm-bpe'), LLAMA3_PATTERN),
    Splitter(('glm4', 'glm5'), LLAMA3_PATTERN, True),
    Splitter(
        ('qwen2', 'deepseek-r1-qwen', 'kormo', 'f2llmv2', 'stablelm2', 'megrez', 'hunyuan', 'solar-open', 'grok-2'),
        _QWEN2_PATTERN,
    ),
    Splitter(
        ('gpt-2', 'phi-2', 'mpt', 'olmo', 'jais', 'gigachat', 'mellum', 'exaone4', 'trillion', 'granite-docling',
         'a.x-4.0', 'jina-es', 'jina-de', 'jina-v2-es', 'jina-v2-de', 'modern-bert'),
        _GPT2_PATTERN,
    ),
    Splitter(('gpt-4o', 'llama4', 'kanana2', 'talkie', 'minimax-m2'), _O200K_PATTERN),
    Splitter(('tekken',), _TEKKEN_PATTERN, True, True),
    Splitter(
        ('qwen35',),
        _QWEN2_PATTERN.replace(r'?\p{L}+', r'?[\p{L}\p{M}]+').replace(r'[^\s\p{L}\p{N}]', r'[^\s\p{L}\p{M}\p{N}]'),
    ),
    Splitter(
        ('seed-coder',),
        _QWEN2_PATTERN.replace(r'\p{N}|', r'\p{N}{1}|').replace(
            r' ?[^\s\p{L}\p{N}]+[\r\n]*', r' ?[^\s\p{L}\p{N}\r\n]+'
        ),
    ),
    Splitter(('ufakzeka',), _QWEN2_PATTERN.removeprefix(_CONTRACTION + '|')),
    Splitter(('bailingmoe', 'bailingmoe2', 'llada-moe'), _BAILING_PATTERN),
    Splitter(('bloom', 'poro-chat', 'gpt3-finnish'), r' ?[^(\s|.,!?…。，、।۔،)]+'),
    Splitter(('jais-2',), LLAMA3_PATTERN.replace(r'\s+(?!\S)|\s+', _JAIS2_SPACES)),
    Splitter(
        ('exaone-moe',),
        _CONTRACTION + r'|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?'
        r'|\s*[\r\n]|\s+(?!\S)|\s+',
    ),
)  # fmt: skip
SPLITTERS = {name: splitter for splitter in _KNOWN for name in splitter.names}
USUAL_NAMES = tuple(splitter.names[0] for splitter in _KNOWN)


def splitters_of(pre_tokenizer: Any, whole_words: bool) -> list[str]:
    """Names of the splitters that a tokenizer.json's `pre_tokenizer` may be, the likeliest first."""
    parts = pre_tokenizer.get('pretokenizers') if isinstance(pre_tokenizer, dict) else None
    parts = parts if isinstance(parts, list) else [pre_tokenizer]
    patterns = []
    for part in parts:
        if not isinstance(part, dict) or part.get('add_prefix_space'):
            return []
        if part.get('type') == 'ByteLevel':
            patterns += [_GPT2_PATTERN] * (part.get('use_regex', True) is not False)
        elif part.get('type') == 'Split' and part.get('behavior') == 'Isolated' and not part.get('invert'):
            pattern = part.get('pattern')
            given = pattern.get('Regex') if isinstance(pattern, dict) else None
            # Some spell line ends as themselves.
            patterns.append(
                given.replace('\r', r'\r').replace('\n', r'\n') if isinstance(given, str) else None
            )
        else:
            return []
    alike = [splitter for splitter in _KNOWN if patterns == [splitter.pattern]]
    # Words that are tokens need no merges where these are made of the ids, so the other one will do where ids agree.
    alike.sort(key=lambda splitter: splitter.whole_words != whole_words)
    return [splitter.names[0] for splitter in alike]


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
