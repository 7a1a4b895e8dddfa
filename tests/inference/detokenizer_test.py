"""Text while it grows: against decoding the whole, and stop strings against cutting the whole."""

import dataclasses
import os
import random

import pytest

from llama_jax.errors import InputError
from llama_jax.inference.detokenizer import Detokenizer, before_stop
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.protocol import Spelling, spelling_of
from llama_jax.tokenizer.sentencepiece_model import read_model, write_model
from llama_jax.tokenizer.tokenizer import load_tokenizer, parse_tokenizer, tokenizer_of_files
from tests.tokenizer import kinds


class Bytes:
    """A tokenizer whose ids are bytes; it counts what is asked of it."""

    vocab_size, bos_id, eos_id, stop_ids, path, sha256 = 256, 0, 1, (1,), 'bytes', ''
    num_spelled = num_decoded = 0

    def encode(self, text, bos=False, eos=False, special=False):
        return [0] * bos + list(text.encode()) + [1] * eos

    def encode_batch(self, texts):
        raise NotImplementedError

    def decode(self, ids):
        self.num_decoded += len(ids)
        return bytes(ids).decode(errors='replace')

    def spelling(self):
        def spell(id):
            self.num_spelled += 1
            return bytes([id])

        return Spelling(spell)


class WholeBytes(Bytes):
    """The same, of which only whole rows can be decoded."""

    def spelling(self):
        return None


def sentencepiece(**changes):
    """A small model with other settings."""
    model = read_model(kinds.sentencepiece_file(), 'a.model')
    return parse_tokenizer('a.model', write_model(dataclasses.replace(model, **changes)), {})


def of_json(definition, eos):
    return tokenizer_of_files('folder', kinds.files(definition, eos=eos))


SMALL, LLAMA2, LLAMA3 = 'weights/stories260K/tok512.model', 'tokenizers/llama2', 'tokenizers/llama3'
MADE = {
    'no space before a text': lambda: sentencepiece(add_dummy_prefix=False),
    'all spaces before a text go': lambda: sentencepiece(remove_extra_whitespaces=True),
    'pieces in JSON': lambda: of_json(kinds.spm_json(['<|im_end|>'], metaspace=True), '</s>'),
    'bytes in JSON': lambda: of_json(kinds.byte_json(['<|begin_of_text|>', 'é ü', '日é', '</s>']), '</s>'),
}


@pytest.fixture(scope='module')
def opened(shared_data):
    """name -> tokenizer."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MADE[name]() if name in MADE else load_tokenizer(shared_data / name)
        return made[name]

    return get


def draw_ids(draw, tokenizer):
    """Runs of words, of bytes that are no text, of special tokens and of spaces; one id stands for no token."""
    size = tokenizer.vocab_size
    spaces = [id for id in range(min(size, 1000)) if not tokenizer.decode([id]).strip()]
    text = tokenizer.encode(' naïve 日本語 😀 \n x')
    pools = [range(size + 1), range(min(size, 262)), text, range(size - 260, size), spaces]
    while True:
        runs = [draw.choices(draw.choice(pools), k=draw.randrange(10)) for _ in range(draw.randrange(5))]
        yield [id for run in runs for id in run]


def pieces_of(draw, row, ids):
    """What a row gives for ids that come in random portions."""
    pieces, at = [], 0
    while at < len(ids):
        size = draw.choice([1, 1, 2, 3, 32])
        pieces.append(row.push(ids[at : at + size]))
        at += size
    return [*pieces, row.flush()]


def check_joined(tokenizer, count, seed=0):
    draw = random.Random(seed)
    for _, ids in zip(range(count), draw_ids(draw, tokenizer), strict=False):
        cut = draw.randrange(len(ids) + 1)
        joined = ''.join(pieces_of(draw, Detokenizer(tokenizer, ids[:cut]), ids[cut:]))
        before, whole = (
            tokenizer.decode([id for id in part if id < tokenizer.vocab_size]) for part in (ids[:cut], ids)
        )
        # A prompt may break off within a character, whose bytes are another text once the rest has come.
        assert joined == whole[len(os.path.commonprefix([before, whole])) :], (ids, cut)


@pytest.mark.parametrize('name', [SMALL, LLAMA3, *MADE])
def test_pieces_join_to_what_all_ids_decode_to(opened, name):
    assert spelling_of(opened(name))
    check_joined(opened(name), 100)


def test_a_token_without_text_parts_the_bytes_around_it_as_in_sentencepiece():
    tokenizer = sentencepiece()
    first, *others = (tokenizer.id_of(f'<0x{byte:02X}>') for byte in '日'.encode())
    for ids in ([first, *others], [first, tokenizer.eos_id, *others]):
        row = Detokenizer(tokenizer)
        assert ''.join([row.push([id]) for id in ids]) + row.flush() == tokenizer.decode(ids)


@pytest.mark.slow
def test_ten_thousand_rows_join(opened):
    in_json = tokenizer_of_files('json', huggingface_files(opened(LLAMA3), max_seq_len=64))
    for tokenizer in (opened(LLAMA2), opened(LLAMA3), in_json):
        check_joined(tokenizer, 10_000, seed=1)
    for name, given in kinds.kinds().items():
        tokenizer = tokenizer_of_files(name, given[0])
        assert spelling_of(tokenizer), name
        check_joined(tokenizer, 300, seed=2)


def test_a_row_that_is_decoded_as_a_whole_alone_gives_its_text_at_the_end():
    definition = kinds.byte_json(['</s>'], bos='')
    replace = {'type': 'Replace', 'pattern': {'String': 'green'}, 'content': 'red'}
    definition['decoder'] = {'type': 'Sequence', 'decoders': [definition['decoder'], replace]}
    tokenizer = of_json(definition, '</s>')
    assert spelling_of(tokenizer) is None
    check_joined(tokenizer, 50)
    row = Detokenizer(tokenizer)
    assert row.push(tokenizer.encode('a gre')) == row.push(tokenizer.encode('en b')) == ''
    assert row.flush() == 'a red b'


@pytest.mark.parametrize('name', ['spelled', 'whole'])
def test_a_character_comes_when_it_is_whole(name):
    row = Detokenizer({'spelled': Bytes, 'whole': WholeBytes}[name](), list('né'.encode())[:-1])
    pieces = [row.push([byte]) for byte in 'é日a'.encode()[1:]] + [row.push([0xE6]), row.flush()]
    if name == 'spelled':
        assert pieces == ['é', '', '', '日', 'a', '', '\ufffd']
    assert ''.join(pieces) == 'é日a\ufffd'


def random_stops(draw, alphabet):
    stops = [''.join(draw.choices(alphabet, k=draw.randrange(1, 6))) for _ in range(draw.randrange(1, 4))]
    if draw.random() < 0.3:  # one that another begins with, and one within another
        stops += [stops[0] + draw.choice(alphabet), stops[-1][1:] or 'a']
    return draw.sample(stops, len(stops))


def check_stops(count, tokenizer, seed=0):
    draw, num_stopped = random.Random(seed), 0
    for _ in range(count):
        alphabet = draw.choice(['ab', 'ab ', 'aé日', 'é\u0301日😀', 'aab\n'])
        stops = random_stops(draw, alphabet)
        text = ''.join(draw.choices(alphabet, k=draw.randrange(24)))
        wanted = before_stop(text, stops)
        row = Detokenizer(tokenizer, stop=stops)
        assert ''.join(pieces_of(draw, row, list(text.encode()))) == wanted, (text, stops)
        assert (row.stopped_by is not None) == (wanted != text)
        num_stopped += row.stopped_by is not None
    assert count / 4 < num_stopped < count


def test_what_begins_a_stop_string_is_held_back_and_what_follows_it_is_lost():
    check_stops(300, Bytes())
    check_stops(100, WholeBytes())


@pytest.mark.slow
def test_ten_thousand_rows_with_stop_strings():
    check_stops(10_000, Bytes(), seed=1)


@pytest.mark.parametrize(
    ('stops', 'letters', 'pieces', 'end'),
    [
        (['\n\nQ:'], 'a\n\nQ:b', ['a', '', '', '', '', ''], ''),
        (['\n\nQ:'], 'a\n\nQ', ['a', '', '', ''], '\n\nQ'),
        (
            ['abcd', 'bc'],
            'xabcd',
            ['x', '', '', '', ''],
            '',
        ),  # bc has come, but abcd may, which begins before it
        (['abcd', 'bc'], 'xabce', ['x', '', '', '', 'a'], ''),
        (['abcd', 'bc'], 'xabc', ['x', '', '', ''], 'a'),
        (['ab', 'abc'], 'xabc', ['x', '', '', ''], ''),
        (['aab'], 'aaab', ['', '', 'a', ''], ''),
        (['日本'], '日日本x', ['', '日', '', ''], ''),
        (['b'], 'abc', ['a', '', ''], ''),
    ],
)
def test_stop_strings_letter_by_letter(stops, letters, pieces, end):
    row = Detokenizer(Bytes(), stop=stops)
    assert [row.push(letter.encode()) for letter in letters] == pieces
    assert row.flush() == end
    assert (row.stopped_by is not None) == any(stop in letters for stop in stops)


def test_a_token_costs_the_same_wherever_it_stands():
    tokenizer = Bytes()
    row = Detokenizer(tokenizer, [97] * 50, stop=['never', 'ab'])
    for _ in range(2_000):
        row.push([97])
        assert len(row._held) < len('never')
    assert tokenizer.num_spelled == 2_050 and not tokenizer.num_decoded


def test_a_text_ends_before_the_stop_string_that_begins_first():
    assert before_stop('a.b she', (' she', '.', 'zz')) == 'a' and before_stop('a.', ()) == 'a.'


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="a stop text is '', which every text begins with"):
        Detokenizer(Bytes(), stop=['a', ''])
