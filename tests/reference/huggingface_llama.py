"""transformers' Llama in float32, to compare with; torch and transformers are imported when it is used."""

import numpy as np


def make_model(hparams: dict, params: dict, max_seq_len: int):
    """transformers' LlamaForCausalLM with eager attention, holding our weights.

    Args:
      hparams: what `numpy_llama.forward` reads.
      params: our tree; tied where it has no head.
      max_seq_len: tokens of context.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # the matrices are small, and the cores busy with other tests
    rope = {'rope_type': 'default', 'rope_theta': hparams['rope_theta']}
    if scaling := hparams['rope_scaling']:
        names = {'original_max_seq_len': 'original_max_position_embeddings'}
        rope |= {'rope_type': 'llama3'} | {names.get(key, key): value for key, value in scaling.items()}
    layers, embed_dim, num_heads, head_dim = params['blocks']['attention']['q'].shape
    config = transformers.LlamaConfig(
        vocab_size=params['embed'].shape[0],
        hidden_size=embed_dim,
        intermediate_size=params['blocks']['mlp']['gate'].shape[-1],
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=params['blocks']['attention']['k'].shape[2],
        head_dim=head_dim,
        max_position_embeddings=max_seq_len,
        rms_norm_eps=hparams['norm_eps'],
        rope_parameters=rope,
        tie_word_embeddings='head' not in params,
        attn_implementation='eager',
    )
    model = transformers.LlamaForCausalLM(config).float()
    state = {name: torch.tensor(np.ascontiguousarray(w)) for name, w in _state_dict(params).items()}
    model.load_state_dict(state, strict=True)
    return model


def _state_dict(params: dict) -> dict[str, np.ndarray]:
    """Our tree as their flat one: a matrix a layer, [out, in]. Both keep RoPE half-split."""
    state = {
        'model.embed_tokens.weight': params['embed'],
        'model.norm.weight': params['final_norm'],
        'lm_head.weight': params.get('head', params['embed']),
    }
    blocks = params['blocks']
    for layer in range(len(blocks['attention_norm'])):
        prefix = f'model.layers.{layer}'
        state[f'{prefix}.input_layernorm.weight'] = blocks['attention_norm'][layer]
        state[f'{prefix}.post_attention_layernorm.weight'] = blocks['mlp_norm'][layer]
        for name in 'qkvo':
            w = np.asarray(blocks['attention'][name][layer])
            w = w.reshape(-1, w.shape[-1]) if name == 'o' else w.reshape(w.shape[0], -1)
            state[f'{prefix}.self_attn.{name}_proj.weight'] = w.T
        for name in ('gate', 'up', 'down'):
            state[f'{prefix}.mlp.{name}_proj.weight'] = blocks['mlp'][name][layer].T
    return state


def forward(model, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of tokens [B, T], causal, at any increasing positions [B, T]."""
    import torch

    length = tokens.shape[1]
    # An explicit mask: without one, transformers takes a jump of positions for the start of another document.
    blocked = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            position_ids=torch.tensor(positions, dtype=torch.long),
            attention_mask=blocked.expand(len(tokens), 1, length, length),
            use_cache=False,
        )
    return out.logits.numpy()
