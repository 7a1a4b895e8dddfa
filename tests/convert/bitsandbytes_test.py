"""Matrices of 4 bits, against bitsandbytes itself where it is installed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from llama_jax import pretrained
from llama_jax.convert import huggingface
from llama_jax.convert.bitsandbytes import with_whole_weights
from llama_jax.convert.safetensors_file import open_safetensors
from llama_jax.errors import InputError
from llama_jax.models.llama import LlamaForCausalLM, abstract_params, param_axes
from llama_jax.ops.nf4 import Nf4Array
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.pretrained.adapters import whole_leaves
from tests import toy
from tests.convert.huggingface_test import our_logits
from tests.convert.in_memory import matrices, random_source

CONFIG = dataclasses.replace(toy.CONFIG, num_layers=1)
# 15 values of NF4 of Dettmers et al. 2023, appendix E, as far as it prints them; the file's table must be these.
NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.7230, 1.0]  # fmt: skip
DYNAMIC = np.linspace(-1, 1, 256, dtype=np.float32)  # any table of 256 will do


def stored(matrix: str, shape, *, kind='nf4', size=64, nested=0, dtype='float32', seed=0, levels=None):
    """(tensors of random codes and scales as bitsandbytes names them, the matrix that they stand for)."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    codes, absmax = rng.integers(16, size=count), rng.random(-(-count // size), np.float32)
    pairs = np.append(codes, [0] * (count % 2)).reshape(-1, 2).astype(np.uint8)
    levels = quant_map(kind) if levels is None else levels
    state = {'quant_type': kind, 'blocksize': size, 'dtype': dtype, 'shape': list(shape)}
    tensors = {matrix: (pairs[:, :1] << 4) | pairs[:, 1:], f'{matrix}.quant_map': levels}
    if nested:
        scales = rng.random(-(-len(absmax) // nested), np.float32)
        small = rng.integers(256, size=len(absmax)).astype(np.uint8)
        absmax = DYNAMIC[small] * scales[np.arange(len(small)) // nested] + np.float32(1.5)
        state |= {'nested_blocksize': nested, 'nested_dtype': 'float32', 'nested_offset': 1.5}
        tensors |= {f'{matrix}.nested_absmax': scales, f'{matrix}.nested_quant_map': DYNAMIC}
    tensors[f'{matrix}.absmax'] = small if nested else absmax
    tensors[f'{matrix}.quant_state.bitsandbytes__{kind}'] = text(state)
    return tensors, (levels[codes] * absmax[np.arange(count) // size]).reshape(shape)


def text(state) -> np.ndarray:
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def quant_map(kind: str) -> np.ndarray:
    from llama_jax.convert import bitsandbytes

    return bitsandbytes._LEVELS[kind]


def opened(tmp_path, tensors):
    save_file(tensors, tmp_path / 'x.safetensors')
    return with_whole_weights(open_safetensors(epath.Path(tmp_path / 'x.safetensors')), 'x')


@pytest.mark.parametrize('kind', ['nf4', 'fp4'])
@pytest.mark.parametrize('nested', [0, 32])
def test_any_rows_and_columns_are_what_the_codes_stand_for(kind, nested, tmp_path):
    """Of widths that no block divides, and odd ones: rows then begin within a block, and within a byte."""
    for shape, size in (((128, 64), 64), ((37, 45), 64), ((9, 700), 128)):
        tensors, want = stored('w', shape, kind=kind, size=size, nested=nested)
        tensor = opened(tmp_path, tensors | {'norm': np.ones(3, np.float32)})['w']
        assert (tensor.shape, tensor.dtype) == (shape, np.float32)
        np.testing.assert_array_equal(tensor.read(), want)
        for rows in (slice(0, 1), slice(3, 8), slice(1, 2), slice(8, 8)):
            np.testing.assert_array_equal(tensor.read(rows), want[rows])
            np.testing.assert_array_equal(tensor.read(rows, slice(5, 44)), want[rows, 5:44])
    np.testing.assert_allclose(quant_map('nf4'), NF4, atol=5e-5)


def test_a_folder_is_converted_as_any_other(tmp_path):
    source = random_source(CONFIG)
    huggingface.write(source, epath.Path(tmp_path))
    tensors = load_file(tmp_path / 'model.safetensors')
    want = matrices(source, 'huggingface')
    for seed, name in enumerate(n for n in want if n.endswith('proj.weight')):
        quantised, want[name] = stored(name, want[name].shape, nested=256 * (seed % 2), seed=seed)
        tensors |= quantised
    save_file(tensors, tmp_path / 'model.safetensors')
    file = tmp_path / 'config.json'
    described = {'quant_method': 'bitsandbytes', 'load_in_4bit': True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {'quantization_config': described}))
    found = matrices(huggingface.open_source(epath.Path(tmp_path)), 'huggingface')
    for name, value in want.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize('nested', [0, 32])
def test_a_base_in_nf4_keeps_the_codes_of_the_file(nested, tmp_path):
    """Not quantised again from what they stand for: random codes have blocks whose largest is no end of the levels."""
    config = dataclasses.replace(
        CONFIG, embed_dim=64, num_heads=8, num_kv_heads=4, head_dim=16, mlp_dim=128, num_layers=2
    )
    source = random_source(config)
    huggingface.write(source, epath.Path(tmp_path))
    tensors = load_file(tmp_path / 'model.safetensors')
    want = matrices(source, 'huggingface')
    kept = {name: True for name in want if name.endswith('proj.weight')}
    kept['model.layers.1.mlp.up_proj.weight'] = False  # the weight of its layers is quantised as it is read
    for seed, name in enumerate(kept):
        if kept[name]:
            quantised, want[name] = stored(name, want[name].shape, nested=nested, seed=seed)
            tensors |= quantised
    save_file(tensors, tmp_path / 'model.safetensors')
    file = tmp_path / 'config.json'
    described = {'quant_method': 'bitsandbytes', 'load_in_4bit': True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {'quantization_config': described}))
    opened = pretrained.open(tmp_path)
    model = LlamaForCausalLM(config)
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4]))
    shapes = abstract_params(model)
    shardings = partitioner.tree_shardings(shapes, param_axes(model))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    base = opened.base_params(target, 'nf4')
    whole = whole_leaves(config, opened.source, {}, {'weights': 'nf4', 'scale': 1.0})
    for path, foreign in (
        ('attention/q', 'self_attn.q'), ('attention/k', 'self_attn.k'), ('attention/o', 'self_attn.o'),
        ('mlp/gate', 'mlp.gate'), ('mlp/down', 'mlp.down'), ('mlp/up', 'mlp.up'),
    ):  # fmt: skip
        room, name = path.split('/')
        weight = base['blocks'][room][name]
        matrices_ = [want[f'model.layers.{layer}.{foreign}_proj.weight'] for layer in range(2)]
        wanted = np.stack([np.moveaxis(m.reshape(len(m), -1), 0, 1) for m in matrices_]).reshape(weight.shape)
        made, merged = np.asarray(weight.materialize()), whole[f'blocks/{path}']
        merged = merged.read(tuple(slice(0, size) for size in weight.shape))
        np.testing.assert_array_equal(made, merged, err_msg=path)
        assert np.array_equal(made, wanted) == (name != 'up'), path
        assert (weight.nested is None) == (name != 'up')
        np.testing.assert_allclose(made, wanted, atol=0.2)
    assert not isinstance(opened.base_params(target, 'int8')['blocks']['mlp']['gate'], Nf4Array)


STATE = 'w.quant_state.bitsandbytes__nf4'


def changed(**values):
    def change(tensors):
        state = json.loads(tensors[STATE].tobytes())
        tensors[STATE] = text({key: value for key, value in (state | values).items() if value is not None})

    return change


def put(name, value):
    def change(tensors):
        tensors[name] = value

    return change


# What is done to sound tensors, and what the one line says.
DAMAGED = {
    'no JSON': (put(STATE, np.frombuffer(b'{"shape": [1', np.uint8)), r'tensor w\.quant_state.*is not JSON'),
    'not a text': (put(STATE, np.ones(4, np.float32)), r'must be a text'),
    'no block': (changed(blocksize=0), r'blocksize 0, it must be one of 32, 64'),
    'huge block': (changed(blocksize=1 << 60), r'blocksize 1152921504606846976'),
    'a kind of its own': (changed(quant_type='fp4'), r"quant_type 'fp4', its name says nf4"),
    'a vector': (changed(shape=[2048]), r'shape \[2048\], it must be the two sizes'),
    'negative': (changed(shape=[-64, 32]), r'shape \[-64, 32\]'),
    'larger than it is': (changed(shape=[1 << 30, 1 << 30]), r'w has 1024 values of uint8, a matrix .* needs'),
    'of another size': (changed(shape=[64, 34]), r'w has 1024 values of uint8, a matrix \[64, 34\] .* needs 1088'),
    'another type': (changed(dtype='int8'), r"dtype 'int8', it must be one of float32"),
    'scales missing': (lambda t: t.pop('w.absmax'), r'has no w\.absmax beside it'),
    'too few scales': (put('w.absmax', np.ones(3, np.float32)), r'w\.absmax has 3 values of float32.* needs 32'),
    'scales in bytes': (put('w.absmax', np.ones(32, np.uint8)), r'w\.absmax has 32 values of uint8'),
    'other levels': (put('w.quant_map', DYNAMIC[:16]), r'quant_map are not the levels of nf4'),
    'misnamed': (lambda t: t.update({'v.absmax': t.pop('w.absmax')}), r'has no w\.absmax beside it; did you mean v\.'),
    'surplus': (put('v.absmax', np.ones(3, np.float32)), r'tensor v\.absmax belongs to no matrix of 4 bits.*mean w\.'),
    'no description': (lambda t: t.pop(STATE), r'w\.(absmax|quant_map) belongs to no matrix of 4 bits'),
    '8 bits': (lambda t: t.update({'v.SCB': np.ones(3, np.float32)}), r'v\.SCB belongs to no matrix'),
    'twice': (put('w.quant_state.bitsandbytes__fp4', np.ones(3, np.uint8)), r'bitsandbytes__(fp4|nf4)'),
    'unknown kind': (lambda t: t.update({'w.quant_state.bitsandbytes__af4': t.pop(STATE)}), r'there are nf4, fp4'),
    'nested, no size': (
        put('w.nested_absmax', np.ones(1, np.float32)), r'nested_blocksize None, it must be one of'
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', DAMAGED)
def test_what_is_damaged_is_named(name, tmp_path):
    damage, says = DAMAGED[name]
    tensors, _ = stored('w', (64, 32))
    damage(tensors)
    with pytest.raises(InputError, match=says) as refusal:
        opened(tmp_path, tensors)
    assert '\n' not in str(refusal.value)


@pytest.mark.slow
def test_equal_to_bitsandbytes_bit_for_bit(tmp_path):
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    functional = pytest.importorskip(
        'bitsandbytes.functional', reason='needs bitsandbytes: the extra `parity`'
    )
    safetensors_torch = pytest.importorskip('safetensors.torch')
    torch.manual_seed(0)
    for kind in ('nf4', 'fp4'):
        for twice in (False, True):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                weight = torch.randn(96, 200, dtype=dtype)
                codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=twice)
                tensors = {'w': codes} | {f'w.{k}': v for k, v in state.as_dict(packed=True).items()}
                file = tmp_path / f'{kind}{twice}{dtype}'
                safetensors_torch.save_file(tensors, file)
                found = with_whole_weights(open_safetensors(epath.Path(file)), 'x')['w'].read()
                want = functional.dequantize_4bit(codes, state)
                assert str(want.dtype) == f'torch.{found.dtype}'
                np.testing.assert_array_equal(
                    found.astype(np.float32), want.float().numpy(), err_msg=file.name
                )
                assert np.abs(found.astype(np.float32) - weight.float().numpy()).mean() < 0.12


@pytest.mark.slow
def test_a_folder_that_transformers_saved_gives_its_logits(tmp_path):
    """Those of its weights written out: its own product in 4 bits sums in another type."""
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    transformers = pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    pytest.importorskip('bitsandbytes', reason='needs bitsandbytes: the extra `parity`')
    (tmp_path / 'plain').mkdir()
    # bitsandbytes' kernel for CPUs takes another scale where a row is shorter than a block.
    config = dataclasses.replace(CONFIG, embed_dim=64, mlp_dim=128)
    huggingface.write(random_source(config), epath.Path(tmp_path / 'plain'))
    from tests.reference import huggingface_llama

    tokens = np.random.default_rng(1).integers(64, size=(2, 24), dtype=np.int32)
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    for kind, twice, dtype in (('nf4', True, torch.bfloat16), ('fp4', False, torch.float32)):
        form = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=twice
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / 'plain', quantization_config=form, dtype=dtype
        )
        model.save_pretrained(tmp_path / kind)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        whole = again.dequantize().float()
        logits = huggingface_llama.forward(whole, tokens, positions)
        found = our_logits(huggingface.open_source(epath.Path(tmp_path / kind)), tokens, positions)
        assert np.std(logits) > 0.5
        # Weights are the same to the last bit; sums in another order round fp32 by 6e-8 each.
        np.testing.assert_allclose(found, logits, atol=1e-5, rtol=0)
