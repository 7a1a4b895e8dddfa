"""The table of accelerators, by the names that JAX gives them."""

import pytest

from llama_jax.chips import CHIPS, find


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        ('TPU v2', 'v2'), ('TPU v3', 'v3'), ('TPU v4', 'v4'), ('TPU v5 lite', 'v5e'), ('TPU v5e', 'v5e'),
        ('TPU v5', 'v5p'), ('TPU v5p', 'v5p'), ('TPU v6 lite', 'v6e'), ('TPU v6e', 'v6e'), ('TPU7x', 'tpu7x'),
        ('NVIDIA GB200', 'gb200'), ('NVIDIA B200', 'b200'), ('NVIDIA H200', 'h200'), ('NVIDIA H200 NVL', 'h200_nvl'),
        ('NVIDIA H100 80GB HBM3', 'h100'), ('NVIDIA H100 PCIe', 'h100_pcie'), ('NVIDIA A100-SXM4-40GB', 'a100'),
        ('NVIDIA A100-SXM4-80GB', 'a100_80gb'), ('NVIDIA A100 80GB PCIe', 'a100_80gb_pcie'),
    ],
)  # fmt: skip
def test_a_chip_by_its_device(kind, name):
    assert find(kind) is CHIPS[name]


@pytest.mark.parametrize('kind', ['cpu', 'NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'NVIDIA RTX A6000', ''])
def test_others_are_not_taken_for_one_of_them(kind):
    assert find(kind) is None
