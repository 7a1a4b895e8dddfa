"""Requests of any kind through shared slots: each is answered as if it were alone, to the bit."""

import collections
import dataclasses
import itertools
import json
import logging

import jax.monitoring
import numpy as np
import pytest

import llama_jax
from llama_jax.inference import generator as generator_module
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM, param_axes
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy

BLOCK = 256
SAMPLERS = (
    Sampler(),
    Sampler(temperature=1.0, seed=3),
    Sampler(temperature=0.8, top_p=0.9, seed=1),
    Sampler(repetition_penalty=1.3, presence_penalty=0.5),
)


def make_model(context):
    return LlamaForCausalLM(dataclasses.replace(toy.CONFIG, max_seq_len=context), dtype=np.float32)


@pytest.fixture(scope='module')
def small():
    """A model of so short a context that few programs serve it, and its weights."""
    model = make_model(16)
    return model, toy.make_params(model)


@pytest.fixture(scope='module')
def few():
    """Short requests of all kinds."""
    rng = np.random.default_rng(1)
    lengths, most = (3, 12, 1, 7, 9, 4), (9, 3, 15, 6, 1, 12)
    return [
        CompletionRequest(
            rng.integers(3, 64, size=lengths[i]).tolist(), most[i], SAMPLERS[i % 4], stop_ids=(7, 9, 11, 13),
            key=str(i % 2),
        )
        for i in range(6)
    ]  # fmt: skip


def make_generator(model_and_params, **settings):
    return Generator(*model_and_params, log_probabilities=0, **settings)


def answers(generator, asked):
    """Of each request: tokens, their scores, and how it ended."""
    numbers = [generator.submit(one) for one in asked]
    found = collect(generator.run())
    return [found[number] for number in numbers]


def collect(progresses):
    found = {}
    for progress in progresses:
        answer = found.setdefault(progress.number, [[], [], None])
        assert answer[2] is None, 'a request that is over goes on'
        answer[0] += progress.tokens
        answer[1] += progress.scores
        answer[2] = progress.ended
        assert not progress.ended or progress.ended.num_tokens == len(answer[0])
    return found


def bits(found):
    return [(*answer[:2], answer[2].reason) for answer in found]


def alone(model, params, asked, num_slots=4):
    """Each in a generator of as many slots as it will share."""
    return [answers(make_generator((model, params), num_slots=num_slots), [one])[0] for one in asked]


@pytest.mark.parametrize('is_ahead', [False, True])
def test_any_company_and_any_slot_give_the_same_bits(small, few, is_ahead):
    want = alone(*small, few)
    assert {answer[2].reason for answer in want} == {'stop', 'length'}
    assert all(score.filtered_log_probability < 0 for score in want[5][1])  # drawn by settings of its own
    generator = make_generator(small, num_slots=4)
    generator._is_ahead = is_ahead
    assert bits(answers(generator, few)) == bits(want)
    assert bits(answers(generator, few[::-1])) == bits(want[::-1])  # in slots that others had


@pytest.mark.slow
def test_alone_or_not_it_is_what_generate_gives(small, few):
    found = answers(make_generator(small, num_slots=2), few)
    for one, answer in zip(few, found, strict=True):
        want = generate_tokens(
            *small, [one.tokens], max_new_tokens=one.max_new_tokens, sampler=[one.sampler], stop_ids=one.stop_ids
        )  # fmt: skip
        assert answer[0] == want[0]


def test_what_the_caller_ends_the_stop_token_behind_it_does_not(small):
    drawn = CompletionRequest([3, 4, 5], 8, Sampler(temperature=1.0, seed=1))
    ((tokens, _, _),) = answers(make_generator(small, num_slots=1), [drawn])
    assert tokens[2] not in tokens[:2]
    asked = dataclasses.replace(drawn, stop_ids=(tokens[2],), is_complete=lambda made: len(made) == 2)
    generator = make_generator(small, num_slots=1)
    generator.submit(asked)
    *_, last = generator.run()
    assert (last.tokens, last.stop_id, last.ended.reason) == (tokens[1:2], None, 'stop')


@pytest.mark.parametrize('is_ahead', [False, True])
def test_a_cancelled_request_leaves_its_slot_to_the_next(small, few, is_ahead):
    """While it runs, while it waits, and once more when it is over; the others do not notice."""
    want = bits(alone(*small, few[5:], num_slots=1))
    generator = make_generator(small, num_slots=1, max_steps=1)
    generator._is_ahead = is_ahead
    endless = dataclasses.replace(few[2], stop_ids=())
    runs, waits, follows = map(generator.submit, (endless, few[0], few[5]))
    first = list(itertools.islice((p for _ in range(9) for p in generator.advance()), 2))
    assert [progress.number for progress in first] == [runs, runs]
    assert generator.cancel(waits).ended.num_tokens == 0
    assert generator.cancel(runs).ended.reason == 'cancelled'
    found = collect(generator.run())
    assert list(found) == [follows] and bits([found[follows]]) == want
    assert generator.cancel(runs) is generator.cancel(follows) is None


@pytest.fixture
def compilations():
    """What is compiled from here on, by its name."""
    found = []

    def listen(event, *_, **details):
        if event == '/jax/core/compile/backend_compile_duration':
            found.append(details['fun_name'])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ('context', 'mesh', 'settings'),
    [
        (16, None, {}),
        # Of two blocks of 200 KB each, one is on the devices.
        pytest.param(512, None, {'prefix_bytes': (200_000, 10**6)}, marks=pytest.mark.slow),
        pytest.param(64, {'data': 2, 'fsdp': 2, 'tensor': 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_compiled_once_it_is_warm(monkeypatch, compilations, caplog, context, mesh, settings):
    monkeypatch.setattr(generator_module, '_WIDTHS', {'cpu': (16, 128, 256)})  # few, as each takes a while
    model = make_model(context)
    params = toy.make_params(model)
    if mesh:
        partitioner = Partitioner(make_mesh(mesh))
        model = model.clone(partitioner=partitioner)
        params = jax.device_put(params, partitioner.tree_shardings(params, param_axes(model)))
    generator = Generator(model, params, num_slots=4, **settings)
    if context > 256:
        jax.clear_caches()
    with caplog.at_level(logging.INFO):
        compilations.clear()
        generator.warm_up()
    if context > 256:
        # For any settings, and any room that a first piece is put into; later pieces have fewer widths.
        programs = collections.Counter(compilations)
        assert [programs[f'jit({name})'] for name in ('decode', 'first', 'begin', 'extend')] == [2, 1, 3, 2]
    assert f'{len(compilations)} programs compiled in' in caplog.text
    assert f'rows: 4 of up to {context} tokens' in caplog.text  # the plan
    compilations.clear()
    rng = np.random.default_rng(0)
    for samplers in (SAMPLERS[:3], SAMPLERS):  # without what changes logits, then with it too
        found = answers(
            generator,
            [
                CompletionRequest(
                    [1 + index % 2] * int(rng.integers(1, context - 1)), int(rng.integers(1, context)),
                    samplers[index % len(samplers)], stop_ids=range(3 * index % 8),
                    is_complete=[None, lambda made: made[-1] > 60][index % 2],
                )
                for index in range(15)
            ],
        )  # fmt: skip
        assert {answer[2].reason for answer in found} == {'stop', 'length'}
    assert any(answer[2].cached_tokens for answer in found) == bool(settings)
    assert not compilations


@pytest.fixture(scope='module')
def long():
    """A model whose prompts take several pieces, and whose rooms grow and shrink."""
    model = make_model(512)
    return model, toy.make_params(model)


@pytest.fixture(scope='module')
def many():
    """Requests of all kinds, some with one beginning of more than a block."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 64, size=BLOCK + 10).tolist()
    kinds = ((0, 3, 40), (0, 20, 60), (1, 10, 30), (0, 60, 200), (1, 60, 90), (1, 0, 8), (0, 260, 20))
    return [
        CompletionRequest(
            shared * begins + rng.integers(3, 64, size=length).tolist(), most, SAMPLERS[index % 4],
            stop_ids=(7,) if index % 2 else (), key=str(index % 2),
        )
        for index, (begins, length, most) in enumerate(kinds)
    ]  # fmt: skip


@pytest.fixture(scope='module')
def wanted(long, many):
    return alone(*long, many)


@pytest.mark.slow
@pytest.mark.parametrize('is_ahead', [False, True])
def test_rooms_that_grow_and_shrink_give_the_same_bits(long, many, wanted, is_ahead):
    generator = make_generator(long, num_slots=4)
    generator._is_ahead = is_ahead
    order = [4, 0, 6, 2, 3, 5, 1]
    found = answers(generator, [many[index] for index in order])
    assert bits(found) == bits([wanted[index] for index in order])
    assert bits(answers(generator, many)) == bits(wanted)


@pytest.mark.slow
@pytest.mark.parametrize('rooms', [(4, 0), (1, 2)], ids=['on the devices', 'moved to the host'])
def test_a_cached_beginning_gives_the_same_bits(long, many, wanted, rooms):
    block_bytes = BLOCK * make_generator(long, num_slots=1)._slots.token_bytes
    generator = make_generator(long, num_slots=4, prefix_bytes=tuple(room * block_bytes for room in rooms))
    found = answers(generator, many)
    assert [answer[2].cached_tokens for answer in found] == [0, 0, 0, 0, BLOCK, BLOCK, 0]
    assert bits(found) == bits(wanted)
    other = dataclasses.replace(many[2], tokens=many[2].tokens[::-1])
    for one, cached in ((other, 0), (many[2], BLOCK)):
        found = answers(generator, [one])
        assert found[0][2].cached_tokens == cached
    assert bits(found) == bits([wanted[2]])


@pytest.mark.slow
def test_a_request_is_cancelled_between_two_pieces(long, many, wanted):
    generator = make_generator(long, num_slots=1)
    reads, follows = generator.submit(many[4]), generator.submit(many[0])
    assert generator.advance() == []  # the first piece
    assert generator.cancel(reads).ended.reason == 'cancelled'
    assert [progress.number for progress in generator.advance()] == [follows]
    assert [*generator.run()][-1].ended.num_tokens == len(wanted[0][0])


@pytest.mark.slow
def test_the_published_text_in_company(shared_data):
    """`expected.json` text for text, beside rows that come and go."""
    stories = shared_data / 'weights/stories260K'
    expected = json.loads((stories / 'expected.json').read_text())
    config, params, tokenizer = llama_jax.load(stories / 'stories260K.pt')
    generator = Generator(LlamaForCausalLM(config, dtype=np.float32), params, num_slots=4)
    bos = CompletionRequest([tokenizer.bos_id], expected['max_new_tokens'], stop_ids=tokenizer.stop_ids)
    others = [
        dataclasses.replace(bos, max_new_tokens=20 * n, sampler=Sampler(temperature=1.0, seed=n))
        for n in (1, 2, 3, 4)
    ]
    found = answers(generator, [*others[:2], bos, *others[2:], bos])
    assert [tokenizer.decode(found[index][0]) for index in (2, 5)] == [expected['greedy_text']] * 2
