"""The library's face as a notebook uses it; every name and argument here is a contract."""

import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint.model_file import save_config
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.models.llama import init_params
from llama_jax.models.presets import with_vocab_size
from llama_jax.tokenizer.training import train_sentencepiece


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A workdir of the tiny preset with fresh weights."""
    from etils import epath

    folder = epath.Path(tmp_path_factory.mktemp('api') / 'workdir')
    folder.mkdir()
    train_sentencepiece(
        [f'Once upon a time there were {i} bears.' for i in range(300)], 320, folder / 'tokenizer.model'
    )
    config = with_vocab_size(llama_jax.PRESETS['tiny'], 320)
    save_config(folder, config)
    checkpointer = Checkpointer(folder / 'checkpoints')
    params = jax.jit(lambda: init_params(llama_jax.LlamaForCausalLM(config), jax.random.key(0)))()
    checkpointer.save(1, {'params': params}, {})
    checkpointer.close()
    return str(folder)


def test_the_notebook(checkpoint):
    config, params, tokenizer = llama_jax.load(checkpoint)
    assert isinstance(config, llama_jax.LlamaConfig)
    model = llama_jax.LlamaForCausalLM(config)
    tokens = jnp.array([tokenizer.encode('Once upon a time', bos=True)], jnp.int32)
    logits, cache = model.apply({'params': params}, tokens)
    assert (
        logits.shape == (*tokens.shape, config.vocab_size) and logits.dtype == jnp.float32 and cache is None
    )
    texts = llama_jax.generate(
        model, params, tokenizer, ['Once upon a time'], max_new_tokens=8, temperature=0.0
    )
    assert len(texts) == 1 and isinstance(texts[0], str)
    # The first token of the text is the most likely one of the logits.
    first = [*tokens[0].tolist(), int(jnp.argmax(logits[0, -1]))]
    assert tokenizer.decode(tokens[0].tolist() + tokenizer.encode(texts[0]))
    assert ('Once upon a time' + texts[0]).startswith(tokenizer.decode(first).rstrip('\ufffd'))


@pytest.mark.slow
def test_generation_is_the_same_on_a_mesh(checkpoint):
    prompts = ['Once upon', 'a time', 'bears']
    config, params, tokenizer = llama_jax.load(checkpoint)
    model = llama_jax.LlamaForCausalLM(config, dtype=jnp.float32)
    samplers = [
        llama_jax.Sampler(),
        llama_jax.Sampler(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=3),
        llama_jax.Sampler(
            temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={9: 2.0}
        ),
    ]
    want = llama_jax.generate(model, params, tokenizer, prompts, max_new_tokens=4, samplers=samplers)
    _, spread, _ = llama_jax.load(
        checkpoint, mesh=llama_jax.make_mesh({'fsdp': 4, 'tensor': 2}), dtype=jnp.float32
    )
    assert llama_jax.generate(model, spread, tokenizer, prompts, max_new_tokens=4, samplers=samplers) == want


def test_the_tokenizer(checkpoint):
    tokenizer = llama_jax.load_tokenizer(checkpoint)
    ids = tokenizer.encode('Once upon a time', bos=False, eos=False)
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == 'Once upon a time'
    assert tokenizer.encode('a', bos=True, eos=True) == [
        tokenizer.bos_id,
        *tokenizer.encode('a'),
        tokenizer.eos_id,
    ]


def test_presets_are_configs():
    config = llama_jax.PRESETS['llama3_8b']
    assert isinstance(config, llama_jax.LlamaConfig)
    assert (config.vocab_size, config.num_layers, config.rope_theta) == (128_256, 32, 500_000.0)


def test_every_public_name_is_there():
    for name in dir(llama_jax):
        assert getattr(llama_jax, name) is not None
    with pytest.raises(AttributeError, match="'llama_jax' has no attribute 'nonsense'"):
        llama_jax.nonsense  # noqa: B018


def test_the_cache_as_a_user_drives_it(checkpoint):
    config, params, _ = llama_jax.load(checkpoint)
    model = llama_jax.LlamaForCausalLM(config, dtype=jnp.float32)
    tokens = jnp.arange(6, dtype=jnp.int32)[None, :]
    apply = jax.jit(model.apply)
    whole, _ = apply({'params': params}, tokens)
    cache = llama_jax.KVCache.create(config, batch_size=1, max_len=8, dtype=jnp.float32)
    _, cache = apply({'params': params}, tokens[:, :5], cache=cache)
    last, _ = apply({'params': params}, tokens[:, 5:], cache=cache)
    np.testing.assert_allclose(last[:, 0], whole[:, 5], atol=1e-5)  # fp32 sums in another order


@pytest.mark.slow
@pytest.mark.parametrize('name', ['generate', 'complete', 'stream', 'hidden_states', 'ChatSession'])
def test_the_example_of_a_docstring_runs(checkpoint, name, capsys):
    config, params, tokenizer = llama_jax.load(checkpoint)
    known: dict[str, Any] = {'llama_jax': llama_jax, 'params': params, 'tokenizer': tokenizer}
    known['model'] = llama_jax.LlamaForCausalLM(config)
    exec(example_of(getattr(llama_jax, name)), known)
    found = {key: known[key] for key in ('texts', 'first', 'states') if key in known}
    assert found or capsys.readouterr().out


@pytest.mark.slow
def test_the_python_of_the_page_on_generation_runs(checkpoint):
    page = (pathlib.Path(__file__).resolve().parents[1] / 'docs/generation.md').read_text()
    config, params, tokenizer = llama_jax.load(checkpoint)
    known: dict[str, Any] = {
        'llama_jax': llama_jax,
        'jnp': jnp,
        'params': params,
        'tokenizer': tokenizer,
        'prompts': ['a', 'time'],
    }
    known['model'] = llama_jax.LlamaForCausalLM(config)
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, known)
    assert len(known['choices']) == 4 and len(known['texts']) == 2 and len(known['session'].messages) == 3


def example_of(documented):
    """The first indented block of a docstring."""
    block = re.search(r'\n\n((?:    .*\n)+)', inspect.getdoc(documented))
    return textwrap.dedent(block[1])


def test_a_bare_import_is_lazy():
    program = 'import sys, llama_jax; sys.exit("jax" in sys.modules or "flax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0
