"""Answers that keep to a JSON schema, a regular expression or a grammar: llguidance says which tokens may come next.

    rules = Rules(tokenizer, config.vocab_size)
    constrained = Constrained(rules, rules.of_schema({'type': 'integer', 'minimum': 0, 'maximum': 9}))
    texts = llama_jax.generate(model, params, tokenizer, prompts, logits_processor=constrained)

The masks are made on the host, for each row that has a rule, while the program waits for them; rows without one do not.
"""

import collections
import dataclasses
import itertools
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.tokenizer.protocol import Tokenizer, bytes_within
from llama_jax.types import InputError, error_line

# Of a schema, an expression or a grammar, in characters.
MAX_RULE = 64 << 10
# Rows whose automata are kept; those that ended long ago go first.
_MAX_ROWS = 1024
# What a rule may take: to be read, and at each token. All are far from what people write.
_LIMITS = {
    'initial_lexer_fuel': 200_000, 'step_lexer_fuel': 100_000, 'step_max_items': 50_000, 'max_lexer_states': 50_000,
    'max_grammar_size': 50_000, 'max_items_in_row': 1000, 'precompute_large_lexemes': False, 'verbose_errors': False,
}  # fmt: skip
# Nothing joins this letter, so what stands behind it has none of what a text's beginning has.
_BEFORE = '☺'
_ONE_SPELLING = {'whitespace_flexible': False}


@dataclasses.dataclass(eq=False)
class Rule:
    """What one answer keeps to.

    Attributes:
      number: tells it from others, from 1 on.
      matcher: of llguidance, at the beginning.
      failure: why an answer could not be made by it to the end; '' as long as it could.
    """

    number: int
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
        self._numbers = itertools.count(1)
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
        text = json.dumps(schema)
        try:
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, defaults=_ONE_SPELLING)
        except ValueError as error:
            raise InputError(f'the schema cannot be used: {error_line(error)}') from None
        return self._read('the schema', text, grammar)

    def of_regex(self, regex: str) -> Rule:
        """Answers match a regular expression, whole.

        Raises:
          InputError: it is none, or too large.
        """
        return self._read('the regular expression', regex, self._library.LLMatcher.grammar_from_regex(regex))

    def of_grammar(self, grammar: str) -> Rule:
        """Answers are words of a grammar in the language of Lark, as llguidance reads it.

        Raises:
          InputError: it is none, or too large.
        """
        return self._read('the grammar', grammar, self._library.LLMatcher.grammar_from_lark(grammar))

    def _read(self, what: str, text: str, grammar: str) -> Rule:
        if len(text) > MAX_RULE:
            raise InputError(f'{what} has {len(text)} characters; it may have {MAX_RULE}')
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise InputError(f'{what} cannot be used: {error_line(ValueError(matcher.get_error()))}')
        return Rule(next(self._numbers), matcher)


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


@dataclasses.dataclass
class _Row:
    """Of an answer: its automaton after so many tokens, and which may be next."""

    rule: Rule
    matcher: Any
    step: int
    mask: np.ndarray


class Constrained:
    """A logits processor: rows keep to the rule of all, or each to its own."""

    def __init__(self, rules: Rules, rule: Rule | None = None):
        """Args: rules: for the tokenizer. rule: of all rows; None: that of the request, if it has one."""
        self._vocab_size, self._rule = rules.vocab_size, rule
        self._num_words, self._mask_bytes = -(-rules.vocab_size // 32), 4 * -(-rules.num_tokens // 32)
        self._numbers = itertools.count(1)
        # A request holds its rule as long as it is answered.
        self._known: weakref.WeakValueDictionary[int, Rule] = weakref.WeakValueDictionary()
        self._rows: collections.OrderedDict[int, _Row] = collections.OrderedDict()
        self._end = np.zeros(self._num_words * 32, bool)
        self._end[rules.stop_ids] = True
        self._end = np.packbits(self._end, bitorder='little').view(np.int32)

    def begin(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Any:
        """See `LogitsProcessor`."""
        del num_tokens
        return self.begin_ruled([None] * len(prompts))

    def begin_ruled(self, rules: Sequence[Any]) -> Any:
        """See `RuledProcessor`; a row is its number, 0 where it is free, its rule's, its step and its last token."""
        given = [self._rule if rule is None else rule for rule in rules]
        numbers = [next(self._numbers) if rule is not None else 0 for rule in given]
        self._known.update({rule.number: rule for rule in given if rule is not None})
        rows, of_rules = np.array(numbers, np.int32), [0 if rule is None else rule.number for rule in given]
        return rows, np.array(of_rules, np.int32), np.zeros_like(rows), np.zeros_like(rows)

    def __call__(self, logits: Float[Array, 'B V'], state: Any) -> Float[Array, 'B V']:
        """See `LogitsProcessor`."""
        shape = jax.ShapeDtypeStruct((len(logits), self._num_words), jnp.int32)

        def masked(logits: Array) -> Array:
            words = jax.pure_callback(self._masks, shape, *state, vmap_method='sequential')
            bits = (words[:, :, None] >> jnp.arange(32)[None, None]) & 1
            allowed = bits.reshape(len(logits), -1)[:, : self._vocab_size] == 1
            return jnp.where(allowed, logits, -jnp.inf)

        return jax.lax.cond(jnp.any(state[0] > 0), masked, lambda logits: logits, logits)

    def advance(self, state: Any, tokens: Int[Array, 'B']) -> Any:
        """See `LogitsProcessor`."""
        numbers, rules, step, _ = state
        return numbers, rules, step + 1, tokens

    def _masks(self, numbers: Any, rules: Any, steps: Any, tokens: Any) -> np.ndarray:
        """Which tokens may come next in each row, a bit each; of one without a rule all."""
        masks = np.full((len(numbers), self._num_words), -1, np.int32)
        columns = (np.asarray(x).tolist() for x in (numbers, rules, steps, tokens))
        for place, (number, rule, step, token) in enumerate(zip(*columns, strict=True)):
            if number and (row := self._row(number, rule)) is not None:
                self._go_on(row, step, token)
                masks[place] = row.mask
        return masks

    def _row(self, number: int, rule_number: int) -> _Row | None:
        row = self._rows.get(number)
        if row is None:
            rule = self._known.get(rule_number)
            if rule is None:
                return None  # its request is over, so nobody reads what comes of it
            row = self._rows[number] = _Row(rule, rule.matcher.deep_copy(), 0, self._end)
            row.mask = self._mask(row)
            if len(self._rows) > _MAX_ROWS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(number)
        return row

    def _go_on(self, row: _Row, step: int, token: int) -> None:
        """To this step, of which it may have heard already; behind its end a row hears no more."""
        if step == row.step + 1 and not row.matcher.is_stopped():
            row.matcher.consume_token(token)
            row.mask = self._mask(row)
        row.step = max(step, row.step)

    def _mask(self, row: _Row) -> np.ndarray:
        """What may be next; where the automaton cannot say, the end alone, and the rule hears why."""
        matcher = row.matcher
        if matcher.is_stopped() and not matcher.is_error():
            return self._end
        mask = np.zeros(self._num_words, np.int32)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, self._mask_bytes)
        if matcher.is_error() or not mask.any():
            row.rule.failure = error_line(ValueError(matcher.get_error() or 'no token can come next'))
            return self._end
        return mask
