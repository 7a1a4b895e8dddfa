"""llama2.c's files: a real `.pt` against PyTorch, and `.bin` files written here as its export.py writes them."""

import struct

import numpy as np
import pytest
from etils import epath

from llama_jax.convert import llama2c
from llama_jax.convert.mapping import layers_of, weights_of
from llama_jax.convert.torch_writer import TorchWriter
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig

# The FFN's size is no multiple of the 8 values of a group, so groups span rows of w2.
SIZES = dict(dim=16, hidden_dim=44, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=30, seq_len=64)
GROUP = 8


def expected_config(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=30, embed_dim=16, mlp_dim=44, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, max_seq_len=64,
        tie_embeddings=tied,
    )  # fmt: skip


def random_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    layer = {
        'attention.wq': (16, 16), 'attention.wk': (8, 16), 'attention.wv': (8, 16), 'attention.wo': (16, 16),
        'feed_forward.w1': (44, 16), 'feed_forward.w2': (16, 44), 'feed_forward.w3': (44, 16),
        'attention_norm': (16,), 'ffn_norm': (16,),
    }  # fmt: skip
    shapes = {'tok_embeddings': (30, 16), 'norm': (16,), 'output': (30, 16)}
    shapes |= {f'layers.{i}.{name}': shape for i in range(3) for name, shape in layer.items()}
    return {f'{name}.weight': rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def quantize(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups = value.reshape(-1, GROUP)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def bin_file(version: int, tensors: dict[str, np.ndarray], tied: bool) -> bytes:
    sign = -1 if version == 0 and not tied else 1
    sizes = struct.pack('<7i', *[size * (sign if key == 'vocab_size' else 1) for key, size in SIZES.items()])
    layers = ['attention.wq', 'attention.wk', 'attention.wv', 'attention.wo']
    ffn = ['feed_forward.w1', 'feed_forward.w2', 'feed_forward.w3']
    names = {
        0: ['tok_embeddings', 'attention_norm', *layers, 'ffn_norm', *ffn, 'norm'],
        1: ['attention_norm', 'ffn_norm', 'norm', 'tok_embeddings', *layers, *ffn],
    }[min(version, 1)]
    names = [f'{name}.weight' for name in names]
    order = [
        n for name in names for n in ([name] if name in tensors else [f'layers.{i}.{name}' for i in range(3)])
    ]
    data = b''
    for name in [*order, *([] if tied else ['output.weight'])]:
        if name == 'output.weight' and version == 0:
            data += bytes(2 * 64 * 2 * 4)  # cosines and sines of 64 positions, two pairs a head
        if version == 2 and tensors[name].ndim == 2:
            values, scales = quantize(tensors[name])
            data += values.tobytes() + scales.tobytes()
        else:
            data += tensors[name].tobytes()
    if version == 0:
        return sizes + data + (bytes(2 * 64 * 2 * 4) if tied else b'')
    header = struct.pack('<Ii', 0x616B3432, version) + sizes + struct.pack('<?', tied)
    header += struct.pack('<i', GROUP) if version == 2 else b''
    return header.ljust(256, b'\0') + data


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('version', [0, 1, 2])
def test_bin_of_each_version(tmp_path, version, tied):
    tensors = random_tensors()
    path = epath.Path(tmp_path / 'model.bin')
    path.write_bytes(bin_file(version, tensors, tied))
    source = llama2c.open_source(path)
    assert source.config == expected_config(tied)
    for weight in weights_of(source.config):
        for layer in layers_of(weight, source.config):
            expected = tensors[weight.name('meta', layer)]
            if version == 2 and expected.ndim == 2:
                values, scales = quantize(expected)
                expected = (values * scales[:, None]).reshape(expected.shape)
            if weight.rotary:  # row 2j + p of a head, of 4, is row 2p + j
                expected = expected.reshape(-1, 4, 16)[:, [0, 2, 1, 3]].reshape(expected.shape)
            tensor = source.tensors[weight.path][layer]
            np.testing.assert_array_equal(tensor.read(), expected, weight.path)
            if expected.ndim == 2:
                np.testing.assert_array_equal(tensor.read(slice(3, 7), slice(1, 9)), expected[3:7, 1:9])


def test_real_pt_has_torchs_values(shared_data):
    torch = pytest.importorskip('torch')
    path = shared_data / 'weights' / 'stories260K' / 'stories260K.pt'
    state = {name.removeprefix('_orig_mod.'): value for name, value in torch.load(path)['model'].items()}
    source = llama2c.open_source(epath.Path(path))
    assert source.config == LlamaConfig(
        vocab_size=512, embed_dim=64, mlp_dim=172, num_layers=5, num_heads=8, num_kv_heads=4, head_dim=8,
        max_seq_len=512, tie_embeddings=True,
    )  # fmt: skip
    for weight in weights_of(source.config):
        for layer in layers_of(weight, source.config):
            expected = state[weight.name('meta', layer)].numpy()
            if weight.rotary:  # row 2j + p of a head, of 8, is row 4p + j
                expected = expected.reshape(-1, 8, 64)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(expected.shape)
            np.testing.assert_array_equal(source.tensors[weight.path][layer].read(), expected, weight.path)


@pytest.mark.parametrize(
    ('version', 'edit', 'message'),
    [
        (0, lambda data: data[:-1], 'has .* bytes, but its header .* makes'),
        (1, lambda data: data + b'\0', 'has .* bytes, but its header .* makes'),
        (2, lambda data: data[:-4], 'has .* bytes, but its header .* makes'),
        (0, lambda data: data[:8] + struct.pack('<i', 2**14) + data[12:], 'makes .*; it is cut off'),
        (0, lambda data: data[:8] + struct.pack('<i', 2**31 - 1) + data[12:], 'num_layers is 2147483647'),
        (0, lambda data: struct.pack('<i', -16) + data[4:], 'dim is -16; it must be'),
        (0, lambda data: struct.pack('<i', 18) + data[4:], 'dim 18 over n_heads 4'),
        (0, lambda data: data[:20] + struct.pack('<i', 0) + data[24:], 'vocab_size is 0; it must be'),
        (1, lambda data: data[:4] + struct.pack('<i', 3) + data[8:], "is version 3 of llama2.c's format"),
        (1, lambda data: data[:200], 'has 200 bytes; a .bin of llama2.c is longer'),
        (
            2,
            lambda data: data[:37] + struct.pack('<i', 0) + data[41:],
            'the group size of its int8 weights is 0',
        ),
        (2, lambda data: data[:37] + struct.pack('<i', 7) + data[41:], 'makes'),
        (0, lambda _: b'', 'has 0 bytes; a .bin of llama2.c is longer'),
    ],
)
def test_wrong_bin_is_refused_in_one_line(tmp_path, version, edit, message):
    path = epath.Path(tmp_path / 'model.bin')
    path.write_bytes(edit(bin_file(version, random_tensors(), tied=False)))
    with pytest.raises(InputError, match=message) as error:
        llama2c.open_source(path)
    assert str(path) in str(error.value)
    assert '\n' not in str(error.value)


def test_pt_without_its_keys_is_refused(tmp_path):
    path = epath.Path(tmp_path / 'model.pt')
    with TorchWriter(path, {'w': ((2,), np.dtype(np.float32))}) as writer:
        writer.append(np.zeros(2, np.float32))
        writer.finish()
    with pytest.raises(InputError, match='has keys model and model_args'):
        llama2c.open_source(path)
