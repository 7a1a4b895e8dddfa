import collections
import dataclasses
import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from jax.sharding import SingleDeviceSharding

from llama_jax import export, pretrained
from llama_jax.convert import gguf_file, tensors
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.partitioning import Partitioner, make_mesh, parse_rules
from llama_jax.placement import place
from llama_jax.storage import enable_bucket
from tests.convert.in_memory import InMemory, random_source
from tests.reference.fake_gcs import FakeGCS

CONFIG = LlamaConfig(
    vocab_size=512, embed_dim=256, mlp_dim=512, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=32, max_seq_len=64
)  # fmt: skip
MESHES = {
    'one device': {},
    'fsdp=8': {'fsdp': 8},
    'data=4, tensor=2': {'data': 4, 'tensor': 2},
    'data=2, fsdp=4': {'data': 2, 'fsdp': 4},
}
# How each is written: the format, the type, and the files of Meta's.
WRITTEN = {
    'orbax': ('orbax', 'bfloat16', 1),
    'safetensors': ('huggingface', 'bfloat16', 1),
    'two files of Meta': ('meta', 'bfloat16', 2),
    'quantised GGUF': ('gguf', 'q8_0', 1),
    'llama2.c': ('llama2c', 'float32', 1),
}


def target(sizes: dict[str, int], rules: str = '', dtype=jnp.float32, config=CONFIG):
    devices = jax.devices() if sizes else jax.devices()[:1]
    partitioner = Partitioner(make_mesh(sizes, devices), parse_rules(rules))
    model = LlamaForCausalLM(config)
    shapes = abstract_params(model)
    shardings = partitioner.tree_shardings(shapes, param_axes(model))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp('written'), {}

    def write(name: str) -> pathlib.Path:
        if name not in made:
            made[name] = folder / name.replace(' ', '_')
            to, dtype, ranks = WRITTEN[name]
            source = random_source(CONFIG)
            if to == 'gguf':
                made[name] = made[name].with_suffix('.gguf')
                vocabulary = {'tokenizer.ggml.model': 'none'}
                export.gguf.write(source, epath.Path(made[name]), dtype=dtype, vocabulary=vocabulary)
            elif to == 'llama2c':
                made[name] = made[name].with_suffix('.bin')
                made[name].write_bytes(llama2c_file(source))
            else:
                export.save(made[name], source, None, to=to, dtype=dtype, model_parallel=ranks)
        return made[name]

    return write


def llama2c_file(source) -> bytes:
    """Version 1: a header, all norms, then the matrices by kind."""
    header = b'24ka' + np.int32([1, 256, 512, 2, 8, 4, 512, 64]).tobytes() + b'\0'
    data = header.ljust(256, b'\0')
    names = ['blocks/attention_norm', 'blocks/mlp_norm', 'final_norm', 'embed']
    names += [f'blocks/attention/{name}' for name in 'qkvo'] + [
        f'blocks/mlp/{name}' for name in ('gate', 'down', 'up')
    ]
    for name in [*names, 'head']:
        for tensor in source.tensors[name]:
            values = tensor.read()
            if name.endswith(('/q', '/k')):
                values = tensors.to_interleaved(values, 32)
            data += values.tobytes()
    return data


def size_of(path: pathlib.Path) -> int:
    """Bytes of the files that hold weights."""
    files = [path] if not path.is_dir() else [file for file in path.rglob('*') if file.is_file()]
    return sum(file.stat().st_size for file in files)


@pytest.fixture
def bytes_read(monkeypatch):
    """Of arrays, mapped or read, all that is asked for, used or not; of TensorStore what it says itself."""
    found = collections.Counter()

    def count(path, offset, shape, dtype, original=tensors.read_array):
        found['arrays'] += int(np.prod(shape)) * dtype.itemsize
        return original(path, offset, shape, dtype)

    for module in (tensors, gguf_file):
        monkeypatch.setattr(module, 'read_array', count)

    def stored() -> int:
        metrics = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
        return sum(value['value'] for metric in metrics for value in metric['values'])

    before = stored()
    return lambda: found['arrays'] + stored() - before


QUICK = {('orbax', 'fsdp=8'), ('two files of Meta', 'data=4, tensor=2'), ('quantised GGUF', 'fsdp=8')}


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        pytest.param(*both, marks=[] if both in QUICK else pytest.mark.slow)
        for both in itertools.product(WRITTEN, MESHES)
    ],
)
def test_each_byte_is_read_once_whatever_the_format_and_the_mesh(written, bytes_read, name, mesh):
    path = written(name)
    params = pretrained.open(path).params(target(MESHES[mesh]))
    assert bytes_read() <= 1.02 * size_of(path)
    for leaf, plain in zip(jax.tree.leaves(params), jax.tree.leaves(expected(path)), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), plain)


@functools.cache
def expected(path):
    """Leaf by leaf, without placing."""
    source = pretrained.open(path).source
    leaves = {w.path: pretrained.Leaf(source, w) for w in pretrained.weights_of(CONFIG)}
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: (
            leaves[jax.tree_util.keystr(keys, simple=True, separator='/')]
            .read((slice(None),) * len(x.shape))
            .astype(np.float32)
        ),
        target({}),
    )


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name == 'safetensors' else pytest.mark.slow) for name in WRITTEN]
)
def test_each_byte_is_read_once_from_a_bucket_too(written, name, monkeypatch):
    path = written(name)
    with FakeGCS() as gcs, pytest.MonkeyPatch.context() as patch:
        for variable, value in gcs.environment().items():
            patch.setenv(variable, value)
        enable_bucket('gs://bucket')
        for file in [path] if not path.is_dir() else path.rglob('*'):
            if file.is_file():
                gcs.objects['bucket', f'model/{file.relative_to(path.parent)}'] = file.read_bytes()
                gcs.generations['bucket', f'model/{file.relative_to(path.parent)}'] = 1
        if WRITTEN[name][0] == 'orbax':
            gcs.insert(('bucket', f'model/{path.name}/checkpoints/0/commit_success.txt'), b'', {})
        for sizes in ({'fsdp': 8}, {'data': 4, 'tensor': 2}):
            gcs.sent.clear()
            params = pretrained.open(f'gs://bucket/model/{path.name}').params(target(sizes))
            assert 0.9 * size_of(path) < sum(gcs.sent.values()) <= 1.02 * size_of(path)
            jax.tree.map(np.testing.assert_array_equal, params, expected(path))
        gcs.insert(('bucket', 'empty.gguf'), b'', {})
        with pytest.raises(InputError, match=r"empty.gguf is not a checkpoint: it begins with b''"):
            pretrained.open('gs://bucket/empty.gguf')


def test_weights_are_born_where_other_rules_place_them(written):
    rules = 'embed=,mlp=tensor+fsdp,head_dim=fsdp,vocab='
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 4}), parse_rules(rules))
    _, params, tokenizer = pretrained.load(written('safetensors'), partitioner=partitioner)
    assert tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, params, expected(written('safetensors')))
    assert {s.data.shape for s in params['blocks']['attention']['q'].addressable_shards} == {(2, 256, 2, 16)}
    assert {s.data.shape for s in params['blocks']['mlp']['gate'].addressable_shards} == {(2, 256, 64)}
    with pytest.raises(InputError, match='mesh and partitioner are both given'):
        pretrained.load(written('safetensors'), mesh=partitioner.mesh, partitioner=partitioner)


@pytest.mark.parametrize('name', ['orbax', 'safetensors'])
def test_a_larger_vocabulary_begins_as_the_mean_of_the_trained_rows(written, name, caplog):
    larger = dataclasses.replace(CONFIG, vocab_size=520)
    checkpoint = pretrained.open(written(name))
    with caplog.at_level('INFO'):
        params = checkpoint.params(target({'fsdp': 2, 'tensor': 4}, config=larger), grow_vocabulary=True)
    for table in ('embed', 'head'):
        plain = expected(written(name))[table]
        np.testing.assert_array_equal(params[table][:512], plain)
        np.testing.assert_array_equal(
            params[table][512:], np.broadcast_to(plain.mean(0, np.float64), (8, 256)).astype('f4')
        )
        assert f'8 rows added to {table}, the mean of its 512' in caplog.text
    for config, grow in ((larger, False), (dataclasses.replace(CONFIG, vocab_size=504), True)):
        message = f'weight embed has shape (512, 256), the model ({config.vocab_size}, 256)'
        with pytest.raises(InputError, match=message.replace('(', r'\(').replace(')', r'\)')):
            checkpoint.params(target({}, config=config), grow_vocabulary=grow)


class InOneBlock(InMemory):
    rows_axis = None

    def blocks(self):
        return [(slice(None),) * self.values.ndim]


@pytest.mark.skipif(not pathlib.Path('/proc/self/smaps').exists(), reason='Linux tells how memory is mapped')
def test_a_large_weight_lies_in_large_pages():
    """It may: how many there are is for the system to say. Of shared memory it gives none unless it is told to."""
    wanted = jax.ShapeDtypeStruct((1 << 20,), np.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
    weight = place('w', InOneBlock(np.ones(1 << 20, np.float32)), wanted)
    address, flags = weight.unsafe_buffer_pointer(), None
    for line in pathlib.Path('/proc/self/smaps').read_text().splitlines():
        if found := re.match('([0-9a-f]+)-([0-9a-f]+) ', line):
            is_inside = int(found[1], 16) <= address < int(found[2], 16)
        elif line.startswith('VmFlags:') and is_inside:
            flags = line.split()[1:]
    assert flags and 'hg' in flags and 'sh' not in flags
