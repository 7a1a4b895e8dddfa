"""Long-context Llamas: every way of stretching RoPE against transformers and llama.cpp, and through the formats."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax import pretrained
from llama_jax.convert import gguf, huggingface
from llama_jax.convert.gguf_file import read_metadata
from llama_jax.convert.huggingface_config import config_json
from llama_jax.convert.mapping import Leaf, weights_of
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS
from llama_jax.ops.rope import inverse_frequencies, rope_tables
from tests import toy
from tests.command_line import add_nano, tiny_run
from tests.convert.in_memory import random_source

# Of the logits' standard deviation: fp32 sums in another order move them by 1e-5, a wrong factor by more than 1e-2.
TOLERANCE = 1e-4
BASE = dataclasses.replace(
    toy.CONFIG, vocab_size=96, embed_dim=64, mlp_dim=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
    max_seq_len=2048,
)  # fmt: skip
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 512}
LLAMA3 = {
    'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 512,
}  # fmt: skip
# Keys of config.json, and the context that they mean.
VARIANTS = {
    'linear, as Vicuna-16k': ({'rope_scaling': {'type': 'linear', 'factor': 4.0}}, 8192),
    'linear, new spelling': (
        {'rope_scaling': None, 'rope_parameters': {'rope_type': 'linear', 'factor': 2.5, 'rope_theta': 5e5}}, 5120),
    'dynamic': ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, 2048),
    'yarn, as Yarn-Llama-2': ({'rope_scaling': YARN | {'type': 'yarn', 'finetuned': True}}, 2048),
    'yarn, old spelling': (
        {'rope_scaling': {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 512}}, 2048),
    'yarn, its settings': ({'rope_scaling': YARN | {'beta_fast': 16, 'beta_slow': 2, 'attention_factor': 0.8}}, 2048),
    'yarn, attention': ({'rope_scaling': YARN | {'attention_factor': 0.8}}, 2048),
    'yarn, DeepSeek-like': ({'rope_scaling': YARN | {'mscale': 1.0, 'mscale_all_dim': 0.5}}, 2048),
    'yarn, not rounded': ({'rope_scaling': YARN | {'truncate': False}}, 2048),
    'yarn, by its contexts': (
        {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': None,
                             'original_max_position_embeddings': 256}}, 2048),
    'llama3, as 3.1': ({'rope_scaling': LLAMA3 | {'factor': 8.0}}, 2048),
    'llama3, as 3.2': (
        {'rope_parameters': LLAMA3 | {'factor': 32.0, 'original_max_position_embeddings': 8192, 'rope_theta': 5e5}},
        2048),
}  # fmt: skip

# What a GGUF has of them beside the base and the length of the context.
KEYS = {
    'linear, as Vicuna-16k': {'type': 'linear', 'factor': 4.0, 'original_context_length': 2048},
    'yarn, as Yarn-Llama-2': {'type': 'yarn', 'factor': 4.0, 'original_context_length': 512},
    'llama3, as 3.1': {},  # a tensor
}
MUTATED = (
    'linear, as Vicuna-16k',
    'dynamic',
    'yarn, its settings',
    'llama3, as 3.1',
)  # each setting must count


def config_of(tmp_path, changes):
    """A folder of a config.json alone."""
    folder = epath.Path(tmp_path / 'm')
    folder.mkdir(exist_ok=True)
    values = config_json(BASE, np.dtype('float32'), 1, [2]) | changes
    if 'rope_parameters' in changes:
        del values['rope_scaling'], values['rope_theta']
    (folder / 'config.json').write_text(json.dumps(values))
    return folder


def folder_of(tmp_path, changes):
    folder = epath.Path(tmp_path / 'm')
    folder.mkdir()
    huggingface.write(random_source(BASE), folder)
    return config_of(tmp_path, changes)


def logits_of(source, config, tokens, positions):
    params = {}
    for weight in weights_of(config):
        leaf = params
        *folders, name = weight.path.split('/')
        for folder in folders:
            leaf = leaf.setdefault(folder, {})
        array = Leaf(source, weight)
        leaf[name] = array.read(tuple(slice(None) for _ in array.shape))
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    return np.asarray(jax.jit(model.apply)({'params': params}, tokens, positions)[0])


def spread(config, count=64):
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(config.max_seq_len, count, replace=False))[None].astype(np.int32)
    positions[0, -1] = config.max_seq_len - 1
    return rng.integers(config.vocab_size, size=(1, count)).astype(np.int32), positions


def relative(a, b):
    return np.abs(a - b).max() / b.std()


def mutations_of(scaling):
    """The scaling with another value of each setting that counts."""
    mutated = {'factor': scaling.factor * 1.5} if scaling.kind != 'dynamic' else {'kind': 'linear'}
    if scaling.kind == 'yarn':
        settings = {'beta_fast': scaling.beta_fast / 4, 'beta_slow': scaling.beta_slow * 4}
        mutated |= settings | {'attention_factor': scaling.attention_factor * 1.1}
    if scaling.kind == 'llama3':
        mutated |= {'low_freq_factor': 2.0, 'high_freq_factor': 2.0}
    if scaling.kind in ('yarn', 'llama3'):
        mutated['original_max_seq_len'] = scaling.original_max_seq_len * 4
    return {key: dataclasses.replace(scaling, **{key: value}) for key, value in mutated.items()}


def tables_of(config):
    """Cosines and sines of a head's pairs at positions over the whole context."""
    scaling = dataclasses.asdict(config.rope_scaling)
    scale = scaling.pop('attention_factor')
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, **scaling)
    positions = jnp.asarray(spread(config)[1])
    return np.stack(rope_tables(positions, frequencies, scale if scaling['kind'] == 'yarn' else 1.0))


@pytest.mark.parametrize('name', VARIANTS)
def test_angles_are_those_of_transformers_and_each_factor_counts(name, tmp_path):
    torch = pytest.importorskip('torch', reason="needs torch: pip install 'llama_jax[parity]'")
    transformers = pytest.importorskip(
        'transformers', reason="needs transformers: pip install 'llama_jax[parity]'"
    )
    folder = config_of(tmp_path, VARIANTS[name][0])
    config = huggingface.read_config(folder)
    their_config = transformers.LlamaConfig.from_pretrained(str(folder))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(their_config)
    _, positions = spread(config)
    with torch.no_grad():
        theirs = [
            t.numpy()[..., : config.head_dim // 2] for t in rotary(torch.zeros(1), torch.tensor(positions))
        ]
    theirs = np.stack(theirs)
    assert np.abs(tables_of(config) - theirs).max() < 1e-5
    for key, scaling in mutations_of(config.rope_scaling).items():
        wrong = tables_of(dataclasses.replace(config, rope_scaling=scaling))
        assert np.abs(wrong - theirs).max() > 1e-2, key


@pytest.mark.slow
@pytest.mark.parametrize('name', VARIANTS)
def test_logits_are_those_of_transformers_and_each_factor_counts(name, tmp_path):
    torch = pytest.importorskip('torch', reason="needs torch: pip install 'llama_jax[parity]'")
    transformers = pytest.importorskip(
        'transformers', reason="needs transformers: pip install 'llama_jax[parity]'"
    )
    changes, context = VARIANTS[name]
    folder = folder_of(tmp_path, changes)
    source = huggingface.open_source(folder)
    config = source.config
    assert config.max_seq_len == context
    tokens, positions = spread(config)
    torch.set_num_threads(1)
    model = transformers.LlamaForCausalLM.from_pretrained(str(folder), attn_implementation='eager').float()
    with torch.no_grad():
        theirs = model(
            torch.tensor(tokens).long(), position_ids=torch.tensor(positions).long()
        ).logits.numpy()
    ours = logits_of(source, config, tokens, positions)
    assert relative(ours, theirs) < TOLERANCE
    for key, scaling in mutations_of(config.rope_scaling).items() if name in MUTATED else ():
        wrong = dataclasses.replace(config, rope_scaling=scaling)
        assert relative(logits_of(source, wrong, tokens, positions), theirs) > 10 * TOLERANCE, key


@pytest.mark.parametrize('name', VARIANTS)
def test_the_formats_keep_the_scaling_or_refuse_it(name, tmp_path):
    changes, _ = VARIANTS[name]
    source = huggingface.open_source(folder_of(tmp_path, changes))
    config = source.config
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    again = epath.Path(tmp_path / 'again')
    again.mkdir()
    huggingface.write(source, again)
    assert huggingface.read_config(again) == config
    place = epath.Path(tmp_path / 'a.gguf')
    if name in ('dynamic', 'yarn, not rounded', 'yarn, its settings'):
        with pytest.raises(
            InputError, match='no (dynamic scaling|yarn without rounding)|has yarn with beta_fast 32'
        ):
            gguf.write(source, place, dtype='float32', vocabulary={})
        assert not place.exists()
        return
    gguf.write(source, place, dtype='float32', vocabulary={})
    assert gguf.open_source(place).config == config
    if name in KEYS:
        found = read_metadata(place)
        at = 'llama.rope.scaling.'
        assert {k.removeprefix(at): v for k, v in found.items() if k.startswith(at)} == KEYS[name]
        assert found['llama.context_length'] == config.max_seq_len
        assert (config.rope_scaling.kind == 'llama3') == (b'rope_freqs.weight' in place.read_bytes())


def test_longrope_is_refused_by_name(tmp_path):
    for kind in ('longrope', 'su'):
        changes = {'rope_scaling': {'type': kind, 'short_factor': [1.0] * 8, 'long_factor': [2.0] * 8}}
        (folder := tmp_path / kind).mkdir()
        with pytest.raises(InputError, match=f"of type '{kind}'; the Llamas have only"):
            huggingface.open_source(folder_of(folder, changes))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['linear, as Vicuna-16k', 'yarn, as Yarn-Llama-2', 'yarn, attention'])
def test_logits_are_those_of_llama_cpp(name, tmp_path, shared_data):
    llama_cpp = pytest.importorskip(
        'llama_cpp', reason="needs llama-cpp-python: pip install 'llama_jax[parity]'"
    )
    stories = epath.Path(shared_data / 'weights/stories260K/stories260K.gguf')
    keys = {k: v for k, v in read_metadata(stories).items() if k.startswith('tokenizer.')}
    base = dataclasses.replace(BASE, vocab_size=512)
    scaling = huggingface.open_source(folder_of(tmp_path, VARIANTS[name][0])).config.rope_scaling
    config = dataclasses.replace(base, rope_scaling=scaling)
    place = epath.Path(tmp_path / 'a.gguf')
    gguf.write(random_source(config), place, dtype='float32', vocabulary=keys)
    source = gguf.open_source(place)
    assert source.config == config
    tokens = np.random.default_rng(0).integers(512, size=(1, 400)).astype(np.int32)
    ours = logits_of(source, config, tokens, np.arange(400)[None])
    model = llama_cpp.Llama(
        str(place), n_ctx=2048, n_batch=512, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0,
    )  # fmt: skip
    model.eval(tokens[0].tolist())
    theirs = np.array(model.scores[:400])
    model.close()
    # fp32 in another order; its cosines and sines are its own.
    assert relative(ours[0], theirs) < 2e-3
    plain = dataclasses.replace(config, rope_scaling=None)
    assert relative(logits_of(source, plain, tokens, np.arange(400)[None])[0], theirs) > 2e-2


SCALINGS = {
    'linear': RopeScaling(4.0, kind='linear', original_max_seq_len=64),
    'dynamic': RopeScaling(2.0, kind='dynamic', original_max_seq_len=256),
    'yarn': RopeScaling(4.0, kind='yarn', original_max_seq_len=64, attention_factor=1.1386294361119891),
    'llama3': RopeScaling(8.0, original_max_seq_len=64),
}


def nano():
    add_nano()
    return PRESETS.pop('nano')


@pytest.mark.parametrize(
    'kind',
    [pytest.param(kind, marks=pytest.mark.slow if kind == 'yarn' else pytest.mark.long) for kind in SCALINGS],
)
def test_commands_train_evaluate_and_plan_what_is_stretched(kind, commands, corpus, tmp_path, shared_data):
    """From a folder of Hugging Face: trained on, asked, converted; and planned for a TPU."""
    scaling = SCALINGS[kind]
    config = dataclasses.replace(nano(), vocab_size=512, max_seq_len=256, rope_scaling=scaling)
    base = epath.Path(tmp_path / 'base')
    base.mkdir()
    tokenizer = (shared_data / 'weights/stories260K/tok512.model').read_bytes()
    huggingface.write(
        random_source(config), base, bos_id=1, eos_ids=[2], files={'tokenizer.model': tokenizer}
    )
    # A preset says how Llama 3.1 stretches; other ways are the checkpoint's.
    preset = f'RopeScaling(**{dataclasses.asdict(scaling)!r})' if kind == 'llama3' else 'None'
    before = f"""
import dataclasses
from llama_jax.models.config import RopeScaling
from llama_jax.models.presets import PRESETS
PRESETS['nano'] = dataclasses.replace(PRESETS['nano'], max_seq_len=256, rope_scaling={preset})
"""
    arguments = tiny_run(tmp_path / 'run', corpus, model__vocab_size=0, train__num_steps=2)
    done = commands.run('pretrain', *arguments, f'--checkpoint={base}', before=before).succeeded()
    assert (kind != 'llama3') == ('RoPE and context are ' in done.stderr)
    trained = json.loads((tmp_path / 'run/model.json').read_text())
    assert LlamaConfig.from_dict(trained['config']) == config
    asked = [
        f'--checkpoint={tmp_path}/run',
        '--data_dir',
        str(shared_data / 'eval'),
        '--tasks=piqa',
        '--limit=4',
    ]
    commands.run('evaluate', *asked, f'--output={tmp_path}/evaluated').succeeded()
    for to in ('huggingface', *(['gguf'] if kind != 'dynamic' else [])):
        output = tmp_path / f'out_{to}'
        commands.run(
            'convert', f'--input={tmp_path}/run', f'--output={output}', f'--to={to}', '--verify'
        ).succeeded()
        assert pretrained.open(output).config == config
    pytest.importorskip('libtpu', reason="needs libtpu: pip install 'llama_jax[tpu]'")
    before = before.replace(
        f'rope_scaling={preset}', f'rope_scaling=RopeScaling(**{dataclasses.asdict(scaling)!r})'
    )
    plan = [
        '--config=configs/pretrain.py:tiny',
        '--config.model.preset=nano',
        '--topology=v5e:2x2',
        '--max_tries=0',
    ]
    assert 'fits' in commands.run('preflight', *plan, before=before).succeeded().stdout
