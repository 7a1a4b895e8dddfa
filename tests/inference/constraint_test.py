"""Answers under a rule: drawn at temperature 2 from random weights, each that ends is what the rule says."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

import llama_jax
from llama_jax.errors import InputError
from llama_jax.inference.constraint import Constrained, Rules
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from tests import toy
from tests.serve.serving import make_tokenizer

POINT = {
    'type': 'object',
    'properties': {
        'x': {'type': 'integer', 'minimum': -99, 'maximum': 99},
        'colour': {'enum': ['red', 'grün', None]},
        'tags': {'type': 'array', 'items': {'type': 'string', 'maxLength': 3}, 'maxItems': 2},
    },
    'required': ['x', 'colour'],
    'additionalProperties': False,
}


@pytest.fixture(scope='module')
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope='module')
def model_and_params():
    config = dataclasses.replace(toy.CONFIG, vocab_size=520, max_seq_len=128, num_layers=1)
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    return model, unstack(toy.make_params(model), model.dtype)


@pytest.fixture(scope='module')
def rules(tokenizer, model_and_params):
    return Rules(tokenizer, model_and_params[0].config.vocab_size)


def check_point(text):
    point = json.loads(text)
    assert -99 <= point.pop('x') <= 99 and point.pop('colour') in ('red', 'grün', None)
    tags = point.pop('tags', [])
    assert not point and len(tags) <= 2 and all(isinstance(tag, str) and len(tag) <= 3 for tag in tags)


@pytest.mark.slow
def test_every_answer_of_a_bounded_schema_ends_and_fits(model_and_params, tokenizer, rules):
    constrained = Constrained(rules, rules.of_schema(POINT))
    answers = llama_jax.complete(
        *model_and_params, tokenizer, ['Say: '] * 50, n=4, temperature=2.0, max_new_tokens=110,
        logits_processor=constrained,
    )  # fmt: skip
    texts = [choice.text for choices in answers for choice in choices]
    assert {choice.finish_reason for choices in answers for choice in choices} == {'stop'}
    for text in texts:
        check_point(text)
    assert len(set(texts)) > 150


def test_rows_keep_to_their_own_rules_and_others_to_none(model_and_params, rules):
    kinds = [rules.of_regex('[ab]{3}c?'), None, rules.of_grammar('start: "yes" | "no" start'), rules.of_schema({'const': 7})]  # fmt: skip  # noqa: E501
    asked = [
        CompletionRequest([65, 66], 20, Sampler(temperature=2.0, seed=seed), rules.stop_ids, rule=kinds[seed % 4])
        for seed in range(24)
    ]  # fmt: skip

    def answers(processor, asked, slots):
        generator = Generator(*model_and_params, num_slots=slots, processor=processor, max_steps=4)
        numbers, found = [generator.submit(one) for one in asked], {}
        for progress in generator.run():
            tokens, ended = found.get(progress.number, ([], None))
            found[progress.number] = tokens + progress.tokens, progress.ended
        return [found[number] for number in numbers]

    found = answers(Constrained(rules), asked, 4)
    patterns = ['[ab]{3}c?', None, '(no)*yes', '7']
    for place, (tokens, ended) in enumerate(found):
        if (pattern := patterns[place % 4]) is not None and ended.reason == 'stop':
            assert re.fullmatch(pattern, bytes(tokens).decode())
    assert sum(ended.reason == 'stop' for _, ended in found[::4]) == 6  # bounded, so they end
    free = [dataclasses.replace(one, rule=None) for one in asked]
    assert [tokens for tokens, _ in answers(None, free, 4)][1::4] == [tokens for tokens, _ in found][1::4]


@pytest.mark.slow
def test_sentencepiece_keeps_to_rules_too(shared_data):
    """Its tokens begin with spaces, which the beginning of a text loses."""
    config, params, tokenizer = llama_jax.load(shared_data / 'weights/stories260K/stories260K.gguf')
    model = LlamaForCausalLM(dataclasses.replace(config, max_seq_len=128), dtype=jnp.float32)
    rules = Rules(tokenizer, config.vocab_size)
    constrained = Constrained(rules, rules.of_schema(POINT))
    texts = llama_jax.generate(
        model, params, tokenizer, ['Once upon', 'He said', ''], temperature=1.5, max_new_tokens=120,
        logits_processor=constrained,
    )  # fmt: skip
    for text in texts:
        check_point(text)


@pytest.mark.parametrize(
    ('kind', 'rule', 'words'),
    [
        ('schema', {'type': 'nothing'}, 'the schema cannot be used: .*nothing'),
        ('schema', {'type': 'integer', 'minimum': 3, 'maximum': 1}, 'Unsatisfiable'),
        ('schema', {'description': 'x' * 70_000}, 'has 7.* characters; it may have 65536'),
        ('regex', '(a', 'the regular expression cannot be used'),
        ('grammar', 'start: nothing', 'the grammar cannot be used: .*nothing'),
    ],
)
def test_what_is_no_rule_or_too_much_is_refused_in_one_line(rules, kind, rule, words):
    with pytest.raises(InputError, match=words) as error:
        getattr(rules, f'of_{kind}')(rule)
    assert '\n' not in str(error.value)


def test_json_is_spelled_as_it_is_by_python(rules):
    value = {'name': 'sell', 'parameters': {'size': ['S', 1], 'to': {'x': None}}}
    for schema in ({'const': value}, {'properties': {'a': {'const': value}}, 'required': ['a']}):
        text = json.dumps(value if 'const' in schema else {'a': value})
        matcher = rules.of_schema(schema).matcher.deep_copy()
        assert matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()
        matcher = rules.of_schema(schema).matcher.deep_copy()
        compact = json.dumps(json.loads(text), separators=(',', ':'))
        assert matcher.try_consume_tokens(list(compact.encode())) < len(compact)
