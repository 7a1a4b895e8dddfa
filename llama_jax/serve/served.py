"""What is served: a model with its tokenizer, how it is talked to, and what runs it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.errors import InputError
from llama_jax.inference.chat import Chat
from llama_jax.inference.constraint import Constrained, Rules
from llama_jax.inference.decoding import power_of_two
from llama_jax.inference.generator import Generator
from llama_jax.inference.scoring import MAX_CANDIDATES, TokenScore, score_tokens
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.serve.log_probabilities import TokenTexts
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.types import Params

# Tokens of the shortest text that is scored; shorter ones are padded.
_LEAST_SCORED = 64


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is loaded.

    Attributes:
      tokenizer: that it was trained with.
      chat: how it is talked to; a text: why it cannot be.
      context: tokens of a prompt and its answer together, at most.
      vocab_size: tokens that the model has rows for.
      num_slots: rows that are decoded together.
      rules: what reads constraints of answers; a text: why there are none.
      top_logprobs: likely tokens that are told of a place, at most.
      make_generator: for requests of all kinds; called anew where one has failed.
      score: what the model makes of each token of a text.
    """

    tokenizer: Tokenizer
    chat: Chat | str
    context: int
    vocab_size: int
    num_slots: int
    top_logprobs: int
    rules: Rules | str
    make_generator: Callable[[], Generator]
    score: Callable[[Sequence[int]], list[TokenScore]]

    @functools.cached_property
    def texts(self) -> TokenTexts:
        """How tokens are written."""
        return TokenTexts(self.tokenizer)

    @classmethod
    def create(
        cls,
        model: LlamaForCausalLM,
        params: Params,
        tokenizer: Tokenizer,
        chat: Chat | str,
        rules: Rules | str,
        **rows: Any,
    ) -> 'Served':
        """Of weights that are loaded; `rows` are options of `Generator`, of which log_probabilities must be one."""
        number = rows['log_probabilities']
        if isinstance(rules, Rules):
            rows['processor'] = Constrained(rules)
        return cls(
            tokenizer, chat, model.config.max_seq_len, model.config.vocab_size, rows['num_slots'], number, rules,
            functools.partial(Generator, model, params, **rows), scorer(model, params, number),
        )  # fmt: skip

    def warm_up(self) -> Generator:
        """A generator, after every program that requests can need was compiled."""
        generator = self.make_generator()
        widths = {_padded(1 << power, self.context) for power in range(self.context.bit_length() + 1)}
        generator.warm_up([functools.partial(self.score, [0] * width) for width in sorted(widths)])
        return generator


def chat_of(tokenizer: Tokenizer, template: str) -> Chat | str:
    """How a checkpoint is talked to, or why it cannot be."""
    try:
        return Chat(tokenizer, template)
    except InputError as error:
        return str(error)


def rules_of(tokenizer: Tokenizer, model: LlamaForCausalLM, with_draft: bool) -> Rules | str:
    """What reads constraints for a model, or why there are none."""
    if with_draft:
        return 'a draft proposes tokens, which knows of no constraint'
    try:
        return Rules(tokenizer, model.config.vocab_size)
    except InputError as error:
        return str(error)


def scorer(
    model: LlamaForCausalLM, params: Params, top_logprobs: int
) -> Callable[[Sequence[int]], list[TokenScore]]:
    """`Served.score` of a model: one text at a time, padded behind its end, so that few programs serve all."""
    number, context = min(MAX_CANDIDATES, top_logprobs), model.config.max_seq_len

    def score(tokens: Sequence[int]) -> list[TokenScore]:
        padded = [*tokens, *[0] * (_padded(len(tokens), context) - len(tokens))]
        (scores,) = score_tokens(model, params, [padded], num_candidates=number, batch_tokens=1)
        return scores[: len(tokens)]

    return score


def _padded(size: int, context: int) -> int:
    """Tokens that a text of so many is read as."""
    return min(max(power_of_two(size), _LEAST_SCORED), context)
