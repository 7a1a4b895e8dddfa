"""The face for a notebook's cell: what it takes, what it refuses and in which words, what it leaves alone."""

import dataclasses
import functools
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import llama_jax
from llama_jax.convert import gguf, huggingface, llama2c, meta
from llama_jax.convert.memory import HeldArray
from llama_jax.convert.tensors import same_bits
from llama_jax.data.datasets import pretrain_dataset
from llama_jax.data.loader import batches
from llama_jax.errors import InputError
from llama_jax.eval.tasks import find_task
from llama_jax.inference.prompts import ids_of
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import abstract_params, abstract_params_and_axes
from llama_jax.models.presets import with_vocab_size
from llama_jax.models.tokens import check_tokens
from llama_jax.partitioning import Partitioner
from llama_jax.quantize.params import quantize
from llama_jax.tokenizer.training import train_sentencepiece
from llama_jax.train.metrics import JsonlWriter, loss_figure
from llama_jax.train.state import abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step
from llama_jax.types import LMBatch
from tests.toy import CONFIG, make_params

TEXTS = [f'Once upon a time there were {i} bears, and bear {i} said {i * i}.' for i in range(300)]


@pytest.fixture(scope='module')
def face(tmp_path_factory):
    """(model, params, tokenizer): small, and saved at the path that follows."""
    folder = tmp_path_factory.mktemp('face')
    train_sentencepiece(TEXTS, 320, folder / 'tokenizer.model')
    tokenizer = llama_jax.load_tokenizer(folder / 'tokenizer.model')
    config = with_vocab_size(dataclasses.replace(CONFIG, embed_dim=64, max_seq_len=48), 320)
    model = llama_jax.LlamaForCausalLM(config, dtype=jnp.float32)
    params = make_params(model)
    llama_jax.save(folder / 'ours', config, params, tokenizer)
    return model, params, tokenizer, folder / 'ours'


# Prompts.


def test_a_string_is_one_prompt(face):
    model, params, tokenizer, _ = face

    def texts(prompts):
        return llama_jax.generate(model, params, tokenizer, prompts, max_new_tokens=4, ignore_eos=True)

    wanted = texts(['Once upon'])
    ids = tokenizer.encode('Once upon', bos=True)
    for prompts in ('Once upon', ('Once upon',), (p for p in ['Once upon']), [ids], [np.array(ids)]):
        assert texts(prompts) == wanted
    assert ids_of(tokenizer, (p for p in ['Once upon', 'a'])) == [ids, tokenizer.encode('a', bos=True)]
    ((completion,),) = llama_jax.complete(
        model, params, tokenizer, 'Once upon', max_new_tokens=4, ignore_eos=True
    )
    assert [completion.text] == wanted
    assert len(llama_jax.hidden_states(model, params, tokenizer, 'Once upon')) == 1


def test_a_string_is_one_text_to_stop_at(face):
    model, params, tokenizer, _ = face
    settings = dict(max_new_tokens=8, ignore_eos=True)
    (text,) = llama_jax.generate(model, params, tokenizer, 'Once', **settings)
    stop = text[2:5]
    (one,) = llama_jax.generate(model, params, tokenizer, 'Once', stop=stop, **settings)
    assert [one] == llama_jax.generate(
        model, params, tokenizer, 'Once', stop=[stop], **settings
    ) and one != text


# Names, places, types.


@pytest.mark.parametrize('dtype', ['bf16', 'bfloat16', 'fp16', jnp.float16])
def test_a_type_has_a_name(face, dtype):
    wanted = {'bf16': jnp.bfloat16, 'bfloat16': jnp.bfloat16}.get(dtype, jnp.float16)
    config, params, _ = llama_jax.load(face[3], dtype=dtype)
    assert params['embed'].dtype == wanted
    assert llama_jax.LlamaForCausalLM(config, dtype='bf16').dtype == jnp.bfloat16


def test_a_mesh_is_the_sizes_of_its_axes(face):
    _, params, _ = llama_jax.load(
        str(face[3]), mesh={'fsdp': 4, 'tensor': 2}, tokenizer=face[3] / 'tokenizer.model'
    )
    assert params['embed'].sharding.mesh.shape['fsdp'] == 4
    np.testing.assert_array_equal(params['embed'], face[1]['embed'])


def wrong_calls(face, tmp_path):
    """What is called wrongly -> the words that the line begins with and holds."""
    model, params, tokenizer, path = face
    config = model.config
    tokens = jnp.zeros((1, 4), jnp.int32)
    other = dict(params, embed=params['embed'][:9])
    surplus = dict(params, extra=params['embed'])
    missing = {name: weight for name, weight in params.items() if name != 'final_norm'}
    integers = quantize(params, 'int8')
    gone = jax.tree.map(jnp.copy, params)
    gone['embed'].delete()
    tx = optax.sgd(0.1)

    def generate(prompts='a', **settings):
        return lambda: llama_jax.generate(model, params, tokenizer, prompts, **settings)

    checked = functools.partial(check_tokens, config=config, may_be_long=False)

    def save(*args, **settings):
        return lambda: llama_jax.save(tmp_path / 'x', *(args or (config, params, tokenizer)), **settings)

    return {
        'a number for a prompt': (generate(7), 'prompts are 7', 'give a text'),
        'flat ids': (generate([1, 2]), 'prompt 0 is the number 1', '[[...]]'),
        'bytes for a prompt': (generate([b'abc']), "prompt 0 is b'abc'", 'a text or a list of token ids'),
        'weights for a model': (
            lambda: llama_jax.generate(params, model, tokenizer, 'a'),
            'the model is a dict',
            'LlamaForCausalLM(config)',
        ),
        'what apply takes for weights': (
            lambda: llama_jax.complete(model, {'params': params}, tokenizer, 'a'),
            "params have the keys ['params']",
            "params['params']",
        ),
        'no weights': (
            lambda: llama_jax.hidden_states(model, tokenizer, params, 'a'),
            'params are a SentencePieceTokenizer',
            'load',
        ),
        'weights of another model': (
            lambda: llama_jax.ChatSession(model, other, tokenizer),
            'params are of another model: vocab_size',
            "9, 64 and 3, the model's 320, 64 and 3",
        ),
        'weights of more layers, apart': (
            lambda: llama_jax.token_log_probabilities(
                model, params | {'blocks': llama_jax.unstack(params)['blocks'] * 2}, tokens
            ),
            'params are of another model',
            'num_layers are 320, 64 and 6',
        ),
        'a path for a tokenizer': (
            lambda: llama_jax.generate(model, params, 'tokenizer.model', 'a'),
            "the tokenizer is 'tokenizer.model'",
            'load_tokenizer',
        ),
        'no path': (lambda: llama_jax.load(''), "'' is no place", 'give a path'),
        'no path to a tokenizer': (
            lambda: llama_jax.load_tokenizer(None),
            'None is no place',
            'give a path',
        ),
        'a mesh in words': (
            lambda: llama_jax.load(str(path), mesh='fsdp=4'),
            "a mesh is 'fsdp=4'",
            "'fsdp': 4",
        ),
        'no text to encode': (lambda: tokenizer.encode(None), 'None is no text', 'a string'),
        'text to decode': (lambda: tokenizer.decode('abc'), "'abc' are no token ids", 'whole numbers'),
        'fractions to decode': (lambda: tokenizer.decode([1.5]), '[1.5] are no token ids', 'whole numbers'),
        'a name for a config': (lambda: llama_jax.LlamaForCausalLM('tiny'), "config is 'tiny'", 'PRESETS'),
        'sizes in words': (lambda: llama_jax.make_mesh('fsdp=4'), "a mesh is 'fsdp=4'", "'fsdp': 4"),
        'a name for an optimiser': (
            lambda: llama_jax.trainer(model, params, 'adam'),
            "tx is 'adam'",
            'optax',
        ),
        'weights to train for a model': (
            lambda: llama_jax.trainer(params, model, tx),
            'the model is a dict',
            'Llama',
        ),
        'weights saved for a config': (save(params, config, None), 'config and params are dict and', 'load'),
        'a list to inspect': (
            lambda: llama_jax.inspect(model, params, [[1]]),
            'tokens are a list',
            'jnp.asarray',
        ),
        'an argument of an answer nearly right': (
            lambda: llama_jax.ChatSession(model, params, tokenizer).say('a', max_tokens=2),
            "say has no argument 'max_tokens'",
            'max_new_tokens',
        ),
        'no rows': (
            lambda: model.apply({'params': params}, tokens[:0]),
            'tokens have the shape (0, 4)',
            'one row',
        ),
        'no prompt': (generate([None]), 'prompt 0 is None', 'a text or a list of token ids'),
        'no ids': (generate([[]]), 'prompt 0 has no token', 'BOS'),
        'ids in fractions': (generate([[1.5]]), 'prompt 0 is [1.5]', 'whole numbers'),
        'an id beyond the vocabulary': (
            generate([[320]]),
            'prompt 0 holds token 320',
            'tokenizer that the weights',
        ),
        'an id below 0': (generate([[-1]]), 'prompt 0 holds -1', '0 or more'),
        'a prompt beyond the context': (generate([[1] * 48]), 'prompt 0 has 48 tokens', 'shorten'),
        'an argument nearly right': (
            generate(max_tokens=4),
            "generate has no argument 'max_tokens'",
            'max_new_tokens',
        ),
        'a setting out of range': (generate(temperature=-1.0), 'temperature', '-1.0'),
        'a number in words': (generate(max_new_tokens='4'), "max_new_tokens is '4'", 'a whole number'),
        'a fraction of tokens': (generate(max_new_tokens=4.5), 'max_new_tokens is 4.5', 'a whole number'),
        'a number for a text that ends': (generate(stop=[1]), 'stop is [1]', 'a list of texts'),
        'texts for tokens that end': (generate(stop_ids=['a']), "stop_ids are ['a']", 'a list of token ids'),
        'one token that ends': (generate(stop_ids=2), 'stop_ids are 2', 'a list of token ids'),
        'a token that ends below 0': (generate(stop_ids=[-1]), 'stop_ids hold -1', '0 or more'),
        'a draft by its name': (generate(draft='lookup'), "draft is 'lookup'", 'Lookup(4)'),
        'an argument of complete': (
            lambda: llama_jax.complete(model, params, tokenizer, 'a', temperatures=1),
            "complete has no argument 'temperatures'",
            'did you mean temperature',
        ),
        'an argument of stream': (
            lambda: llama_jax.stream(model, params, tokenizer, 'a', top=1),
            "stream has no argument 'top'",
            'top_p',
        ),
        'no completion': (
            lambda: llama_jax.complete(model, params, tokenizer, 'a', n=0),
            'n is 0',
            'at least 1',
        ),
        'no tokenizer': (lambda: llama_jax.generate(model, params, None, 'a'), '', 'tokenizer'),
        'a layer of hidden_states': (
            lambda: llama_jax.hidden_states(model, params, tokenizer, 'a', layers=[9]),
            'layer 9 is asked for',
            'to 3',
        ),
        'ids beyond the vocabulary': (
            lambda: model.apply({'params': params}, tokens + 999),
            'tokens hold the id 999',
            'from 0 to 319',
        ),
        'ids below 0': (
            lambda: model.apply({'params': params}, tokens - 1),
            'tokens hold the id -1',
            'from 0 to 319',
        ),
        'tokens as a list': (lambda: checked([[1, 2]]), 'tokens are a list', 'jnp.asarray(tokens)'),
        'a single row': (lambda: checked(tokens[0]), 'tokens have the shape (4,)', 'tokens[None]'),
        'tokens of floats': (lambda: checked(tokens / 2), 'tokens are float32', 'integers'),
        'segments of another shape': (
            lambda: checked(tokens, segment_ids=tokens[:, 1:]),
            'segment_ids have the shape (1, 3)',
            'tokens (1, 4)',
        ),
        'rows beyond the context': (
            lambda: jax.eval_shape(model.apply, {'params': params}, jnp.zeros((1, 49), jnp.int32)),
            'tokens have 49 columns',
            'dataclasses.replace(config, max_seq_len=49)',
        ),
        'an architecture to load': (
            lambda: llama_jax.load('llama3_8b'),
            'llama3_8b is an architecture',
            'init_params',
        ),
        'nearly an architecture': (
            lambda: llama_jax.load('llama3_8'),
            'no checkpoint at llama3_8',
            'llama3_8b',
        ),
        'a model of the hub': (
            lambda: llama_jax.load('org/Llama-9'),
            'no checkpoint at org/Llama-9',
            'hf://org/Llama-9',
        ),
        'a folder nearly right': (
            lambda: llama_jax.load(f'{path}s'),
            'no checkpoint at',
            'did you mean ours?',
        ),
        'a tokenizer that is not there': (
            lambda: llama_jax.load_tokenizer('none.model'),
            'no tokenizer at none',
            'no such',
        ),
        'a preset': (
            lambda: llama_jax.PRESETS['llama3_9b'],
            "unknown model 'llama3_9b'",
            'did you mean llama3_8b',
        ),
        'a task': (lambda: find_task('hella'), "unknown task 'hella'", 'did you mean hellaswag?'),
        'an axis of a mesh': (
            lambda: llama_jax.load(path, mesh={'fdsp': 8}),
            "unknown mesh axes ['fdsp']",
            'did you mean fsdp?',
        ),
        'a mesh too large': (lambda: llama_jax.load(path, mesh={'fsdp': 16}), 'impossible mesh', '8 devices'),
        'a type': (lambda: llama_jax.load(path, dtype='float31'), "dtype 'float31'", 'did you mean float32'),
        'a type of a model': (
            lambda: llama_jax.LlamaForCausalLM(config, dtype='bf61'),
            "dtype 'bf61'",
            'bf16',
        ),
        'an argument of load': (
            lambda: llama_jax.load(path, dtyp='bf16'),
            "load has no argument 'dtyp'",
            'dtype',
        ),
        'text for a source of Meta': (
            lambda: meta.open_source('a string'),
            'no checkpoint at a string',
            'no such',
        ),
        'text for one of Hugging Face': (
            lambda: huggingface.open_source('a string'),
            'no checkpoint at a string',
            'no such',
        ),
        'text for one of GGUF': (
            lambda: gguf.open_source('a string'),
            'no checkpoint at a string',
            'no such',
        ),
        'text for one of llama2.c': (
            lambda: llama2c.open_source('a string'),
            'no checkpoint at a string',
            'no such',
        ),
        'a format': (save(to='ggfu'), "to is 'ggfu'", 'did you mean gguf?'),
        'a path that exists': (
            lambda: llama_jax.save(path, config, params, tokenizer),
            f'{path} exists',
            'give a new path',
        ),
        'params of another shape': (
            save(config, other, None),
            'params: weight embed has shape (9, 64)',
            '(320, 64)',
        ),
        'a surplus leaf': (save(config, surplus, None), 'params holds extra', 'has not'),
        'a missing leaf': (save(config, missing, None), 'params has no weight final_norm', ''),
        'params in integers': (save(config, integers, None), 'params: weight', 'QuantizedArray'),
        'layers apart': (
            save(config, llama_jax.unstack(params), None),
            'params have the layers apart',
            'unstack',
        ),
        'abstract params': (save(config, abstract_params(model), None), 'params: weight', 'holds no values'),
        'params that are gone': (
            save(config, gone, None),
            'params: weight embed was deleted',
            'newest state',
        ),
        'a type to save': (save(dtype='float31'), "dtype 'float31'", 'did you mean float32'),
        'to train params of another shape': (
            lambda: llama_jax.trainer(model, other, tx),
            'params: weight embed has shape (9, 64)',
            '(320, 64)',
        ),
        'to train what is gone': (
            lambda: llama_jax.trainer(model, gone, tx),
            'params: weight embed was deleted',
            'anew',
        ),
        'no data': (lambda: llama_jax.pretrain_dataset([], tokenizer, 8), 'no training data', 'texts'),
        'one string for texts': (
            lambda: llama_jax.pretrain_dataset([], tokenizer, 8, texts='abc'),
            "texts are one string, 'abc'",
            '[text]',
        ),
        'a number for a text': (
            lambda: llama_jax.pretrain_dataset([], tokenizer, 8, texts=['a', 3]),
            'text 1 is 3, a int',
            'a string',
        ),
        'no batch': (
            lambda: llama_jax.pretrain_dataset([], tokenizer, 8, texts=TEXTS).batches(0),
            'batch_size is 0',
            'at least 1',
        ),
        'no figures': (lambda: llama_jax.metrics(tmp_path), f'no figures of a run at {tmp_path}', 'workdir'),
        'no weight': (lambda: llama_jax.describe({'a': 'b'}), 'a is a str', 'arrays'),
        'a topology': (
            lambda: llama_jax.preflight.run('configs/pretrain.py:tiny', 'v5p', settings=None, topo=1),
            "run has no argument 'topo'",
            'topology',
        ),
    }


@pytest.fixture
def types_unchecked():
    """As outside of tests, where nobody checks annotations before the function is called."""
    jaxtyping.config.update('jaxtyping_disable', True)
    yield
    jaxtyping.config.update('jaxtyping_disable', False)


@pytest.mark.usefixtures('types_unchecked')
def test_wrong_calls_are_told_in_one_line(face, tmp_path):
    calls = wrong_calls(face, tmp_path)
    assert len(calls) >= 40
    for name, (call, begin, held) in calls.items():
        with pytest.raises(InputError) as refused:
            call()
        line = str(refused.value)
        assert line.startswith(begin) and held in line, (name, line)
        assert '\n' not in line and len(line) < 300 and not re.search(r'(^|\s)--\w|config\.\w+\.', line), (
            name,
            line,
        )
    assert not (tmp_path / 'x').exists()


# What is shown.


def test_objects_are_shown_in_a_few_lines(face):
    model, params, tokenizer, _ = face
    data = llama_jax.pretrain_dataset([], tokenizer, 16, texts=TEXTS)
    state = new_state(params, optax.adam(0.1))
    partitioner = llama_jax.Partitioner(llama_jax.make_mesh({'fsdp': 4, 'tensor': 2}))
    assert repr(llama_jax.PRESETS).startswith('PRESETS(tiny, stories_15m, ')
    for thing, held in (
        (model.config, 'vocab_size=320'), (tokenizer, '320'), (data, f'documents: {data.num_train_documents}'),
        (state, 'step: 0'), (partitioner, 'fsdp=4'),
    ):  # fmt: skip
        text, page = repr(thing), thing._repr_html_()
        assert held in text and text.count('\n') < 8 and len(text) < 800, text
        assert page.startswith('<table>') and page.endswith('</table>') and '<tr>' in page
    assert '<b>' not in llama_jax.describe({'<b>': params['embed']})._repr_html_()


def test_params_are_described(face):
    model, params, _, _ = face
    shown = str(llama_jax.describe(params)).splitlines()
    assert len(shown) == 2 + 12 and f'{model.config.num_params:,}' in shown[-1]
    row = next(line for line in shown if line.startswith('blocks/attention/q'))
    assert row.split('  ')[1].strip() == '(3, 64, 8, 8)' or '(3, 64, 8, 8)' in row
    assert '12,288' in row and '49,152' in row and 'cpu:0' in row
    assert 'int8' in str(llama_jax.describe(quantize(params, 'int8')))
    largest = llama_jax.PRESETS['llama3_1_405b']
    whole = str(llama_jax.describe(abstract_params(llama_jax.LlamaForCausalLM(largest))))
    assert f'{largest.num_params:,}' in whole and f'{4 * largest.num_params:,}' in whole
    spread = jax.device_put(params['embed'], llama_jax.make_mesh({'fsdp': 8}).devices.flat[3])
    assert 'cpu:3' in str(llama_jax.describe({'embed': spread}))


def test_help_of_the_library_is_a_page_that_names_the_whole_face():
    text = pydoc.plain(pydoc.render_doc(llama_jax))
    assert len(text.splitlines()) <= 60
    listed = re.findall(r'\w+', ' '.join(re.findall(r'^        \w+   +(.*)', text, re.MULTILINE)))
    assert sorted(listed) == sorted({*dir(llama_jax)} - {'jaxtyping'})


def test_the_face_is_what_dir_gives():
    assert dir(llama_jax) == sorted(set(dir(llama_jax)))
    assert {'load', 'save', 'trainer', 'inspect', 'describe', 'metrics', 'preflight', 'generate'} <= set(
        dir(llama_jax)
    )
    for name in dir(llama_jax):
        assert not inspect.isfunction(getattr(llama_jax, name)) or inspect.getdoc(getattr(llama_jax, name))


@pytest.mark.slow
def test_pyright_shows_each_function_with_its_signature(tmp_path):
    pytest.importorskip('pyright')
    functions = [n for n in dir(llama_jax) if inspect.isfunction(getattr(llama_jax, n))]
    file = tmp_path / 'cell.py'
    file.write_text('import llama_jax\n' + ''.join(f'reveal_type(llama_jax.{name})\n' for name in functions))
    found = subprocess.run(
        [sys.executable, '-m', 'pyright', str(file)], capture_output=True, text=True
    ).stdout
    for name in functions:
        [line] = [line for line in found.splitlines() if f'"llama_jax.{name}" is' in line]
        first = next(iter(inspect.signature(getattr(llama_jax, name)).parameters))
        assert f'({first}: ' in line, line


def test_a_figure_touches_nothing_of_the_callers(tmp_path):
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    pyplot.close('all')
    backend = matplotlib.get_backend()
    figure = loss_figure([{'step': 1, 'loss': 4.0}, {'step': 2, 'loss': 3.5}], {'unigram': 3.0})
    assert isinstance(figure, Figure) and not pyplot.get_fignums() and matplotlib.get_backend() == backend


def test_what_a_run_has_logged_is_columns(tmp_path):
    writer = JsonlWriter(tmp_path / 'metrics.jsonl')
    writer.write(10, {'loss': 2.5})
    writer.write(20, {'loss': 2.25, 'validation_loss': 2.75})
    writer.close()
    found = llama_jax.metrics(tmp_path)
    assert found['step'].tolist() == [10, 20] and found['step'].dtype.kind == 'i'
    assert found['loss'].tolist() == [2.5, 2.25]
    assert np.isnan(found['validation_loss'][0]) and found['validation_loss'][1] == 2.75


# Training.


def one_epoch(face, mesh, tx, loss=None, donate=False, steps=10):
    """(params given, state, losses)."""
    model, params, tokenizer, path = face
    _, params, _ = llama_jax.load(path, mesh=mesh)
    data = llama_jax.pretrain_dataset([], tokenizer, 16, texts=TEXTS)
    state, step = llama_jax.trainer(model, params, tx, loss, donate=donate)
    losses = []
    for batch, _ in zip(data.batches(8), range(steps), strict=False):
        state, metrics = step(state, batch)
        losses.append(float(metrics['loss']))
    return params, state, losses


@pytest.mark.parametrize('mesh', [None, pytest.param({'fsdp': 4, 'tensor': 2}, marks=pytest.mark.slow)])
def test_what_the_caller_holds_stays(face, mesh):
    params, state, losses = one_epoch(face, mesh, optax.adam(1e-2))
    assert losses[-1] < losses[0] - 0.5 and int(state.step) == 10
    np.testing.assert_array_equal(params['embed'], face[1]['embed'])
    assert state.params['embed'].sharding == params['embed'].sharding or mesh is None


def test_what_is_donated_is_freed(face):
    # Exact: the very same program but for whose memory it writes into.
    _, wanted, losses = one_epoch(face, None, optax.adam(1e-2))
    params, state, again = one_epoch(face, None, optax.adam(1e-2), donate=True)
    assert losses == again
    np.testing.assert_array_equal(state.params['embed'], wanted.params['embed'])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    live = {id(array) for array in jax.live_arrays()}
    assert not any(id(leaf) in live for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    'tx', [optax.sgd(0.05), optax.lion(1e-3), optax.chain(optax.clip(1.0), optax.rmsprop(1e-3))]
)
@pytest.mark.slow
def test_any_optimiser_trains(face, tx):
    _, _, losses = one_epoch(face, None, tx, steps=8)
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.slow
def test_a_loss_of_ones_own_is_minimised(face):
    model = face[0]

    def squared(params, frozen, batch, rng):
        logits, _ = model.apply({'params': params}, batch.tokens, batch.positions, batch.segment_ids)
        return jnp.sum(logits**2), jnp.float32(logits.size), {'largest': jnp.max(logits) * logits.size}

    _, _, losses = one_epoch(face, None, optax.adam(1e-2), squared, steps=6)
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
def test_a_cell_trains_as_the_commands_do(face):
    """Bit for bit: the step of `experiments`, on the same rows."""
    model, params, tokenizer, path = face
    data = pretrain_dataset([], tokenizer, 16, texts=TEXTS)
    tx, partitioner = optax.adam(1e-2), Partitioner(llama_jax.make_mesh({'fsdp': 4, 'tensor': 2}))
    model = model.clone(partitioner=partitioner)
    target = abstract_state(*abstract_params_and_axes(model), tx, partitioner)
    update = compile_train_step(target, loss_fn=language_model_loss(model), tx=tx)
    state = jax.jit(lambda p: new_state(p, tx), out_shardings=shardings_of(target))(params)
    batch_of = LMBatch.abstract(8, 16, partitioner.batch_sharding(8, 16))
    wanted = []
    with jax.set_mesh(partitioner.mesh):
        for batch, _ in zip(batches(data.train, batch_of), range(5), strict=False):
            state, metrics = update(state, {}, batch, jax.random.key(1))
            wanted.append(float(metrics['loss']))
    _, trained, losses = one_epoch(face, {'fsdp': 4, 'tensor': 2}, tx, steps=5)
    assert losses == wanted
    np.testing.assert_array_equal(trained.params['embed'], state.params['embed'])


def test_texts_in_memory_are_those_of_a_file(face, tmp_path):
    (tmp_path / 'a.jsonl').write_text(''.join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    of_file = pretrain_dataset(tmp_path / 'a.jsonl', face[2], 16)
    in_memory = pretrain_dataset([], face[2], 16, texts=iter(TEXTS))
    assert of_file.fingerprint == in_memory.fingerprint
    for i in range(3):
        np.testing.assert_array_equal(of_file.train[i]['tokens'], in_memory.train[i]['tokens'])
    first = next(in_memory.batches(4, first_row=4))
    np.testing.assert_array_equal(first.tokens[0], in_memory.train[4]['tokens'][:-1])


# Saving.


@pytest.mark.parametrize('to', ['orbax', 'meta', 'huggingface', 'gguf'])
def test_what_is_in_memory_is_saved_in_any_format(face, tmp_path, to):
    model, params, tokenizer, path = face
    _, spread, _ = llama_jax.load(path, mesh={'fsdp': 4, 'tensor': 2})
    for name, given in (('one', params), ('many', spread), ('host', jax.tree.map(np.asarray, params))):
        place = tmp_path / f'{name}{".gguf" if to == "gguf" else ""}'
        llama_jax.save(place, model.config, given, tokenizer, to=to)
        config, found, again = llama_jax.load(place)
        assert dataclasses.replace(config, max_seq_len=48) == model.config
        assert again and again.encode('Once upon') == tokenizer.encode('Once upon')
        same = jax.tree.map(lambda a, b: same_bits(np.asarray(a), np.asarray(b)), params, found)
        assert all(jax.tree.leaves(same)), name


def test_a_block_is_put_together_out_of_what_devices_hold():
    values = np.arange(16 * 6 * 4, dtype=np.float32).reshape(16, 6, 4)
    mesh = llama_jax.make_mesh({'fsdp': 4, 'tensor': 2})
    spec = jax.sharding.PartitionSpec('fsdp', None, 'tensor')
    for array in (values, jax.device_put(values, jax.sharding.NamedSharding(mesh, spec))):
        for index in np.ndindex(3, 3, 3):
            block = tuple(slice(i, i + 1 + 5 * (i != 1)) for i in index)
            np.testing.assert_array_equal(HeldArray(array).read(block), values[block])


def test_a_bar_is_shown_to_who_looks_on(face, monkeypatch, capsys):
    monkeypatch.setattr('llama_jax.pretrained.loading_bar._LEAST_BYTES', 1)
    monkeypatch.delitem(sys.modules, 'ipykernel', raising=False)  # of another test
    llama_jax.load(face[3])
    assert not capsys.readouterr().err  # a log is no terminal
    monkeypatch.setitem(sys.modules, 'ipykernel', sys)
    llama_jax.load(face[3], progress=False)
    assert not capsys.readouterr().err
    llama_jax.load(face[3], mesh={'fsdp': 2, 'data': 4})
    shown = capsys.readouterr().err
    assert 'loading' in shown and '100%' in shown


@pytest.mark.slow
def test_the_lines_of_the_page_on_notebooks_train(shared_data, tmp_path, monkeypatch, capsys):
    page = (pathlib.Path(__file__).resolve().parents[1] / 'docs/notebooks.md').read_text()
    [block] = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert len(list(filter(str.strip, block.splitlines()))) <= 12
    monkeypatch.chdir(tmp_path)
    weights, text = (
        shared_data / 'weights/stories260K/stories260K.pt',
        shared_data / 'text/tinyshakespeare.txt',
    )
    exec(block, {'CKPT': weights, 'TEXT': text})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 30 and losses[-1] < losses[0] - 1
    assert llama_jax.load('my_model')[0].num_layers == 5
