"""--schema, --regex and --grammar: what completions keep to."""

from collections.abc import Mapping

from etils import epath

from llama_jax.errors import InputError
from llama_jax.inference.constraint import MAX_RULE, Constrained, Rules
from llama_jax.json_file import parse_json, read_bytes
from llama_jax.tokenizer.protocol import Tokenizer


def read_constraint(
    given: Mapping[str, str], tokenizer: Tokenizer, vocab_size: int
) -> tuple[Constrained | None, str]:
    """What holds completions to a rule, and the rule's text; None and '' where there is none.

    Args:
      given: {'schema': a file of JSON, 'regex': an expression, 'grammar': a file}, of which one at most is not ''.
      tokenizer: of the model.
      vocab_size: rows of the model.

    Raises:
      InputError: several are given, or the one cannot be used.
    """
    names = [name for name, value in given.items() if value]
    if not names:
        return None, ''
    if len(names) > 1:
        raise InputError(f'{" and ".join(names)} are both given; a completion keeps to one')
    (name,) = names
    text = (
        given[name]
        if name == 'regex'
        else read_bytes(epath.Path(given[name]), MAX_RULE).decode(errors='replace')
    )
    rules = Rules(tokenizer, vocab_size)
    if name == 'schema':
        rule = rules.of_schema(parse_json(text, given[name]))
    else:
        rule = rules.of_regex(text) if name == 'regex' else rules.of_grammar(text)
    return Constrained(rules, rule), f'{name}: {text}'
