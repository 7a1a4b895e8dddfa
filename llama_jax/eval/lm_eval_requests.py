"""The requests of lm-evaluation-harness as ours; one that is odd is answered or said, and ends no run."""

import collections
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError
from llama_jax.eval.task import Completion, Completions, Continuation, Likelihood, Request, Result
from llama_jax.inference.sampling import Sampler

_log = logging.getLogger(__name__)


def read(requests: Sequence[Any], make: Callable[..., Any]) -> list[Any]:
    """What each request asks for; None where it cannot be answered, with one line for all that fail alike."""
    asked, reasons = [], collections.Counter()
    for request in requests:
        try:
            asked.append(make(*request.args))
        except (InputError, TypeError, ValueError) as error:
            asked.append(None)
            reasons[' '.join(str(error).split())] += 1
    for reason, count in reasons.items():
        _log.error(
            '%d of %d requests cannot be answered and count as wrong: %s', count, len(requests), reason
        )
    return asked


def whole_text(text: Any) -> str:
    """The text itself; InputError or ValueError for what is none."""
    if not isinstance(text, str):
        raise InputError(f'{str(text)[:40]!r} is no text but {type(text).__name__}')
    text.encode()  # half of a surrogate pair has no bytes: ValueError
    return text


def continuation(context: Any, text: Any) -> Request | Result:
    """A request for the likelihood of `text`, or the answer: an empty one is certain."""
    request = Continuation(whole_text(context), whole_text(text))
    return request if text else Likelihood(0.0, is_greedy=True)


# Settings of transformers' `generate` at which they change nothing; with beams, and with drawing, go others.
_NEUTRAL = {
    'num_beams': 1, 'num_beam_groups': 1, 'num_return_sequences': 1, 'n': 1, 'best_of': 1, 'no_repeat_ngram_size': 0,
    'min_length': 0, 'diversity_penalty': 0, 'encoder_repetition_penalty': 1, 'typical_p': 1,
    'renormalize_logits': False, 'use_cache': True,
}  # fmt: skip
_OF_BEAMS = ('length_penalty', 'early_stopping')
_OF_DRAWING = ('typical_p', 'seed')
# Settings of a `Sampler`, and whether they matter where nothing is drawn.
_FURTHER: dict[str, tuple[Callable[[Any], float], bool]] = {
    'top_k': (lambda value: max(int(value), 0), False), 'min_p': (float, False), 'repetition_penalty': (float, True),
    'presence_penalty': (float, True), 'frequency_penalty': (float, True), 'min_new_tokens': (int, True),
}  # fmt: skip


def completion(context: Any, arguments: Mapping[str, Any] | None) -> Request | Result:
    """A request for what follows `context`, or the answer where that is nothing.

    Raises:
      InputError: an argument would change the text in a way that we cannot.
    """
    rest = {name: value for name, value in dict(arguments or {}).items() if value is not None}
    stop = _stop_strings(rest.pop('until', ()))
    lengths = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
    given = [int(rest.pop(name)) for name in lengths if name in rest]
    temperature, top_p = float(rest.pop('temperature', 0.0)), float(rest.pop('top_p', 1.0))
    if rest.pop('do_sample', None) is False:
        temperature = 0.0
    further: dict[str, Any] = {}
    for name, (read_as, matters_always) in _FURTHER.items():
        if name in rest and (matters_always or temperature):
            further[name] = read_as(rest[name])
        rest.pop(name, None)
    neutral = vars(Sampler())
    further = {name: value for name, value in further.items() if value != neutral[name]}
    without_effect = _OF_BEAMS + (() if temperature else _OF_DRAWING)
    unknown = {
        f'{name}={value}' for name, value in rest.items()
        if name not in without_effect and value != _NEUTRAL.get(name, rest)
    }  # fmt: skip
    if unknown:
        raise InputError(
            f'generation arguments {", ".join(sorted(unknown))} are not supported; there are until, max_gen_toks, '
            f'do_sample, temperature, top_p, {", ".join(_FURTHER)}'
        )
    top_p = top_p if temperature else 1.0
    Sampler(temperature, top_p=top_p, **further)  # checks them
    max_new_tokens = given[0] if given else 256
    if max_new_tokens < 0:
        raise InputError(f'max_gen_toks is {max_new_tokens}; it must be 0 or more')
    if max_new_tokens == 0:
        return Completions(('',))
    if (least := further.get('min_new_tokens', 0)) > max_new_tokens:
        raise InputError(f'min_new_tokens is {least}; it must be at most max_gen_toks, {max_new_tokens}')
    in_order = tuple(sorted(further.items()))
    return Completion(whole_text(context), stop, max_new_tokens, temperature, top_p, further=in_order)


def _stop_strings(until: Any) -> tuple[str, ...]:
    items: Iterable[Any] = [until] if isinstance(until, str | int | float) else until
    return tuple(str(item) for item in items if item not in (None, ''))


def plain_text(content: Any) -> str:
    """The text of a message, which may come in pieces: [{'type': 'text', 'text': ...}, ...]."""
    if content is None or isinstance(content, str):
        return content or ''
    if isinstance(content, Sequence):
        texts = [piece if isinstance(piece, str) else piece.get('text') for piece in content]
        if all(isinstance(text, str) for text in texts):
            return ''.join(texts)
    raise InputError(f'a message holds {str(content)[:60]!r}; this model reads text only')
