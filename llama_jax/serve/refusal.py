"""What is told of a request that is not answered: OpenAI's object for errors, and the status that goes with it."""

import collections
import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from llama_jax.errors import InputError, error_line

# Seconds after which one that was sent away may come again.
_RETRY_SECONDS = 5
# What pydantic puts between the names of fields: kinds of a union.
_KIND = re.compile(r'^((str|int|float|bool)$|function-|constrained-|literal\[|(list|dict)\[)|[A-Z]')


class Refusal(Exception):
    """A request is refused, or cannot be answered.

    Attributes:
      status: of HTTP.
      param: the parameter that is wrong; None where none is.
      code: for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """As OpenAI's service tells it."""
        kinds = {429: 'rate_limit_error', 401: 'authentication_error'}
        kind = kinds.get(self.status, 'server_error' if self.status >= 500 else 'invalid_request_error')
        return {'error': {'message': str(self), 'type': kind, 'param': self.param, 'code': self.code}}

    def response(self) -> JSONResponse:
        """To be sent instead of an answer."""
        headers: Mapping[str, str] = {}
        if self.status in (429, 503):
            headers = {'Retry-After': str(_RETRY_SECONDS)}
        elif self.status == 401:
            headers = {'WWW-Authenticate': 'Bearer'}
        return JSONResponse(self.to_json(), self.status, headers)


def bad(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request itself is wrong."""
    return Refusal(400, message, param, code)


def of_input_error(error: InputError, param: str | None = None) -> Refusal:
    """What the library refuses; the parameter is the one that its line begins with, if it begins with one."""
    line = error_line(error)
    named = re.match(
        r'(temperature|top_k|top_p|min_p|repetition_penalty|presence_penalty|frequency_penalty|logit_bias|seed)\b',
        line,
    )
    return bad(line, param or (named[1] if named else None))


def of_validation(error: ValidationError) -> Refusal:
    """The first thing that is wrong with a body."""
    errors = error.errors(include_url=False, include_context=False)
    of_kind = collections.Counter(one['loc'][:2] for one in errors)
    # Of the kinds that a value may have, the one that it comes nearest to.
    first = max(
        (one for one in errors if one['loc'][:1] == errors[0]['loc'][:1]),
        key=lambda one: (not one['type'].endswith('_type'), -of_kind[one['loc'][:2]], len(one['loc'])),
    )
    place = [str(part) for part in first['loc'] if isinstance(part, int) or not _KIND.search(part)]
    param = re.sub(r'\.(\d+)', r'[\1]', '.'.join(place)) or None
    if first['type'] == 'json_invalid':
        return bad(f'the body is no JSON: {first["msg"]}')
    value = '' if first['type'] == 'missing' else f', not {_shown(first["input"])}'
    return bad(f'{param or "the body"}: {first["msg"]}{value}', param)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f'{text[:60]}...'
