import json

import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.conversion import model_file
from llama_jax.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.sentencepiece_model import SentencePieceModel, write_model
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_jax.tokenizer.tokenizer import load_tokenizer

TEXTS = [
    *('', 'Hello world', ' leading', '  two  spaces', 'trailing  ', '\n', '\t\r\n', ' ' * 50 + 'x', '1234567'),
    *("I'll don'T", '日本語', '😀', 'naïve café', 'a\u0301\u00a0b', '<0x41>', '▁', '\x00', 'def f(x):\n    return x\n'),
]  # fmt: skip
DIALOG = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': ' Hi\n'},
    {'role': 'assistant', 'content': 'Hello!'},
    {'role': 'user', 'content': 'Bye'},
]


@pytest.fixture(scope='module', params=['llama2', 'llama3'])
def folder(request, shared_data, tmp_path_factory):
    """A native tokenizer and its folder for transformers."""
    native = load_tokenizer(shared_data / 'tokenizers' / request.param)
    folder = tmp_path_factory.mktemp(request.param)
    template = chat_format_for(native).template
    for name, data in huggingface_files(native, chat_template=template, max_seq_len=4096).items():
        (folder / name).write_bytes(data)
    return native, folder


def test_transformers_opens_the_folder_and_gives_the_same_ids(folder, shared_data):
    transformers = pytest.importorskip(
        'transformers', reason="needs transformers: pip install 'llama_jax[parity]'"
    )
    native, path = folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    family = 'llama2' if isinstance(native, SentencePieceTokenizer) else 'llama3'
    vectors = json.loads((shared_data / 'tokenizers' / family / 'vectors.json').read_text())
    for text in TEXTS + [vector['text'] for vector in vectors if '<' not in vector['text']]:
        assert tokenizer(text)['input_ids'] == native.encode(text, bos=True), repr(text)
        assert tokenizer.decode(native.encode(text)) == native.decode(native.encode(text)), repr(text)
    chat = chat_format_for(native)
    ids = tokenizer.apply_chat_template(DIALOG, add_generation_prompt=True, return_dict=False)
    assert ids == chat.encode_prompt(DIALOG)
    assert (tokenizer.bos_token_id, tokenizer.model_max_length, len(tokenizer)) == (
        native.bos_id, 4096, native.vocab_size,
    )  # fmt: skip
    assert tokenizer.eos_token_id == chat.stop_ids[-1]


def test_the_folder_is_ours_again(folder):
    native, path = folder
    tokenizer = load_tokenizer(path / 'tokenizer.json')
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (native.bos_id, native.stop_ids)
    assert tokenizer.eos_id == native.stop_ids[-1]  # a folder of a chat model names the end of a turn
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [native.encode(text) for text in TEXTS]
    files = huggingface_files(tokenizer, max_seq_len=8)
    assert files['tokenizer.json'] == (path / 'tokenizer.json').read_bytes()
    config = json.loads(files['tokenizer_config.json'])
    assert (config['model_max_length'], 'chat_template' in config) == (8, False)
    is_sentencepiece = isinstance(native, SentencePieceTokenizer)
    assert (path / 'tokenizer.model').exists() == is_sentencepiece
    if is_sentencepiece:
        assert (path / 'tokenizer.model').read_bytes() == model_file(native)


def test_user_defined_pieces_are_read_whole_where_no_format_disagrees():
    tokens = ['<unk>', '<s>', '</s>', 'a', '▁', 'mine', '▁a']
    keys = {
        'model': 'llama',
        'tokens': tokens,
        'token_type': [2, 3, 3, 1, 1, 4, 1],
        'scores': [0.0] * 6 + [-1.0],
    }
    keys |= {'bos_token_id': 1, 'eos_token_id': 2}
    tokenizer = tokenizer_from_gguf({f'tokenizer.ggml.{key}': value for key, value in keys.items()}, 'a.gguf')
    assert tokenizer.encode('aminea') == [6, 5, 6]  # as llama.cpp, which puts a space before each piece
    files = huggingface_files(tokenizer, max_seq_len=8)
    again = HuggingFaceTokenizer('none/tokenizer.json', files.pop('tokenizer.json'), files)
    assert again.encode('aminea') == [6, 5, 6] and again.ends == tokenizer.ends
    # Sentencepiece itself puts one before the whole text.
    pieces = list(zip(tokens, [0.0] * 6 + [-1.0], [2, 3, 3, 1, 1, 4, 1], strict=True))
    own = SentencePieceTokenizer('own.model', write_model(SentencePieceModel(pieces)))
    assert own.encode('aminea') == [6, 5, 3]
    with pytest.raises(InputError, match=r"own\.model has user-defined pieces \('mine'\)"):
        huggingface_files(own, max_seq_len=8)
