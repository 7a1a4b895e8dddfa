import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.inference import decoding
from llama_jax.inference.generate import complete, generate, stream
from llama_jax.inference.logits_processor import ByTokens, LogitsProcessor, as_processor
from tests import toy
from tests.inference.generate_test import PROMPTS, Spelled

VOCAB = toy.CONFIG.vocab_size


def no_token_again(logits, tokens, lengths):
    """Of what a row has, prompt included, nothing comes again; the host says so, at every token."""

    def seen(tokens, lengths):
        mask = np.zeros((len(tokens), VOCAB), bool)
        for row, own, length in zip(mask, np.asarray(tokens), np.asarray(lengths), strict=True):
            row[own[:length]] = True
        return mask

    mask = jax.pure_callback(seen, jax.ShapeDtypeStruct((len(tokens), VOCAB), bool), tokens, lengths)
    return jnp.where(mask, -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Cycle:
    """Tokens of each remainder of 3 in turns, from that behind the prompt's last on: an automaton on the device."""

    def begin(self, prompts, num_tokens):
        assert num_tokens & (num_tokens - 1) == 0
        return {'next': np.array([(prompt[-1] + 1) % 3 for prompt in prompts], np.int32)}

    def __call__(self, logits, state):
        return jnp.where(jnp.arange(VOCAB)[None] % 3 == state['next'][:, None], logits, -jnp.inf)

    def advance(self, state, tokens):
        return {'next': (tokens + 1) % 3}


def test_a_function_of_all_tokens_so_far_changes_what_is_drawn(model, params, logits_of):
    found = complete(model, params, None, PROMPTS, max_new_tokens=8, logits_processor=no_token_again)
    for (one,), prompt in zip(found, PROMPTS, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            logits = logits_of(tokens)[-1]
            logits[tokens] = -np.inf
            tokens.append(int(logits.argmax()))
        assert [*one.prompt_tokens, *one.tokens] == tokens
    assert found != complete(model, params, None, PROMPTS, max_new_tokens=8)


def test_a_state_of_each_row_goes_from_token_to_token(model, params):
    settings = {'max_new_tokens': 8, 'temperature': 1.5, 'seed': 3, 'logits_processor': Cycle()}
    found = complete(model, params, None, PROMPTS, log_probabilities=2, **settings)
    for (one,) in found:
        path = np.array([one.prompt_tokens[-1], *one.tokens])
        assert (np.diff(path) % 3 == 1).all()
        # By the model they are what they were, by what was drawn from more likely.
        assert all(score.filtered_log_probability > score.log_probability for score in one.scores)
        assert any(token % 3 != score.token % 3 for score in one.scores for token, _ in score.candidates)
    programs = decoding.decode._cache_size()
    again = complete(
        model, params, None, PROMPTS, log_probabilities=2, **settings | {'logits_processor': Cycle()}
    )
    assert [one.tokens for (one,) in again] == [one.tokens for (one,) in found]
    assert decoding.decode._cache_size() == programs  # one that is equal has the same program


@pytest.mark.slow
def test_texts_and_streams_are_changed_alike(model, params):
    settings = {'max_new_tokens': 8, 'logits_processor': Cycle(), 'ignore_eos': True}
    (text,) = generate(model, params, Spelled(), PROMPTS[:1], **settings)
    assert ''.join(stream(model, params, Spelled(), PROMPTS[0], **settings)) == text
    ((one,),) = complete(model, params, Spelled(), PROMPTS[:1], **settings)
    assert one.text == text and (np.diff([PROMPTS[0][-1], *one.tokens]) % 3 == 1).all()


def test_a_function_becomes_a_processor():
    assert as_processor(None) is None and isinstance(Cycle(), LogitsProcessor)
    assert as_processor(no_token_again) == ByTokens(no_token_again) == as_processor(ByTokens(no_token_again))
    tokens, lengths = ByTokens(no_token_again).begin([[1, 2, 3], [4]], 8)
    assert tokens.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]] and lengths.tolist() == [
        3,
        1,
    ]
    state = ByTokens(no_token_again).advance((jnp.asarray(tokens), jnp.asarray(lengths)), jnp.array([7, 8]))
    assert state[0].tolist()[0][:4] == [1, 2, 3, 7] and state[1].tolist() == [4, 2]
