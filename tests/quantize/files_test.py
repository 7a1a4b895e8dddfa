"""Checkpoints in integers: written block by block, opened as any other, and GGUF's integers as they are."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import llama_jax
from llama_jax import export, pretrained
from llama_jax.convert.mapping import native_source
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.quantize.files import pack, unpack
from llama_jax.quantize.params import dequantize, quantize
from tests import toy
from tests.convert.in_memory import InMemory

# Of widths that GGUF's blocks of 32 divide, heads that are less than one, and a matrix that they do not divide.
CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=64, mlp_dim=72, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8, max_seq_len=64
)  # fmt: skip


def source_of(params, config):
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator='/'): InMemory(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return native_source(config, leaves, 'memory')


@pytest.fixture(scope='module')
def params():
    return toy.make_params(LlamaForCausalLM(CONFIG))


@pytest.fixture(scope='module')
def source(params):
    return source_of(params, CONFIG)


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_int4_codes_are_packed_and_unpacked():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 5, 16)).astype(np.int8)
    assert pack(codes).shape == (3, 5, 8)
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize(('dtype', 'group'), [('int8', None), ('int8', 8), ('int4', None)])
def test_what_is_written_in_small_blocks_is_what_the_params_become(
    dtype, group, params, source, tmp_path, monkeypatch
):
    monkeypatch.setattr('llama_jax.checkpoint.weights.CHUNK_BYTES', 1024)  # the codes of a layer in several
    monkeypatch.setattr('llama_jax.convert.tensors._BLOCK_BYTES', 4096)  # its scales in several
    report = export.save_quantized(tmp_path / 'out', source, None, dtype, group)
    assert json.loads((tmp_path / 'out/quantization.json').read_text()) == report
    expected = quantize(params, dtype, group)
    partitioner = Partitioner(make_mesh({'fsdp': 2, 'tensor': 4}))
    config, loaded, _ = llama_jax.load(tmp_path / 'out', partitioner=partitioner, dtype=jnp.bfloat16)
    assert config == CONFIG
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(loaded), jax.tree.leaves(expected), strict=True
    ):
        if jnp.issubdtype(found.dtype, jnp.integer):
            assert found.dtype == wanted.dtype
            found, wanted = np.asarray(found).astype(int), np.asarray(wanted).astype(int)
            # The largest weight of a scale is half way between codes: NumPy divides and XLA may round inverses.
            assert (off := np.abs(found - wanted)).max() <= 1 and (
                np.abs(wanted)[off > 0] >= {'int8': 127, 'int4': 7}[dtype]
            ).all()
        else:
            np.testing.assert_allclose(np.float32(found), np.float32(wanted), rtol=2**-8, err_msg=str(path))
    stored = sum(
        f.stat().st_size for f in (tmp_path / 'out/checkpoints').rglob('params.*/*') if f.name[0].isdigit()
    )
    assert (
        report['bytes'] <= stored < report['bytes'] * 1.3 < report['bytes_before']
    )  # the last block is padded
    for name, weight in report['weights'].items():
        whole, kept = params, expected
        for part in name.split('/'):
            whole, kept = whole[part], kept[part]
        lost = np.linalg.norm(np.ravel(kept.materialize() - whole)) / np.linalg.norm(np.ravel(whole))
        np.testing.assert_allclose(weight['relative_error'], lost, rtol=1e-2)  # codes half way apart
        assert 0.001 < lost < (0.02 if weight['form'].startswith('int8') else 0.2)
    assert ('reason' in report['weights']['blocks/mlp/down']) == (dtype == 'int4')


def test_it_converts_to_what_the_integers_stand_for_and_is_not_trained_from(source, tmp_path):
    export.save_quantized(tmp_path / 'int4', source, None, 'int4')
    checkpoint = pretrained.open(tmp_path / 'int4')
    export.save(tmp_path / 'whole', checkpoint.source, None, to='orbax')
    _, kept, _ = llama_jax.load(tmp_path / 'int4')
    _, whole, _ = llama_jax.load(tmp_path / 'whole')
    same(whole, dequantize(kept))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_params(LlamaForCausalLM(CONFIG)),
    )
    with pytest.raises(
        InputError, match=r'holds blocks/attention/k as int4 in groups of 32, .*no training; convert'
    ):
        checkpoint.params(target)
    with pytest.raises(InputError, match='int4 exists'):
        export.save_quantized(tmp_path / 'int4', source, None, 'int8')
    model = tmp_path / 'int4/model.json'
    text = model.read_text()
    model.write_text(text.replace('"group": 32', '"group": 7'))
    with pytest.raises(InputError, match=r'model\.json: its quantization has .* which no weight can be in'):
        llama_jax.load(tmp_path / 'int4')
    description = json.loads(text)
    description['quantization']['final_norm'] = {'dtype': 'int8', 'group': 0}
    model.write_text(json.dumps(description))
    with pytest.raises(InputError, match='final_norm'):
        llama_jax.load(tmp_path / 'int4')


def test_a_weight_that_is_not_a_number_is_refused_and_nothing_is_left(params, tmp_path):
    broken = params | {'head': params['head'].at[3, 5].set(jnp.nan)}
    with pytest.raises(InputError, match='weight head holds values that are infinite or not a number'):
        export.save_quantized(tmp_path / 'out', source_of(broken, CONFIG), None, 'int8')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['q8_0', 'q4_0'])
def test_the_integers_of_a_gguf_stand_for_its_weights_bit_for_bit(kind, source, params, tmp_path):
    pytest.importorskip('gguf')
    from llama_jax.convert import gguf

    file, other = (epath.Path(tmp_path / name) for name in ('model.gguf', 'plain.gguf'))
    gguf.write(source, file, dtype=kind, vocabulary={})
    _, plain, _ = llama_jax.load(file)
    _, kept, _ = llama_jax.load(file, keep_quantized=True, mesh=make_mesh({'fsdp': 2, 'tensor': 4}))
    assert kept['blocks']['attention']['o'].qvalue.dtype == {'q8_0': 'int8', 'q4_0': 'int4'}[kind]
    assert kept['blocks']['mlp']['down'].dtype == jnp.float32  # rows of 72 are no blocks of 32
    same(dequantize(kept), plain)
    model, tokens = LlamaForCausalLM(CONFIG, dtype=jnp.float32), toy.packed_batch(2, 32).tokens
    found, expected = (
        jax.jit(lambda p: model.apply({'params': p}, tokens)[0])(p) for p in (jax.device_get(kept), plain)
    )
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
    )  # sums in another order
    gguf.write(source, other, dtype='float16', vocabulary={})
    with pytest.raises(InputError, match='holds no weights in integers to be kept'):
        llama_jax.load(other, keep_quantized=True)
