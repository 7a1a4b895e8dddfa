import jax.numpy as jnp
import pytest

import llama_jax
from llama_jax import export, pretrained
from llama_jax.eval.engine import Engine


@pytest.fixture(scope='session')
def stories(shared_data):
    """The checkpoint stories260K: small, and trained."""
    return shared_data / 'weights/stories260K/stories260K.gguf'


@pytest.fixture(scope='session')
def engine(stories):
    config, params, tokenizer = llama_jax.load(stories)
    model = llama_jax.LlamaForCausalLM(config, dtype=jnp.float32)
    return Engine(model, params, tokenizer, batch_tokens=2048)


@pytest.fixture(scope='session')
def huggingface_folder(stories, engine, tmp_path_factory):
    """The same weights and tokenizer as transformers reads them."""
    folder = tmp_path_factory.mktemp('huggingface') / 'stories'
    source = pretrained.open(stories).source
    export.save(folder, source, engine.tokenizer, to='huggingface')
    return folder
