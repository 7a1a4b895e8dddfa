"""experiments.generate --draft: what is printed does not change, and what cannot draft is refused."""

import pytest

from llama_jax.errors import InputError
from llama_jax.tokenizer.protocol import check_same_ids


@pytest.fixture(scope='module')
def stories(shared_data):
    folder = shared_data / 'weights' / 'stories260K'
    return [
        f'--checkpoint={folder / "stories260K.pt"}',
        f'--tokenizer={folder / "tok512.model"}',
        '--prompt=',
    ]


@pytest.mark.slow
def test_every_draft_prints_what_the_model_says(commands, stories, shared_data):
    options = [*stories, '--max_new_tokens=100']
    plain = commands.run('generate', *options).succeeded().stdout
    assert plain.startswith('Once upon a time')
    gguf = shared_data / 'weights' / 'stories260K' / 'stories260K.gguf'
    for draft, passes in (('lookup', range(40, 99)), ('int4', range(20, 50)), (gguf, range(20, 21))):
        done = commands.run('generate', *options, f'--draft={draft}').succeeded()
        assert done.stdout == plain
        (line,) = [line for line in done.stderr.splitlines() if ' passes of the model' in line]
        assert int(line.split('99 tokens in ')[1].split()[0]) in passes
    line = commands.run('generate', *options, f'--draft={gguf}', '--dtype=bfloat16', '--draft_tokens=1')
    assert line.succeeded().stdout.startswith('Once upon a time')


@pytest.mark.parametrize(
    ('flags', 'words'),
    [
        (['--draft_tokens=3'], '--draft_tokens is of --draft, which is not given'),
        (
            ['--draft=lookup', '--draft_tokens=33'],
            '--draft_tokens=33: 33 is not an integer in the range [1, 32]',
        ),
        (
            ['--draft=lookup', '--draft_tokens=0'],
            '--draft_tokens=0: 0 is not an integer in the range [1, 32]',
        ),
        (['--draft=nowhere/draft'], 'nowhere/draft'),
    ],
)
def test_what_cannot_draft_is_refused(commands, stories, flags, words):
    assert words in commands.run('generate', *stories, *flags).error()


class Words:
    """A tokenizer of some words."""

    bos_id, eos_id, stop_ids = 0, 0, ()

    def __init__(self, *words, sha256=''):
        self.words, self.vocab_size, self.path, self.sha256 = words, len(words), '/'.join(words), sha256

    def encode(self, text, bos=False, eos=False):
        return [self.words.index(text)]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return ''.join(self.words[id] for id in ids).strip()


def test_a_draft_whose_ids_stand_for_other_texts_is_refused_naming_both():
    one = Words('a', ' b', 'c', sha256='1')
    check_same_ids(one, Words('a', ' b', 'c', sha256='2'), 'the draft')
    for other, words in (
        (Words('a', ' b', 'c', 'd'), 'a/ b/c and a/ b/c/d differ: they have 3 and 4 ids'),
        (Words('a', 'b', 'c'), "a/ b/c and a/b/c differ: twice id 1 is 'b b' and 'bb'"),
    ):
        with pytest.raises(InputError) as error:
            check_same_ids(one, other, 'the draft')
        assert str(error.value).startswith('the draft has another tokenizer: ' + words)
