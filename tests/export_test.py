"""Whole checkpoints of every kind of tokenizer, from each format into each: ids, ends, template, what is said and where
it stops, beside what transformers and llama.cpp answer.

The model answers `chain[t]` after token t, whatever stood before. llama.cpp's own converter, which no package installs,
is taken from $LLAMA_CPP_SOURCE, a folder of its source; `.ci/run` unpacks one.
"""

import functools
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import export, pretrained
from llama_jax.errors import InputError
from llama_jax.inference.generate import generate
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.conversion import model_file, own_files
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests.tokenizer import kinds
from tests.tokenizer.matrix_test import NAMES, SPACED

pytestmark = pytest.mark.slow
EMBED = 64
PROMPTS = ['Hello', 'x']
FORMATS = ('huggingface', 'gguf', 'orbax', 'meta')


@functools.cache
def all_kinds():
    return kinds.kinds()


def reference(files):
    """Ids of a text and text of ids, by the libraries that the files are of; the number of ids."""
    if 'tokenizer.json' in files:
        import tokenizers

        t = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
        return lambda text: t.encode(text, add_special_tokens=False).ids, t.get_vocab_size()
    import sentencepiece

    p = sentencepiece.SentencePieceProcessor(model_proto=files['tokenizer.model'])
    added = json.loads(files.get('added_tokens.json', '{}'))
    return p.Encode, max([p.GetPieceSize() - 1, *added.values()]) + 1


def chain_of(files, stop_ids):
    """After the last token of each prompt two words, then one of the ids that end an answer; then the same again."""
    encode, size = reference(files)
    used = {encode(prompt)[-1] for prompt in PROMPTS} | set(stop_ids)
    words = [i for i in dict.fromkeys(encode('99 green bottles hanging on the wall')) if i not in used]
    chain = {}
    for number, prompt in enumerate(PROMPTS):
        first, second = words[2 * number : 2 * number + 2]
        stop = sorted(stop_ids)[number % len(stop_ids)]
        chain |= {encode(prompt)[-1]: first, first: second, second: stop}
    return chain, size


def weights(rows, chain):
    """Tensors of transformers' names: attention and MLP add nothing, so that a token's answer is the head's alone."""
    draw = np.random.default_rng(0)
    embed = draw.choice([-1.0, 1.0], (rows, EMBED)).astype(np.float32)
    head = np.zeros((rows, EMBED), np.float32)
    for source, target in chain.items():
        head[target] += embed[source]
    ones, layer = np.ones(EMBED, np.float32), 'model.layers.0.'
    shapes = {'self_attn.q_proj': (64, 64), 'self_attn.k_proj': (32, 64), 'self_attn.v_proj': (32, 64),
              'mlp.gate_proj': (96, 64), 'mlp.up_proj': (96, 64)}  # fmt: skip
    tensors = {f'{layer}{n}.weight': 0.1 * draw.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    tensors |= {f'{layer}self_attn.o_proj.weight': np.zeros((64, 64), np.float32)}
    tensors |= {f'{layer}mlp.down_proj.weight': np.zeros((64, 96), np.float32)}
    tensors |= {f'{layer}{n}.weight': ones for n in ('input_layernorm', 'post_attention_layernorm')}
    return tensors | {
        'model.embed_tokens.weight': embed, 'model.norm.weight': ones, 'lm_head.weight': head,
    }  # fmt: skip


def make_folder(folder, name):
    """A Hugging Face folder of the kind."""
    from safetensors.numpy import save_file

    files, stop_ids, _ = all_kinds()[name]
    chain, size = chain_of(files, stop_ids)
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    save_file(weights(size, chain), folder / 'model.safetensors', metadata={'format': 'pt'})
    config = {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'vocab_size': size, 'hidden_size': EMBED,
        'intermediate_size': 96, 'num_hidden_layers': 1, 'num_attention_heads': 4, 'num_key_value_heads': 2,
        'max_position_embeddings': 128, 'rms_norm_eps': 1e-5, 'tie_word_embeddings': False, 'torch_dtype': 'float32',
        'eos_token_id': sorted(stop_ids),
    }  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


_CONVERT = """
import gguf, json, pathlib, sys, torch
from conversion import get_model_class
Llama = get_model_class('LlamaForCausalLM')
Llama.get_vocab_base_pre = lambda self, tokenizer: 'smaug-bpe'
with torch.inference_mode():
    for folder, place in json.loads(sys.argv[1]):
        Llama(pathlib.Path(folder), gguf.LlamaFileType.ALL_F32, pathlib.Path(place)).write()
"""


def convert_by_llama_cpp(pairs):
    """What `convert_hf_to_gguf.py --outtype=f32 --outfile=PLACE FOLDER` does, with the library gguf of its release.

    It knows a splitter by the ids that released tokenizers give one text; of these small ones it is told.
    """
    source = os.environ['LLAMA_CPP_SOURCE']
    pairs = [(str(folder), str(place)) for folder, place in pairs]
    done = subprocess.run(
        [sys.executable, '-c', _CONVERT, json.dumps(pairs)], text=True, capture_output=True, timeout=600,
        env=os.environ | {'PYTHONPATH': os.pathsep.join([source, f'{source}/gguf-py'])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def said(path):
    """What a checkpoint answers to the prompts, greedily."""
    config, params, tokenizer = pretrained.load(path)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    return generate(model, params, tokenizer, PROMPTS, max_new_tokens=9)


def texts_of(tokenizer):
    names = [*getattr(tokenizer, 'added_tokens', {}), *list(tokenizer.special_tokens)[:12]]
    own = [text for name in names for text in (f'a{name}b', f'{name} c', f' {name}\n', name)]
    texts = [*kinds.PROBES, *own, *kinds.random_texts(40)]
    return texts[: max(60, len(kinds.PROBES) + len(own))]


def assert_same(found, original, name, *, template=True):
    """Two opened checkpoints have the same vocabulary, ends and template."""
    ours, theirs = found.tokenizer, original.tokenizer
    assert (ours.bos_id, ours.add_bos) == (theirs.bos_id, theirs.add_bos)
    assert set(ours.stop_ids) >= set(theirs.stop_ids)
    if template:
        assert found.template == original.template
    for text in texts_of(theirs):
        if name == SPACED and text.startswith(' '):  # as no other format has it
            continue
        ids = theirs.encode(text)
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids), text
        # Behind a tag only transformers 5 puts no space; and llama.cpp knows the tag <unk> of every vocabulary.
        if name != SPACED and not ('<unk>' in text and '<unk>' not in theirs.special_tokens):
            assert ours.encode(text, special=True) == theirs.encode(text, special=True), text


def assert_llama_cpp(path, expected, *, ends=True):
    """llama.cpp reads it as we do, and says and ends as is expected."""
    import llama_cpp

    checkpoint = pretrained.open(path)
    ours, theirs = checkpoint.tokenizer, llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, verbose=False)
    try:
        vocabulary = llama_cpp.llama_model_get_vocab(theirs._model.model)
        stops = [i for i in range(ours.vocab_size) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
        assert stops == list(ours.stop_ids) and llama_cpp.llama_vocab_get_add_bos(vocabulary) == ours.add_bos
        assert llama_cpp.llama_vocab_eos(vocabulary) == ours.eos_id
        assert (theirs.metadata.get('tokenizer.chat_template') or '') == checkpoint.template
        for text in texts_of(ours):
            for special in (False, True):
                ids = theirs.tokenize(text.encode(), add_bos=False, special=special)
                assert ours.encode(text, special=special) == ids, (text, special)
        answers = [theirs.create_completion(p, max_tokens=9, temperature=0)['choices'][0] for p in PROMPTS]
        assert [a['text'] for a in answers] == expected
        assert not ends or {a['finish_reason'] for a in answers} == {'stop'}
    finally:
        theirs.close()


def assert_transformers(folder, expected):
    """transformers reads it as we do, and says and ends as is expected."""
    import transformers

    ours = pretrained.open(folder).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='float32')
    for prompt, text in zip(PROMPTS, expected, strict=True):
        asked = theirs(prompt, return_tensors='pt')
        assert asked['input_ids'][0].tolist() == ([ours.bos_id] * ours.add_bos + ours.encode(prompt))
        given = model.generate(asked['input_ids'], do_sample=False, max_new_tokens=9, pad_token_id=0)[
            0
        ].tolist()
        new = given[asked['input_ids'].shape[1] :]
        assert new[-1] in ours.stop_ids and len(new) == 3
        assert ours.decode(given[:-1])[len(ours.decode(given[:-3])) :] == text


@pytest.mark.parametrize('name', NAMES)
def test_every_format_becomes_every_other(name, tmp_path):
    for package in ('transformers', 'llama_cpp', 'safetensors', 'gguf'):
        pytest.importorskip(
            package, reason="needs transformers and llama-cpp-python: pip install 'llama_jax[parity]'"
        )
    folder = make_folder(tmp_path / 'source', name)
    source = pretrained.open(folder)
    expected = said(folder)
    assert all(text and len(source.tokenizer.encode(text)) < 9 for text in expected)
    if 'tokenizer.json' in all_kinds()[name][0]:
        assert_transformers(folder, expected)
    inputs = {'huggingface': folder}
    for to in FORMATS:
        place = tmp_path / f'from_huggingface{".gguf" if to == "gguf" else f"_{to}"}'
        if written(source, place, to, name):
            inputs[to] = place
    assert {'huggingface', 'orbax'} <= inputs.keys() and ('gguf' in inputs) == (name != 'unigram')
    for kind, path in inputs.items():
        opened = pretrained.open(path)
        assert said(path) == expected, kind
        if kind == 'gguf':
            assert_llama_cpp(path, expected)
        for to in FORMATS if kind != 'huggingface' else ():
            place = tmp_path / f'from_{kind}_to{".gguf" if to == "gguf" else f"_{to}"}'
            if written(opened, place, to, name):
                assert said(place) == expected, (kind, to)
    if 'tokenizer.json' in all_kinds()[name][0]:
        assert_transformers(inputs['huggingface'], expected)


def written(source, place, to, name):
    """Whether a checkpoint could be written and was found to be the same; else there is one line, and nothing else."""
    files = source.files if to == 'huggingface' else {}
    refused = ''
    try:
        export.save(place, source.source, source.tokenizer, to=to, chat_template=source.template, files=files)
    except InputError as error:
        refused = str(error)
    if refused:
        assert '\n' not in refused and not place.exists()
        return False
    opened = pretrained.open(place)
    export.verify(opened.source, source.source)
    export.verify_tokenizer(opened.tokenizer, source.tokenizer, str(place))
    assert_same(opened, source, name, template=to != 'meta')
    return True


CONVERTED = [name for name in NAMES if name != 'unigram']  # which it takes for a BPE
# What the converter itself loses of a folder's tokenizer; the file is then read as llama.cpp reads it.
LOST = {
    'special tokens first': 'ids of BOS and EOS that only tokenizer.model has',
    'tokenizer.model and added tokens': 'that added tokens are special, where only a list of names says so',
}
# Without a tokenizer.model it gives all pieces one score, so that one is put there, and what it looks at beside it.
NO_MODEL = {'chatml on llama2, transformers 5': True, 'hand-made': True, 'llama2 with a plain token': False}


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """By kind: its folder, and the GGUF that llama.cpp's converter makes of it."""
    for package in ('transformers', 'llama_cpp', 'safetensors'):
        pytest.importorskip(
            package, reason="needs transformers and llama-cpp-python: pip install 'llama_jax[parity]'"
        )
    if not os.environ.get('LLAMA_CPP_SOURCE'):
        pytest.skip('needs $LLAMA_CPP_SOURCE, a folder of the source of llama.cpp')
    place = tmp_path_factory.mktemp('converted')
    made = {name: (make_folder(place / name, name), place / f'{name}.gguf') for name in CONVERTED}
    for name, is_special in NO_MODEL.items():
        folder = made[name][0]
        (folder / 'tokenizer.model').write_bytes(model := kinds.sentencepiece_file())
        config = json.loads((folder / 'tokenizer_config.json').read_text())
        tokens = json.loads((folder / 'tokenizer.json').read_text())['added_tokens']
        more = [token for token in tokens if token['id'] >= len(kinds.pieces_of(model))]
        config['added_tokens_decoder'] = {str(token.pop('id')): token for token in more}
        assert all(token['special'] == is_special for token in more)
        (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    convert_by_llama_cpp(made.values())
    return made


@pytest.mark.parametrize('name', CONVERTED)
def test_what_llama_cpp_converts_is_read_as_it_reads_it(name, converted, tmp_path):
    folder, place = converted[name]
    source, theirs, expected = pretrained.open(folder), pretrained.open(place), said(place)
    export.verify(theirs.source, source.source)
    if name not in LOST:
        assert_same(theirs, source, name)
        assert expected == said(folder)
    assert_llama_cpp(place, expected, ends=name not in LOST)
    for to in FORMATS:
        again = tmp_path / f'again{".gguf" if to == "gguf" else f"_{to}"}'
        if written(theirs, again, to, name):
            assert said(again) == expected, to


def without_one_key(value):
    """The value, with one key or element left out, at every depth; of many alike a few."""
    if not isinstance(value, dict | list):
        return
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) <= 20 else [*keys[:2], keys[len(keys) // 2], keys[-1]]:
        rest = {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else [*value]
        if isinstance(rest, list):
            del rest[key]
        yield rest
        for inner in without_one_key(value[key]):
            yield (
                {**value, key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]
            )


def tried(folder, outputs, whole):
    """Everything public that reads a checkpoint; whether all of it was possible. What is refused, is so in one line."""
    try:
        opened = pretrained.open(folder)
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode('Hello 1 <|im_end|>', bos=True, eos=True, special=True))
        assert opened.config and opened.source and opened.template is not None and opened.files is not None
    except InputError as error:
        return str(error)
    lines = []
    for to in FORMATS:
        try:
            if whole:
                place = outputs / f'{to}{len(list(outputs.iterdir()))}{".gguf" * (to == "gguf")}'
                export.save(place, opened.source, tokenizer, to=to, chat_template=opened.template)
            else:
                WRITTEN[to](tokenizer, opened)
        except InputError as error:
            lines.append(str(error))
    return '\n' * any('\n' in line for line in lines)


WRITTEN = {
    'huggingface': lambda tokenizer, opened: huggingface_files(
        tokenizer, chat_template=opened.template, max_seq_len=opened.config.max_seq_len
    ),
    'gguf': lambda tokenizer, opened: gguf_vocabulary(tokenizer, opened.template, opened.config.vocab_size),
    'orbax': lambda tokenizer, opened: own_files(tokenizer, opened.template),
    'meta': lambda tokenizer, opened: model_file(tokenizer),
}


@pytest.mark.parametrize(
    'name',
    [
        'chatml on llama2, transformers 4',
        'dolphin',
        'special tokens first',
        'bytes, special tokens first',
        'unigram',
    ],
)
def test_without_a_file_or_a_key_it_is_read_or_refused_in_one_line(name, tmp_path):
    folder = make_folder(tmp_path / 'source', name)
    (outputs := tmp_path / 'outputs').mkdir()
    assert not tried(folder, outputs, whole=True)
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        file.unlink()
        assert '\n' not in tried(folder, outputs, whole=True), file.name
        if file.suffix == '.json':
            for content in without_one_key(json.loads(data)):
                file.write_text(json.dumps(content))
                whole = file.name in ('config.json', 'generation_config.json')
                assert '\n' not in tried(folder, outputs, whole), (file.name, content)
        file.write_bytes(data)
