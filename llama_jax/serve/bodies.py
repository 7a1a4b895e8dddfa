"""The bodies of requests, as OpenAI's clients send them: every field with its kind and its range."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from llama_jax.inference.sampling import Sampler
from llama_jax.inference.scoring import MAX_CANDIDATES

# Texts that may end an answer, as in OpenAI's service.
_MAX_STOPS = 4
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _check_numbers(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError('a number in it is not finite') from None
    return value


# An object of any kind, such as a schema.
FreeJson = Annotated[dict[str, Any], AfterValidator(_check_numbers)]


class Part(BaseModel):
    """Of a body: kinds are not converted, numbers are finite, and what is not named here is kept to be looked at."""

    model_config = {'strict': True, 'extra': 'allow', 'allow_inf_nan': False}


class StreamOptions(Part):
    """What a stream tells beside its pieces."""

    include_usage: bool | None = None


class Sampling(Part):
    """What requests of all kinds say of how tokens are drawn; None is the default."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampler(self, otherwise: int) -> Sampler:
        """How the tokens are drawn.

        Args:
          otherwise: the seed where none is given.

        Raises:
          InputError: a bias is out of range.
        """
        temperature = 1.0 if self.temperature is None else self.temperature
        # Below, logits in fp32 would overflow; nothing but the most likely token would be drawn.
        temperature = 0.0 if temperature < 1e-6 else temperature
        given = (self.logit_bias or {}).items()  # of ids in texts; Python does not read very long ones
        bias = {int(id) if id.isdecimal() and len(id) < 20 else -1: value for id, value in given}
        as_named = ('top_p', 'min_p', 'repetition_penalty', 'presence_penalty', 'frequency_penalty')
        return Sampler(
            **{name: value for name in as_named if (value := getattr(self, name)) is not None},
            temperature=temperature,
            top_k=max(self.top_k or 0, 0),
            logit_bias=bias,
            min_new_tokens=self.min_tokens or 0,
            seed=(otherwise if self.seed is None else self.seed) % 2**32,
        )


class CompletionBody(Sampling):
    """Of /v1/completions."""

    prompt: str | list[str] | list[_TokenId] | list[list[_TokenId]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each text, or its ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class TextPart(Part):
    """A part of a message; only texts are read."""

    type: Literal['text', 'input_text', 'output_text']
    text: str


class CalledFunction(Part):
    """What the assistant called, with its arguments as JSON in a text."""

    name: str
    arguments: str


class ToolCall(Part):
    """Of a message by the assistant."""

    id: str | None = None
    type: Literal['function'] = 'function'
    function: CalledFunction


class ChatMessage(Part):
    """One message of a conversation."""

    role: Literal['system', 'developer', 'user', 'assistant', 'tool']
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Of all its parts."""
        if isinstance(self.content, list):
            return ''.join(part.text for part in self.content)
        return self.content or ''


class Function(Part):
    """That the model may call."""

    name: Annotated[str, Field(pattern=r'^[a-zA-Z0-9_.-]{1,64}$')]
    description: str | None = None
    parameters: FreeJson | None = None
    strict: bool | None = None


class OfFunction(Part):
    """Of tools only functions are offered."""

    type: Literal['function']


class Tool(OfFunction):
    """That the model may use."""

    function: Function


class NamedFunction(Part):
    """Of a choice of tool."""

    name: str


class NamedTool(OfFunction):
    """A choice of tool: this one."""

    function: NamedFunction


class JsonSchema(Part):
    """Of an answer's format."""

    name: str | None = None
    schema_: Annotated[FreeJson, Field(alias='schema')]
    strict: bool | None = None


class ResponseFormat(Part):
    """What an answer is to be."""

    type: Literal['text', 'json_object', 'json_schema']
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    """Of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal['none', 'auto', 'required'] | NamedTool | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(Part):
    """Of /tokenize: a text in which a special token's name is that token."""

    prompt: str
    add_special_tokens: bool | None = None
    model: str | None = None


class DetokenizeBody(Part):
    """Of /detokenize."""

    tokens: list[_TokenId]
    model: str | None = None


class PassagesBody(Part):
    """Of /passages: a question to the documents."""

    prompt: str
