"""Which candidates are kept, and the order statistics of best-of-n against draws and enumeration."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from etils import epath

from llama_jax.data.examples import Encoder
from llama_jax.data.preference_dataset import Reading
from llama_jax.data.record_kinds import Conversation, Preference
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.rl.context_distillation import distilled_lines
from llama_jax.rl.rejection import (
    Candidate,
    Keep,
    best_of,
    best_of_n_divergence,
    curves,
    lines_of,
    median_of,
    plot_curves,
    select,
)
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer


def pool(*scores, **given):
    return [Candidate(f'answer {i}', score, **given) for i, score in enumerate(scores)]


def test_the_best_is_kept_and_of_equal_ones_the_first():
    assert select(pool(0.5, 2.0, -1.0, 2.0), Keep()) == [(1,)]
    assert select([], Keep()) == []
    assert select([Candidate(' ', 9.0), Candidate('so', 1.0)], Keep()) == [(1,)], (
        'nothing is learnt of no words'
    )


def test_a_pair_is_of_different_scores_and_texts():
    assert select(pool(0.5, 2.0, -1.0, -1.0), Keep('pair')) == [(1, 2)]
    assert select(pool(1.0, 1.0), Keep('pair')) == [] == select(pool(1.0), Keep('pair'))
    assert select([Candidate('so', 1.0), Candidate(' so', 0.0)], Keep('pair')) == []


def test_a_threshold_keeps_all_that_reach_it_each_text_once():
    candidates = [*pool(0.5, 2.0, 1.0), Candidate('answer 1', 1.5)]
    assert select(candidates, Keep('threshold', 1.0)) == [(1,), (2,)]
    assert select(candidates, Keep('threshold', 2.5)) == []


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (('worst',), 'keep is .worst.; it is one of best, pair, threshold'),
        (('threshold',), 'threshold is None; to keep all'),
        (('threshold', math.nan), 'threshold is nan; to keep all'),
        (('best', 1.0), 'threshold is 1.0, and what is kept is the best; leave it out'),
    ],
)
def test_ways_to_keep_that_are_none_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        Keep(*given)


def test_lines_are_read_by_sft_and_dpo(tmp_path):
    talk = [
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Yes?'},
        {'role': 'user', 'content': 'Go'},
    ]
    lines = [
        *lines_of('Say', pool(0.5, 2.0, -1.0), Keep('pair')),
        *lines_of(talk, pool(1.0, 0.0), Keep('pair')),
    ]
    file = tmp_path / 'kept.jsonl'
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    first, second = read_records([str(file)], kind=Conversation)
    assert [message.content for message in first.messages] == ['Say', 'answer 1'] and first.counts == (
        False,
        True,
    )
    assert [message.role for message in second.messages] == ['user', 'assistant', 'user', 'assistant']
    assert second.counts == (False, False, False, True)
    first, second = read_records([str(file)], kind=Preference)
    assert (first.chosen[0].content, first.rejected[0].content, first.margin) == ('answer 1', 'answer 2', 3.0)
    assert len(second.prompt) == 3 and second.margin == 1.0
    assert [one['score'] for one in lines[0]['candidates']] == [0.5, 2.0, -1.0]
    several = lines_of('Say', pool(2.0, 1.0), Keep('threshold', 0.0))
    assert [len(line.get('candidates', [])) for line in several] == [2, 0], 'all candidates stand once'


def test_no_end_is_learnt_of_an_answer_that_was_cut(tmp_path, shared_data):
    """By `sft` and by `dpo`, whatever has drawn it."""
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    plain, cut = chat_format_for(tokenizer, 'plain'), Candidate('a cat', 2.0, stopped=False)
    line = lines_of('Say', [cut, Candidate('a dog', 1.0)], Keep('pair'))[0]
    distilled = dataclasses.replace(cut, preprompt='Be safe.')
    others = [
        lines_of('Say', [cut], Keep())[0], distilled_lines('Say', [distilled, Candidate('a dog', 1.0)], Keep())[0],
        {'messages': [{'role': 'user', 'content': 'Say'}, {'role': 'assistant', 'content': 'a cat'}], 'stopped': False},
    ]  # fmt: skip
    file = tmp_path / 'kept.jsonl'
    file.write_text(''.join(json.dumps(one) + '\n' for one in [line, *others]))
    words = tokenizer.encode('Saya cat', bos=True)
    for record in read_records([str(file)], kind=Conversation):
        example = Encoder(plain, 64).encode(record)
        assert example is not None and tokenizer.eos_id not in example.tokens, record.place
        assert example.tokens[0] == words[0] and tokenizer.decode(example.tokens.tolist()) == 'Saya cat'
    file.write_text(json.dumps(line))
    (pair,) = Reading(tokenizer, plain, 64).pairs([str(file)])
    chosen, rejected = (
        answer is not None and answer.tokens[-1] == tokenizer.eos_id for answer in pair.answers
    )
    assert not chosen and rejected
    file.write_text(json.dumps(line | {'stopped': 'no'}))
    with pytest.raises(InputError, match="stopped is 'no'; it is true or false"):
        list(read_records([str(file)], kind=Conversation))


@pytest.mark.parametrize('n', range(1, 7))
def test_order_statistics_are_the_means_over_all_draws(n):
    scores = np.array([0.3, -1.0, 2.5, 2.5, 0.0, 7.0])
    draws = [np.array(draw) for draw in itertools.combinations(scores, n)]
    assert best_of(scores, n) == pytest.approx(np.mean([draw.max() for draw in draws]), rel=1e-12)
    assert median_of(scores, n) == pytest.approx(
        np.mean([np.median(draw) for draw in draws]), rel=1e-12, abs=1e-12
    )


def test_the_measured_best_of_n_has_the_order_statistics_mean_and_divergence():
    """Scores of a law whose order statistics are known: uniform ones have E[max of n] = n / (n + 1)."""
    rng = np.random.default_rng(0)
    for n in (2, 4, 16):
        drawn = rng.random((4000, n))
        best = drawn.max(axis=1)
        assert abs(best.mean() - n / (n + 1)) < 3 * best.std() / math.sqrt(len(best))
        pools = rng.random((200, 32))
        found = np.array([best_of(pool, n) for pool in pools])
        assert abs(found.mean() - n / (n + 1)) < 3 * found.std() / math.sqrt(len(found))
        # The density of the best against the policy's, 1 on [0, 1], is n u^(n - 1): its mean logarithm under itself.
        measured = np.log(n * best ** (n - 1))
        assert abs(measured.mean() - best_of_n_divergence(n)) < 3 * measured.std() / math.sqrt(len(best))
    assert best_of_n_divergence(1) == 0.0


def test_curves_are_means_over_prompts_by_temperature_of_what_was_drawn_here(tmp_path):
    rng = np.random.default_rng(1)
    prompts = []
    for _ in range(5):
        scores = rng.normal(size=(2, 6))
        cold, hot = (
            [Candidate('a', float(score), temperature=t) for score in row]
            for t, row in zip((0.7, 1.2), scores + np.array([[0.0], [1.0]]), strict=True)
        )
        prompts.append([*cold, *hot, Candidate('b', 99.0, origin='v1.jsonl')])
    found = curves(prompts)
    assert found is not None and found.temperatures == (0.7, 1.2) and found.numbers == (1, 2, 4, 6)
    assert found.best.shape == (2, 4) and found.best.max() < 99
    np.testing.assert_allclose(found.best[0, -1], np.mean([max(c.score for c in p[:6]) for p in prompts]))
    np.testing.assert_allclose(
        found.median[1, -1], np.mean([np.median([c.score for c in p[6:12]]) for p in prompts])
    )
    np.testing.assert_allclose(found.best[:, 0], found.median[:, 0])
    assert (np.diff(found.best) > 0).all()
    plot_curves(epath.Path(tmp_path) / 'curves.png', found)
    assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert curves([[Candidate('b', 1.0, origin='v1.jsonl')]]) is None
