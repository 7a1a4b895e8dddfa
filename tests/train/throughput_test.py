import types

import jax
import pytest

from llama_jax.models.presets import PRESETS
from llama_jax.train.throughput import peak_flops_per_device, training_flops_per_token
from tests import toy


def test_flops_by_hand():
    # Multiply-adds of one token of toy.CONFIG (D 32, F 64, N 8, K 4, H 8, L 3, V 64), by the shapes of the products.
    projections = 32 * 64 + 2 * 32 * 32 + 64 * 32  # q; k and v; o
    mlp = 3 * 32 * 64
    scores = 8 * 8 * 100  # of 8 heads with 100 keys, each a product of 8; the values cost the same
    head = 32 * 64
    forward = 2 * (3 * (projections + mlp + 2 * scores) + head)  # an addition for each multiplication
    causal, full = training_flops_per_token(toy.CONFIG, seq_len=100)
    assert full == 3 * forward  # the backward pass has two products for each one of the forward pass
    assert full - causal == 3 * 2 * 3 * scores


@pytest.mark.parametrize(
    ('preset', 'seq_len', 'causal', 'full'),
    [
        ('llama3_8b', 8192, 5.15e10, 5.79e10),
        # JAX-Toolbox, 11,361 tokens/s on an H100 (989 TFLOP/s): 49.2 % of it causal, 52.9 % in full.
        ('llama2_7b', 4096, 0.492 * 989e12 / 11_361, 0.529 * 989e12 / 11_361),
    ],
)
def test_flops_agree_with_published_ones(preset, seq_len, causal, full):
    assert training_flops_per_token(PRESETS[preset], seq_len) == pytest.approx(
        (causal, full), rel=2e-3
    )  # 3 digits


@pytest.mark.parametrize(
    ('kind', 'peak'),
    [
        ('NVIDIA H200', 989e12),
        ('NVIDIA H100 80GB HBM3', 989e12),
        ('TPU v4', 275e12),
        ('TPU v5 lite', 197e12),
        ('TPU v5', 459e12),
        ('TPU v6 lite', 918e12),
    ],
)
def test_peak_is_the_data_sheets(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, 'local_devices', lambda: [types.SimpleNamespace(device_kind=kind)])
    assert peak_flops_per_device() == peak


def test_a_cpu_is_measured():
    # One of 8 emulated devices: some GFLOP/s to some TFLOP/s.
    assert 1e8 < peak_flops_per_device() < 1e13
