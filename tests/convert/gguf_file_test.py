"""The header's reader on files made by hand: what it reads of a sound one, and how it refuses each kind of damage."""

import struct

import numpy as np
import pytest
from etils import epath

from llama_jax.convert import gguf_file
from llama_jax.errors import InputError

U8, BOOL, STRING, ARRAY, U32, F32, F64 = 0, 7, 8, 9, 4, 6, 12


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack('<Q', len(data)) + data


def pair(key, kind, value):
    return text(key) + struct.pack('<I', kind) + value


def tensor(name, shape, kind=0, offset=0):
    """`shape` innermost first, as in the file."""
    return text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, kind, offset)


def gguf_bytes(pairs=(), tensors=(), *, data=b'', magic=b'GGUF', version=3, num_pairs=None, num_tensors=None):
    counts = [
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    ]
    header = magic + struct.pack('<IQQ', version, *counts) + b''.join(pairs) + b''.join(tensors)
    return header + bytes(-len(header) % 32) + data


@pytest.fixture
def written(tmp_path):
    def write(data):
        (tmp_path / 'x.gguf').write_bytes(data)
        return epath.Path(tmp_path / 'x.gguf')

    return write


@pytest.mark.parametrize('version', [2, 3])
def test_reads_every_kind_of_value_and_places_tensors(written, version):
    pairs = [
        pair('general.alignment', U32, struct.pack('<I', 64)),
        *(
            pair(f'scalar.{kind}', kind, struct.pack(f'<{code}', 7))
            for kind, code in {
                0: 'B',
                1: 'b',
                2: 'H',
                3: 'h',
                4: 'I',
                5: 'i',
                6: 'f',
                10: 'Q',
                11: 'q',
                12: 'd',
            }.items()
        ),
        pair('flag', BOOL, b'\1'),
        pair('flags', ARRAY, struct.pack('<IQ3B', BOOL, 3, 1, 0, 1)),
        pair('text', STRING, text('Grüße')),
        pair('texts', ARRAY, struct.pack('<IQ', STRING, 3) + text('a') + text('') + text('▁b')),
        pair('floats', ARRAY, struct.pack('<IQ2f', F32, 2, 0.5, -1.5)),
        pair('none', ARRAY, struct.pack('<IQ', F64, 0)),
    ]
    data = gguf_bytes(
        pairs, [tensor('late', [3, 2], offset=64), tensor('early', [4], kind=1)], version=version
    )
    data += bytes(-len(data) % 64)
    start = len(data)
    path = written(data + bytes(64 + 24))
    metadata, tensors = gguf_file.read_header(path)
    assert {metadata.pop(f'scalar.{kind}') for kind in (0, 1, 2, 3, 4, 5, 6, 10, 11, 12)} == {7}
    assert metadata['flag'] is True and metadata['text'] == 'Grüße' and metadata['texts'] == ['a', '', '▁b']
    np.testing.assert_array_equal(metadata['flags'], [True, False, True])
    np.testing.assert_array_equal(metadata['floats'], np.array([0.5, -1.5], np.float32))
    assert len(metadata['none']) == 0 and metadata['general.alignment'] == 64
    assert gguf_file.read_metadata(path).keys() == gguf_file.read_header(path)[0].keys()
    assert tensors['late'] == gguf_file.TensorInfo((2, 3), gguf_file.F32, start + 64)
    assert tensors['early'] == gguf_file.TensorInfo((4,), gguf_file.F16, start)


HUGE = 2**62
X = tensor('x', [8])


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (b'', 'the magic needs 4 bytes'),
        (gguf_bytes(magic=b'ggjt'), "begins with b'ggjt'"),
        (gguf_bytes(version=1), 'of version 1'),
        (gguf_bytes(version=3 << 24), 'big-endian'),
        (gguf_bytes()[:20], 'the header needs 16 bytes'),
        (gguf_bytes(num_pairs=HUGE), f'a list of {HUGE} keys needs'),
        (gguf_bytes(num_tensors=HUGE), f'a list of {HUGE} tensors needs'),
        (gguf_bytes([struct.pack('<Q', HUGE)], data=bytes(64)), f'string of {HUGE} bytes'),
        (gguf_bytes([pair(b'\xff', U8, b'\0')], data=bytes(64)), 'key 0 is not UTF-8'),
        (gguf_bytes([pair('a', U8, b'\0')] * 2), "key 'a' appears twice"),
        (gguf_bytes([pair('a', 99, b'\0')]), "value of 'a' has type 99"),
        (gguf_bytes([pair('a', STRING, struct.pack('<Q', 200))]), "value of 'a' needs 200 bytes"),
        (gguf_bytes([pair('a', ARRAY, struct.pack('<IQ', STRING, HUGE))]), f"value of 'a' needs {8 * HUGE} bytes"),
        (gguf_bytes([pair('a', ARRAY, struct.pack('<IQ', F32, HUGE))]), f"value of 'a' needs {4 * HUGE} bytes"),
        (gguf_bytes([pair('a', ARRAY, struct.pack('<IQ', ARRAY, 1))]), "value of 'a' has type 9"),
        (gguf_bytes([pair('general.alignment', U32, struct.pack('<I', 0))]), "general.alignment is '0'"),
        (gguf_bytes([pair('general.alignment', U32, struct.pack('<I', 48))]), "general.alignment is '48'"),
        (gguf_bytes([pair('general.alignment', STRING, text('32'))]), 'general.alignment'),
        (gguf_bytes(tensors=[X, X], data=bytes(64)), "tensor 'x' appears twice"),
        (gguf_bytes(tensors=[tensor('x\n', [8])], data=bytes(32)), 'no printable name'),
        (gguf_bytes(tensors=[tensor('x' * 65, [8])], data=bytes(32)), 'string of 65 bytes'),
        (gguf_bytes(tensors=[tensor('x', [])], data=bytes(32)), 'tensor x has 0 axes'),
        (gguf_bytes(tensors=[tensor('x', [1] * 5)], data=bytes(32)), 'tensor x has 5 axes'),
        (gguf_bytes(tensors=[tensor('x', [8, 0])], data=bytes(32)), r'tensor x has shape \(0, 8\)'),
        (gguf_bytes(tensors=[tensor('x', [48], kind=8)], data=bytes(99)), 'rows of Q8_0 have a multiple of 32'),
        (gguf_bytes(tensors=[tensor('x', [8], kind=4)], data=bytes(32)), 'tensor x has type 4,'),  # no such type
        (gguf_bytes(tensors=[tensor('x', [8], kind=26)], data=bytes(32)), 'tensor x has type 26,'),  # I32
        (gguf_bytes(tensors=[tensor('x', [8], offset=4)], data=bytes(64)), 'no multiple of the alignment 32'),
        (gguf_bytes(tensors=[X, tensor('y', [9]), ], data=bytes(64)), 'tensor y begins at byte .*, inside tensor x'),
        (gguf_bytes(tensors=[X], data=bytes(31)), 'tensor x ends at byte'),
        (gguf_bytes(tensors=[tensor('x', [HUGE, HUGE])], data=bytes(64)), 'tensor x ends at byte'),
        (gguf_bytes(tensors=[tensor('x', [8], offset=HUGE)], data=bytes(64)), 'tensor x ends at byte'),
        (gguf_bytes(tensors=[X, tensor('y', [9], offset=64)], data=bytes(128)), 'begins at byte .*, but tensor x ends'),
        (gguf_bytes(tensors=[tensor('x', [8], offset=32)], data=bytes(64)), 'begins at byte .*, but the header ends'),
        (gguf_bytes(tensors=[X], data=bytes(64)), 'what follows belongs to no tensor'),
        (gguf_bytes(tensors=[X], data=bytes(32) + b'1'), 'what follows belongs to no tensor'),
        (gguf_bytes([pair('general.alignment', U32, struct.pack('<I', 2**30))]), 'at most 1048576'),
    ],
)  # fmt: skip
def test_refuses_damage_in_one_line_that_names_file_and_place(written, data, message):
    with pytest.raises(InputError, match=f'x.gguf: .*{message}') as caught:
        gguf_file.read_header(written(data))
    assert '\n' not in str(caught.value)


def test_what_is_inserted_or_cut_out_anywhere_is_found(written):
    """Otherwise all tensors behind it would be read from other bytes than their own."""
    values = np.arange(1, 41, dtype=np.float32).tobytes()
    tensors = [tensor('x', [16]), tensor('y', [24], offset=64)]
    sound = gguf_bytes(tensors=tensors, data=values)
    assert len(gguf_file.read_header(written(sound))[1]) == 2
    header = len(sound) - len(values)
    for place in range(header - 20, len(sound), 4):
        for damaged in (
            sound[:place] + b'\1\0\0\1' + sound[place:],
            sound[:place] + sound[max(place, 0) + 4 :],
            sound[:place] + bytes(32) + sound[place:],
        ):
            with pytest.raises(InputError):
                gguf_file.read_header(written(damaged))


def test_agrees_with_the_library_on_a_real_file(shared_data):
    gguf = pytest.importorskip('gguf')
    path = shared_data / 'weights/stories260K/stories260K.gguf'
    metadata, tensors = gguf_file.read_header(epath.Path(path))
    reader = gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith('GGUF.')}
    assert metadata.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(metadata[key], value, err_msg=key)
    assert {(name, info.shape, info.offset, info.num_bytes) for name, info in tensors.items()} == {
        (t.name, tuple(map(int, t.shape[::-1])), int(t.data_offset), t.n_bytes) for t in reader.tensors
    }
