import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llama_jax.errors import InputError
from llama_jax.inference.filters import most_likely
from llama_jax.inference.sampling import (
    Sampler,
    SamplerRows,
    candidates,
    count_drawn,
    draw_tokens,
    row_key,
    seen_in_prompts,
)
from llama_jax.inference.sampling import draw as draw_rows

draw_rows = jax.jit(draw_rows)
adjust, keep = jax.jit(SamplerRows.adjust), jax.jit(SamplerRows.filter)

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3], np.float32)  # most likely first: 1, 3, 0, 2
DRAWS = 4000


def tokens_of(sampler, logits, streams=None):
    settings = SamplerRows.create(
        [sampler] * len(logits), range(len(logits)), [()] * len(logits), logits.shape[-1]
    )
    return np.asarray(draw_rows(settings, logits, 0).token)


def draw(sampler, probabilities=PROBABILITIES):
    """How often each token is drawn."""
    logits = jnp.log(jnp.broadcast_to(probabilities, (DRAWS, len(probabilities)))) + 3.0
    tokens = tokens_of(sampler, logits)
    return np.bincount(tokens, minlength=len(probabilities)) / DRAWS


def expect(sampler, kept):
    """Tokens in `kept` are drawn as their renormalised probabilities say, and no other."""
    kept_mass = np.where(np.isin(np.arange(4), kept), PROBABILITIES, 0.0)
    wanted = kept_mass / kept_mass.sum()
    found = draw(sampler)
    assert set(np.flatnonzero(found)) == set(kept)
    np.testing.assert_allclose(found, wanted, atol=0.04)  # 5 standard deviations of 4000 draws


def test_temperature_zero_takes_the_most_likely():
    logits = jax.random.normal(jax.random.key(0), (5, 9))
    np.testing.assert_array_equal(tokens_of(Sampler(), logits), np.argmax(logits, axis=-1))


def test_of_equally_likely_tokens_the_first_is_taken():
    rng, inf = np.random.default_rng(0), np.inf
    logits = rng.integers(3, size=(200, 9)).astype(np.float32)
    np.testing.assert_array_equal(most_likely(jnp.array(logits)), np.argmax(logits, axis=-1))
    some = np.array([[-inf, -inf, -inf], [-inf, -0.0, 0.0], [1, np.nan, 2]], np.float32)
    np.testing.assert_array_equal(most_likely(jnp.array(some)), [0, 1, 2])  # whatever NaN gives is a token


def test_all_tokens_are_drawn_by_their_probabilities():
    expect(Sampler(temperature=1.0), [0, 1, 2, 3])


def test_temperature_divides_the_logits():
    found = draw(Sampler(temperature=2.0))
    np.testing.assert_allclose(found, PROBABILITIES**0.5 / np.sum(PROBABILITIES**0.5), atol=0.04)


@pytest.mark.parametrize(
    ('top_k', 'kept'), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_most_likely(top_k, kept):
    expect(Sampler(temperature=1.0, top_k=top_k), kept)


# Sums of the most likely: 0.5, 0.8, 0.95, 1. The token that crosses the threshold stays.
@pytest.mark.parametrize(
    ('top_p', 'kept'),
    [(1e-6, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_token_that_crosses_it(top_p, kept):
    expect(Sampler(temperature=1.0, top_p=top_p), kept)


def test_top_p_sees_the_distribution_after_temperature():
    # Roots of the probabilities: 0.21, 0.38, 0.12, 0.29. So 0.51 now needs two, and 0.7 three.
    assert set(np.flatnonzero(draw(Sampler(temperature=2.0, top_p=0.7)))) == {0, 1, 3}
    assert set(np.flatnonzero(draw(Sampler(temperature=1.0, top_p=0.7)))) == {1, 3}


def test_each_row_is_filtered_by_itself():
    rows = np.stack([PROBABILITIES, PROBABILITIES[::-1]])
    logits = jnp.log(jnp.tile(rows, (500, 1)))
    tokens = tokens_of(Sampler(temperature=1.0, top_p=0.6), logits)
    assert set(tokens[::2]) == {1, 3} and set(tokens[1::2]) == {0, 2}


def test_seeds_are_reproducible():
    first, other = (Sampler(temperature=1.0, top_k=3, top_p=0.9, seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(draw(first), draw(first))
    assert np.any(draw(first) != draw(other))


def reference(sampler, logits, prompt=(), completion=()):
    """Exact probabilities of the next token, by sorting, in float64."""
    x = np.array(logits, np.float64)
    for token, bias in sampler.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *completion}:
        x[token] *= sampler.repetition_penalty if x[token] < 0 else 1 / sampler.repetition_penalty
    for token in completion:
        x[token] -= sampler.frequency_penalty
    x[list({*completion})] -= sampler.presence_penalty
    if sampler.temperature == 0:
        return np.arange(len(x)) == np.argmax(x)
    arrays = (
        np.array([value]) for value in (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)
    )
    p = kept(x[None], *arrays)[0][0]
    return p / p.sum()


def kept(x, temperature, top_k, top_p, min_p):
    """Probabilities that the filters leave by sorting, and how near a token is to being the other way, by row."""
    rows = np.arange(len(x))
    p = np.exp((x - x.max(axis=-1, keepdims=True)) / temperature[:, None])
    last = np.sort(p)[:, ::-1][rows, np.where(top_k == 0, x.shape[1], np.minimum(top_k, x.shape[1])) - 1]
    p = np.where(p >= last[:, None], p, 0)
    p /= p.sum(axis=-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind='stable')
    before = np.empty_like(p)
    before[rows[:, None], order] = np.cumsum(np.sort(p)[:, ::-1], axis=-1) - np.sort(p)[:, ::-1]
    is_cut = (p > 0) & (before > 0) & (top_p < 1)[:, None]
    far = np.min(np.abs(before - top_p[:, None]), axis=-1, where=is_cut, initial=1)
    p = np.where((before > top_p[:, None]) & (top_p < 1)[:, None], 0, p)
    ratio = p / p.max(axis=-1, keepdims=True)
    far = np.minimum(
        far, np.min(np.abs(ratio - min_p[:, None]), axis=-1, where=(min_p > 0)[:, None], initial=1)
    )
    return np.where(ratio < min_p[:, None], 0, p), far


def seen_of(prompts, completions, vocab_size):
    seen = jnp.array(seen_in_prompts(prompts, vocab_size), jnp.int32)
    for column in jnp.array(completions, jnp.int32).T:
        seen = count_drawn(seen, column)
    return seen


def settings_of(samplers, vocab_size, streams=None):
    streams = [0] * len(samplers) if streams is None else streams
    return SamplerRows.create(samplers, streams, [()] * len(samplers), vocab_size)


@pytest.mark.parametrize('kind', ['ties', 'no ties', 'equal', 'neighbours'])
def test_sets_are_those_of_sorting(kind):
    rng = np.random.default_rng(3)
    count, size = (8000, 40) if kind == 'ties' else (1000, 700) if kind == 'no ties' else (1000, 40)
    logits = rng.normal(scale=3, size=(count, size)).astype(np.float32)
    if kind == 'ties':
        logits = np.round(logits) * np.float32(0.75)
    elif kind == 'neighbours':  # they differ in the last bits alone
        logits = (2**23 + rng.integers(-50, 50, size=(count, size))).astype(np.float32) * np.float32(2.0**-22)
    elif kind == 'equal':  # masked and signed zeros too
        logits = rng.choice(np.array([0.0, -0.0, -np.inf], np.float32), p=[0.6, 0.3, 0.1], size=(count, size))
    settings = {
        'temperature': rng.uniform(0.2, 3, size=count),
        'top_k': rng.choice([0, 1, 2, 5, 12, 39, 40, 41], size=count),
        'top_p': np.where(
            rng.uniform(size=count) < 0.5, rng.uniform(size=count), rng.choice([1, 1e-9], size=count)
        ),
        'min_p': np.where(rng.uniform(size=count) < 0.5, rng.uniform(size=count) ** 4, 0),
    }
    settings = {
        name: value.astype(np.int32 if name == 'top_k' else np.float32) for name, value in settings.items()
    }
    if kind == 'neighbours':
        settings['temperature'] = np.ones(count, np.float32)  # in fp32 others make some of them equal
    found = keep(settings_of([Sampler()], size).replace(**settings), logits)
    wanted, far = kept(logits.astype(np.float64), **settings)
    sure = far > 2e-6  # else fp32 may round a sum or a quotient to the other side
    assert sure.mean() > 0.97
    np.testing.assert_array_equal(np.asarray(found)[sure] > -np.inf, wanted[sure] > 0)


def mixed_settings():
    """Every combination of filters, with and without what changes the logits before; and greedy rows between."""
    filters = itertools.product((0.7, 1.6), (0, 4), (1.0, 0.8), (0.0, 0.1))
    before = [
        {}, {'repetition_penalty': 1.4}, {'presence_penalty': 0.8}, {'frequency_penalty': -0.4},
        {'logit_bias': {1: 1.0, 7: -100.0}},
    ]  # fmt: skip
    before.append({name: value for settings in before for name, value in settings.items()})
    return [Sampler(*f, **b) for f in filters for b in before] + [Sampler(**b) for b in before]


def check_law(rounds, draws=500):
    rng = np.random.default_rng(8)
    samplers = mixed_settings()
    logits = rng.normal(scale=1.5, size=(len(samplers), 10)).astype(np.float32)
    prompts = [rng.integers(10, size=n).tolist() for n in rng.integers(1, 4, size=len(samplers))]
    completions = rng.integers(10, size=(len(samplers), 3)).tolist()
    rows = np.random.default_rng(1).permutation(len(samplers) * draws) % len(samplers)  # mixed in the batch
    # The first stops and biases: all that there are, without most of the padding.
    settings = jax.tree.map(
        lambda leaf: leaf[rows, :8] if leaf.ndim == 2 else leaf[rows], settings_of(samplers, 10)
    )
    seen, streams = seen_of(prompts, completions, 10)[rows], np.arange(len(rows), dtype=np.int32)
    several = [
        draw_rows(settings.replace(stream=streams + n * len(rows)), logits[rows], np.int32(3), seen)
        for n in range(rounds)
    ]
    rows, draws = np.tile(rows, rounds), draws * rounds
    drawn = jax.tree.map(lambda *parts: np.concatenate(parts), *several)
    for index, sampler in enumerate(samplers):
        wanted = reference(sampler, logits[index], prompts[index], completions[index])
        ours = rows == index
        tokens = drawn.token[ours]
        found = np.bincount(tokens, minlength=10)
        assert not found[wanted == 0].any()
        bins = wanted > 0
        statistic = np.sum((found - draws * wanted)[bins] ** 2 / (draws * wanted[bins]))
        # Of 102 laws, at chances of one in 100,000 each; the draws are the same in every run.
        assert statistic <= scipy.stats.chi2.isf(1e-5, max(bins.sum() - 1, 1)), sampler
        np.testing.assert_allclose(drawn.filtered_log_probability[ours], np.log(wanted[tokens]), atol=1e-5)
        raw = reference(Sampler(1.0), logits[index])
        np.testing.assert_allclose(drawn.log_probability[ours], np.log(raw[tokens]), atol=1e-5)


def test_draws_follow_the_law_of_their_rows_settings():
    check_law(rounds=2)


@pytest.mark.slow
def test_many_draws_follow_the_law_of_their_rows_settings():
    check_law(rounds=40)


def test_a_row_is_drawn_alike_in_any_company():
    rng = np.random.default_rng(5)
    samplers = mixed_settings()[::5]
    logits = rng.normal(size=(len(samplers), 300)).astype(np.float32)
    steps = rng.integers(9, size=len(samplers)).astype(np.int32)
    seen = seen_of(rng.integers(300, size=(len(samplers), 20)).tolist(), [[]] * len(samplers), 300)
    together = draw_rows(settings_of(samplers, 300), logits, steps, seen)
    for row, sampler in enumerate(samplers):
        alone = settings_of([sampler], 300)
        one = draw_rows(alone, logits[row : row + 1], steps[row : row + 1], seen[row : row + 1])
        assert one.token[0] == together.token[row]
        # Another batch may be another program, which sums in another order.
        np.testing.assert_allclose(one.log_probability[0], together.log_probability[row], atol=1e-5)
    # A row keeps its bits whatever the others ask for.
    plain = [Sampler(temperature=0.9, top_p=0.9, seed=seed) for seed in range(8)]
    want = draw_rows(settings_of(plain, 300), logits[:8], 4)
    company = [*plain[:4], *(Sampler(repetition_penalty=1.2, top_k=3, min_p=0.2) for _ in range(4))]
    found = draw_rows(settings_of(company, 300), logits[:8], 4, seen[:8])
    np.testing.assert_array_equal(found.token[:4], want.token[:4])
    np.testing.assert_array_equal(found.log_probability[:4], want.log_probability[:4])


def test_seed_stream_and_step_each_tell_draws_apart():
    logits = np.zeros((4, 1000), np.float32)
    samplers = [Sampler(1.0), Sampler(1.0, seed=1), Sampler(1.0), Sampler(1.0)]
    settings = settings_of(samplers, 1000, streams=[0, 0, 1, 0])
    tokens = draw_rows(settings, logits, np.array([0, 0, 0, 1], np.int32)).token.tolist()
    assert len({*tokens}) == 4
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 0)
    assert tokens[1] == draw_tokens(key[None], logits[1:2])[0]


@pytest.mark.parametrize('size', [300, 1280])  # parts of 3 tokens, of which some are padding; of 10
def test_tokens_of_any_part_of_a_vocabulary_are_drawn_by_their_probabilities(size):
    rng, draws = np.random.default_rng(size), 20_000
    logits = rng.normal(scale=3, size=size).astype(np.float32)
    logits[rng.permutation(size)[: size // 4]] = -np.inf
    logits[: size // 5] = -np.inf  # parts of nothing that may be drawn
    keys = jax.vmap(row_key)(*np.ones((2, draws), np.int32), np.arange(draws, dtype=np.int32))
    tokens = jax.jit(draw_tokens)(keys, np.broadcast_to(logits, (draws, size)))
    p = np.exp(logits.astype(np.float64))
    found, wanted = np.bincount(tokens, minlength=size), draws * p / p.sum()
    assert len(found) == size and not found[wanted == 0].any()
    often = wanted >= 5
    found, wanted = (np.append(x[often], x[~often].sum()) for x in (found, wanted))
    assert often.sum() > 40
    assert np.sum((found - wanted) ** 2 / wanted) <= scipy.stats.chi2.isf(1e-3, len(wanted) - 1)


def test_twenty_settings_are_one_program():
    traces = []

    @jax.jit
    def traced(settings, logits, seen):
        traces.append(1)
        return draw_rows(settings, logits, 0, seen).token

    rng = np.random.default_rng(0)
    seen = seen_of([[1]] * 3, [[]] * 3, 50)
    adjusting = [s for s in mixed_settings() if s.adjusts]
    for _ in range(20):
        samplers = rng.choice(np.array(adjusting), size=3).tolist()
        stops = [rng.integers(50, size=n).tolist() for n in (0, 3, 8)]
        traced(SamplerRows.create(samplers, [0, 1, 2], stops, 50), np.zeros((3, 50), np.float32), seen)
    assert len(traces) == 1


def test_penalties_are_those_of_transformers():
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    rng = np.random.default_rng(2)
    logits = rng.normal(scale=3, size=(6, 50)).astype(np.float32)
    prompts, completions = rng.integers(50, size=(6, 7)), rng.integers(50, size=(6, 5))
    samplers = [
        Sampler(rng.uniform(0.5, 2), 20, 0.9, 0.05, repetition_penalty=1.7, logit_bias={4: 3.0})
        for _ in range(6)
    ]
    settings = settings_of(samplers, 50)
    seen = seen_of(prompts.tolist(), completions.tolist(), 50)
    found = keep(settings, adjust(settings, logits, seen, np.full(6, 5)))
    for row, sampler in enumerate(samplers):
        scores = torch.tensor(logits[row : row + 1])
        ids = torch.tensor(np.concatenate([prompts[row], completions[row]])[None])
        for process in (
            transformers.SequenceBiasLogitsProcessor([[[4], 3.0]]),
            transformers.RepetitionPenaltyLogitsProcessor(1.7),
            transformers.TemperatureLogitsWarper(float(sampler.temperature)),
            transformers.TopKLogitsWarper(20),
            transformers.TopPLogitsWarper(0.9),
            transformers.MinPLogitsWarper(0.05),
        ):
            scores = process(ids, scores)
        np.testing.assert_allclose(found[row], scores[0], rtol=1e-5)


def test_numbers_of_any_size_are_arrays_of_32_bits():
    sampler = Sampler(1.0, top_k=10**30, top_p=1e-300, min_new_tokens=10**30, seed=2**32 - 1)
    settings = settings_of([sampler], 4)
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(settings)} == {4}
    assert draw_rows(settings, jnp.log(PROBABILITIES)[None], 0, jnp.zeros((1, 4), jnp.int32)).token == 1
    other = settings_of([Sampler(1.0, seed=-1)], 4)
    assert settings.seed == other.seed  # the same 32 bits


def test_the_prompt_is_seen_without_its_padding():
    seen = seen_of([[3, 1, 1], [2]], [[3, 3], [0, 3]], 5)
    np.testing.assert_array_equal(seen, [[0, 1, 0, 5, 0], [2, 0, 1, 2, 0]])


def test_candidates_are_the_most_likely_first():
    logits = np.log(np.stack([PROBABILITIES, PROBABILITIES[::-1], [0.25] * 4])).astype(np.float32) - 2
    tokens, log_probabilities = candidates(logits, 3)
    np.testing.assert_array_equal(tokens, [[1, 3, 0], [2, 0, 3], [0, 1, 2]])
    np.testing.assert_allclose(np.exp(log_probabilities), [[0.5, 0.3, 0.15]] * 2 + [[0.25] * 3], rtol=1e-5)


def test_stop_tokens_of_any_number_have_few_shapes():
    rows = [SamplerRows.create([Sampler()], [0], [range(number)], 500) for number in range(300)]
    assert {row.stop_ids.shape[1] for row in rows} == {8, 16, 32, 64, 128, 256, 512}


def test_stop_tokens_are_of_each_row_and_wait():
    stops = [(1,), (), tuple(range(9)), (2, 10**9, -1)]  # what the model has no row for is never drawn
    # One of them asks for more, so that all are adjusted at any step.
    asked = [Sampler(min_new_tokens=2), Sampler(min_new_tokens=2, presence_penalty=1.0)]
    settings = SamplerRows.create([*asked, asked[0], asked[0]], [0] * 4, stops, 12)
    assert settings.is_stop(jnp.array([1, 1, 8, 3])).tolist() == [True, False, True, False]
    logits, seen = np.zeros((4, 12), np.float32), np.zeros((4, 12), np.int32)
    early, late = (adjust(settings, logits, seen, np.full(4, step)) for step in (1, 2))
    assert [np.flatnonzero(row == -np.inf).tolist() for row in np.asarray(early)] == [
        [1],
        [],
        [*range(9)],
        [2],
    ]
    np.testing.assert_array_equal(late, logits)


@pytest.mark.parametrize(
    ('setting', 'words'),
    [
        ({'temperature': -0.1}, 'temperature is -0.1; it must be 0'),
        ({'top_k': -1}, 'top_k is -1; it must be 0 (all tokens) or a larger whole number'),
        ({'top_p': 0.0}, 'top_p is 0.0; it must be above 0'),
        ({'top_p': 1.5}, 'top_p is 1.5; it must be above 0 and at most 1'),
        ({'temperature': float('nan')}, 'temperature is nan'),
        ({'temperature': 1e-9}, 'temperature is 1e-09; it must be 0 (greedy) or from 1e-06 to 1e+06'),
        ({'min_p': 1.1}, 'min_p is 1.1; it must be from 0 (all tokens) to 1'),
        ({'repetition_penalty': 0}, 'repetition_penalty is 0; it must be from 0.01 to 100'),
        ({'presence_penalty': -3}, 'presence_penalty is -3; it must be from -2 to 2'),
        ({'frequency_penalty': float('inf')}, 'frequency_penalty is inf; it must be from -2 to 2'),
        ({'logit_bias': {3: 101}}, 'logit_bias of token 3 is 101; it must be from -100 to 100'),
        ({'logit_bias': {3: float('nan')}}, 'logit_bias of token 3 is nan'),
        ({'logit_bias': {-1: 1.0}}, 'logit_bias is for token -1; an id is a whole number'),
        ({'logit_bias': {i: 1 for i in range(301)}}, 'logit_bias is for 301 tokens; it may be for 300'),
        ({'min_new_tokens': -1}, 'min_new_tokens is -1; it must be 0 or'),
        ({'seed': 2**32}, 'seed is 4294967296; it must be a whole number of 32 bits'),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(setting, words):
    with pytest.raises(InputError) as error:
        Sampler(**setting)
    assert words in str(error.value) and '\n' not in str(error.value)
