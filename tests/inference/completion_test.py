import functools
import json

import numpy as np
import pytest

from llama_jax.errors import InputError
from llama_jax.inference import decoding
from llama_jax.inference import generate as generation
from llama_jax.inference.batcher import Ended, Request
from llama_jax.inference.completion import Completion, Row, Watch
from llama_jax.inference.generate import complete, complete_each, generate
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.scoring import TokenScore
from tests import toy
from tests.inference.generate_test import PROMPTS, Spelled

CONTEXT = toy.CONFIG.max_seq_len


@pytest.fixture(scope='module')
def ask(model, params):
    return functools.partial(complete, model, params, None)


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def metas_generate(logits_of, prompts, max_gen_len, stop_ids, echo):
    """Meta's loop: the part that all prompts have is read at once, then a position of all rows at a time, where a
    prompt's own token is kept.

    Source: llama/generation.py of meta-llama/llama and meta-llama/llama3.
    """
    total = min(CONTEXT, max_gen_len + max(map(len, prompts)))
    tokens = np.full((len(prompts), total), -1)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    is_prompt, log_probabilities = tokens != -1, np.zeros(tokens.shape)
    is_ended, before = np.zeros(len(prompts), bool), 0
    for position in range(min(map(len, prompts)), total):
        for index, row in enumerate(tokens):
            logits = logits_of(row[:position])
            if not is_prompt[index, position]:
                row[position] = logits[-1].argmax()
                is_ended[index] |= row[position] in stop_ids
            read = np.arange(before + 1, position + 1)  # targets of the logits since the last position
            log_probabilities[index, read] = log_softmax(logits)[read - 1, row[read]]
        before = position
        if is_ended.all():
            break
    out = []
    for row, values, prompt in zip(tokens, log_probabilities, prompts, strict=True):
        start = 0 if echo else len(prompt)
        kept = slice(start, len(prompt) + max_gen_len)
        row, values = row[kept].tolist(), values[kept].tolist()
        ends = [place for place, token in enumerate(row) if token in stop_ids or token == -1]
        end = min([place for place in ends if start + place >= len(prompt)], default=len(row))
        out.append((row[:end], values[:end]))
    return out


def test_metas_teacher_forced_batch_gives_the_same(ask, logits_of):
    """Tokens, and log-probabilities of them and, with echo, of the prompts, whose first Meta's code gives as 0."""
    free = [completion.tokens for (completion,) in ask(PROMPTS, max_new_tokens=8)]
    stops = (free[0][2], 63)
    found = [one for (one,) in ask(PROMPTS, max_new_tokens=8, stop_ids=stops, log_probabilities=4, echo=True)]
    for echo in (False, True):
        wanted = metas_generate(logits_of, PROMPTS, 8, stops, echo)
        for one, (tokens, log_probabilities) in zip(found, wanted, strict=True):
            assert [*one.prompt_tokens * echo, *one.tokens] == tokens
            scores = [*one.prompt_scores * echo, *one.scores[: len(one.tokens)]]
            assert [score.token for score in scores] == tokens
            values = [score.log_probability or 0.0 for score in scores]
            np.testing.assert_allclose(
                values, log_probabilities, atol=2e-5
            )  # fp32 logits of up to 10, beside fp64
    # The stop token is scored too: what lm-evaluation-harness reads has an entry more than the prompt even then.
    assert len(found[0].tokens) < 8 and found[0].finish_reason == 'stop' and found[0].stopped_by == stops[0]
    assert len(found[0].scores) == len(found[0].tokens) + 1 and found[0].scores[-1].token == stops[0]


def test_each_as_it_ends_is_the_same_in_any_company(model, params):
    """To the last bit of the log-probabilities, through two slots."""
    samplers = [Sampler(temperature=0.3 * number, seed=number) for number in range(4)]
    prompts = [[1, *range(2, 3 + 5 * number)] for number in range(4)]

    def each(numbers):
        found = complete_each(
            model, params, None, [prompts[number] for number in numbers], num_slots=2, log_probabilities=2,
            samplers=[samplers[number] for number in numbers], max_new_tokens=6, stop_ids=[5],
        )  # fmt: skip
        return {numbers[place]: (one.tokens, one.scores) for place, one in found}

    together = each([0, 1, 2, 3])
    assert each([3, 1, 0, 2]) == together
    assert {number: found for number in range(4) for found in each([number]).values()} == together


def test_tokens_are_scored_by_the_model_and_after_the_filters(ask, logits_of):
    settings = {'temperature': 0.7, 'top_k': 9, 'seed': 3}
    for (one,) in ask(PROMPTS, max_new_tokens=8, log_probabilities=4, **settings):
        assert one.finish_reason == 'length' and len(one.scores) == 8 and one.prompt_scores == ()
        logits = logits_of([*one.prompt_tokens, *one.tokens])[len(one.prompt_tokens) - 1 :]
        for score, row in zip(one.scores, logits, strict=False):
            raw = log_softmax(row)
            assert score.log_probability == pytest.approx(raw[score.token], abs=2e-5)
            assert [token for token, _ in score.candidates] == np.argsort(-raw, kind='stable')[:4].tolist()
            assert dict(score.candidates).get(score.token, score.log_probability) == score.log_probability
            row = np.where(row >= np.sort(row)[-9], row / 0.7, -np.inf)
            assert score.filtered_log_probability == pytest.approx(log_softmax(row)[score.token], abs=5e-5)
    greedy = ask(PROMPTS, max_new_tokens=8, log_probabilities=0)[0][0]
    assert {(score.filtered_log_probability, score.candidates) for score in greedy.scores} == {(0.0, ())}


def test_choices_of_a_prompt_that_is_read_once_differ_and_repeat(monkeypatch, model, params, ask):
    settings = {'temperature': 1.0, 'seed': 7, 'max_new_tokens': 8}
    pieces, read = [], decoding.read

    def counted(model, params, cache, slots, start, tokens, *rest):
        pieces.append(tokens.shape)
        return read(model, params, cache, slots, start, tokens, *rest)

    monkeypatch.setattr(decoding, 'read', counted)
    (choices,) = ask(PROMPTS[1:2], n=3, **settings)
    assert pieces == [(1, 8)]
    choices = [one.tokens for one in choices]
    # As so many prompts, and whatever is asked beside them.
    assert choices == [one.tokens for (one,) in ask(PROMPTS[1:2] * 3, **settings)]
    assert len({*choices}) == 3
    samplers = [Sampler(temperature=1.0, seed=seed) for seed in (1, 7)]
    beside = ask(PROMPTS[:2], n=2, samplers=samplers, max_new_tokens=8)
    assert [one.tokens for one in beside[1]] == choices[:2]
    assert len({one.tokens for row in beside for one in row}) == 4


def test_what_ends_a_completion_is_told_and_is_the_same_however_often_it_is_looked_for(
    monkeypatch, model, params
):
    tokenizer = Spelled()

    def ask(**settings):
        settings = {'max_new_tokens': 8, 'ignore_eos': True, 'log_probabilities': 0} | settings
        return complete(model, params, tokenizer, PROMPTS, **settings)[0][0]

    whole = ask()
    assert (whole.finish_reason, whole.stopped_by) == ('length', None)
    assert whole.text == generate(model, params, tokenizer, PROMPTS, max_new_tokens=8, ignore_eos=True)[0]
    assert 0 < whole.first_seconds <= whole.seconds
    text = whole.text[2:4]
    asked = []

    def is_complete(index, tokens):
        if index == 0:
            asked.append(len(tokens))
        return len(tokens) == 3

    cut = {}
    for steps in (1, 2, 32):
        monkeypatch.setattr(generation, 'CHECKED_STEPS', steps)
        by_text = ask(stop=['~~', text])
        by_caller = ask(is_complete=is_complete)
        by_token = ask(stop_ids=[whole.tokens[3]], ignore_eos=False)
        assert (by_text.finish_reason, by_text.stopped_by, by_text.text) == ('stop', text, whole.text[:2])
        assert (by_caller.finish_reason, by_caller.stopped_by) == ('stop', None)
        assert by_caller.tokens == whole.tokens[:3] and len(by_caller.scores) == 3
        assert (by_token.finish_reason, by_token.stopped_by) == ('stop', whole.tokens[3])
        assert by_token.tokens == whole.tokens[: whole.tokens.index(whole.tokens[3])]
        # Up to the token that completes the stop text.
        assert len(by_text.scores) == len(by_text.tokens) < 8
        cut[steps] = by_text.tokens, by_caller.text
    assert cut[1] == cut[2] == cut[32] and asked == [1, 2, 3] * 3


def test_what_nobody_wants_any_more_is_told_apart():
    def completion(reason, tokens, stop_id=None, stop=()):
        ended = Ended(Request(0, [1], 8), reason, len(tokens), 1)
        watch = Watch(Spelled(), [1], stop)
        return watch.completion(Row(0.0, tokens, stop_id, ended=ended))

    letters = Spelled().encode('abc')
    cancelled = completion('cancelled', letters)
    assert (cancelled.finish_reason, cancelled.text, cancelled.cached_tokens) == ('cancelled', 'abc', 1)
    assert completion('length', letters).finish_reason == 'length'
    assert completion('cancelled', letters, stop=['b']).finish_reason == 'stop'
    assert completion('stop', letters, 2).stopped_by == 2


def test_what_json_shows_is_finite():
    scores = (
        TokenScore(7, float('-inf'), -1.5, ((7, float('-inf')), (3, -0.25))),
        TokenScore(8, float('nan')),
    )
    shown = Completion('a', (7,), (1, 2), 'stop', 8, scores, (TokenScore(1), TokenScore(2, -1.0))).to_json()
    assert json.loads(json.dumps(shown, allow_nan=False)) == {
        'completion': 'a',
        'tokens': [7],
        'finish_reason': 'stop',
        'stopped_by': 8,
        'prompt_tokens': 2,
        'cached_tokens': 0,
        'scores': [
            {
                'token': 7,
                'log_probability': -9999.0,
                'filtered_log_probability': -1.5,
                'candidates': [[7, -9999.0], [3, -0.25]],
            },
            {'token': 8, 'log_probability': -9999.0},
        ],
        'prompt_scores': [{'token': 1, 'log_probability': None}, {'token': 2, 'log_probability': -1.0}],
    }


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'n': 0}, 'n is 0; it must be at least 1'),
        ({'log_probabilities': 21}, 'candidates of a token are 21'),
        ({'stop': ['a']}, 'text needs a tokenizer'),
        ({'samplers': [Sampler()]}, 'samplers are 1 for 3 prompts'),
        ({'temperature': -1}, 'temperature is -1'),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(ask, settings, words):
    with pytest.raises(InputError, match=words) as error:
        ask(PROMPTS, **settings)
    assert '\n' not in str(error.value)
