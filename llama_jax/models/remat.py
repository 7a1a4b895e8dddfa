"""What the backward pass finds saved of a layer, by the names of policies."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.ops.attention_cudnn import FORWARD_PRIMITIVE as CUDNN_FORWARD

# How a policy is asked about a value that has a name.
_NAME = jax.make_jaxpr(lambda x: checkpoint_name(x, ''))(0.0).eqns[0].primitive


def _with_cudnn(policy: Callable) -> Callable:
    """The policy, for which what cuDNN's kernel gives, output and unnamed residual, is an 'attention_output'."""

    def decide(primitive, *args, **params):
        if primitive.name == CUDNN_FORWARD:
            return policy(_NAME, name='attention_output')
        return policy(primitive, *args, **params)

    return decide


def _save(*names: str) -> Callable:
    return _with_cudnn(jax.checkpoint_policies.save_only_these_names(*names))


def _offload(*names: str) -> Callable:
    return _with_cudnn(
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=['block_input', *names],
            offload_src='device',
            offload_dst='pinned_host',
        )
    )


# What the backward pass finds saved of a layer, beside its input; all else it recomputes. Numbers of a token and layer
# are counted in D = embed_dim, F = mlp_dim, N, K heads of H.
REMAT_POLICIES: dict[str, Callable | None] = {
    'full': jax.checkpoint_policies.nothing_saveable,  # nothing: D
    'attention': _save('attention_output'),  # what the attention kernel gives: D + N H
    # The same and every product with a weight, so that none is done twice: 3 D + 2 (N + K) H + 2 F.
    'projections': _save('attention_output', 'projection'),
    'none': None,  # everything there is
    # As their namesakes, but all that is saved waits in the host's memory, the layer's input too: for TPUs and GPUs
    # whose own memory is short and whose link to the host has time.
    'full_offload': _offload(),
    'attention_offload': _offload('attention_output'),
    'projections_offload': _offload('attention_output', 'projection'),
}
