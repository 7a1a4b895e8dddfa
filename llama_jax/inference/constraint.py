"""Answers that keep to a JSON schema, a regular expression or a grammar: llguidance says which tokens may come next.

    rules = Rules(tokenizer, config.vocab_size)
    constrained = Constrained(rules, rules.of_schema({'type': 'integer', 'minimum': 0, 'maximum': 9}))
    texts = llama_jax.generate(model, params, tokenizer, prompts, logits_processor=constrained)

The masks are made on the host, on accelerators while these read the token before, so steps are made one by one while a
row with a rule runs.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.errors import InputError, error_line
from llama_jax.tokenizer.protocol import Tokenizer, bytes_within

# Of a schema, an expression or a grammar, in characters.
MAX_RULE = 64 << 10
# What a rule may take: to be read, and at each token. All are far from what people write.
_LIMITS = {
    'initial_lexer_fuel': 200_000, 'step_lexer_fuel': 100_000, 'step_max_items': 50_000, 'max_lexer_states': 50_000,
    'max_grammar_size': 50_000, 'max_items_in_row': 1000, 'precompute_large_lexemes': False, 'verbose_errors': False,
}  # fmt: skip
# Nothing joins this letter, so what stands behind it has none of what a text's beginning has.
_BEFORE = '☺'
# As `json.dumps` has it.
_ONE_SPELLING = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}


@dataclasses.dataclass(eq=False)
class Rule:
    """What one answer keeps to.

    Attributes:
      source: kind and text, of which `Rules.read` makes the same.
      matcher: of llguidance, at the beginning.
      failure: why an answer could not be made by it to the end; '' as long as it could.
    """

    source: tuple[str, str]
    matcher: Any
    failure: str = ''


class Rules:
    """Reads rules for one tokenizer; from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """Takes the tokenizer, and the model's number of rows.

        Raises:
          InputError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise InputError(
                "constraints need the package llguidance: pip install 'llama_jax[serve]'"
            ) from None
        self._library, self.vocab_size = llguidance, vocab_size
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self.stop_ids = sorted(id for id in tokenizer.stop_ids if id < vocab_size)
        self.num_tokens = min(vocab_size, tokenizer.vocab_size)
        described = _Described(tokenizer, self.num_tokens)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(described), n_vocab=len(described.tokens), eos_token=self.stop_ids
        )

    def of_schema(self, schema: Mapping[str, Any] | bool) -> Rule:
        """Answers are JSON of this schema, in one spelling: no spaces but one behind each comma and colon.

        Raises:
          InputError: it is no schema, is one that nothing fits, or is too large.
        """
        return self.read(('schema', json.dumps(schema)))

    def of_regex(self, regex: str) -> Rule:
        """Answers match a regular expression, whole.

        Raises:
          InputError: it is none, or too large.
        """
        return self.read(('regular expression', regex))

    def of_grammar(self, grammar: str) -> Rule:
        """Answers are words of a grammar in the language of Lark, as llguidance reads it.

        Raises:
          InputError: it is none, or too large.
        """
        return self.read(('grammar', grammar))

    def read(self, source: tuple[str, str]) -> Rule:
        """What one of the above has read, once more: another process has `Rule.source`."""
        (kind, text), matcher = source, self._library.LLMatcher
        if len(text) > MAX_RULE:
            raise InputError(f'the {kind} has {len(text)} characters; it may have {MAX_RULE}')
        try:
            if kind == 'schema':
                grammar = matcher.grammar_from_json_schema(text, defaults=_ONE_SPELLING)
            else:
                is_regex = kind == 'regular expression'
                grammar = (matcher.grammar_from_regex if is_regex else matcher.grammar_from_lark)(text)
            made = matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if made.is_error():
                raise ValueError(made.get_error())
        except ValueError as error:
            raise InputError(f'the {kind} cannot be used: {error_line(error)}') from None
        return Rule(source, made)


class _Described:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, size: int):
        names = {id: name for name, id in getattr(tokenizer, 'special_tokens', {}).items() if id < size}
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [
            names[id].encode() if id in names else bytes_within(tokenizer, id) for id in range(size)
        ]
        # What stands for no text is in none.
        self.special_token_ids = [id for id, spelled in enumerate(self.tokens) if id in names or not spelled]
        self._encode, self._num_before = tokenizer.encode, len(tokenizer.encode(_BEFORE))

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError('texts are encoded')  # llguidance then asks by texts
        return self._encode(_BEFORE + text)[self._num_before :]


class _Follower:
    """One answer, token by token: which may come next, a bit each in the words of `mask`, made once it is asked for."""

    def __init__(self, rule: Rule, end: np.ndarray, mask_bytes: int):
        self._rule, self._matcher = rule, rule.matcher.deep_copy()
        self._end, self._mask_bytes = end, mask_bytes
        self._made: np.ndarray | None = None

    def hear(self, token: int) -> None:
        """Behind its end an answer hears no more."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._made = None

    @property
    def mask(self) -> np.ndarray:
        """What may be next; where the automaton cannot say, the end alone, and the rule hears why."""
        if self._made is None:
            self._made = self._next()
        return self._made

    def _next(self) -> np.ndarray:
        matcher = self._matcher
        if matcher.is_stopped() and not matcher.is_error():
            return self._end
        mask = np.zeros_like(self._end)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, self._mask_bytes)
        if matcher.is_error() or not mask.any():
            self._rule.failure = error_line(ValueError(matcher.get_error() or 'no token can come next'))
            return self._end
        return mask


class Constrained:
    """A logits processor: rows keep to the rule of all, or each to its own."""

    def __init__(self, rules: Rules, rule: Rule | None = None):
        """Args: rules: for the tokenizer. rule: of all rows; None: that of the request, if it has one."""
        self._vocab_size, self._rule = rules.vocab_size, rule
        self._mask_bytes = 4 * -(-rules.num_tokens // 32)
        end = np.zeros(-(-rules.vocab_size // 32) * 32, bool)
        end[rules.stop_ids] = True
        self._end = np.packbits(end, bitorder='little').view(np.int32)

    def follow(self, rule: Any) -> _Follower | None:
        """See `RuledProcessor`."""
        rule = self._rule if rule is None else rule
        return None if rule is None else _Follower(rule, self._end, self._mask_bytes)

    def states(self, rows: Sequence[Any]) -> Int[np.ndarray, 'B words']:
        """See `RuledProcessor`; of a row without a rule all may come."""
        every = np.full_like(self._end, -1)
        return np.stack([every if row is None else row.mask for row in rows])

    def begin(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Int[np.ndarray, 'B words']:
        """See `LogitsProcessor`."""
        del num_tokens
        return self.states([None] * len(prompts))

    def __call__(self, logits: Float[Array, 'B V'], state: Int[Array, 'B words']) -> Float[Array, 'B V']:
        """See `LogitsProcessor`."""

        def masked(logits: Array) -> Array:
            bits = (state[:, :, None] >> jnp.arange(32)[None, None]) & 1
            allowed = bits.reshape(len(logits), -1)[:, : self._vocab_size] == 1
            return jnp.where(allowed, logits, -jnp.inf)

        return jax.lax.cond(jnp.any(state != -1), masked, lambda logits: logits, logits)

    def advance(self, state: Any, tokens: Int[Array, 'B']) -> Any:
        """See `LogitsProcessor`; the host gives the next."""
        del tokens
        return state
