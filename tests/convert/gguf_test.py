"""GGUF against the library `gguf`, torch and llama.cpp: each tensor bit for bit, the metadata, the text it tells."""

import dataclasses
import functools
import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax.convert import gguf as gguf_format
from llama_jax.convert import gguf_file, mapping
from llama_jax.convert.tensors import to_interleaved
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.models.llama import LlamaForCausalLM
from tests.convert.in_memory import matrices, random_source

gguf = pytest.importorskip('gguf')

# Rows of down (48) are no whole blocks of 32; heads together are wider than the embedding.
CONFIG = LlamaConfig(
    vocab_size=20, embed_dim=64, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, max_seq_len=512,
    rope_theta=500_000.0, rope_scaling=RopeScaling(8.0), tie_embeddings=True,
)  # fmt: skip
VOCABULARY = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'llama-bpe',
    'tokenizer.ggml.tokens': ['a', 'b', 'ab', '<|end|>', *(f'[PAD{i}]' for i in range(4, 20))],
    'tokenizer.ggml.token_type': [1, 1, 1, 3] + [5] * 16,
    'tokenizer.ggml.scores': np.arange(20, dtype=np.float32),  # as `read_metadata` returns it
    'tokenizer.ggml.merges': ['a b'],
    'tokenizer.ggml.bos_token_id': 3,
    'tokenizer.ggml.padding_token_id': -1,
    'tokenizer.ggml.add_bos_token': True,
    'tokenizer.chat_template': '{{ bos_token }}',
}


by_name = functools.partial(matrices, naming='gguf')


@pytest.fixture
def target(tmp_path):
    return epath.Path(tmp_path) / 'x.gguf'


@pytest.fixture(scope='module')
def stories(shared_data):
    return epath.Path(shared_data / 'weights/stories260K/stories260K.gguf')


def vocabulary_of(path):
    metadata = gguf_file.read_metadata(path)
    return {key: value for key, value in metadata.items() if key.startswith('tokenizer.')}


def test_real_file_holds_the_tensors_of_the_torch_checkpoint(stories):
    torch = pytest.importorskip('torch')
    state = torch.load(stories.with_suffix('.pt'), weights_only=True)['model']
    state = {name.removeprefix('_orig_mod.'): value.numpy() for name, value in state.items()}
    source = gguf_format.open_source(stories)
    assert (source.config.num_layers, source.config.num_kv_heads, source.config.norm_eps) == (5, 4, 1e-5)
    for weight in mapping.weights_of(source.config):
        for layer in mapping.layers_of(weight, source.config):
            values = source.tensors[weight.path][layer].read()
            if weight.rotary:
                values = to_interleaved(values, source.config.head_dim)
            np.testing.assert_array_equal(values, state[weight.name('meta', layer)], err_msg=weight.path)


@pytest.mark.parametrize('source_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize(
    ('dtype', 'name'),
    [('float32', 'F32'), ('float16', 'F16'), ('bfloat16', 'BF16'), ('q8_0', 'Q8_0'), ('q4_0', 'Q4_0')],
)
def test_written_values_are_those_of_the_library(target, dtype, name, source_dtype, monkeypatch):
    monkeypatch.setattr('llama_jax.convert.tensors._BLOCK_BYTES', 1 << 10)  # several blocks a tensor
    source = random_source(CONFIG, source_dtype)
    written = []
    gguf_format.write(source, target, dtype=dtype, vocabulary=VOCABULARY, progress=written.append)
    found = gguf_format.open_source(target)
    assert found.config == CONFIG
    values = by_name(found)
    for weight, original in by_name(source).items():
        kind = 'F32' if original.ndim == 1 else 'F16' if original.shape[-1] % 32 and '_' in name else name
        kind = gguf.GGMLQuantizationType[kind]
        original = original.astype(np.float32)
        expected = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
        np.testing.assert_array_equal(values[weight].astype(np.float32), expected, err_msg=weight)
    assert sum(written) == sum(tensor.n_bytes for tensor in gguf.GGUFReader(target).tensors)
    assert [file.name for file in target.parent.iterdir()] == ['x.gguf']


def test_library_reads_the_metadata_that_llama_cpp_needs(target):
    gguf_format.write(random_source(CONFIG), target, dtype='q8_0', vocabulary=VOCABULARY, name='toy')
    reader = gguf.GGUFReader(target)
    fields = {
        key: (field.contents(), *(kind.name for kind in field.types)) for key, field in reader.fields.items()
    }
    assert {key: value for key, value in fields.items() if not key.startswith('GGUF.')} == {
        'general.architecture': ('llama', 'STRING'),
        'general.type': ('model', 'STRING'),
        'general.name': ('toy', 'STRING'),
        'general.file_type': (7, 'UINT32'),
        'general.quantization_version': (2, 'UINT32'),
        'llama.vocab_size': (20, 'UINT32'),
        'llama.context_length': (512, 'UINT32'),
        'llama.embedding_length': (64, 'UINT32'),
        'llama.block_count': (2, 'UINT32'),
        'llama.feed_forward_length': (48, 'UINT32'),
        'llama.attention.head_count': (4, 'UINT32'),
        'llama.attention.head_count_kv': (2, 'UINT32'),
        'llama.attention.key_length': (32, 'UINT32'),
        'llama.attention.value_length': (32, 'UINT32'),
        'llama.attention.layer_norm_rms_epsilon': (float(np.float32(1e-5)), 'FLOAT32'),
        'llama.rope.freq_base': (500_000.0, 'FLOAT32'),
        'llama.rope.dimension_count': (32, 'UINT32'),
        'tokenizer.ggml.model': ('gpt2', 'STRING'),
        'tokenizer.ggml.pre': ('llama-bpe', 'STRING'),
        'tokenizer.ggml.tokens': (VOCABULARY['tokenizer.ggml.tokens'], 'ARRAY', 'STRING'),
        'tokenizer.ggml.token_type': ([1, 1, 1, 3] + [5] * 16, 'ARRAY', 'INT32'),
        'tokenizer.ggml.scores': (list(range(20)), 'ARRAY', 'FLOAT32'),
        'tokenizer.ggml.merges': (['a b'], 'ARRAY', 'STRING'),
        'tokenizer.ggml.bos_token_id': (3, 'UINT32'),
        'tokenizer.ggml.add_bos_token': (True, 'BOOL'),
        'tokenizer.chat_template': ('{{ bos_token }}', 'STRING'),
    }
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds['token_embd.weight'] == kinds['blk.1.attn_q.weight'] == 'Q8_0'
    assert kinds['blk.0.ffn_down.weight'] == 'F16'
    assert (
        kinds['rope_freqs.weight'] == kinds['output_norm.weight'] == kinds['blk.1.ffn_norm.weight'] == 'F32'
    )
    assert 'output.weight' not in kinds


@pytest.mark.parametrize('kind', list(gguf.GGMLQuantizationType), ids=lambda kind: kind.name)
def test_any_piece_of_every_type_equals_the_whole_cut(target, kind):
    """Random bytes are valid blocks of any type, if not of pleasant numbers; also NaN must come out the same."""
    known = gguf_file.block_type(int(kind))
    if known is None:
        with pytest.raises(NotImplementedError):
            gguf.quants.dequantize(np.zeros((1, 256), np.uint8), kind)
        return
    shape = (5, 3 * max(known.size, 32))
    info = gguf_file.TensorInfo(shape, known, 96)
    raw = np.random.default_rng(0).integers(0, 256, info.num_bytes, np.uint8).reshape(5, -1)
    target.write_bytes(b'x' * 96 + raw.tobytes())
    with np.errstate(all='ignore'):
        whole = gguf.quants.dequantize(raw, kind)
    tensor = gguf_file.open_tensor(target, info)
    row = gguf_file.open_tensor(target, dataclasses.replace(info, shape=shape[1:]))
    for rows in (slice(None), slice(1, 4), slice(4, None), slice(2, 2)):
        for columns in (slice(None), slice(7, 70), slice(32, 64), slice(95, None), slice(3, 3)):
            values = tensor.read(rows, columns)
            np.testing.assert_array_equal(values.astype(np.float32), whole[rows, columns])
            np.testing.assert_array_equal(row.read(columns).astype(np.float32), whole[0, columns])
            assert values.dtype == tensor.dtype


def test_file_of_mixed_types_reads_as_the_library_does(target):
    """As llama-quantize mixes them: K-quants, with q and k interleaved in their quantised rows."""
    config = dataclasses.replace(
        CONFIG, embed_dim=256, mlp_dim=256, num_layers=1, head_dim=64, rope_scaling=None, tie_embeddings=False
    )
    kinds = {
        'token_embd.weight': 'Q6_K', 'blk.0.attn_q.weight': 'Q4_K', 'blk.0.attn_k.weight': 'Q5_K',
        'blk.0.attn_v.weight': 'IQ4_XS', 'blk.0.attn_output.weight': 'Q2_K', 'blk.0.ffn_gate.weight': 'Q3_K',
        'blk.0.ffn_up.weight': 'MXFP4', 'blk.0.ffn_down.weight': 'Q5_1', 'output.weight': 'BF16',
    }  # fmt: skip
    writer = gguf.GGUFWriter(target, 'llama')
    for key, value in {
        'context_length': 512, 'embedding_length': 256, 'block_count': 1, 'feed_forward_length': 256,
        'attention.head_count': 4, 'attention.head_count_kv': 2,
    }.items():  # fmt: skip
        writer.add_uint32(f'llama.{key}', value)
    writer.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    rng, expected = np.random.default_rng(0), {}
    for weight in mapping.weights_of(config):
        name, shape = weight.name('gguf', 0), weight.matrix_shape(config)
        kind = gguf.GGMLQuantizationType[kinds.get(name, 'F32')]
        size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(
            0, 60, (*shape[:-1], shape[-1] // size * num_bytes), np.uint8
        )  # no exponent of all ones
        writer.add_tensor(name, raw, raw_dtype=kind)
        expected[weight.path] = gguf.quants.dequantize(raw, kind).reshape(shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = gguf_format.open_source(target)
    assert source.config == dataclasses.replace(config, rope_theta=10_000.0)
    for weight in mapping.weights_of(config):
        values = source.tensors[weight.path][0].read().astype(np.float32)
        values = to_interleaved(values, config.head_dim) if weight.rotary else values
        np.testing.assert_array_equal(values, expected[weight.path], err_msg=weight.path)


@pytest.mark.parametrize(('factor', 'ratios'), [(8.0, (1.207484, 2.694530)), (32.0, (1.234937, 3.292262))])
def test_rope_scaling_travels_as_divisors(target, factor, ratios):
    """The reference ratios, at indices 29 and 32 of 64, were computed in float64 for theta 500,000."""
    config = dataclasses.replace(CONFIG, head_dim=128, rope_scaling=RopeScaling(factor))
    gguf_format.write(random_source(config), target, dtype='bfloat16', vocabulary={})
    (divisors,) = [t.data for t in gguf.GGUFReader(target).tensors if t.name == 'rope_freqs.weight']
    np.testing.assert_allclose(divisors[[28, 29, 32, 35, 63]], [1, *ratios, factor, factor], rtol=2e-6)
    assert gguf_format.open_source(target).config == config
    data, divisors = target.read_bytes(), np.array(divisors)
    wiggled = divisors * np.float32(1 + 1e-6)  # another program rounds otherwise
    target.write_bytes(data.replace(divisors.tobytes(), wiggled.tobytes()))
    assert gguf_format.open_source(target).config == config
    target.write_bytes(data.replace(divisors.tobytes(), np.linspace(1, 8, 64, dtype=np.float32).tobytes()))
    with pytest.raises(
        InputError, match=r'rope_freqs.weight holds divisors up to 8.0 that are not those of Llama 3.1'
    ):
        gguf_format.open_source(target)


def replaced(old, new):
    return lambda data: data.replace(old, new)


def u32(key, value):
    return key.encode() + struct.pack('<II', 4, value)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (replaced(b'\5\0\0\0\0\0\0\0llama', b'\5\0\0\0\0\0\0\0gemma'), "general.architecture is 'gemma'"),
        (replaced(u32('attention.head_count', 4), u32('attention.head_count', 0)), "head_count is '0'"),
        (replaced(u32('attention.head_count', 4), u32('attention.head_count', 3)), 'num_heads 3 is not a multiple'),
        (replaced(u32('block_count', 2), u32('block_count', 3)), 'no tensor blk.2.attn_norm.weight'),
        (replaced(u32('block_count', 2), u32('block_count', 2**31)), 'num_layers is 2147483648'),
        (replaced(u32('block_count', 2), u32('block_count', 1)), 'tensors without a place .* blk.1.attn_k.weight'),
        (replaced(u32('embedding_length', 64), u32('embedding_length', 32)), r'token_embd.weight has shape \(20, 64\)'),
        (replaced(b'freq_base\6', b'freq_base\4'), 'freq_base is 1223959552, which is no float'),
        (replaced(b'llama.context_length', b'llama.context_lengtH'), 'llama.context_length is missing'),
        (replaced(u32('dimension_count', 32), u32('dimension_count', 16)), 'rope.dimension_count is 16'),
        (replaced(b'token_embd.weight', b'token_embd.weighT'), 'no tensor token_embd.weight'),
        (replaced(b'output_norm.weight', b'output_norm.weighT'), 'no tensor output_norm.weight'),
        (lambda data: data[:-1], 'ends at byte'),
    ],
)  # fmt: skip
def test_refuses_what_is_no_whole_llama(target, damage, message):
    config = dataclasses.replace(CONFIG, rope_scaling=None)
    gguf_format.write(random_source(config), target, dtype='q8_0', vocabulary={})
    data = damage(target.read_bytes())
    assert data != target.read_bytes()
    target.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        gguf_format.open_source(target)
    assert '\n' not in str(caught.value) and 'x.gguf' in str(caught.value)


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('llama.expert_count', 8, 'a mixture of experts is no Llama'),
        ('llama.rope.scaling.type', 'longrope', "scaling.type is 'longrope'"),
        ('llama.rope.scaling.factor', 2.0, 'scales RoPE both by tensor'),
        ('split.count', 3, 'join the parts'),
        ('llama.head_count_kv', [4, 2], None),  # not the key of any number
        ('llama.feed_forward_length.', 'x', None),
    ],
)
def test_refuses_other_models_under_the_same_name(target, key, value, message):
    gguf_format.write(random_source(CONFIG), target, dtype='float32', vocabulary={key: value})
    if message is None:
        assert gguf_format.open_source(target).config == CONFIG
        return
    with pytest.raises(InputError, match=message):
        gguf_format.open_source(target)


@pytest.mark.parametrize(
    ('dtype', 'value', 'message'),
    [
        ('float16', 1e6, 'holds 1000000.0, which float16 cannot'),
        ('q8_0', np.nan, 'holds a value that Q8_0 cannot'),
        ('q4_0', 1e9, 'holds a value that Q4_0 cannot'),
    ],
)
def test_value_beyond_the_type_is_named_and_nothing_is_left(target, dtype, value, message):
    source = random_source(CONFIG)
    source.tensors['blocks/attention/v'][1].values[5, 7] = value
    with pytest.raises(InputError, match=f'memory: tensor blk.1.attn_v.weight {message}'):
        gguf_format.write(source, target, dtype=dtype, vocabulary={})
    assert not list(target.parent.iterdir())


def test_tokenizer_of_another_model_is_refused(target):
    vocabulary = {'tokenizer.ggml.tokens': [str(i) for i in range(19)]}
    with pytest.raises(InputError, match='the tokenizer has 19 tokens, the model 20'):
        gguf_format.write(random_source(CONFIG), target, dtype='float32', vocabulary=vocabulary)
    assert not list(target.parent.iterdir())


def test_plain_types_read_without_the_library(target, monkeypatch):
    source = random_source(CONFIG)
    gguf_format.write(source, target, dtype='bfloat16', vocabulary={})
    quantized = target.with_name('q.gguf')
    gguf_format.write(source, quantized, dtype='q8_0', vocabulary={})
    gguf_file.block_type.cache_clear()
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert len(by_name(gguf_format.open_source(target))) == 20
    for refused in (
        lambda: gguf_format.open_source(quantized),
        lambda: gguf_format.write(source, target, dtype='float32', vocabulary={}),
    ):
        with pytest.raises(InputError, match=r"pip install 'llama_jax\[gguf\]'"):
            refused()


# llama.cpp: the same files, read and run by the program that they are for.


def llama_cpp_model(path):
    llama_cpp = pytest.importorskip('llama_cpp')
    return llama_cpp.Llama(
        str(path), n_ctx=512, n_batch=512, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0  # fp32 cache
    )  # fmt: skip


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'q8_0'])
def test_llama_cpp_tells_the_same_story(stories, target, dtype):
    gguf_format.write(
        gguf_format.open_source(stories), target, dtype=dtype, vocabulary=vocabulary_of(stories)
    )
    model = llama_cpp_model(target)
    tokens = [
        token for token, _ in zip(model.generate([model.token_bos()], temp=0.0), range(256), strict=False)
    ]
    text = model.detokenize(tokens).decode().lstrip()
    model.close()
    expected = json.loads(stories.with_name('expected.json').read_text())['greedy_text']
    # Rounded weights tell another story after a while.
    length = {'float32': len(expected), 'bfloat16': 100, 'q8_0': 100}[dtype]
    assert text[:length] == expected[:length]


def test_llama_cpp_computes_the_logits_of_ours(stories, target):
    """Scaled RoPE that a short prompt feels, heads wider than the embedding, and a tied head."""
    config = dataclasses.replace(
        CONFIG, vocab_size=512, mlp_dim=64, rope_scaling=RopeScaling(8.0, original_max_seq_len=64)
    )
    gguf_format.write(random_source(config), target, dtype='float32', vocabulary=vocabulary_of(stories))
    source = gguf_format.open_source(target)
    assert source.config == config
    tokens = np.random.default_rng(0).integers(512, size=200)
    params = {}
    for weight in mapping.weights_of(config):
        leaf = params
        *folders, name = weight.path.split('/')
        for folder in folders:
            leaf = leaf.setdefault(folder, {})
        whole = tuple(slice(None) for _ in mapping.leaf_shape(weight, config))
        leaf[name] = mapping.Leaf(source, weight).read(whole)
    ours = jax.jit(LlamaForCausalLM(config, dtype=jnp.float32).apply)(
        {'params': params}, jnp.array(tokens[None])
    )
    model = llama_cpp_model(target)
    model.eval(tokens.tolist())
    theirs = np.array(model.scores[: len(tokens)])
    model.close()
    assert theirs.std() > 1
    np.testing.assert_allclose(
        ours[0][0], theirs, atol=2e-3
    )  # fp32 sums in another order, of logits up to 10
