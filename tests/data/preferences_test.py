import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.preferences import (
    Answer,
    EncodedPair,
    PreferenceRows,
    best_fit,
    collate_preferences,
    encode_answer,
    format_ids,
    mismatched,
)
from llama_jax.errors import InputError
from llama_jax.losses.dpo import answer_sums, log_probabilities
from llama_jax.losses.reward import pair_scores
from llama_jax.models.reward import LlamaForRewardModel
from llama_jax.tokenizer.chat_format import Llama2ChatFormat, Llama3ChatFormat, Message
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests import toy

SCORED = dataclasses.replace(toy.CONFIG, scalar_head=True)


def random_pairs(number: int, seed: int, num_prompts: int = 0, alone: bool = False) -> list[EncodedPair]:
    """Pairs of random tokens; some prompts several times where `num_prompts` is given."""
    rng = np.random.default_rng(seed)

    def tokens(least, most):
        return rng.integers(1, toy.CONFIG.vocab_size, size=rng.integers(least, most)).astype(np.int32)

    def answer():
        found = tokens(2, 9)
        return Answer(found, rng.random(len(found)) < 0.8, int(rng.integers(-1, 2)))

    prompts = [tokens(1, 8) for _ in range(num_prompts or number)]
    pairs = []
    for index in range(number):
        left_out = rng.integers(2) if alone else 2
        better, worse = (None if side == left_out else answer() for side in range(2))
        pairs.append(EncodedPair(prompts[index % len(prompts)], (better, worse), float(rng.integers(4))))
    return pairs


@pytest.mark.parametrize('share', [False, True])
@pytest.mark.parametrize('alone', [False, True])
def test_every_pair_that_fits_stands_once_with_its_own_tokens(share, alone):
    rng = np.random.default_rng()  # other pairs each time
    for _ in range(20):
        check_rows(int(rng.integers(10**6)), int(rng.integers(1, 13)), int(rng.integers(8, 65)), share, alone)


def check_rows(seed, number, seq_len, share, alone):
    pairs = random_pairs(number, seed, num_prompts=max(1, number // 2), alone=alone)
    forms = (3, 5)
    try:
        rows = PreferenceRows(pairs, seq_len, format_ids=forms, share_prompt=share)
    except InputError:  # all are too long, which another test looks at
        return
    found = [n for i in range(len(rows)) for n in rows.numbers(i)]
    assert sorted(found + rows.too_long) == list(range(number))
    for index in range(len(rows)):
        row = rows[index]
        assert sum(row['weights']) == len(rows.numbers(index)) <= rows.num_pairs
        of_answers = np.zeros(seq_len, bool)
        for place, pair_number in enumerate(rows.numbers(index)):
            pair = pairs[pair_number]
            assert row['margins'][place] == pair.margin
            for side, answer in enumerate(pair.answers):
                segment, end = row['pairs'][place, side], row['ends'][place, side]
                assert (segment == 0) == (answer is None)
                if answer is None:
                    assert row['safe'][place, side] == -1
                    continue
                slots = np.flatnonzero(row['segment_ids'] == segment)
                of_answers[slots] = True
                assert end == slots[-1] and row['safe'][place, side] == answer.safe
                whole = np.concatenate([pair.prompt, answer.tokens])
                np.testing.assert_array_equal(row['tokens'][slots], whole[row['positions'][slots]])
                assert row['positions'][end] == len(whole) - 1
                counted = slots[row['loss_mask'][slots]]
                np.testing.assert_array_equal(row['targets'][counted], answer.tokens[answer.counts])
                np.testing.assert_array_equal(row['targets'][counted], row['tokens'][counted + 1])
                formal = np.isin(answer.tokens[answer.counts], forms)
                np.testing.assert_array_equal(row['format_mask'][counted], formal)
        assert not np.any(row['loss_mask'] & ~of_answers)
        assert not np.any(row['format_mask'] & ~row['loss_mask'])


@pytest.mark.parametrize('number', [0, 1, 7, 40])
def test_best_fit_fills_bins_and_loses_nothing(number):
    lengths = np.random.default_rng().integers(1, 21, size=number).tolist()
    bins = best_fit(lengths, 20)
    assert sorted(n for one in bins for n in one) == list(range(len(lengths)))
    filled = [sum(lengths[n] for n in one) for one in bins]
    assert all(size <= 20 for size in filled)
    # Two bins that are at most half full would have been one.
    assert sum(size <= 10 for size in filled) <= 1


def test_an_answer_to_another_prompt_is_beside_each_prompt():
    rng = np.random.default_rng()  # other pairs each time
    for _ in range(20):
        number = int(rng.integers(2, 12))
        pairs = random_pairs(number, int(rng.integers(10**6)), int(rng.integers(2, number + 1)), alone=True)
        rng.shuffle(pairs)
        for number, (pair, other) in enumerate(zip(pairs, mismatched(pairs), strict=True)):
            np.testing.assert_array_equal(other.prompt, pair.prompt)
            later = [pairs[(number + i) % len(pairs)] for i in range(1, len(pairs))]
            follower = next(one for one in later if one.prompt.tobytes() != pair.prompt.tobytes())
            assert other.answers == follower.answers
    with pytest.raises(InputError, match='all answers are to the same prompt'):
        mismatched(random_pairs(4, 0, num_prompts=1, alone=True))


@pytest.mark.parametrize('share', [False, True])
def test_log_probabilities_and_scores_are_those_of_each_answer_alone(share):
    """Whatever stands before, behind or beside it."""
    kernel = 'shared_prefix' if share else 'auto'
    policy, judge = toy.make_model(), LlamaForRewardModel(SCORED, dtype=jnp.float32)
    params, judging = toy.make_params(policy), toy.make_params(judge, seed=1)
    pairs = random_pairs(9, seed=1, num_prompts=4)
    rows = PreferenceRows(pairs, 48, share_prompt=share)
    batch = jax.tree.map(jnp.asarray, collate_preferences([rows[i] for i in range(len(rows))]))
    by_token = jax.jit(
        lambda p: log_probabilities(policy.clone(attention_implementation=kernel), p, batch, num_chunks=2)
    )(params)
    counted = jnp.where(batch.loss_mask, by_token, 0.0)
    sums = np.asarray(jax.jit(answer_sums)(counted, batch.segment_ids, batch.pairs))
    scores = jax.jit(lambda p: pair_scores(judge.clone(attention_implementation=kernel), p, batch))(judging)
    scores = np.asarray(scores)

    answers = [answer for pair in pairs for answer in pair.answers if answer]
    whole = [np.concatenate([pairs[i // 2].prompt, answer.tokens]) for i, answer in enumerate(answers)]
    alone = np.zeros((len(whole), 24), np.int32)
    for tokens, row in zip(whole, alone, strict=True):
        row[: len(tokens)] = tokens
    logits, _ = jax.jit(lambda p: policy.apply({'params': p}, jnp.asarray(alone)))(params)
    by_id = np.asarray(jax.nn.log_softmax(logits))
    alone_scores = np.asarray(jax.jit(lambda p: judge.apply({'params': p}, jnp.asarray(alone)))(judging))
    for row in range(len(rows)):
        for place, number in enumerate(rows.numbers(row)):
            for side in range(2):
                i = 2 * number + side
                slots = len(pairs[number].prompt) + np.flatnonzero(answers[i].counts)
                wanted = float(by_id[i, slots - 1, alone[i, slots]].sum())
                assert sums[row, place, side] == pytest.approx(wanted, abs=1e-5 * max(1, abs(wanted)))
                # The last token is the one that is scored.
                assert scores[row, place, side] == pytest.approx(
                    float(alone_scores[i, len(whole[i]) - 1]), abs=1e-5
                )


def test_rows_that_hold_nothing_are_refused():
    pairs = random_pairs(3, seed=0)
    longest = max(sum(len(p.prompt) + len(a.tokens) for a in p.answers if a) for p in pairs)
    with pytest.raises(
        InputError, match=f'of 3 pairs none fits into a row of 3 tokens: the longest takes {longest}'
    ):
        PreferenceRows(pairs, 3)


def test_the_fingerprint_is_of_all_that_a_row_says():
    pairs = random_pairs(5, seed=3)
    first = PreferenceRows(pairs, 48).fingerprint
    assert first == PreferenceRows(random_pairs(5, seed=3), 48).fingerprint
    swapped = [
        EncodedPair(pairs[0].prompt, (pairs[0].answers[1], pairs[0].answers[0]), pairs[0].margin),
        *pairs[1:],
    ]
    wider = [EncodedPair(pairs[0].prompt, pairs[0].answers, pairs[0].margin + 1), *pairs[1:]]
    others = [
        PreferenceRows(swapped, 48), PreferenceRows(wider, 48), PreferenceRows(pairs, 40),
        PreferenceRows(pairs, 48, share_prompt=True), PreferenceRows(pairs, 48, format_ids=[1]),
    ]  # fmt: skip
    assert len({first, *(rows.fingerprint for rows in others)}) == 6


DIALOG = [
    Message('system', 'Be brief.'), Message('user', 'Name a fruit.'), Message('assistant', 'Fig.'),
    Message('user', 'Another, and a colour.'),
]  # fmt: skip


@pytest.mark.parametrize('family', ['llama2', 'llama3'])
def test_the_last_answer_counts_with_its_stop_token_and_nothing_else(shared_data, family):
    tokenizer = load_tokenizer(shared_data / 'tokenizers' / family)
    chat_format = (Llama2ChatFormat if family == 'llama2' else Llama3ChatFormat)(tokenizer)
    prompt, answer = encode_answer(chat_format, DIALOG, [Message('assistant', 'Pear, green.')])
    assert prompt.tolist() == chat_format.encode_prompt(DIALOG)
    assert answer.counts.all() and answer.tokens[-1] in chat_format.stop_ids
    assert tokenizer.decode(answer.tokens[:-1].tolist()).strip() == 'Pear, green.'
    assert answer.tokens[-1] in format_ids(tokenizer, chat_format)
    assert not set(answer.tokens[:-1].tolist()) & set(format_ids(tokenizer, chat_format))
    with pytest.raises(InputError, match='the answer is empty'):
        encode_answer(chat_format, DIALOG, [Message('assistant', ' ')])


def test_what_others_say_within_an_answer_does_not_count(shared_data):
    tokenizer = load_tokenizer(shared_data / 'tokenizers' / 'llama3')
    chat_format = Llama3ChatFormat(tokenizer)
    turns = [Message('assistant', 'Pear.'), Message('user', 'Why?'), Message('assistant', 'Sweet.')]
    _, answer = encode_answer(chat_format, DIALOG, turns)
    counted = tokenizer.decode(answer.tokens[answer.counts].tolist())
    assert 'Pear.' in counted and 'Sweet.' in counted and 'Why' not in counted
