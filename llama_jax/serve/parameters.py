"""What clients may send beside what is honoured: parameters that change no answer here, and those that are refused."""

from typing import Any

from pydantic import BaseModel

from llama_jax.errors import did_you_mean
from llama_jax.serve.refusal import bad

# Taken and without effect, as they change no answer: who asks, what the service is to keep, whom it serves first.
HARMLESS = frozenset(
    {
        'metadata', 'parallel_tool_calls', 'prompt_cache_key', 'prompt_cache_options', 'prompt_cache_retention',
        'safety_identifier', 'service_tier', 'store', 'user',
    }
)  # fmt: skip

# Refused, each with its reason, but for values that ask for nothing.
_NOT_OFFERED = {
    'access_programs': 'programs are not offered',
    'audio': 'only text is offered',
    'background': 'answers are given while the client waits',
    'background_options': 'answers are given while the client waits',
    'best_of': 'ask for n answers and choose among them',
    'context_management': 'nothing is cut silently; send what the model is to read',
    'conversation': 'no conversations are kept; send all messages',
    'function_call': 'it is outdated; use tool_choice',
    'functions': 'they are outdated; use tools',
    'image': 'only text is offered',
    'include': 'log-probabilities come with top_logprobs; nothing else is offered',
    'max_tool_calls': 'an answer has one call at most',
    'modalities': 'only text is offered',
    'moderation': 'it is not offered',
    'prediction': 'it is not offered',
    'previous_response_id': 'no answers are kept; send all messages',
    'reasoning': 'these models have no such setting',
    'reasoning_effort': 'these models have no such setting',
    'truncation': 'nothing is cut silently; send what the model is to read',
    'verbosity': 'these models have no such setting',
    'web_search_options': 'there is no search',
}
_ASKS_FOR_NOTHING: dict[str, tuple[Any, ...]] = {
    'background': (False,), 'best_of': (1,), 'include': ([],), 'modalities': (['text'],), 'truncation': ('disabled',),
}  # fmt: skip
REFUSED = frozenset(_NOT_OFFERED)


def check_others(body: BaseModel) -> None:
    """Refuses parameters that would be without effect.

    Raises:
      Refusal: names the first.
    """
    known = type(body).model_fields
    for name, value in (body.model_extra or {}).items():
        if name in HARMLESS or value is None or value in _ASKS_FOR_NOTHING.get(name, ()):
            continue
        if name in _NOT_OFFERED:
            raise bad(f'{name} is not offered here: {_NOT_OFFERED[name]}', name, 'unsupported_parameter')
        raise bad(f'unknown parameter {name}; {did_you_mean(name, known)}', name, 'unknown_parameter')
