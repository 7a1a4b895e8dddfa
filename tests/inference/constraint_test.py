"""Answers under a rule: drawn at temperature 2 from random weights, each that ends is what the rule says."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest

import llama_jax
from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.inference import decoding, slots
from llama_jax.inference.constraint import Constrained, Rules
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner, make_mesh
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


def asked_by_kinds(rules, *seeds):
    kinds = [rules.of_regex('[ab]{3}c?'), None, rules.of_grammar('start: "yes" | "no" start'), rules.of_schema({'const': 7})]  # fmt: skip  # noqa: E501
    return [
        CompletionRequest([65, 66], 20, Sampler(temperature=2.0, seed=seed), rules.stop_ids, rule=kinds[seed % 4])
        for seed in seeds
    ]  # fmt: skip


def answers(generator, asked):
    numbers, found = [generator.submit(one) for one in asked], {}
    for progress in generator.run():
        tokens, ended = found.get(progress.number, ([], None))
        found[progress.number] = tokens + progress.tokens, progress.ended
    return [found[number] for number in numbers]


def test_rows_keep_to_their_own_rules_and_others_to_none(model_and_params, rules):
    asked = asked_by_kinds(rules, *range(24))
    ruled, free = (
        Generator(*model_and_params, num_slots=4, processor=processor, max_steps=4)
        for processor in (Constrained(rules), None)
    )
    found = answers(ruled, asked)
    patterns = ['[ab]{3}c?', None, '(no)*yes', '7']
    for place, (tokens, ended) in enumerate(found):
        if (pattern := patterns[place % 4]) is not None and ended.reason == 'stop':
            assert re.fullmatch(pattern, bytes(tokens).decode())
    assert sum(ended.reason == 'stop' for _, ended in found[::4]) == 6  # bounded, so they end
    unasked = [dataclasses.replace(one, rule=None) for one in asked]
    assert [tokens for tokens, _ in answers(free, unasked)][1::4] == [tokens for tokens, _ in found][1::4]


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [None, {'data': 2, 'tensor': 4}])
def test_an_accelerator_reads_a_token_while_masks_are_made(model_and_params, rules, monkeypatch, mesh):
    model, params = model_and_params
    if mesh:
        partitioner = Partitioner(make_mesh(mesh))
        params = jax.device_put(
            toy.make_params(model), partitioner.tree_shardings(*abstract_params_and_axes(model))
        )
        model = model.clone(partitioner=partitioner)
    asked, found, order = asked_by_kinds(rules, *range(8)), [], []
    for platform in ('cpu', 'gpu'):
        monkeypatch.setattr(slots, 'platform_of', lambda _, platform=platform: platform)
        generator = Generator(model, params, num_slots=4, processor=Constrained(rules), max_steps=4)
        generator.warm_up()
        for owner, name in (decoding, 'read_last'), (Constrained, 'states'), (decoding, 'draw_next'):
            real = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *a, real=real, name=name: order.append(name) or real(*a))
        compiled = []
        with runtime.hears_compilations(compiled.append):
            found.append([tokens for tokens, _ in answers(generator, asked)])
        assert not compiled
        assert ('read_last states draw_next' in ' '.join(order)) == (platform == 'gpu')
    assert found[0] == found[1]
    if not mesh:  # and rows without a rule, what they get without anybody's
        free = Generator(model, params, num_slots=4)
        unasked = [dataclasses.replace(one, rule=None) for one in asked]
        assert [tokens for tokens, _ in answers(free, unasked)][1::4] == found[1][1::4]


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
