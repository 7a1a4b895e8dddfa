"""What fills the gaps between texts."""

from collections.abc import Sequence
from typing import Any

from llama_jax.errors import checked_names
from llama_jax.inference.generate import generate
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.infill_format import InfillFormat
from llama_jax.tokenizer.protocol import required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params


@checked_names(generate)
def infill(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    gaps: Sequence[tuple[str, str]],
    *,
    suffix_first: bool = False,
    stop_ids: Sequence[int] = (),
    **settings: Any,
) -> list[str]:
    r"""What the model puts into each gap, for Code Llama 7B and 13B.

        (body,) = llama_jax.infill(model, params, tokenizer, [('def add(a, b):\n    return ', '\n\nprint(add(1, 2))')])

    Args:
      model: see `generate`.
      params: its weights.
      tokenizer: that the weights were trained with.
      gaps: (the text before, the text behind) of each.
      suffix_first: see `InfillFormat.encode_prompt`.
      stop_ids: end a filling, besides the tokenizer's and the token that ends one.
      settings: of `generate`.

    Raises:
      InputError: the tokenizer has no tokens for gaps, or as `generate`.
    """
    tokenizer = required(tokenizer)
    gap_format = InfillFormat(tokenizer)
    prompts = [gap_format.encode_prompt(prefix, suffix, suffix_first) for prefix, suffix in gaps]
    ends = (*gap_format.stop_ids, *stop_ids)
    return generate(model, params, tokenizer, prompts, stop_ids=ends, **settings)
