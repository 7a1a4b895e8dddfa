"""Files of safetensors: what we write, others read; what is damaged is refused."""

import json

import numpy as np
import pytest
from etils import epath

from llama_jax.convert import tensors as tensors_module
from llama_jax.convert.safetensors_file import DTYPES, Entry, open_safetensors, write_safetensors
from llama_jax.errors import InputError


def arrays(rng) -> dict[str, np.ndarray]:
    """One array of every type, of odd sizes, so that one of 8 bytes after one of 1 would not be aligned."""
    kinds = sorted(DTYPES, key=lambda kind: DTYPES[kind].itemsize)
    return {
        kind: rng.integers(0, 2, size=(5, 3 + i)).astype(DTYPES[kind]) if kind == 'BOOL'
        else rng.integers(-100, 100, size=(5, 3 + i)).astype(DTYPES[kind])
        for i, kind in enumerate(kinds)
    }  # fmt: skip


def write(path: epath.Path, values: dict[str, np.ndarray], **kwargs) -> None:
    write_safetensors(
        path, [Entry(n, v.shape, v.dtype, lambda rows, v=v: v[rows]) for n, v in values.items()], **kwargs
    )


def assert_equal(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_what_we_write_the_library_and_torch_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, '_BLOCK_BYTES', 32)  # so that most tensors take several blocks
    values = arrays(np.random.default_rng(0))
    values['vector'] = np.arange(7, dtype=np.float32)
    values['transposed'] = np.asfortranarray(np.arange(15, dtype=np.float32).reshape(5, 3))
    path, written = epath.Path(tmp_path) / 'model.safetensors', []
    write(path, values, progress=written.append)
    assert len(written) > len(values) and sum(written) == sum(v.nbytes for v in values.values())

    assert_equal({name: t.read() for name, t in open_safetensors(path).items()}, values)
    assert_equal({name: t.read(slice(1, 3)) for name, t in open_safetensors(path).items()},
                 {name: v[1:3] for name, v in values.items()})  # fmt: skip
    for tensor in open_safetensors(path).values():
        assert tensor.offset % tensor.dtype.itemsize == 0  # aligned, as the library writes them

    from safetensors import safe_open

    with safe_open(path, 'numpy') as file:
        assert file.metadata() == {'format': 'pt'}
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, values)  # noqa: SIM118
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    from safetensors.torch import load_file

    for name, tensor in load_file(path).items():
        if tensor.dtype == torch.bfloat16:
            assert name == 'BF16'
            tensor = tensor.float()
        np.testing.assert_array_equal(tensor.numpy(), values[name].astype(tensor.numpy().dtype), err_msg=name)


def test_what_the_library_writes_we_read(tmp_path):
    from safetensors.numpy import save_file

    values = arrays(np.random.default_rng(1))
    save_file(values, tmp_path / 'model.safetensors', metadata={'format': 'np'})
    found = open_safetensors(epath.Path(tmp_path) / 'model.safetensors')
    assert_equal({name: t.read() for name, t in found.items()}, values)


def tensor(begin: int, end: int, shape=None, dtype: str = 'F32') -> dict:
    return {
        'dtype': dtype,
        'shape': [(end - begin) // 4] if shape is None else shape,
        'data_offsets': [begin, end],
    }


def raw(header, data: bytes = bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + data


GOOD = {'a': tensor(0, 8), 'b': tensor(8, 16)}

REFUSED = {
    'empty': (b'', 'no safetensors file'),
    'short': (b'\x02\0\0', 'no safetensors file'),
    'long header': (raw(GOOD)[:40], 'truncated'),
    'huge header': ((2**63).to_bytes(8, 'little') + b'{}', 'header is said to take 9223372036854775808'),
    'git lfs': (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    'no json': (raw(b'{"a": '), 'header is not JSON'),
    'no utf-8': (raw(b'\xff\xfe{}'), 'header is not JSON'),
    'deep': (raw(b'[' * 100_000), 'header is not JSON'),
    'no object': (raw([1]), 'must be an object'),
    'twice': (raw(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 16)).encode(),) * 2)), "'a' stands twice"),
    'nan': (raw(b'{"a": NaN}'), 'NaN is no number'),
    'name': (raw({'a\nb': tensor(0, 16)}), 'no name of a tensor'),
    'long name': (raw({'a' * 9999: tensor(0, 16)}), 'no name of a tensor'),
    'no entry': (raw({'a': 7}), 'tensor a is described by 7'),
    'no dtype': (raw({'a': {'shape': [4], 'data_offsets': [0, 16]}}), 'stored as None'),
    'fp8': (raw({'a': tensor(0, 16, [16], 'F8_E4M3')}), "tensor a is stored as 'F8_E4M3'"),
    'negative size': (raw({'a': tensor(0, 16, [-4, -1])}), r'shape \[-4, -1\]'),
    'size true': (raw({'a': tensor(0, 16, [True, 4])}), r'shape \[True, 4\]'),
    'fractional size': (raw({'a': tensor(0, 16, [4.0])}), r'shape \[4.0\]'),
    'many sizes': (raw({'a': tensor(0, 16, [1] * 5000)}), 'at most 8 sizes'),
    'negative offset': (raw({'a': tensor(-16, 0, [4])}), r'data_offsets \[-16, 0\]'),
    'backward': (raw({'a': tensor(16, 0, [4])}), r'data_offsets \[16, 0\]'),
    'three offsets': (raw({'a': tensor(0, 16) | {'data_offsets': [0, 8, 16]}}), 'data_offsets'),
    'beyond': (raw({'a': tensor(0, 20)}), 'tensor a ends at byte .* truncated'),
    'far beyond': (raw({'a': tensor(0, 4 * 10**80)}), 'tensor a ends at byte .* truncated'),
    'other size': (raw({'a': tensor(0, 16, [5])}), 'tensor a takes 16 bytes'),
    'overlap': (raw({'a': tensor(0, 12), 'b': tensor(8, 16)}), 'tensor b overlaps'),
    'hole': (raw({'a': tensor(0, 4), 'b': tensor(8, 16)}), 'bytes .* belong to no tensor'),
    'surplus bytes': (raw({'a': tensor(0, 8)}), 'bytes .* belong to no tensor'),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_damaged_files_are_refused(case, tmp_path):
    data, message = REFUSED[case]
    path = epath.Path(tmp_path) / 'x.safetensors'
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        open_safetensors(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 600


def test_the_format_s_own_freedoms(tmp_path):
    path = epath.Path(tmp_path) / 'x.safetensors'
    for header in (GOOD, GOOD | {'__metadata__': {'a': 'b'}}, json.dumps(GOOD).encode() + b'   '):
        path.write_bytes(raw(header))
        assert open_safetensors(path).keys() == {'a', 'b'}
    path.write_bytes(raw({'none': tensor(0, 0, [0, 3]), 'all': tensor(0, 16)}))
    assert open_safetensors(path)['none'].read().shape == (0, 3)
    path.write_bytes(raw({}, b''))
    assert open_safetensors(path) == {}
