"""Llama in float64 numpy, written from the papers: what the model is compared with.

It shares nothing with `llama_jax` but the parameter layout, and computes what it can in another way: RoPE is
Meta's product of complex numbers over interleaved pairs (the model rotates half-split halves), attention loops
over heads, layers are a loop. Only RoPE's angles are fp32, as in every implementation that the released weights
were run with: float64 angles differ by up to 0.009 rad before position 131,072, which is a different model.

Sources: LLaMA (arXiv 2302.13971), RoFormer (2104.09864), GQA (2305.13245), SwiGLU (2002.05202), RMSNorm
(1910.07467), and `apply_scaling` of Meta's llama-models for Llama 3.1.
"""

import numpy as np


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None = None) -> np.ndarray:
    """RoPE's fp32 inverse frequencies [H / 2], with the roundings of torch.

    Args:
      head_dim: H.
      theta: the base.
      scaling: None, or Llama 3.1's `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_seq_len`.
    """
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    powers = np.float64(theta) ** exponents.astype(np.float64)
    frequencies = np.float32(1) / powers.astype(np.float32)
    if scaling is None:
        return frequencies
    low, high, context = (
        scaling['low_freq_factor'],
        scaling['high_freq_factor'],
        scaling['original_max_seq_len'],
    )
    scaled = []
    for frequency in frequencies:
        wavelength = np.float32(2 * np.pi) / frequency
        if wavelength < context / high:
            scaled.append(frequency)
        elif wavelength > context / low:
            scaled.append(frequency / np.float32(scaling['factor']))
        else:
            smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
            scaled.append(
                (np.float32(1) - smooth) * frequency / np.float32(scaling['factor']) + smooth * frequency
            )
    return np.array(scaled, np.float32)


def rotations(positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """exp(i angle) in complex128 [..., H / 2]; the angle itself is an fp32 product."""
    angles = positions.astype(np.float32)[..., None] * frequencies
    assert angles.dtype == np.float32
    return np.exp(1j * angles.astype(np.float64))


def interleaved(weight: np.ndarray) -> np.ndarray:
    """From half-split (x[j], x[j + H/2]) to Meta's interleaved (x[2j], x[2j + 1]) pairs on the last axis."""
    half = weight.shape[-1] // 2
    out = np.empty_like(weight)
    out[..., 0::2] = weight[..., :half]
    out[..., 1::2] = weight[..., half:]
    return out


def rotate(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rotates the interleaved pairs of x [B, T, H] by rotation [B, T, H / 2]."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * rotation
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(x: np.ndarray, weights: dict, rotation: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Causal grouped-query attention: query head n reads key-value head n // (N / K)."""
    num_heads, num_kv_heads, head_dim = weights['q'].shape[1], weights['k'].shape[1], weights['q'].shape[2]
    wq, wk = interleaved(weights['q']), interleaved(weights['k'])
    out = np.zeros_like(x)
    for n in range(num_heads):
        kv = n // (num_heads // num_kv_heads)
        q = rotate(x @ wq[:, n], rotation)
        k = rotate(x @ wk[:, kv], rotation)
        v = x @ weights['v'][:, kv]
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(head_dim)
        out += softmax(np.where(mask, scores, -np.inf)) @ v @ weights['o'][n]
    return out


def mlp(x: np.ndarray, weights: dict) -> np.ndarray:
    gate = x @ weights['gate']
    return (gate / (1 + np.exp(-gate)) * (x @ weights['up'])) @ weights['down']


def forward(
    hparams: dict,
    params: dict,
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [B, T, V] in float64.

    Args:
      hparams: `norm_eps`, `rope_theta`, `rope_scaling` (as above); sizes are those of the params.
      params: the parameter tree of `llama_jax`, as numpy arrays; without `head` the embedding is the head.
      tokens: [B, T].
      positions: [B, T], by default 0, 1, ... in each row. They rotate; they do not mask.
      segment_ids: [B, T]; a token attends to earlier tokens of the row with its own id. Default: one segment.
    """
    params = to_float64(params)
    batch, length = tokens.shape
    positions = np.tile(np.arange(length), (batch, 1)) if positions is None else positions
    segment_ids = np.ones((batch, length)) if segment_ids is None else segment_ids
    mask = np.tril(np.ones((length, length), bool)) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    blocks, eps = params['blocks'], hparams['norm_eps']
    head_dim = blocks['attention']['q'].shape[-1]
    frequencies = inverse_frequencies(head_dim, hparams['rope_theta'], hparams['rope_scaling'])
    rotation = rotations(positions, frequencies)

    x = params['embed'][tokens]
    for layer in range(len(blocks['attention_norm'])):
        attention_weights = {name: w[layer] for name, w in blocks['attention'].items()}
        mlp_weights = {name: w[layer] for name, w in blocks['mlp'].items()}
        x = x + attention(
            rms_norm(x, blocks['attention_norm'][layer], eps), attention_weights, rotation, mask
        )
        x = x + mlp(rms_norm(x, blocks['mlp_norm'][layer], eps), mlp_weights)
    x = rms_norm(x, params['final_norm'], eps)
    return x @ params.get('head', params['embed']).T


def loss(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    """Mean negative log-likelihood of the targets where mask is true, in nats."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    picked = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return -float((picked * mask).sum() / mask.sum())


def to_float64(tree: dict) -> dict:
    return {
        name: to_float64(leaf) if isinstance(leaf, dict) else np.asarray(leaf, np.float64)
        for name, leaf in tree.items()
    }
