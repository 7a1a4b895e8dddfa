"""Several tokens a step: what is proposed, and that what is taken of it changes no distribution."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llama_jax import pretrained
from llama_jax.errors import InputError
from llama_jax.inference import decoding, proposers, speculative
from llama_jax.inference import generator as generator_of
from llama_jax.inference.decode_weights import decode_weights
from llama_jax.inference.generate import complete
from llama_jax.inference.generator import Generator
from llama_jax.inference.proposers import Draft, Heard, Lookup, Proposal
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler, SamplerRows, count_drawn, draw, seen_in_prompts
from llama_jax.models.kv_cache import KVCache
from llama_jax.models.llama import LlamaForCausalLM, param_axes
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.quantize.params import quantize
from tests import toy
from tests.inference.sampling_test import reference

ROWS, SIZE, NEW = 6_000, 5, 3

draw_rows, draw_proposal = jax.jit(draw), jax.jit(proposers.draw_proposal)
count_one = jax.jit(count_drawn)
verify, count_taken = jax.jit(speculative.verify), jax.jit(speculative.count_taken)
propose = jax.jit(lambda lookup, heard: lookup.propose(NO_CACHE, heard)[1].tokens)
NO_CACHE = KVCache((), (), np.zeros(0, np.int32))

EVERYTHING = Sampler(
    1.3, top_k=4, top_p=0.97, min_p=0.02, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.6,
    logit_bias={2: 0.5},
)  # fmt: skip


def settings_of(sampler, num_rows=ROWS, size=SIZE):
    settings = SamplerRows.create([sampler], [0], [(0,)], size)
    settings = jax.tree.map(
        lambda x: np.repeat(x[:, :8] if x.ndim == 2 else x, num_rows, axis=0), settings
    )  # the first biases and stops are all that there are
    return settings.replace(stream=np.arange(num_rows, dtype=np.int32))


def table(seed):
    """What follows each token, of a model that looks at the last one alone."""
    return np.random.default_rng(seed).normal(scale=1.2, size=(SIZE, SIZE)).astype(np.float32)


TARGET, DRAFT = table(0), table(1)


def seen_of_first(token):
    return seen_in_prompts([[token]] * ROWS, SIZE).astype(np.int32)


def propose_drawn(settings, tokens, step, seen):
    """Two tokens of a draft model."""
    proposed, logits = [], []
    for n in range(2):
        token, law = draw_proposal(settings, DRAFT[tokens], step + n, seen)
        seen = None if seen is None else count_one(seen, token)
        tokens = np.asarray(token)
        proposed.append(token)
        logits.append(law)
    return Proposal(jnp.stack(proposed, axis=1), jnp.stack(logits, axis=1))


def propose_certain(settings, tokens, step, seen):
    """Two tokens by a rule of no model: not drawn."""
    return Proposal(jnp.array(np.stack([(tokens + 1) % SIZE, (tokens + 2) % SIZE], axis=1), jnp.int32))


def simulate(sampler, propose_tokens, first=1):
    """The first three tokens of rows that begin with the same, proposals taken of each, log-probabilities."""
    settings = settings_of(sampler)
    prompt = np.full((ROWS, 1), first, np.int32)
    seen = seen_of_first(first) if sampler.adjusts else None
    drawn = draw_rows(settings, TARGET[prompt[:, 0]], 0, seen)
    new = np.zeros((ROWS, NEW + 3), np.int32)
    logged = np.zeros((2, ROWS, NEW + 3))
    rows, given = np.arange(ROWS), np.ones(ROWS, np.int32)
    new[:, 0] = drawn.token
    logged[:, :, 0] = drawn.log_probability, drawn.filtered_log_probability
    if seen is not None:
        seen = count_one(seen, drawn.token)
    taken = 0
    while (given < NEW).any():  # rows go on beyond what is looked at, each at its own pace
        newest = new[rows, given - 1]
        proposal = propose_tokens(settings, newest, given, seen)
        read = np.concatenate([newest[:, None], proposal.tokens], axis=1)
        count, drawn = verify(settings, TARGET[read], proposal, given, seen)
        going_on = given < NEW
        kept = np.where(going_on, count + 1, 0)
        for column in range(3):
            mine = rows[column < kept]
            new[mine, given[mine] + column] = drawn.token[mine, column]
            logged[0, mine, given[mine] + column] = drawn.log_probability[mine, column]
            logged[1, mine, given[mine] + column] = drawn.filtered_log_probability[mine, column]
        if seen is not None:
            seen = count_taken(seen, drawn.token, kept)
        given, taken = given + kept, taken + count[going_on].sum()
    return new[:, :NEW], logged[:, :, :NEW], taken


@functools.cache
def law(sampler, first=1):
    """Exact probabilities of all that may be the first three tokens, and of each of them by the model."""
    joint, raw = np.ones((SIZE,) * NEW), np.ones((SIZE,) * NEW)
    for tokens in itertools.product(range(SIZE), repeat=NEW):
        for step, token in enumerate(tokens):
            logits = TARGET[[first, *tokens][step]]
            joint[tokens] *= reference(sampler, logits, [first], tokens[:step])[token]
            raw[tokens] *= reference(Sampler(1.0), logits)[token]
    return joint, raw


def check_law(sampler, propose_tokens):
    tokens, logged, taken = simulate(sampler, propose_tokens)
    assert taken > ROWS / 4  # else little is shown
    joint, raw = law(sampler)
    found = np.zeros_like(joint)
    np.add.at(found, tuple(tokens.T), 1)
    assert joint.sum() == pytest.approx(1) and not found[joint == 0].any()
    bins = joint > 0
    statistic = np.sum((found - ROWS * joint)[bins] ** 2 / (ROWS * joint[bins]))
    assert statistic < scipy.stats.chi2.isf(1e-5, bins.sum() - 1)  # the draws are the same in every run
    np.testing.assert_allclose(logged[1].sum(-1), np.log(joint[tuple(tokens.T)]), atol=1e-5)
    np.testing.assert_allclose(logged[0].sum(-1), np.log(raw[tuple(tokens.T)]), atol=1e-5)


@pytest.mark.parametrize('propose_tokens', [propose_drawn, propose_certain])
def test_three_tokens_follow_the_law_that_they_have_one_by_one(propose_tokens):
    check_law(EVERYTHING, propose_tokens)


@pytest.mark.slow
@pytest.mark.parametrize('propose_tokens', [propose_drawn, propose_certain])
@pytest.mark.parametrize('sampler', [Sampler(1.0), Sampler(0.6, top_k=3), Sampler(1.5, top_p=0.8)])
def test_three_tokens_follow_the_law_whatever_filters_them(sampler, propose_tokens):
    check_law(sampler, propose_tokens)


def test_as_much_is_taken_as_two_distributions_have_in_common():
    """The sum of the smaller of the two, the most that is possible."""
    settings = settings_of(EVERYTHING)
    last, step = np.full(ROWS, 1), np.zeros(ROWS, np.int32)
    seen = seen_of_first(1)
    proposal = propose_drawn(settings, last, step, seen)
    read = np.concatenate([last[:, None], proposal.tokens], axis=1)
    count, _ = verify(settings, TARGET[read], proposal, step, seen)
    p, q = (reference(EVERYTHING, law[1], [1]) for law in (TARGET, DRAFT))
    common = np.minimum(p, q).sum()
    assert 0.2 < common < 0.8
    sigma = np.sqrt(common * (1 - common) / ROWS)
    assert np.mean(np.asarray(count) > 0) == pytest.approx(common, abs=4 * sigma)


@pytest.mark.slow
def test_what_was_not_drawn_changes_no_draw():
    """The tokens of a seed are those that it draws one by one."""
    tokens, *_ = simulate(EVERYTHING, propose_certain)
    alone, *_ = simulate(EVERYTHING, lambda settings, *_: Proposal(jnp.zeros((ROWS, 2), jnp.int32)))
    np.testing.assert_array_equal(tokens, alone)


def looked_up(tokens, num_tokens):
    """What follows the longest match of the end, the latest of several, and on by what is proposed already."""
    best, following = 0, len(tokens) - 1
    for place in range(len(tokens) - 1):
        length = 0
        while length < min(place + 1, 6) and tokens[place - length] == tokens[-1 - length]:
            length += 1
        if length >= best:
            best, following = length, place + 1
    row = list(tokens)
    for n in range(num_tokens):
        row.append(row[following + n])
    return row[len(tokens) :]


def test_a_lookup_proposes_what_followed_the_longest_match_of_the_end():
    rng = np.random.default_rng(0)
    lengths = [1, 2, 3, *range(4, 41)] * 5
    rows = [rng.integers(2 if n % 2 else 4, size=length).tolist() for n, length in enumerate(lengths)]
    rows += [[7] * 9, [1, 2, 3] * 5, [*range(20), 3, 4], [*range(20), 3, 9, 4]]
    padded = rng.integers(4, size=(len(rows), 48)).astype(np.int32)  # of earlier rows, or rejected
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    last = np.array([len(row) - 1 for row in rows], np.int32)
    heard = Heard(padded, last, last, None, settings_of(Sampler(), len(rows)))
    found = propose(Lookup(7), heard)
    assert found.tolist() == [looked_up(row, 7) for row in rows]
    assert found[-4:, :3].tolist() == [[7, 7, 7], [1, 2, 3], [5, 6, 7], [5, 6, 7]]


@pytest.fixture(scope='module')
def model():
    return toy.make_model().clone(config=dataclasses.replace(toy.CONFIG, num_layers=1))


@pytest.fixture(scope='module')
def params(model):
    return decode_weights(toy.make_params(model), jnp.float32)


PROMPTS = [[1, 5, 9], [1, 7, 2, 8, 30, 11, 4], [1], [1, 2] * 10]
MIXED = [
    Sampler(),
    Sampler(repetition_penalty=1.3, frequency_penalty=0.5),
    Sampler(0.9, top_k=20, seed=3),
    Sampler(1.2, top_p=0.9, presence_penalty=0.5, min_new_tokens=4, seed=7),
]


def completed(generator, prompts=PROMPTS, samplers=MIXED, stop_ids=(), max_new_tokens=20):
    rows = {}
    for prompt, sampler in zip(prompts, samplers, strict=True):
        rows[generator.submit(CompletionRequest(prompt, max_new_tokens, sampler, stop_ids))] = []
    for progress in generator.run():
        rows[progress.number] += progress.tokens
    return list(rows.values())


@pytest.fixture(scope='module')
def plain(model, params):
    return functools.cache(lambda *stops: completed(Generator(model, params, num_slots=4), stop_ids=stops))


def speed(generator):
    return generator._slots.given / generator._slots.passes


@pytest.fixture(scope='module')
def drafted(model, params):
    """Completions with a proposer, and tokens a pass."""

    def run(proposer, *args, num_slots=4, **options):
        generator = Generator(model, params, num_slots=num_slots, draft=proposer)
        rows = completed(generator, *args, **options)
        return rows, speed(generator)

    return run


def until(rows, stops):
    """What is before the first stop token."""
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


def test_what_is_proposed_without_draws_changes_no_row(model, params, plain, drafted):
    """Rows of any length and settings in one batch."""
    stops = (plain()[0][7], plain()[3][11])
    assert plain(*stops) == until(plain(), stops) != plain()
    found, each = drafted(Lookup(4))
    assert found == plain() and each > 1
    assert drafted(Lookup(4), stop_ids=stops)[0] == plain(*stops)
    # Of two tokens at a place half of what is proposed is drawn, and the draws behind it have their own numbers.
    close = [Sampler(1.0, top_k=2, seed=seed) for seed in range(4)]
    assert drafted(Lookup(4), samplers=close)[0] == completed(
        Generator(model, params, num_slots=4), samplers=close
    )


def test_a_draft_leaves_greedy_rows_as_they_are_and_draws_by_the_seed_alone(model, params, plain, drafted):
    draft = Draft(model, params, 3)
    found, each = drafted(draft)
    assert found[:2] == plain()[:2] and [len(row) for row in found] == [20] * 4
    assert each == 19 / 5  # of four tokens each, as it always agrees with itself
    assert drafted(draft, PROMPTS[::-1], MIXED[::-1])[0] == found[::-1]
    # Whatever proposes: one that thinks least likely what the model thinks most likely.
    wrong, slow = drafted(Draft(model, params | {'head': -params['head']}, 3))
    assert wrong[:2] == plain()[:2] and slow < 1.2
    # A stop token among those that are taken ends the row there.
    stops = (found[0][5], found[3][9])
    generator = Generator(model, params, num_slots=4, draft=draft)
    ended = completed(generator, stop_ids=stops)
    assert ended == until(found, stops) != found
    given = [min(len(row) + 1, 20) for row in ended]  # with the stop token, and nothing behind it
    assert generator._slots.given == sum(given) - 4
    proposed, taken = generator.drafted
    assert proposed == 3 * generator._slots.passes and proposed > taken > proposed / 2


def test_a_copy_takes_fewer_than_half_the_passes(model, params):
    """Of a text of 25 tokens that it has read, by a model whose every token has one successor."""
    rng = np.random.default_rng(0)
    text = rng.permutation(64)[:25].tolist()
    embed, head = rng.normal(size=(64, 32)).astype(np.float32), np.zeros((64, 32), np.float32)
    head[text[1:] + text[:1]] = embed[text]
    still = jax.tree.map(jnp.zeros_like, params['blocks'])
    weights = params | {'embed': jnp.array(embed), 'head': jnp.array(head), 'blocks': still}
    generator = Generator(model, weights, num_slots=4, draft=Lookup(4))
    sampler = Sampler(min_new_tokens=1)  # so that it is the program of the other tests
    assert completed(generator, [text], [sampler], max_new_tokens=25) == [text]
    assert speed(generator) == 24 / 5


def test_choices_of_a_prompt_are_proposed_for_as_well(model, params):
    """A prompt that is read once, from where users ask."""
    asked = {
        'n': 3,
        'max_new_tokens': 20,
        'temperature': 0.5,
        'repetition_penalty': 1.05,
        'log_probabilities': 0,
    }
    prompts, plain = PROMPTS[3:], complete(model, params, None, PROMPTS[3:], **asked)
    found = complete(model, params, None, prompts, draft=Lookup(4), **asked)
    assert [one.tokens for one in found[0]] == [one.tokens for one in plain[0]]
    for one, other in zip(found[0], plain[0], strict=True):
        for ours, theirs in zip(one.scores, other.scores, strict=True):
            assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)
    with pytest.raises(InputError, match='a draft and a logits_processor are both given'):
        complete(model, params, None, prompts, draft=Lookup(4), logits_processor=lambda logits, *_: logits)


@pytest.mark.slow
def test_three_tokens_of_a_model_follow_their_law(model, params):
    """Of every text of three tokens that may come, the probability as the model has it, reading it at once."""
    sampler, prompt, count = Sampler(0.9, top_k=4, repetition_penalty=1.2), [1, 5, 9, 5], 4096
    cheap = params | {'head': params['head'] + 0.1 * np.random.default_rng(0).normal(size=(64, 32))}
    draft = Draft(model, cheap, 3)
    settings = settings_of(sampler, count, size=64)
    piece = (
        np.zeros(count, np.int32),
        np.tile(np.array(prompt, np.int32), (count, 1)),
        np.full(count, 4, np.int32),
    )
    slots = np.arange(count, dtype=np.int32)
    rows = decoding.empty_rows(model, count, 32, settings)
    cache, last = decoding.extend(model, params, rows.cache, None, *piece)
    begun = decoding.Begun(
        slots, np.full(count, NEW, np.int32), seen_in_prompts([prompt] * count, 64), settings
    )
    rows, first = decoding.first(model, params, dataclasses.replace(rows, cache=cache), last, begun)
    memory = speculative.read(draft, speculative.empty_memory(model, draft, count, 32, 32), slots, *piece)
    _, _, steps, passes = speculative.decode(
        model, params, draft, rows, memory, np.zeros(count, bool), np.int32(4)
    )
    assert set(np.asarray(steps.count)) == {NEW - 1} and 1.1 < np.mean(passes) < 1.9
    found = np.concatenate([first.tokens, steps.tokens[:, : NEW - 1]], axis=1).tolist()
    texts, wanted = [()], np.ones(1)
    for _ in range(NEW):
        logits = jax.jit(lambda tokens: model.apply({'params': params}, tokens)[0][:, -1])
        logits = logits(jnp.array([prompt + [*text] for text in texts]))
        laws = [reference(sampler, row, prompt, text) for row, text in zip(logits, texts, strict=True)]
        wanted = np.concatenate([p * law[law > 0] for p, law in zip(wanted, laws, strict=True)])
        texts = [(*text, int(i)) for text, law in zip(texts, laws, strict=True) for i in np.flatnonzero(law)]
    assert len(texts) == 64 and {*map(tuple, found)} <= {*texts}
    counts = np.array([sum(tuple(row) == text for row in found) for text in texts])
    rare = count * wanted < 5
    bins = [
        *zip(counts[~rare], count * wanted[~rare], strict=True),
        (sum(counts[rare]), count * sum(wanted[rare])),
    ]
    statistic = sum((n - mean) ** 2 / mean for n, mean in bins if mean)
    assert statistic < scipy.stats.chi2.isf(1e-5, len(bins) - 1)


@pytest.mark.slow
def test_any_company_slots_and_prefixes_leave_a_row_as_it_is(model, params, drafted, monkeypatch):
    """Rows that wait for a slot, end at the context or outgrow their room; beginnings that were read before."""
    monkeypatch.setattr(generator_of, '_BLOCK', 8)
    monkeypatch.setattr(decoding, 'LEAST_ROOM', 16)
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(3, 64, size=n)] for n in (40, 3, 62, 25, 1, 11, 40, 0)]
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    samplers = [Sampler(0.9 * (n % 2), seed=n, repetition_penalty=1.2) for n in range(8)]
    many = {'prompts': prompts, 'samplers': samplers, 'max_new_tokens': 60}
    greedy = completed(Generator(model, params, num_slots=8), **many)
    for proposer in (Lookup(4), Draft(model, params | {'head': 1.2 * params['head']}, 3)):
        found, _ = drafted(proposer, num_slots=8, **many)
        assert [len(row) for row in found] == [23, 60, 1, 38, 60, 52, 23, 60]
        assert found[::2] == greedy[::2]
        assert drafted(proposer, num_slots=2, **many)[0] == found
        generator = Generator(model, params, num_slots=2, prefix_bytes=(1 << 20, 0), draft=proposer)
        assert completed(generator, **many) == completed(generator, **many) == found


@pytest.mark.slow
def test_a_mesh_speculates_as_one_device_does(model):
    partitioner, params = Partitioner(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})), toy.make_params(model)
    split = jax.device_put(params, partitioner.tree_shardings(params, param_axes(model)))
    on_mesh = model.clone(partitioner=partitioner)
    cheap, cheap_split = quantize(params, 'int4'), quantize(split, 'int4')
    alone = completed(Generator(model, params, num_slots=4, draft=Draft(model, cheap, 3)))
    found = completed(Generator(on_mesh, split, num_slots=4, draft=Draft(on_mesh, cheap_split, 3)))
    assert found == alone
    looked = completed(Generator(on_mesh, split, num_slots=4, draft=Lookup(3)))
    assert looked == completed(Generator(model, params, num_slots=4))


@pytest.mark.slow
def test_real_weights_say_what_they_say_alone(shared_data):
    """The published text of stories260K, with every kind of draft and one that is always wrong."""
    folder = shared_data / 'weights' / 'stories260K'
    config, params, tokenizer = pretrained.load(
        folder / 'stories260K.pt', tokenizer=str(folder / 'tok512.model')
    )
    expected = json.loads((folder / 'expected.json').read_text())
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    params, wrong = unstack(params), unstack(params)
    wrong['final_norm'] = -wrong['final_norm']
    passes = {}
    for name, proposer in {
        'lookup': Lookup(4),
        'int4': Draft(model, quantize(params, 'int4'), 4),
        'itself': Draft(model, params, 4),
        'wrong': Draft(model, wrong, 4),
    }.items():
        generator = Generator(model, params, num_slots=1, draft=proposer)
        (found,) = completed(generator, [[1]], [Sampler()], max_new_tokens=expected['max_new_tokens'])
        assert tokenizer.decode(found).strip() == expected['greedy_text'].strip()
        passes[name] = generator._slots.passes
    assert passes['itself'] == 51 and passes['wrong'] == 255
    assert passes['int4'] < 80 and passes['lookup'] < 200


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'num_tokens': 0}, 'a draft proposes 0 tokens; it may be 1 to 32'),
        ({'num_tokens': 33}, 'a draft proposes 33 tokens; it may be 1 to 32'),
        ({'vocab_size': 65}, 'the draft has rows for 65 tokens, the model for 64'),
    ],
)
def test_a_draft_that_does_not_fit_is_refused_in_one_line(model, params, change, words):
    config = dataclasses.replace(model.config, vocab_size=change.get('vocab_size', 64))
    draft = Draft(model.clone(config=config), params, change.get('num_tokens', 4))
    with pytest.raises(InputError) as error:
        Generator(model, params, num_slots=1, draft=draft)
    assert words in str(error.value) and '\n' not in str(error.value)
