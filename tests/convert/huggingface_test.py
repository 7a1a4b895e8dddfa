"""Folders of Hugging Face's format, against transformers itself where it is installed."""

import dataclasses
import functools
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from llama_jax.convert import huggingface
from llama_jax.convert.mapping import Leaf, Source, weights_of
from llama_jax.convert.tensors import BFLOAT16
from llama_jax.errors import InputError
from llama_jax.models.config import RopeScaling
from llama_jax.models.llama import LlamaForCausalLM
from tests import toy
from tests.convert.in_memory import matrices, random_source
from tests.reference import huggingface_llama

# The same sums in another order: some roundings of fp32 (6e-8 each) of values of order 1.
TOLERANCE = 1e-5

SCALING = RopeScaling(factor=8.0, original_max_seq_len=64)
CONFIGS = {
    'mha': dataclasses.replace(toy.CONFIG, num_layers=2, num_kv_heads=8, norm_eps=1e-6),
    'gqa': dataclasses.replace(toy.CONFIG, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16),
    'tied, scaled': dataclasses.replace(
        toy.CONFIG, num_layers=2, rope_theta=500_000.0, rope_scaling=SCALING, max_seq_len=512, tie_embeddings=True
    ),
}  # fmt: skip


def write(folder, source: Source, **kwargs) -> epath.Path:
    folder = epath.Path(folder)
    folder.mkdir(parents=True)
    huggingface.write(source, folder, **kwargs)
    return folder


by_name = functools.partial(matrices, naming='huggingface')


def assert_same(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def our_logits(source: Source, tokens, positions) -> np.ndarray:
    params: dict = {}
    for weight in weights_of(source.config):
        *parents, last = weight.path.split('/')
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        leaf = Leaf(source, weight)
        node[last] = leaf.read((slice(None),) * len(leaf.shape))
    model = LlamaForCausalLM(source.config)  # on a CPU: in float32
    apply = jax.jit(lambda params, *args: model.apply({'params': params}, *args)[0])
    return np.asarray(apply(params, jnp.asarray(tokens), jnp.asarray(positions)))


@pytest.mark.parametrize('name', CONFIGS)
def test_to_transformers_and_back(name, tmp_path):
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    transformers = pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    torch.set_num_threads(1)  # the matrices are small, and the cores busy with other tests
    source = random_source(CONFIGS[name])
    many = name == 'gqa'
    ours = write(
        tmp_path / 'ours', source, bos_id=1, eos_ids=[2, 3], shard_bytes=20_000 if many else 5_000_000_000
    )
    assert len(list(ours.glob('*.safetensors'))) > 2 if many else (ours / 'model.safetensors').exists()

    model, info = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(info.values()), info
    state = {n: v.numpy() for n, v in model.state_dict().items()}
    want = by_name(source)
    if source.config.tie_embeddings:
        want['lm_head.weight'] = want['model.embed_tokens.weight']
    assert_same(state, want)
    assert model.dtype == torch.float32
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, [2, 3])
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, [2, 3])

    theirs = tmp_path / 'theirs'
    model.save_pretrained(theirs, max_shard_size='20KB' if many else '5GB')
    again = huggingface.open_source(epath.Path(theirs))
    assert again.config == source.config
    assert_same(by_name(again), by_name(source))

    rng = np.random.default_rng(1)
    tokens = rng.integers(64, size=(2, 24), dtype=np.int32)
    positions = np.sort(rng.permuted(np.tile(np.arange(source.config.max_seq_len), (2, 1)), axis=1)[:, :24])
    positions = positions.astype(np.int32)
    logits = huggingface_llama.forward(model, tokens, positions)
    assert np.std(logits) > 0.5  # so that the tolerance means something
    np.testing.assert_allclose(our_logits(again, tokens, positions), logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_and_the_base_model(dtype, tmp_path):
    """LlamaModel saves names without `model.`; with tied embeddings that is the whole language model."""
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    transformers = pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    source = random_source(CONFIGS['tied, scaled'], np.dtype(dtype) if dtype == 'float16' else BFLOAT16)
    ours = write(tmp_path / 'ours', source)
    model = transformers.AutoModel.from_pretrained(ours, dtype='auto')
    assert isinstance(model, transformers.LlamaModel) and model.dtype == getattr(torch, dtype)
    model.save_pretrained(tmp_path / 'theirs')
    assert 'embed_tokens.weight' in load_names(tmp_path / 'theirs' / 'model.safetensors')
    again = huggingface.open_source(epath.Path(tmp_path / 'theirs'))
    assert again.config == source.config
    assert_same(by_name(again), by_name(source))


def load_names(path) -> set[str]:
    data = path.read_bytes()
    return set(json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')]))


@pytest.mark.parametrize('name', ['gqa', 'tied, scaled'])
def test_folders_of_before_safetensors(name, tmp_path):
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    source = random_source(CONFIGS[name])
    folder = write(tmp_path / 'x', source)
    (folder / 'model.safetensors').unlink()
    state = {n: torch.tensor(v) for n, v in by_name(source).items()}
    head = state.setdefault('lm_head.weight', state['model.embed_tokens.weight'])
    torch.save(state, folder / 'pytorch_model.bin')
    assert_same(by_name(huggingface.open_source(folder)), by_name(source))

    (folder / 'pytorch_model.bin').unlink()
    state = {n: v for n, v in state.items() if v is not head}
    files = {
        'first.bin': state,
        'second.bin': {n: head for n in ('lm_head.weight', *by_name(source)) if n not in state},
    }
    for file, part in files.items():
        torch.save(part, folder / file)
    weight_map = {n: file for file, part in files.items() for n in part}
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': weight_map}))
    assert_same(by_name(huggingface.open_source(folder)), by_name(source))


def test_writing_in_another_type_in_files_of_a_size(tmp_path):
    source = random_source(CONFIGS['gqa'])
    progress = []
    ours = write(tmp_path / 'half', source, dtype=BFLOAT16, shard_bytes=10_000, progress=progress.append)
    again = huggingface.open_source(ours)
    assert again.config == source.config
    assert_same(by_name(again), {n: v.astype(BFLOAT16) for n, v in by_name(source).items()})

    assert json.loads((ours / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
    index = json.loads((ours / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == 2 * source.config.num_params == sum(progress)
    assert list(index['weight_map']) == sorted(index['weight_map']) == sorted(by_name(source))
    count = len(set(index['weight_map'].values()))
    names = [f'model-{k:05d}-of-{count:05d}.safetensors' for k in range(1, count + 1)]
    assert sorted(p.name for p in ours.glob('*.safetensors')) == names
    sizes = [(ours / name).stat().length for name in names]
    assert all(size < 10_000 + 2000 for size in sizes)  # 2000 bytes of header
    assert sum(sizes) > (count - 1) * 8000  # and none much emptier than it must be

    source.tensors['blocks/mlp/up'][1].values[3, 4] = 7e4
    with pytest.raises(InputError, match=r'layers\.1\.mlp\.up_proj\.weight holds 70000\.0'):
        write(tmp_path / 'too_large', source, dtype=np.dtype(np.float16))


def test_what_lies_beside_the_weights(tmp_path):
    source = random_source(CONFIGS['gqa'])
    files = {'tokenizer.json': b'{}', 'generation_config.json': b'{"temperature": 0.6}'}
    folder = write(tmp_path / 'a', source, files=files, eos_ids=[5])
    (folder / 'README.md').write_text('not the model')
    assert huggingface.carried_files(folder) == files
    config = json.loads((folder / 'config.json').read_text())
    assert (config['bos_token_id'], config['eos_token_id'], config['torch_dtype']) == (None, 5, 'float32')
    other = write(tmp_path / 'b', source, bos_id=1)
    assert json.loads((other / 'generation_config.json').read_text()) == {'bos_token_id': 1}


# Reading config.json.

LLAMA_3 = {
    'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 64,
}  # fmt: skip
PLAIN = CONFIGS['gqa']
SCALED = dataclasses.replace(PLAIN, rope_theta=5e5, rope_scaling=SCALING)

# Changes to what we write for PLAIN (None removes a key), and what they must be read as.
SPELLINGS = {
    'as we write it': ({}, PLAIN),
    'transformers 5': (
        {'rope_theta': None, 'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 500_000, **LLAMA_3}},
        SCALED,
    ),
    'rope_type': ({'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'llama3', **LLAMA_3}}, SCALED),
    'type': ({'rope_theta': 5e5, 'rope_scaling': {'type': 'llama3', **LLAMA_3}}, SCALED),
    'default': ({'rope_theta': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4}}, PLAIN),
    'default of old': ({'rope_scaling': {'type': 'default'}}, PLAIN),
    'no rope': ({'rope_theta': None, 'rope_scaling': None}, PLAIN),
    'head_dim null': ({'head_dim': None}, dataclasses.replace(PLAIN, head_dim=8)),
    'llama 1': (
        {key: None for key in ('num_key_value_heads', 'attention_bias', 'mlp_bias', 'rope_theta', 'rope_scaling')}
        | {'architectures': ['LLaMAForCausalLM'], 'max_position_embeddings': None, 'pad_token_id': -1},
        dataclasses.replace(PLAIN, num_kv_heads=4, max_seq_len=2048),
    ),
    'more keys': ({'pretraining_tp': 2, 'use_cache': False, 'unsloth_fixed': True}, PLAIN),
}  # fmt: skip


def config_values(changes: dict, config=PLAIN) -> dict:
    values = huggingface.config_json(config, np.dtype(np.float32), 1, [2]) | changes
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize('name', SPELLINGS)
def test_spellings_of_the_configuration(name, tmp_path):
    changes, want = SPELLINGS[name]
    want = dataclasses.replace(want, embed_dim=32)
    (tmp_path / 'config.json').write_text(json.dumps(config_values(changes)))
    assert huggingface.read_config(epath.Path(tmp_path)) == want


REFUSED_CONFIGS = [
    ({'model_type': 'mistral'}, "model_type is 'mistral'"),
    ({'architectures': ['MistralForCausalLM']}, 'architectures is .*Mistral'),
    ({'architectures': ['LlamaForSequenceClassification']}, 'num_labels is 2: a classifier'),
    ({'quantization_config': {'quant_method': 'awq', 'bits': 4}}, "quantised .*'awq'"),
    ({'hidden_act': 'gelu'}, "hidden_act is 'gelu'"),
    ({'attention_bias': True}, 'attention_bias is true'),
    ({'mlp_bias': 'yes'}, "mlp_bias is 'yes'"),
    ({'rope_scaling': {'type': 'longrope', 'factor': 2.0}}, "of type 'longrope'"),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0, 'truncate': 1}}, 'truncate is 1'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 2.0, 'beta_slow': 64}}, 'beta_slow 64.0 must be less'),
    ({'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 1e4}}, 'factor is None'),
    ({'rope_scaling': {'type': 'linear', 'factor': 0}}, 'factor is 0'),
    ({'rope_parameters': {'full_attention': {'rope_theta': 1e4}}}, 'rope_parameters is .* flat'),
    ({'rope_scaling': {'type': 'llama3', **LLAMA_3, 'factor': None}}, 'factor is None'),
    ({'rope_scaling': {'type': 'llama3', **LLAMA_3, 'low_freq_factor': 4}}, 'low_freq_factor 4.0 must be less'),
    ({'rope_scaling': [1]}, r'rope_scaling is \[1\]'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor'),
    ({'vocab_size': None, 'hidden_size': '32'}, "hidden_size is '32'"),
    ({'vocab_size': None}, 'vocab_size is None'),
    ({'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
    ({'num_hidden_layers': 10**12}, 'num_hidden_layers is 1000000000000'),
    ({'num_attention_heads': True}, 'num_attention_heads is True'),
    ({'num_attention_heads': 5, 'head_dim': None}, 'hidden_size 32 is not a multiple'),
    ({'num_key_value_heads': 3}, 'not a multiple of num_kv_heads 3'),
    ({'head_dim': 7}, 'head_dim 7 is odd'),
    ({'rms_norm_eps': -1e-5}, 'rms_norm_eps is -1e-05'),
    ({'rope_theta': '10000'}, "rope_theta is '10000'"),
]  # fmt: skip


@pytest.mark.parametrize(('changes', 'message'), REFUSED_CONFIGS, ids=lambda value: str(value)[:40])
def test_other_models_are_refused(changes, message, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(config_values(changes)))
    assert_refused(tmp_path, message)


def test_text_that_is_no_configuration_is_refused(tmp_path):
    assert_refused(tmp_path, 'no Hugging Face folder')
    for text in ('', '[]', '{"vocab_size": 1e999}', '{"rope_theta": Infinity}', '[' * 100_000, '9' * 5000):
        (tmp_path / 'config.json').write_text(text)
        assert_refused(tmp_path, 'config.json')


def assert_refused(folder, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        huggingface.open_source(epath.Path(folder))
    assert '\n' not in str(error.value) and len(str(error.value)) < 800
    assert str(folder) in str(error.value)


# Weights that do not fit.


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Folders that are only read: one file, several files, a tied model."""
    root = tmp_path_factory.mktemp('saved')
    config = dataclasses.replace(
        toy.CONFIG, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1
    )
    write(root / 'one', random_source(config))
    write(root / 'several', random_source(config), shard_bytes=3000)
    write(root / 'tied', random_source(dataclasses.replace(config, tie_embeddings=True)))
    return root


def change_weights(path, change) -> None:
    """Rewrites a file with `change` made to its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


EMBED, HEAD, NORM = 'model.embed_tokens.weight', 'lm_head.weight', 'model.norm.weight'
WEIGHTS = {
    'missing': (lambda t: t.pop(NORM), 'no tensor model.norm.weight'),
    'no head': (lambda t: t.pop(HEAD), 'no tensor lm_head.weight'),
    'surplus': (lambda t: t.update(extra=t[NORM]), 'tensors without a place.*extra'),
    'a layer more': (lambda t: t.update({'model.layers.1.self_attn.q_proj.weight': t[NORM]}), 'layers.1.self_attn'),
    'bias': (lambda t: t.update({'model.layers.0.self_attn.q_proj.bias': t[NORM]}), 'q_proj.bias'),
    'other shape': (lambda t: t.update({NORM: np.zeros(8, np.float32)}), r'norm.weight has shape \(8,\)'),
    'integers': (lambda t: t.update({NORM: np.zeros(16, np.int8)}), 'norm.weight holds int8'),
    'both spellings': (lambda t: t.update({'norm.weight': t[NORM]}), 'both .*norm.weight'),
}  # fmt: skip


@pytest.mark.parametrize('case', WEIGHTS)
def test_weights_that_do_not_fit_are_named(case, saved, tmp_path):
    change, message = WEIGHTS[case]
    shutil.copytree(saved / 'one', tmp_path / 'x')
    change_weights(tmp_path / 'x' / 'model.safetensors', change)
    assert_refused(tmp_path / 'x', message)


def test_tied_weights_under_either_name_or_both(saved, tmp_path, caplog):
    folder = epath.Path(shutil.copytree(saved / 'tied', tmp_path / 'x'))
    want = by_name(huggingface.open_source(folder))
    assert HEAD not in want
    file = folder / 'model.safetensors'
    change_weights(
        file, lambda t: t.update({HEAD: t[EMBED], 'model.layers.0.self_attn.rotary_emb.inv_freq': t[NORM]})
    )
    with caplog.at_level(logging.INFO):
        assert_same(by_name(huggingface.open_source(folder)), want)
    assert 'lm_head.weight is the embedding' in caplog.text
    change_weights(file, lambda t: t.pop(EMBED))
    assert_same(by_name(huggingface.open_source(folder)), want)
    change_weights(file, lambda t: t.update({EMBED: t[HEAD] + 1}))
    assert_refused(folder, 'lm_head.weight differs from model.embed_tokens.weight')


def test_files_that_do_not_fit_their_index_are_named(saved, tmp_path):
    several = saved / 'several'
    index = json.loads((several / 'model.safetensors.index.json').read_text())
    places = index['weight_map']

    def assert_index_refused(change, message: str) -> None:
        folder = tmp_path / 'x'
        shutil.copytree(several, folder)
        changed = dict(places)
        change(changed, folder)
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': changed}))
        assert_refused(folder, message)
        shutil.rmtree(folder)

    file, other = places[NORM], places[EMBED]
    assert file != other
    assert_index_refused(lambda _, folder: (folder / file).unlink(), f'{file} is missing')
    assert_index_refused(lambda p, _: p.update(more=file), f"{file} has no tensor 'more'")
    assert_index_refused(lambda p, _: p.pop(NORM), f'{file} holds tensor {NORM}')
    assert_index_refused(lambda p, _: p.update({NORM: other}), f'{file} holds tensor {NORM}|no tensor')
    assert_index_refused(lambda p, _: p.update({NORM: f'../several/{file}'}), 'which is no file name')
    assert_index_refused(lambda p, _: p.update({NORM: 3}), 'which is no file name')
    cut = (several / file).read_bytes()[:-4]
    assert_index_refused(lambda _, folder: (folder / file).write_bytes(cut), f'{file}.*truncated')


def test_folders_without_weights_say_what_to_do(saved, tmp_path):
    shutil.copy(saved / 'one' / 'config.json', tmp_path)
    assert_refused(tmp_path, 'holds no weights')


def test_an_index_decides_which_copy_counts_and_buffers_count_nowhere(tmp_path):
    """As transformers reads them: stale copies in other shards, buffers in the index alone or in a shard alone."""
    config, folder = toy.CONFIG, tmp_path / 'm'
    folder.mkdir()
    source = random_source(config)
    huggingface.write(source, epath.Path(folder))
    tensors = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = sorted(tensors)
    one, two = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
    parts = {one: {n: tensors[n] for n in names[:5]}, two: {n: tensors[n] for n in names[5:]}}
    places = {name: file for file, part in parts.items() for name in part}
    parts[two][names[0]] = np.zeros_like(tensors[names[0]])  # superseded
    parts[one]['model.layers.1.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
    parts[one]['model.layers.0.self_attn.rotary_emb.cos_cached'] = np.ones((1, 1, 8, 4), np.float32)
    parts[two]['model.position_ids'] = np.arange(4)
    places['model.layers.0.self_attn.rotary_emb.inv_freq'] = two
    for file, part in parts.items():
        save_file(part, folder / file, metadata={'format': 'pt'})
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    read = huggingface.open_source(epath.Path(folder))
    for path, layers in source.tensors.items():
        for original, copy in zip(layers, read.tensors[path], strict=True):
            np.testing.assert_array_equal(copy.read(), original.read())
    index.write_text(
        json.dumps({'metadata': {}, 'weight_map': places | {'model.layers.0.extra.weight': one}})
    )
    with pytest.raises(InputError, match=r"has no tensor 'model\.layers\.0\.extra\.weight'"):
        huggingface.open_source(epath.Path(folder))
