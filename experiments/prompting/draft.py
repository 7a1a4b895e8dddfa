"""--draft: who proposes the tokens of which the model verifies several at once."""

from experiments import launch
from llama_jax import pretrained
from llama_jax.inference.proposers import Draft, Lookup, Proposer
from llama_jax.inference.speculative import check_vocabulary
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from llama_jax.quantize.params import quantize
from llama_jax.tokenizer.protocol import check_same_ids
from llama_jax.types import Params


def open_draft(
    name: str, checkpoint: pretrained.Checkpoint, tokenizer_file: str
) -> pretrained.Checkpoint | None:
    """The checkpoint that --draft names, if it does; its weights are still in their files.

    Args:
      name: --draft.
      checkpoint: of the model.
      tokenizer_file: that is used instead of the checkpoint's own; '' for that.

    Raises:
      InputError: the draft has other tokens.
    """
    if name in ('', 'lookup', 'int4'):
        return None
    with launch.flags_named('--draft'):
        draft = pretrained.open(name)
        check_vocabulary(checkpoint.config, draft.config)
        own = pretrained.load_tokenizer(tokenizer_file) if tokenizer_file else checkpoint.tokenizer
        if own is not None and draft.tokenizer is not None:
            check_same_ids(own, draft.tokenizer, f'the draft {name}')
    return draft


def make_proposer(
    name: str, tokens: int, draft: pretrained.Checkpoint | None, model: LlamaForCausalLM, params: Params
) -> Proposer | None:
    """Who proposes; None without --draft.

    Args:
      name: --draft.
      tokens: --draft_tokens.
      draft: as `open_draft` gives it.
      model: that verifies.
      params: its weights.

    Raises:
      InputError: --draft=int4 of weights that are in integers already, or the draft is damaged.
    """
    if name == 'lookup':
        return Lookup(tokens)
    with launch.flags_named('--draft'):
        if name == 'int4':
            # Norms are not quantised: arrays of its own, as those of the model are soon given up.
            return Draft(model, unstack(quantize(params, 'int4'), model.dtype), tokens)
        if draft is None:
            return None
        config, weights, _ = pretrained.load(draft, partitioner=model.partitioner, dtype=model.dtype)
    return Draft(model.clone(config=config), weights, tokens)
