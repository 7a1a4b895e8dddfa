"""A real model through every format and back: the same tensors, the same text, the same likelihood."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import llama_jax
from llama_jax import export, pretrained
from llama_jax.convert.mapping import weights_of

CHAIN = [
    ('orbax', 'ours'),
    ('meta', 'meta'),
    ('huggingface', 'hf'),
    ('gguf', 'model.gguf'),
    ('orbax', 'again'),
]


@pytest.fixture(scope='module')
def stories(shared_data):
    return shared_data / 'weights/stories260K'


@pytest.fixture(scope='module')
def expected(stories):
    return json.loads((stories / 'expected.json').read_text())


@pytest.fixture(scope='module')
def chain(stories, tmp_path_factory):
    """The checkpoint converted from format to format, each from the one before."""
    folder = tmp_path_factory.mktemp('chain')
    previous = epath.Path(stories / 'stories260K.pt')
    places = []
    for to, name in CHAIN:
        source = pretrained.open(previous).source
        tokenizer = pretrained.load_tokenizer(previous)
        written = []
        previous = epath.Path(folder / name)
        export.save(previous, source, tokenizer, to=to, progress=written.append)
        assert sum(written) >= 4 * source.config.num_params
        export.verify(pretrained.open(previous).source, source)
        places.append(previous)
    return places


def complete(path, **kwargs):
    config, params, tokenizer = llama_jax.load(path)
    model = llama_jax.LlamaForCausalLM(config)
    (text,) = llama_jax.generate(model, params, tokenizer, [''], temperature=0.0, **kwargs)
    assert ''.join(llama_jax.stream(model, params, tokenizer, '', temperature=0.0, **kwargs)) == text
    return text


@pytest.mark.parametrize('file', ['stories260K.pt', 'stories260K.gguf'])
def test_published_files_give_the_expected_text(stories, expected, file):
    assert complete(stories / file, max_new_tokens=expected['max_new_tokens']) == expected['greedy_text']


def test_likelihood_of_real_stories(shared_data, stories, expected):
    """256-token windows over the first stories, BOS before each, as `expected.json` describes."""
    config, params, tokenizer = llama_jax.load(stories / 'stories260K.pt')
    text = (shared_data / 'text/tinystories_2MiB_sample.txt').read_text()
    ids = [
        i for story in text.split('<|endoftext|>')[:200] for i in tokenizer.encode(story.strip(), bos=True)
    ]
    rows = jnp.array([ids[start : start + 257] for start in range(0, 60 * 256, 256)])
    model = llama_jax.LlamaForCausalLM(config)

    @jax.jit
    def loss(params, rows):
        logits, _ = model.apply({'params': params}, rows[:, :-1])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], 2).mean()

    assert loss(params, rows) == pytest.approx(expected['mean_nll_first_200_stories'], abs=0.0005)


def test_every_tensor_is_bit_equal_after_every_format(stories, chain):
    original = pretrained.open(stories / 'stories260K.pt').source
    for place in chain:
        copy = pretrained.open(place).source
        for weight in weights_of(original.config):
            for ours, theirs in zip(original.tensors[weight.path], copy.tensors[weight.path], strict=True):
                np.testing.assert_array_equal(ours.read().view(np.uint32), theirs.read().view(np.uint32))


def test_the_text_is_unchanged_after_every_format(chain, expected):
    for place in chain:
        text = complete(place, max_new_tokens=64)
        assert text and expected['greedy_text'].startswith(text)


@pytest.mark.parametrize('index', range(len(CHAIN)))
def test_any_format_is_read_straight_onto_a_mesh(chain, index):
    """Each device's part is what it would be, had the whole been loaded and cut."""
    mesh = llama_jax.make_mesh({'fsdp': 2, 'tensor': 4})
    _, whole, _ = llama_jax.load(chain[index])
    _, sharded, _ = llama_jax.load(chain[index], mesh=mesh, dtype=jnp.bfloat16)
    assert len({s.data.shape for s in sharded['blocks']['mlp']['gate'].addressable_shards}) == 1
    assert (
        sharded['blocks']['mlp']['gate'].addressable_shards[0].data.size * 8
        == whole['blocks']['mlp']['gate'].size
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), sharded, whole)
