"""Tokenizers made to do harm: refused before a library that believes them is asked, or tried in another process."""

import base64
import json

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer import foreign_tokenizer
from llama_jax.tokenizer.charsmap import check_charsmap
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.sentencepiece_model import read_model
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests.convert.samples import normalizing_unigram
from tests.tokenizer import kinds


def opened(definition, **beside):
    files = kinds.files(eos='</s>', bos='<s>', **beside)
    return HuggingFaceTokenizer('FILE', json.dumps(definition).encode(), files)


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize('pattern', ['(a+)+$', '(x+x+)+y'])
def test_a_pattern_that_the_library_panics_at_is_refused_in_one_line(pattern, capfd):
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    assert 'retry-limit' in refusal(opened, kinds.spm_json() | {'pre_tokenizer': split})
    template = kinds.template('<s>', 1) | {'special_tokens': {}}
    assert 'no entry found' in refusal(opened, kinds.spm_json() | {'post_processor': template})
    assert capfd.readouterr() == ('', '')


def test_only_what_no_llama_is_made_of_is_tried_in_another_process(monkeypatch):
    tried = []
    monkeypatch.setattr(foreign_tokenizer, '_tried', lambda *given: tried.append(given) or '')
    usual = [kinds.spm_json(), kinds.spm_json(metaspace=True), kinds.byte_json(['<s>', '</s>'], bos='<s>')]
    for definition in usual:
        opened(definition)
    assert not tried
    opened(usual[0] | {'pre_tokenizer': {'type': 'WhitespaceSplit'}})
    assert len(tried) == 1


def test_ids_beyond_any_vocabulary_are_refused():
    definition = kinds.spm_json()
    definition['model']['vocab']['far'] = 2**32 - 1
    assert 'gives a token the id 4294967295' in refusal(opened, definition)
    decoder = {'added_tokens_decoder': {'999999999': {'content': 'x'}}}
    assert 'added_tokens_decoder holds' in refusal(opened, kinds.spm_json(), config=decoder)


def damaged(charsmap):
    """Each with what is said of it."""
    size = int.from_bytes(charsmap[:4], 'little')
    units = np.frombuffer(charsmap[4 : 4 + size], '<u4')
    texts = charsmap[4 + size :]

    def made(units, texts=texts, size=None):
        data = np.asarray(units, '<u4').tobytes()
        return (len(data) if size is None else size).to_bytes(4, 'little') + data + texts

    leaves = units >= 2**31
    yield made(units, size=2**31), 'with a tree of'
    yield made(units[:-1]), 'with a tree of'
    yield made(units, texts[:-1]), 'with a tree of'
    yield made(units, b'\xff\0' + texts), 'not UTF-8'
    yield made(np.where(leaves, units, units | 0x7FFFFC00)), 'its tree leads out of itself'
    yield made(np.where(leaves, 2**31 + len(texts), units)), 'out of its texts'
    yield made(units, '\u4e00'.encode() + texts[3:]), 'into characters'
    yield made(units, texts.replace(b'\0', b'x', 200)), 'a character becomes'


def test_a_compiled_normalizer_is_proved_sound(tmp_path):
    model = normalizing_unigram()
    charsmap = read_model(model, 'FILE').charsmap
    check_charsmap(charsmap, 'FILE')
    for data, message in damaged(charsmap):
        assert message in refusal(check_charsmap, data, 'FILE'), message
    hostile = next(data for data, message in damaged(charsmap) if 'out of itself' in message)
    (tmp_path / 'tokenizer.model').write_bytes(model.replace(charsmap, hostile))
    assert 'its tree leads' in refusal(load_tokenizer, tmp_path)
    step = {'type': 'Precompiled', 'precompiled_charsmap': base64.b64encode(hostile).decode()}
    sequence = {'type': 'Sequence', 'normalizers': [step]}
    assert 'its tree leads' in refusal(opened, kinds.spm_json() | {'normalizer': sequence})
