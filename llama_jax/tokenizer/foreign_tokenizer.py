"""Whether the library `tokenizers` gets along with a tokenizer.json: seen from the file, or tried by another process.

The library runs what patterns a file holds, some of which take for ever or have it panic, which prints fifty lines. A
file made of the parts that Llamas are made of is known to be harmless. Any other is opened once in a process of its
own before, which takes as long as opening it does, and 0.04 s.
"""

import base64
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

from llama_jax.errors import InputError, error_line
from llama_jax.tokenizer.charsmap import check_charsmap
from llama_jax.tokenizer.splitters import SPLITTERS

PROBES = ('Hello world! 12', *(letter * 40 + '!x' for letter in 'a1 -\né'))
_PROGRAM = pathlib.Path(__file__).with_name('opening_process.py')
_SECONDS = 5  # of processor time
_WALL_SECONDS = 120.0
_MEMORY = 1 << 30  # bytes beyond the process's own
_MAX_LETTERS = 100  # of patterns, runs of which are tried
_MAX_GROWTH = 100  # times; a Llama's own puts one letter for another
_STEPS = ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder')
# Those of Llamas, and what this package writes for sentencepiece's squeezing of spaces.
_PATTERNS = {s.pattern for s in SPLITTERS.values()} | {r'\A +|[ ▁]+\z', ' {2,}'}
_HARMLESS = {
    'Sequence', 'ByteLevel', 'ByteFallback', 'Fuse', 'Metaspace', 'Precompiled', 'Prepend', 'Replace', 'Split', 'Strip',
    'TemplateProcessing', 'NFC', 'NFD', 'NFKC', 'NFKD', 'Lowercase', 'Digits',
}  # fmt: skip


def check_opening(definition: dict[str, Any], data: bytes, path: str) -> None:
    """Refuses a tokenizer.json that the library does not open, or that would cost too much time or memory.

    Args:
      definition: what the file says.
      data: the same, as the library reads it.
      path: for messages.

    Raises:
      InputError: as said.
    """
    _check_charsmaps(definition.get('normalizer'), path)
    if (growth := _growth(definition.get('normalizer'))) > _MAX_GROWTH:
        raise InputError(f'{path} makes texts {growth} times as long; at most {_MAX_GROWTH} times is allowed')
    if _is_plain(definition['model']) and all(map(_is_harmless, map(definition.get, _STEPS))):
        return
    letters = sorted({letter for step in _STEPS for letter in _pattern(definition.get(step))})
    probes = (*PROBES, *(letter * 40 + '!' for letter in letters[:_MAX_LETTERS]))
    if reason := _tried(data, probes):
        raise InputError(f'{path} is not a tokenizer.json that tokenizers can read: {reason}')


def _parts(step: Any) -> list[Any]:
    """What a sequence of steps is made of."""
    keys = ('normalizers', 'pretokenizers', 'processors', 'decoders')
    return [part for key in keys if isinstance(parts := step.get(key), list) for part in parts]


def _is_plain(model: dict[str, Any]) -> bool:
    affixes = ('continuing_subword_prefix', 'end_of_word_suffix')
    return str(model.get('type')) in ('BPE', 'Unigram') and not any(map(model.get, affixes))


def _is_harmless(step: Any) -> bool:
    if step is None:
        return True
    if not isinstance(step, dict) or str(step.get('type')) not in _HARMLESS:
        return False
    if 'pattern' in step and not (isinstance(pattern := step['pattern'], dict) and _is_known(pattern)):
        return False
    return _is_whole(step) and all(map(_is_harmless, _parts(step)))


def _is_whole(step: dict[str, Any]) -> bool:
    """Whether a template knows all the tokens that it puts; of another the library panics."""
    pieces = [piece for key in ('single', 'pair') if isinstance(step.get(key), list) for piece in step[key]]
    if not all(isinstance(piece, dict) for piece in pieces):
        return False
    put = [piece['SpecialToken'] for piece in pieces if 'SpecialToken' in piece]
    known = step.get('special_tokens', {})
    if not isinstance(known, dict):
        return False
    return all(isinstance(token, dict) and str(token.get('id')) in known for token in put)


def _is_known(pattern: dict[str, Any]) -> bool:
    return str(pattern['Regex']) in _PATTERNS if 'Regex' in pattern else bool(pattern.get('String'))


def _growth(step: Any) -> int:
    """By how much the parts of a normalizer, one after another, can lengthen a text."""
    if not isinstance(step, dict):
        return 1
    texts = [value for key in ('content', 'prepend') if isinstance(value := step.get(key), str)]
    return math.prod(map(_growth, _parts(step))) * max(1, *map(len, texts), 1)


def _check_charsmaps(step: Any, path: str) -> None:
    if not isinstance(step, dict):
        return
    if 'precompiled_charsmap' in step or step.get('type') == 'Precompiled':
        try:
            charsmap = base64.b64decode(str(step.get('precompiled_charsmap')), validate=True)
        except ValueError:
            charsmap = b''
        if not charsmap:
            raise InputError(f'{path}: its compiled normalizer of characters is no base64; copy it again')
        check_charsmap(charsmap, path)
    for part in _parts(step):
        _check_charsmaps(part, path)


def _pattern(step: Any) -> str:
    """The patterns of a step and its parts; runs of their letters are what some of them take for ever at."""
    if not isinstance(step, dict):
        return ''
    pattern = step.get('pattern')
    own = pattern.get('Regex') if isinstance(pattern, dict) else ''
    return (own if isinstance(own, str) else '') + ''.join(map(_pattern, _parts(step)))


@functools.lru_cache(8)
def _tried(data: bytes, probes: tuple[str, ...]) -> str:
    """What went wrong in a process of its own; '' for nothing."""
    process = subprocess.Popen(
        [sys.executable, '-P', '-S', str(_PROGRAM), str(_SECONDS), str(_MEMORY), json.dumps(probes)],
        env={name: os.environ[name] for name in ('PATH', 'LD_LIBRARY_PATH') if name in os.environ}
        | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # of the library's panics
    )
    try:
        answer, _ = process.communicate(data, timeout=_WALL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        answer = b''
    if process.returncode:
        return f'it takes more than {_SECONDS} s or {_MEMORY >> 20} MiB (status {process.returncode})'
    reason: str = json.loads(answer)
    return error_line(ValueError(reason)) if reason else ''
