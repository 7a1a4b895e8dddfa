"""Folders of PEFT, against PEFT itself where it is installed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from llama_jax import export, pretrained
from llama_jax.convert import huggingface, peft, peft_config
from llama_jax.convert.tensors import BFLOAT16
from llama_jax.errors import InputError
from llama_jax.models.reward import LlamaForRewardModel
from tests import toy
from tests.convert.huggingface_test import our_logits
from tests.convert.in_memory import matrices, random_source

CONFIG = dataclasses.replace(toy.CONFIG, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)
# Sums in another order round fp32 by 6e-8 each, of logits of order 1.
TOLERANCE = 1e-5

# What PEFT is asked for: the kinds of adapter_config, then what only merging reads.
KINDS = {
    'plain': dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj']),
    'rslora': dict(r=4, lora_alpha=8, use_rslora=True, target_modules=['q_proj', 'k_proj', 'down_proj']),
    'patterns': dict(
        r=4, lora_alpha=8, target_modules=['q_proj', 'up_proj', 'o_proj'],
        rank_pattern={'up_proj': 2, r'layers\.[12]\.self_attn\.q_proj': 6},
        alpha_pattern={'model.layers.1.mlp.up_proj': 3},
    ),
    'patterns, rslora': dict(
        r=4, lora_alpha=8, use_rslora=True, target_modules=['q_proj', 'up_proj'], rank_pattern={'q_proj': 2},
        alpha_pattern={'q_proj': 5},
    ),
    'regex': dict(r=2, target_modules=r'.*\.(0|2)\.(self_attn\.(k|o)_proj|mlp\.(gate|down)_proj)'),
    'all-linear': dict(r=2, target_modules='all-linear'),
    'some layers': dict(
        r=2, target_modules=['q_proj', 'down_proj'], layers_to_transform=[0, 2], layers_pattern='layers',
    ),
    'excluded': dict(r=2, target_modules=['q_proj', 'k_proj'], exclude_modules=r'.*\.1\..*'),
    'modules_to_save': dict(
        r=2, target_modules=['v_proj'], modules_to_save=['lm_head', 'embed_tokens', 'input_layernorm', 'model.norm'],
    ),
    'dora': dict(r=2, target_modules=['q_proj', 'down_proj', 'o_proj'], use_dora=True),
    'biases': dict(r=2, target_modules=['q_proj'], bias='all'),
    'embedding and head': dict(r=2, target_modules=['embed_tokens', 'lm_head', 'q_proj']),
    'rows of the embedding': dict(r=2, target_modules=['q_proj'], trainable_token_indices=[3, 60, 7]),
}  # fmt: skip


def ours(folder, settings, *, config=CONFIG, rank=3, seed=0, base='', places=()) -> dict:
    """An adapter written by hand, with nothing but NumPy: of q in all layers, and what else is named."""
    rng = np.random.default_rng(seed)
    shapes = {name: value.shape for name, value in matrices(random_source(config), 'huggingface').items()}
    tensors = {}
    for name in places or [n for n in shapes if 'q_proj' in n]:
        module, (num_out, num_in) = name.removesuffix('.weight'), shapes[name]
        tensors[f'base_model.model.{module}.lora_A.weight'] = rng.normal(size=(rank, num_in)).astype(
            np.float32
        )
        tensors[f'base_model.model.{module}.lora_B.weight'] = rng.normal(size=(num_out, rank)).astype(
            np.float32
        )
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / 'adapter_model.safetensors')
    settings = {'peft_type': 'LORA', 'r': rank, 'lora_alpha': 6, 'target_modules': ['q_proj']} | settings
    settings |= {'base_model_name_or_path': str(base)}
    (folder / 'adapter_config.json').write_text(json.dumps(settings))
    return tensors


def merged_matrices(folder, config=CONFIG):
    return matrices(peft.open_merged(epath.Path(folder), random_source(config)), 'huggingface')


@pytest.mark.parametrize(
    ('settings', 'scale'),
    [
        ({}, 2.0),
        ({'use_rslora': True}, 6 / 3**0.5),
        ({'alpha_pattern': {'q_proj': 9}}, 3.0),
        ({'alpha_pattern': {r'.*layers\.(0|1|2)\.self_attn.*': 1.5}, 'use_rslora': True}, 1.5 / 3**0.5),
        ({'rank_pattern': {'self_attn.q_proj': 3}, 'r': 8}, 2.0),
        ({'alpha_pattern': {'proj': 9, 'k_proj': 1}}, 2.0),  # no whole part of the name
    ],
)
def test_matrices_are_the_sum_in_any_block(settings, scale, tmp_path):
    tensors = ours(tmp_path / 'a', settings)
    plain, found = matrices(random_source(CONFIG), 'huggingface'), merged_matrices(tmp_path / 'a')
    for name, value in plain.items():
        if 'q_proj' in name:
            parts = [tensors[f'base_model.model.{name}'.replace('weight', f'lora_{p}.weight')] for p in 'AB']
            value = value + scale * parts[1].astype(np.float64) @ parts[0]
        np.testing.assert_allclose(found[name], value, atol=2e-6, rtol=1e-6, err_msg=name)
    tensor = peft.open_merged(epath.Path(tmp_path / 'a'), random_source(CONFIG)).tensors[
        'blocks/attention/q'
    ][1]
    np.testing.assert_allclose(
        tensor.read(slice(3, 9), slice(2, 5)),
        found['model.layers.1.self_attn.q_proj.weight'][3:9, 2:5],
        rtol=1e-6,
    )


def test_rows_of_dora_get_the_length_that_was_trained(tmp_path):
    """Whatever block is read: the length is of the whole row."""
    tensors = ours(tmp_path / 'a', {'use_dora': True})
    rng, lengths = np.random.default_rng(2), {}
    for module in {name.rpartition('.lora')[0] for name in tensors}:
        lengths[module] = rng.random(32, np.float32) + 1
        tensors[f'{module}.lora_magnitude_vector'] = lengths[module]
    save_file(tensors, tmp_path / 'a/adapter_model.safetensors')
    source = peft.open_merged(epath.Path(tmp_path / 'a'), random_source(CONFIG))
    whole = source.tensors['blocks/attention/q'][2].read()
    np.testing.assert_allclose(
        np.linalg.norm(whole, axis=1), lengths['base_model.model.model.layers.2.self_attn.q_proj'], rtol=1e-6
    )
    np.testing.assert_allclose(
        source.tensors['blocks/attention/q'][2].read(slice(4, 9), slice(1, 3)), whole[4:9, 1:3], rtol=1e-6
    )


def test_an_adapter_on_one_side_of_a_tie_unties(tmp_path):
    ours(tmp_path / 'a', {'target_modules': ['lm_head']}, places=['lm_head.weight'])
    source = peft.open_merged(epath.Path(tmp_path / 'a'), random_source(TIED))
    plain = random_source(TIED).tensors['embed'][0].read()
    assert not source.config.tie_embeddings
    np.testing.assert_array_equal(source.tensors['embed'][0].read(), plain)
    assert np.abs(source.tensors['head'][0].read() - plain).max() > 1


def test_a_folder_is_a_checkpoint_wherever_one_is_asked_for(tmp_path):
    source = random_source(CONFIG, BFLOAT16)
    export.save(tmp_path / 'base', source, None, to='orbax')
    ours(tmp_path / 'a', {}, base='../base')
    ours(tmp_path / 'b', {}, base='someone/llama')
    config, params, tokenizer = pretrained.load(tmp_path / 'a')
    assert config == CONFIG and tokenizer is None
    want = pretrained.load(pretrained.open(tmp_path / 'b/adapter_model.safetensors', base=tmp_path / 'base'))[
        1
    ]
    jax.tree.map(np.testing.assert_array_equal, params, want)
    plain = pretrained.load(tmp_path / 'base')[1]
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), params, plain)
    assert [
        path for path, is_changed in traverse_util.flatten_dict(changed, sep='/').items() if is_changed
    ] == ['blocks/attention/q']
    # Written out it is a model by itself, in the base's type, each weight cast once.
    merged = pretrained.open(tmp_path / 'a').source
    export.save(tmp_path / 'whole', merged, None, to='huggingface')
    written = pretrained.open(tmp_path / 'whole').source
    export.verify(written, merged)
    assert written.tensors['blocks/attention/q'][0].dtype == BFLOAT16
    for path, message in {
        tmp_path
        / 'b': r'names its base someone/llama, which is no path here; give the base beside.*or hf://',
    }.items():
        with pytest.raises(InputError, match=message):
            pretrained.load(path)
    ours(tmp_path / 'c', {}, base=tmp_path / 'a')
    with pytest.raises(InputError, match=r'its base .*/a is an adapter too'):
        pretrained.load(tmp_path / 'c')
    with pytest.raises(InputError, match='is no adapter; a base'):
        pretrained.open(tmp_path / 'base', base=tmp_path / 'base')
    (tmp_path / 'a/adapter_config.json').unlink()
    with pytest.raises(InputError, match='is a part of a LoRA adapter .*without the adapter_config.json'):
        pretrained.load(tmp_path / 'a')


Q0 = 'base_model.model.model.layers.0.self_attn.q_proj'


def tensors_changed(change):
    def damage(folder):
        tensors = load_file(folder / 'adapter_model.safetensors')
        change(tensors)
        save_file(tensors, folder / 'adapter_model.safetensors')

    return damage


def settings_changed(**values):
    def damage(folder):
        file = folder / 'adapter_config.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def truncated(folder):
    file = folder / 'adapter_model.safetensors'
    file.write_bytes(file.read_bytes()[:-100])


# What is done to a sound adapter, and what the one line says.
DAMAGED = {
    'truncated': (truncated, 'it is truncated'),
    'no weights': (lambda f: (f / 'adapter_model.safetensors').unlink(), 'has neither adapter_model.safetensors nor'),
    'b missing': (tensors_changed(lambda t: t.pop(f'{Q0}.lora_B.weight')), rf'has no tensor {Q0}\.lora_B\.weight'),
    'misnamed': (
        tensors_changed(lambda t: t.update({f'{Q0[:-4]}porj.lora_A.weight': t.pop(f'{Q0}.lora_A.weight')})),
        r'q_porj\.lora_A\.weight has no place in this model: did you mean .*layers\.0\.self_attn\.q_proj',
    ),
    'another prefix': (
        tensors_changed(lambda t: t.update({'lm_head.lora_A.weight': np.ones((3, 32), np.float32)})),
        r'tensor lm_head\.lora_A\.weight has no place',
    ),
    'a bias': (
        tensors_changed(lambda t: t.update({f'{Q0}.bias': np.ones(32, np.float32)})), 'a Llama has no biases'
    ),
    'surplus': (
        tensors_changed(lambda t: t.update({f'{Q0[:-6]}v_proj.lora_A.weight': np.ones((3, 32), np.float32)})),
        r'v_proj\.lora_A is of a module that adapter_config\.json does not name',
    ),
    'whole missing': (settings_changed(modules_to_save=['lm_head']), r'has no tensor base_model\.model\.lm_head'),
    'rank': (settings_changed(r=4), r'lora_A\.weight has shape \[3, 32\]; with the rank 4 of adapter_config\.json'),
    'another model': (
        tensors_changed(lambda t: t.update({f'{Q0}.lora_A.weight': np.ones((3, 48), np.float32)})),
        r'a of .*q_proj has shape \(3, 48\), for \[32, 32\] in memory it must be \(3, 32\)',
    ),
    'integers': (
        tensors_changed(lambda t: t.update({f'{Q0}.lora_A.weight': np.ones((3, 32), np.int8)})), 'holds int8'
    ),
    'a classifier': (
        tensors_changed(lambda t: t.update({'base_model.model.score.weight': np.ones((2, 32), np.float32)})),
        r'score\.weight has no place',
    ),
    'no score': (settings_changed(task_type='SEQ_CLS'), r'has no tensor base_model\.model\.score\.weight'),
    'another task': (settings_changed(task_type='SEQ_2_SEQ_LM'), "task_type is 'SEQ_2_SEQ_LM'"),
    'not LoRA': (settings_changed(peft_type='IA3'), "peft_type is 'IA3'; only LORA is read"),
    'pissa': (settings_changed(init_lora_weights='pissa'), "init_lora_weights is 'pissa', which changed the base"),
    'replication': (settings_changed(layer_replication=[[0, 2]]), 'layer_replication is .* which is not read'),
    'rank 0': (settings_changed(r=0), r'r is 0, it must be ranks from 1'),
    'no number': (settings_changed(lora_alpha='16'), "lora_alpha is '16', it must be numbers"),
    'no pattern': (settings_changed(target_modules='(('), r"the pattern '\(\(' is no regular expression"),
    'a pattern of patterns': (settings_changed(alpha_pattern={'(a{9999}){9999}': 1}), 'takes too much'),
    'all tokens': (settings_changed(trainable_token_indices=[1 << 40]), 'it must be ids of tokens'),
    'tokens': (settings_changed(trainable_token_indices=[5]), r'trainable_tokens_delta has shape None, .* \(1, 32\)'),
    'no JSON': (lambda f: (f / 'adapter_config.json').write_text('{'), 'is not JSON'),
}  # fmt: skip


@pytest.mark.parametrize('name', DAMAGED)
def test_what_is_damaged_is_named(name, tmp_path):
    damage, says = DAMAGED[name]
    ours(tmp_path / 'a', {})
    damage(tmp_path / 'a')
    with pytest.raises(InputError, match=says) as refusal:
        merged_matrices(tmp_path / 'a')
    assert '\n' not in str(refusal.value) and len(str(refusal.value)) < 500


def saved_by_peft(folder, base, settings, seed=0):
    """The model of PEFT with random adapters, which it saves in a folder."""
    import peft as library
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = library.get_peft_model(model, library.LoraConfig(task_type='CAUSAL_LM', **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def ids():
    rng = np.random.default_rng(1)
    tokens = rng.integers(CONFIG.vocab_size, size=(2, 24), dtype=np.int32)
    tokens[0, :3] = 3, 60, 7
    return tokens, np.tile(np.arange(24, dtype=np.int32), (2, 1))


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bases')
    for name, config in (('untied', CONFIG), ('tied', TIED)):
        (folder / name).mkdir()
        huggingface.write(random_source(config), epath.Path(folder / name))
    return folder


def test_a_pattern_that_would_be_matched_for_ever_is_given_up(tmp_path, monkeypatch):
    ours(tmp_path / 'a', {'target_modules': '.*q_proj'})
    asked = []

    def match(pattern, text, timeout):
        asked.append((pattern, timeout))
        raise TimeoutError

    monkeypatch.setattr(peft_config.regex, 'fullmatch', match)
    with pytest.raises(
        InputError, match=r"the pattern '\.\*q_proj' takes too much; name the modules instead"
    ):
        merged_matrices(tmp_path / 'a')
    assert asked == [('.*q_proj', 5.0)]


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # PEFT's own advice
@pytest.mark.parametrize('kind', KINDS)
def test_what_peft_saved_gives_its_logits(kind, bases, tmp_path):
    pytest.importorskip('peft', reason='needs peft: the extra `parity`')
    from tests.reference import huggingface_llama

    settings = KINDS[kind]
    for name in ('untied', 'tied'):
        base = huggingface.open_source(epath.Path(bases / name))
        model = saved_by_peft(tmp_path / name, bases / name, settings)
        logits = huggingface_llama.forward(model, *ids())
        found = our_logits(peft.open_merged(epath.Path(tmp_path / name), base), *ids())
        assert np.abs(found - our_logits(base, *ids())).max() > 0.05
        np.testing.assert_allclose(found, logits, atol=TOLERANCE, rtol=0, err_msg=name)
        if name == 'tied' or kind in ('dora', 'rows of the embedding'):
            continue
        # Back: PEFT reads what we write, beside the base and merged into it.
        import peft as library
        import transformers

        again = rewritten(tmp_path / name)
        plain = transformers.AutoModelForCausalLM.from_pretrained(bases / name)
        beside = library.PeftModel.from_pretrained(plain, again).eval()
        np.testing.assert_allclose(huggingface_llama.forward(beside, *ids()), found, atol=TOLERANCE, rtol=0)
        whole = beside.merge_and_unload()
        np.testing.assert_allclose(huggingface_llama.forward(whole, *ids()), found, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # PEFT's own advice
def test_a_reward_model_of_peft_gives_its_scores(bases, tmp_path):
    library = pytest.importorskip('peft', reason='needs peft: the extra `parity`')
    import torch
    import transformers

    def policy():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            bases / 'untied', num_labels=1
        )
        model.config.pad_token_id = 0
        return model

    settings = library.LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['q_proj', 'down_proj'])
    model = library.get_peft_model(policy(), settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / 'a')
    tokens = np.random.default_rng(1).integers(1, CONFIG.vocab_size, size=(3, 24), dtype=np.int32)
    with torch.no_grad():
        wanted = model(torch.tensor(tokens.astype(np.int64))).logits[:, 0].numpy()
    opened = pretrained.open(tmp_path / 'a', base=bases / 'untied')
    config, params, _ = pretrained.load(opened)
    scores = LlamaForRewardModel(config).apply({'params': params}, jnp.asarray(tokens))[:, -1]
    assert config.scalar_head and np.std(wanted) > 0.1
    np.testing.assert_allclose(scores, wanted, atol=TOLERANCE, rtol=0)
    export.save_adapter(tmp_path / 'again', opened.adapter, config, to='peft', base='')
    again = library.PeftModel.from_pretrained(policy(), tmp_path / 'again').eval()
    with torch.no_grad():
        np.testing.assert_allclose(
            again(torch.tensor(tokens.astype(np.int64))).logits[:, 0].numpy(), wanted, atol=TOLERANCE, rtol=0
        )


def test_a_score_is_a_vector_here_and_a_matrix_there(tmp_path):
    tensors = ours(tmp_path / 'a', {'task_type': 'SEQ_CLS', 'modules_to_save': ['classifier', 'score']})
    score = np.random.default_rng(4).normal(size=(1, 32)).astype(np.float32)
    save_file(tensors | {'base_model.model.score.weight': score}, tmp_path / 'a/adapter_model.safetensors')
    for config in (CONFIG, TIED):
        source = peft.open_merged(epath.Path(tmp_path / 'a'), random_source(config))
        assert source.config.scalar_head and 'head' not in source.tensors
        np.testing.assert_array_equal(source.tensors['score'][0].read(), score[0])
        again = rewritten(tmp_path / 'a', source.config)
        written = load_file(again / 'adapter_model.safetensors')
        np.testing.assert_array_equal(written['base_model.model.score.weight'], score)
        assert json.loads((again / 'adapter_config.json').read_text())['task_type'] == 'SEQ_CLS'
        shutil.rmtree(again)
    ours(tmp_path / 'b', {})
    with pytest.raises(InputError, match='adapter of a language model, and its base is a reward model'):
        peft.open_adapter(epath.Path(tmp_path / 'b'), source.config)
    tensors['base_model.model.score.weight'] = np.ones((2, 32), np.float32)
    save_file(tensors, tmp_path / 'a/adapter_model.safetensors')
    with pytest.raises(
        InputError, match=r'score\.weight has shape \[2, 32\]; a reward model gives one score'
    ):
        peft.open_merged(epath.Path(tmp_path / 'a'), random_source(CONFIG))


def rewritten(folder, config=CONFIG):
    """An adapter read and written again."""
    adapter = peft.open_adapter(epath.Path(folder), config)
    again = folder.with_name(f'{folder.name} again')
    export.save_adapter(again, adapter, config, to='peft', base='there')
    return again


@pytest.mark.parametrize(
    'settings', [{}, {'use_rslora': True}, {'alpha_pattern': {'layers.1.self_attn.q_proj': 9}}]
)
def test_what_is_read_is_written_again(settings, tmp_path):
    names = ['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
    targets = ['model.layers.0.self_attn.q_proj', 'layers.1.self_attn.q_proj', 'embed_tokens', 'lm_head']
    tensors = ours(tmp_path / 'a', {'target_modules': targets}, places=[*names, 'lm_head.weight'])
    rng = np.random.default_rng(5)
    tensors['base_model.model.model.embed_tokens.lora_embedding_A'] = rng.normal(size=(3, 64)).astype(
        np.float32
    )
    tensors['base_model.model.model.embed_tokens.lora_embedding_B'] = rng.normal(size=(32, 3)).astype(
        np.float32
    )
    save_file(tensors, tmp_path / 'a/adapter_model.safetensors')
    again = rewritten(tmp_path / 'a')
    written = load_file(again / 'adapter_model.safetensors')
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    found, want = merged_matrices(again), merged_matrices(tmp_path / 'a')
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)
    assert json.loads((again / 'adapter_config.json').read_text())['base_model_name_or_path'] == 'there'


def test_what_a_format_of_adapters_cannot_say_is_refused(tmp_path):
    ours(tmp_path / 'a', {'target_modules': ['lm_head']}, places=['lm_head.weight'])
    for to in ('peft', 'gguf_adapter'):
        adapter = peft.open_adapter(epath.Path(tmp_path / 'a'), TIED)
        with pytest.raises(
            InputError, match=f'head was trained, which is tied .*{to} cannot say .*merged model'
        ):
            export.save_adapter(tmp_path / 'x', adapter, TIED, to=to, base='')
        assert not (tmp_path / 'x').exists()
    tensors = ours(tmp_path / 'b', {'modules_to_save': ['model.norm']})
    tensors['base_model.model.model.norm.weight'] = np.ones(32, np.float32)
    save_file(tensors, tmp_path / 'b/adapter_model.safetensors')
    adapter = peft.open_adapter(epath.Path(tmp_path / 'b'), CONFIG)
    with pytest.raises(
        InputError, match='final_norm was trained whole, which an adapter in GGUF cannot hold'
    ):
        export.save_adapter(tmp_path / 'x', adapter, CONFIG, to='gguf_adapter', base='')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'b']
    export.save_adapter(tmp_path / 'x', adapter, CONFIG, to='peft', base='')
    assert (merged_matrices(tmp_path / 'x')['model.norm.weight'] == 1).all()
    with pytest.raises(InputError, match='dtype q8_0 is not one that peft holds'):
        export.save_adapter(tmp_path / 'y', adapter, CONFIG, to='peft', base='', dtype='q8_0')
