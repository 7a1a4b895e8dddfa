from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference import decoding, generator
from llama_jax.inference import generate as generation
from llama_jax.inference.generate import generate, generate_tokens, stream
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.slots import Slots
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.unstacked import unstack
from llama_jax.tokenizer.protocol import Spelling
from tests import toy

PROMPTS = [[1, 5, 9], [1, 7, 2, 8, 30, 11, 4], [1]]


class Letters:
    """A tokenizer of 60 ASCII characters; after the first token of a text, a space comes before each capital."""

    vocab_size, bos_id, eos_id, stop_ids, path, sha256 = 64, 1, 2, (2,), '', ''

    def encode(self, text, bos=False, eos=False):
        return [1] * bos + [ord(letter) - 64 + 4 for letter in text] + [2] * eos

    def encode_batch(self, texts):
        return [np.array(self.encode(text)) for text in texts]

    def decode(self, ids):
        text = ''.join(chr(i - 4 + 64) for i in ids if i >= 4)
        return text[:1] + ''.join(f' {letter}' if letter.isupper() else letter for letter in text[1:])


def complete(model, params, prompts, max_new_tokens=8, sampler=None, stop_ids=()):
    return generate_tokens(
        model, params, prompts, max_new_tokens=max_new_tokens, sampler=sampler or Sampler(), stop_ids=stop_ids
    )


@pytest.fixture(scope='module')
def greedy(logits_of):
    """The most likely continuations, by reading everything anew for each token."""
    continuations = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(np.argmax(logits_of(tokens)[-1])))
        continuations.append(tokens[len(prompt) :])
    return continuations


def test_greedy_is_the_most_likely_token_each_time_in_rows_of_any_length(model, params, greedy):
    assert complete(model, params, PROMPTS) == greedy
    assert [complete(model, params, [prompt])[0] for prompt in PROMPTS] == greedy
    assert complete(model, params, PROMPTS, max_new_tokens=3) == [row[:3] for row in greedy]


def test_a_stop_token_ends_its_row_and_is_left_out(model, params, greedy):
    stops = (greedy[0][2], 63)
    wanted = [row[: next((i for i, token in enumerate(row) if token in stops), 8)] for row in greedy]
    assert len(wanted[0]) < 8
    assert complete(model, params, PROMPTS, stop_ids=stops) == wanted


def test_prompts_longer_than_a_piece_end_with_their_own_last_token(monkeypatch, model, params, greedy):
    monkeypatch.setattr(generator, '_WIDTHS', {'cpu': (1, 2)})
    assert complete(model, params, PROMPTS) == greedy


def test_short_prompts_that_begin_together_are_read_together(monkeypatch, model, params):
    """Only where as many are there as one program reads, and alike; each is answered as it is alone."""
    rng, read = np.random.default_rng(0), Slots.read
    prompts = [rng.integers(3, 64, size=n).tolist() for n in (5, 6, 7, 8, 3, 4, 12, 30)]
    alone = [complete(model, params, [prompt])[0] for prompt in prompts]
    together = []

    def counted(slots, pieces, width):
        together.append((width, len(pieces)))
        return read(slots, pieces, width)

    monkeypatch.setattr(Slots, 'read', counted)
    monkeypatch.setattr(generator, '_TOGETHER', {'cpu': 32})
    assert complete(model, params, prompts) == alone
    assert together == [(8, 4), (8, 1), (8, 1), (16, 1), (32, 1)]


def test_a_row_ends_at_the_context_which_is_told(model, params, caplog):
    context = toy.CONFIG.max_seq_len
    prompts = [[3] * (context - 2), [3] * 4, [3] * (context - 1)]
    rows = complete(model, params, prompts, max_new_tokens=500)
    assert [len(row) for row in rows] == [2, context - 4, 1]
    assert (
        '3 of 3 completions ended where the context of' in caplog.text
        and 'max_new_tokens, 500' in caplog.text
    )
    caplog.clear()
    assert complete(model, params, prompts[:1], max_new_tokens=1)[0] == rows[0][:1]
    assert complete(model, params, prompts[:1], max_new_tokens=2)[0] == rows[0] and not caplog.text


def test_draws_depend_on_the_seed_alone(model, params):
    sampler = Sampler(temperature=1.0, top_p=0.95, seed=3)
    first = complete(model, params, PROMPTS, sampler=sampler)
    assert complete(model, params, PROMPTS, sampler=sampler) == first
    assert complete(model, params, PROMPTS, sampler=replace(sampler, seed=4)) != first
    twins = complete(model, params, PROMPTS[:1] * 2, sampler=sampler)
    assert twins[0] != twins[1]  # rows of one batch are drawn apart


def test_a_row_of_its_own_settings_is_what_it_is_alone(model, params, greedy):
    samplers = [
        Sampler(temperature=1.0, seed=5),
        Sampler(),
        Sampler(temperature=0.7, top_k=9, min_p=0.01, seed=5),
    ]
    rows = complete(model, params, PROMPTS, sampler=samplers)
    assert rows[1] == greedy[1] and rows[0] != greedy[0]
    for prompt, sampler, row in zip(PROMPTS, samplers, rows, strict=True):
        assert complete(model, params, [prompt], sampler=[sampler])[0] == row
    company = [Sampler(repetition_penalty=1.3), *samplers[::-1]]
    assert complete(model, params, [[4, 4, 4], *PROMPTS[::-1]], sampler=company)[:0:-1] == rows


def test_penalties_see_the_prompt_and_what_was_drawn(model, params, logits_of):
    """As reading everything anew for each token, and CTRL's and OpenAI's formulas."""
    sampler = Sampler(
        repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={7: 1.0, 30: -2.0}
    )
    found = complete(model, params, PROMPTS, max_new_tokens=12, sampler=sampler)
    for prompt, row in zip(PROMPTS, found, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            adjusted = logits_of(tokens)[-1] + [{7: 1.0, 30: -2.0}.get(i, 0.0) for i in range(64)]
            for token in set(tokens):
                adjusted[token] *= 1.5 if adjusted[token] < 0 else 1 / 1.5
            for token in tokens[len(prompt) :]:
                adjusted[token] -= 0.2
            adjusted[list(set(tokens[len(prompt) :]))] -= 0.3
            tokens.append(int(np.argmax(adjusted)))
        assert tokens[len(prompt) :] == row
    assert found != complete(model, params, PROMPTS, max_new_tokens=12)


def test_no_stop_token_comes_before_the_least_number(model, params, greedy):
    stops = (greedy[0][2], greedy[1][0])
    assert min(map(len, complete(model, params, PROMPTS, stop_ids=stops))) < 6
    samplers = [Sampler(min_new_tokens=6), Sampler(min_new_tokens=6), Sampler()]
    rows = complete(model, params, PROMPTS, sampler=samplers, stop_ids=stops)
    assert min(map(len, rows[:2])) >= 6 and not {*rows[0][:6], *rows[1][:6]} & {*stops}
    assert rows[0][:2] == greedy[0][:2]  # until then it is not in the way


def test_settings_are_arguments_of_two_programs(model, params):
    programs = decoding.decode._cache_size()
    rng = np.random.default_rng(0)
    for _ in range(10):
        plain = {
            'temperature': rng.uniform(0.1, 2),
            'top_k': int(rng.integers(9)),
            'top_p': rng.uniform(0.1, 1),
        }
        for sampler in (Sampler(**plain), Sampler(**plain, repetition_penalty=rng.uniform(1, 2), seed=1)):
            complete(model, params, PROMPTS, 5, sampler, stop_ids=tuple(range(2, int(rng.integers(2, 9)))))
    assert decoding.decode._cache_size() - programs <= 2


def test_texts_are_continued_without_their_prompt(model, params):
    tokenizer, prompts = Letters(), ['abc', 'Q', '']
    texts = generate(model, params, tokenizer, prompts, max_new_tokens=6)
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    rows = complete(model, params, ids, max_new_tokens=6, stop_ids=(2,))
    for prompt, prompt_ids, row, text in zip(prompts, ids, rows, texts, strict=True):
        assert prompt + text == tokenizer.decode(prompt_ids + row)
    assert generate(model, params, tokenizer, []) == []


class Spelled(Letters):
    """The same, token by token."""

    def spelling(self):
        begun = False

        def spell(id):
            nonlocal begun
            letter = self.decode([id])
            space = ' ' if begun and letter.isupper() else ''
            begun = begun or bool(letter)
            return (space + letter).encode()

        return Spelling(spell)


def test_a_stream_is_the_same_text_in_pieces_that_come_early(model, params):
    settings = {
        'temperature': 2.0,
        'seed': 5,
        'repetition_penalty': 1.5,
        'max_new_tokens': 20,
        'ignore_eos': True,
    }
    for tokenizer in (Letters(), Spelled()):
        (whole,) = generate(model, params, tokenizer, ['abQ'], **settings)
        pieces = list(stream(model, params, tokenizer, 'abQ', **settings))
        assert len(whole) > 15 and ''.join(pieces) == whole and all(pieces)
        stops = [whole[6:9], whole[9:11] + '~']
        (cut,) = generate(model, params, tokenizer, ['abQ'], stop=stops, **settings)
        stopped = list(stream(model, params, tokenizer, 'abQ', stop=stops, **settings))
        assert ''.join(stopped) == cut == whole[: whole.find(stops[0])]
    # Of 1, 2, 4 and then 8 tokens, of which few have no text.
    assert len(pieces) >= 4 and len(pieces[0]) <= 2
    assert not list(stream(model, params, Spelled(), 'a', max_new_tokens=4, stop_ids=range(64)))
    with pytest.raises(InputError, match='max_new_tokens is 0'):
        stream(model, params, Spelled(), 'a', max_new_tokens=0)


def test_looking_for_a_stop_text_decodes_no_row_again(model, params, monkeypatch):
    monkeypatch.setattr(generation, 'CHECKED_STEPS', 2)
    spelled = []

    class Counting(Spelled):
        def spelling(self):
            spell = super().spelling().spell
            return Spelling(lambda id: spelled.append(id) or spell(id))

    generate(model, params, Counting(), ['abc'], max_new_tokens=16, stop=['~~~'], ignore_eos=True)
    assert len(spelled) == len(Letters().encode('abc', bos=True)) + 16


def test_texts_end_at_a_stop_text_and_go_on_behind_the_end_where_asked(model, params, greedy):
    prompt = PROMPTS[0]
    plain = generate(model, params, Letters(), [prompt], max_new_tokens=8)[0]
    assert len(plain) > 3
    cut = generate(model, params, Letters(), [prompt], max_new_tokens=8, stop=['~~', plain[2:4]])
    assert cut == [plain[: plain.find(plain[2:4])]]
    ender = greedy[0][3]  # as if this one ended a text
    short = generate(model, params, Letters(), [prompt], max_new_tokens=8, stop_ids=[ender])[0]
    assert plain.startswith(short) and len(short) < len(plain)

    class Ending(Letters):
        stop_ids = (ender,)

    assert generate(model, params, Ending(), [prompt], max_new_tokens=8) == [short]
    assert generate(model, params, Ending(), [prompt], max_new_tokens=8, ignore_eos=True) == [plain]
    with pytest.raises(InputError, match="a stop text is ''"):
        generate(model, params, Letters(), [prompt], stop=[''])


def test_settings_of_each_prompt_stand_alone(model, params):
    samplers = [Sampler(temperature=1.0, seed=seed) for seed in (1, 2)]
    twins = generate(model, params, Letters(), ['ab', 'ab'], max_new_tokens=9, samplers=samplers)
    assert twins[0] != twins[1]
    swapped = generate(model, params, Letters(), ['ab', 'ab'], max_new_tokens=9, samplers=samplers[::-1])
    assert twins[::-1] == swapped
    for wrong, words in (
        ({'samplers': samplers[:1]}, 'samplers are 1 for 2 prompts'),
        ({'samplers': samplers, 'top_k': 3}, 'give none beside them'),
        ({'min_new_tokens': 10}, 'min_new_tokens is 10; it must be at most max_new_tokens, 9'),
        ({'logit_bias': {64: 1.0}}, 'logit_bias is for token 64, for which the model has no row: it has 64'),
    ):
        with pytest.raises(InputError, match=words):
            generate(model, params, Letters(), ['ab', 'ab'], max_new_tokens=9, **wrong)


def test_rows_without_a_token_print_nothing(model, params, greedy):
    largest = max(greedy[0])
    assert largest > max(PROMPTS[0])

    class Few(Letters):
        vocab_size = largest

    plain = generate(model, params, Letters(), [PROMPTS[0]], max_new_tokens=8)[0]
    fewer = generate(model, params, Few(), [PROMPTS[0]], max_new_tokens=8)[0]
    assert fewer.replace(' ', '') == plain.replace(' ', '').replace(chr(largest - 4 + 64), '')


@pytest.mark.parametrize(
    ('prompts', 'max_new_tokens', 'words'),
    [
        ([[1]], 0, ['max_new_tokens is 0', 'at least 1']),
        ([[1], []], 4, ['no token', 'BOS']),
        ([[1], [1] * 64], 4, ['prompt 1 has 64 tokens', 'at most 63']),
    ],
)
def test_what_cannot_be_continued_is_refused_in_one_line(model, params, prompts, max_new_tokens, words):
    with pytest.raises(InputError) as error:
        complete(model, params, prompts, max_new_tokens)
    assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


@pytest.mark.slow
def test_a_prompt_is_read_by_the_kernels_of_training(params):
    """Tile by tile: with neither time nor memory of prompt x (prompt + new tokens); the tokens are the formula's."""
    length, new = 1024, 8
    models = {
        name: toy.make_model(attention_implementation=name).clone(
            config=replace(toy.CONFIG, max_seq_len=2 * length)
        )
        for name in ('auto', 'reference')
    }
    prompts = [np.random.default_rng(n).integers(3, 64, size=n).tolist() for n in (length, 700)]
    found = {name: complete(model, params, prompts, new) for name, model in models.items()}
    assert found['auto'] == found['reference']
    memory = {}
    for name, model in models.items():
        for is_empty in (True, False):
            cache = KVCache.create(model.config, 2, 2 * length, jnp.float32)
            tokens, counts = np.zeros((2, 512), np.int32), np.ones(2, np.int32)
            program = decoding.extend.lower(
                model, unstack(params), cache, None, counts, tokens, counts, is_first=is_empty
            )
            memory[name, is_empty] = program.compile().memory_analysis().temp_size_in_bytes
    scores = 2 * toy.CONFIG.num_heads * 512 * 512 * 4
    assert max(memory['auto', True], memory['auto', False]) < scores / 2 < scores < memory['reference', True]
