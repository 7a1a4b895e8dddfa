"""Hugging Face's Llama of the same shape, which ours is measured beside."""

from typing import Any

import jax

from llama_jax.models.config import LlamaConfig


def random_llama(config: LlamaConfig) -> tuple[Any, str]:
    """A model of random weights, in float32 with SDPA attention, that ends no text itself; and the device it is on."""
    import torch
    from transformers import LlamaConfig as HuggingFaceConfig
    from transformers import LlamaForCausalLM as HuggingFaceLlama

    torch.manual_seed(0)
    model = HuggingFaceLlama(
        HuggingFaceConfig(
            vocab_size=config.vocab_size, hidden_size=config.embed_dim, intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_seq_len, tie_word_embeddings=config.tie_embeddings,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    model.set_attn_implementation('sdpa')
    device = 'cpu' if jax.default_backend() == 'cpu' else 'cuda'  # of which torch says so where it has none
    return model.to(torch.device(device)), device  # pyright: ignore[reportArgumentType]
