import jax
import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference import scoring
from llama_jax.inference.scoring import TokenScore, score, score_tokens
from llama_jax.models.llama import param_axes
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy


def random_pairs(seed=0, num_contexts=12):
    """Contexts of 1 to 40 tokens, each with 1 to 6 continuations of 1 to 12; some are equal."""
    rng = np.random.default_rng(seed)

    def tokens(count):
        return tuple(rng.integers(3, toy.CONFIG.vocab_size, count).tolist())

    pairs = []
    for _ in range(num_contexts):
        context = tokens(rng.integers(1, 40))
        pairs += [(context, tokens(rng.integers(1, 12))) for _ in range(rng.integers(1, 7))]
    pairs += [((5,), (7,)), ((5,), (8,)), pairs[0], (tokens(1), tokens(64))]
    rng.shuffle(pairs)
    return [tuple(map(tuple, pair)) for pair in pairs]


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.fixture(scope='module')
def expected(logits_of):
    """Each pair read alone: (log-probability, is greedy)."""
    found = []
    for context, continuation in random_pairs():
        log_probs = log_softmax(logits_of((context + continuation)[:-1])[len(context) - 1 :])
        total = log_probs[np.arange(len(continuation)), list(continuation)].sum()
        found.append((total, bool((log_probs.argmax(-1) == continuation).all())))
    return found


def check(found, expected):
    assert sorted(found) == list(range(len(expected)))
    for index, (log_probability, is_greedy) in enumerate(expected):
        # fp32 sums of up to 64 terms in another order.
        assert found[index].log_probability == pytest.approx(log_probability, abs=2e-4)
        assert found[index].is_greedy == is_greedy


def test_pairs_that_share_rows_score_as_if_read_alone(model, params, expected):
    check(dict(score(model, params, random_pairs())), expected)
    check(dict(score(model, params, random_pairs(), batch_tokens=64)), expected)


def test_most_likely_tokens_are_greedy(model, params, logits_of):
    context = (3, 9, 27)
    path = list(context)
    for _ in range(4):
        path.append(int(logits_of(path)[-1].argmax()))
    best = tuple(path[3:])
    other = (*best[:3], (best[3] + 1) % 64)
    found = dict(score(model, params, [(context, best), (context, other), (context, best[:1])]))
    assert [found[index].is_greedy for index in range(3)] == [True, False, True]


@pytest.mark.parametrize('sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'context': 2}])
def test_a_mesh_changes_nothing(params, expected, sizes):
    """With `context` no rows are shared; else they are, as on one device."""
    partitioner = Partitioner(make_mesh(sizes))
    model = toy.make_model(partitioner=partitioner)
    shardings = partitioner.tree_shardings(params, param_axes(model))
    spread = jax.device_put(params, shardings)
    check(dict(score(model, spread, random_pairs(), batch_tokens=256)), expected)


def test_batches_of_few_shapes_are_compiled_once(model, params):
    pairs = [pair for seed in range(8) for pair in random_pairs(seed)]
    before = scoring._score._cache_size()
    first = dict(score(model, params, pairs, batch_tokens=512))
    compiled = scoring._score._cache_size() - before
    batches = list(scoring._batches(sorted(scoring._rows(pairs, True), key=lambda r: -r.size), model, 512))
    assert len(batches) > 2 * compiled
    assert compiled <= len({shape for _, shape in batches}) + 1  # rows with and without shared contexts
    assert dict(score(model, params, pairs[::-1], batch_tokens=512)).keys() == first.keys()
    assert scoring._score._cache_size() - before == compiled


def test_choices_share_the_context_of_their_question():
    context, choices = tuple(range(3, 40)), [(1, 2, 3), (4,), (5, 6)]
    (row,) = scoring._rows([(context, choice) for choice in choices], share=True)
    assert row.num_tokens == 37 + 2 + 0 + 1 and row.num_targets == 6
    alone = list(scoring._rows([(context, choice) for choice in choices], share=False))
    assert [row.num_tokens for row in alone] == [39, 37, 38]
    many = list(scoring._rows([((3,), (1, 2, 3))] * 1000, share=True))
    assert max(row.size for row in many) <= 512 and sum(len(row.members) for row in many) == 1000


@pytest.mark.parametrize(
    ('pairs', 'batch_tokens', 'words'),
    [
        ([((), (1,))], 64, '0 \\+ 1 tokens'),
        ([((1,), (1,)), ((1,), ())], 64, 'pair 1 has 1 \\+ 0 tokens'),
        ([((1,) * 60, (1,) * 6)], 64, '60 \\+ 6 tokens; the model reads 64'),
        ([((1,), (1,))], 0, 'batch_tokens is 0'),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(model, params, pairs, batch_tokens, words):
    with pytest.raises(InputError, match=words):
        list(score(model, params, pairs, batch_tokens=batch_tokens))


def test_each_token_of_a_text_is_scored_beside_the_likeliest(model, params, logits_of):
    rng = np.random.default_rng(3)
    texts = [tuple(rng.integers(3, 64, size=n).tolist()) for n in (1, 2, 40, 33, 7, 64)]
    wanted = [log_softmax(logits_of(text)) for text in texts]
    found = score_tokens(model, params, texts, num_candidates=5)
    for text, scores, log_probabilities in zip(texts, found, wanted, strict=True):
        assert [each.token for each in scores] == list(text)
        assert scores[0] == TokenScore(text[0])  # nothing predicts it
        for each, by_token in zip(scores[1:], log_probabilities, strict=False):
            assert each.log_probability == pytest.approx(by_token[each.token], abs=1e-5)  # fp32, of up to 10
            ids, values = zip(*each.candidates, strict=True)
            assert list(ids) == np.argsort(-by_token, kind='stable')[:5].tolist()
            np.testing.assert_allclose(values, by_token[list(ids)], atol=1e-5)
            # What lm-evaluation-harness compares: one number in both places.
            assert dict(each.candidates).get(each.token, each.log_probability) == each.log_probability
    assert score_tokens(model, params, []) == []


def test_no_candidate_differs_from_its_token_by_a_last_bit():
    near = -1.5, float(np.nextafter(np.float32(-1.5), np.float32(0)))
    assert TokenScore.create(7, near[0], [(3, -0.1), (7, near[1])]).log_probability == near[1]
    assert TokenScore.create(8, near[0], [(3, -0.1), (7, near[1])], -1.0) == TokenScore(
        8, near[0], -1.0, ((3, -0.1), (7, near[1]))
    )


@pytest.mark.parametrize(
    ('texts', 'num_candidates', 'words'),
    [
        ([(1,)], 21, r'candidates of a token are 21; there may be from 0 \(the token alone\) to 20'),
        ([(1,)], -1, 'candidates of a token are -1'),
        ([(1,), ()], 1, 'prompt 1 has no token'),
        ([(1,) * 65], 1, 'prompt 0 has 65 tokens; the model reads 64, so shorten it to at most 64'),
    ],
)
def test_texts_that_cannot_be_scored_are_refused_in_one_line(model, params, texts, num_candidates, words):
    with pytest.raises(InputError, match=words) as error:
        score_tokens(model, params, texts, num_candidates=num_candidates)
    assert '\n' not in str(error.value)
