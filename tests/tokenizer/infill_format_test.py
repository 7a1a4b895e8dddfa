import struct

import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.infill_format import InfillFormat
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_jax.tokenizer.tokenizer import load_tokenizer, parse_tokenizer
from tests.tokenizer import kinds

GAPS = [
    ('def add(a, b):\n    return ', '\n\nprint(add(1, 2))\n'),
    ('', 'x'),
    (' leading', ' green bottles'),
    ('wall', ''),
    ('ünder', '\tдом'),
]


def with_infilling(model: bytes) -> bytes:
    """The sentencepiece model with 16 pieces more, the first eleven in the order of Code Llama's."""
    names = ['▁<SU', '▁<SUF', '▁<PRE', '▁<M', '▁<MID', '▁<E', '▁<EOT', '▁<PRE>', '▁<SUF>', '▁<MID>', '▁<EOT>']
    lowest = min(score for _, score, _ in kinds.pieces_of(model))
    for number, name in enumerate([*names, *(f'▁<{i}>>' for i in range(5))]):
        text = name.encode()
        # ModelProto.pieces (1) of SentencePiece: piece (1), score (2).
        piece = bytes([0x0A, len(text)]) + text + b'\x15' + struct.pack('<f', lowest - 1 - number)
        model += bytes([0x0A, len(piece)]) + piece
    return model


def test_gaps_have_the_ids_of_metas_code(shared_data):
    data = with_infilling((shared_data / 'tokenizers/llama2/tokenizer.model').read_bytes())
    tokenizer = SentencePieceTokenizer('tokenizer.model', data)
    library = tokenizer._processor
    assert tokenizer.vocab_size == 32016
    gap_format = InfillFormat(tokenizer)
    assert gap_format.stop_ids == (32010,)
    for prefix, suffix in GAPS:
        before, behind = library.Encode(prefix), library.Encode('☺' + suffix)[2:]
        assert gap_format.encode_prompt(prefix, suffix) == [1, 32007, *before, 32008, *behind, 32009]
        wanted = [1, 32007, 32008, *behind, 32009, *before]
        assert gap_format.encode_prompt(prefix, suffix, suffix_first=True) == wanted
        # Joined, they read as the two texts do.
        assert (
            library.Decode(before) == prefix
            and library.Decode([*library.Encode('☺'), *behind]) == f'☺{suffix}'
        )


def test_gaps_have_the_ids_of_transformers():
    transformers = pytest.importorskip(
        'transformers', reason="needs transformers: pip install 'llama_jax[parity]'"
    )
    data = with_infilling(kinds.sentencepiece_file())
    definition = kinds.spm_json(model=data)
    vocab, merges = definition['model']['vocab'], definition['model']['merges']
    # They put the space of the prefix themselves; told to add one, transformers 5 would add it to the suffix too, which
    # transformers 4 and Meta's code do not.
    theirs = transformers.CodeLlamaTokenizer(
        vocab=vocab, merges=[tuple(merge.split(' ')) for merge in merges], add_prefix_space=False
    )
    ours = InfillFormat(SentencePieceTokenizer('tokenizer.model', data))
    for prefix, suffix in GAPS:
        if prefix and suffix:  # what they do without one is not Meta's
            for first in (False, True):
                wanted = theirs(prefix, suffix=suffix, suffix_first=first)['input_ids']
                assert ours.encode_prompt(prefix, suffix, first) == wanted


def test_every_kind_of_file_writes_a_gap_alike():
    data = with_infilling(kinds.sentencepiece_file())
    native = InfillFormat(SentencePieceTokenizer('tokenizer.model', data))
    found = kinds.files(kinds.spm_json(model=data), eos='</s>')
    json = InfillFormat(parse_tokenizer('tokenizer.json', found.pop('tokenizer.json'), found))
    assert json.stop_ids == native.stop_ids
    assert all(json.encode_prompt(*gap) == native.encode_prompt(*gap) for gap in GAPS)


@pytest.mark.parametrize('name', ['llama2', 'llama3'])
def test_a_tokenizer_without_such_tokens_is_refused_in_one_line(shared_data, name):
    with pytest.raises(InputError, match='has no token ▁<PRE>, so its model fills no gaps') as error:
        InfillFormat(load_tokenizer(shared_data / 'tokenizers' / name))
    assert '\n' not in str(error.value)
