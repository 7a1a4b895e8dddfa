"""Requests answered by a real model as transformers answers them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine, left_truncated, rolling_windows
from llama_jax.eval.harness import prepare
from llama_jax.eval.task import Completion, Continuation, Likelihood, Rolling
from llama_jax.eval.tasks import find_task
from llama_jax.inference import generate as generation
from llama_jax.partitioning import Partitioner, make_mesh

TASKS = ['piqa', 'hellaswag', 'arc_easy', 'arc_challenge', 'siqa', 'winogrande', 'boolq', 'openbookqa']


@pytest.fixture(scope='module')
def torch_log_probs(huggingface_folder):
    """A function of pairs (context ids, continuation ids): what transformers makes of each, in order."""
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    model = transformers.AutoModelForCausalLM.from_pretrained(huggingface_folder, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several cost more than they give for so small a model

    def log_probs(pairs):
        found = {}
        by_length = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
        for group in np.array_split(by_length, -(-len(pairs) // 32)):
            ids = [torch.tensor([*pairs[index][0], *pairs[index][1]]) for index in group]
            rows = torch.nn.utils.rnn.pad_sequence(
                ids, batch_first=True
            )  # padding comes after all that is read
            with torch.no_grad():
                read = torch.log_softmax(model(input_ids=rows[:, :-1]).logits.float(), -1)
            for index, row, logits in zip(group, ids, read, strict=True):
                start = len(pairs[index][0])
                targets, logits = row[start:], logits[start - 1 : len(row) - 1]
                total = logits.gather(1, targets[:, None]).sum().item()
                found[index] = total, bool((logits.argmax(-1) == targets).all())
        return [found[index] for index in range(len(pairs))]

    yield log_probs
    torch.set_num_threads(threads)


def read(data_dir, name, limit):
    return prepare(find_task(name), str(data_dir), limit=limit)


def ask(engine, prepared_tasks):
    return dict(
        engine.answer(r for prepared in prepared_tasks for requests in prepared.requests for r in requests)
    )


def check_parity(engine, torch_log_probs, prepared, answers):
    theirs, asked = {}, list(dict.fromkeys(request for requests in prepared.requests for request in requests))
    pairs = []
    for request in asked:
        # As lm-evaluation-harness's TemplateLM._encode_pair.
        before = engine.tokenizer.encode(request.context.rstrip(), bos=True)
        whole = engine.tokenizer.encode(request.context + request.continuation, bos=True)
        pairs.append((before, whole[len(before) :]))
    for request, (_, continuation), (log_probability, is_greedy) in zip(
        asked, pairs, torch_log_probs(pairs), strict=True
    ):
        result = answers[request]
        assert result.log_probability == pytest.approx(log_probability, abs=1e-3), request
        assert (result.is_greedy, result.num_tokens) == (is_greedy, len(continuation))
        theirs[request] = Likelihood(log_probability, is_greedy, len(continuation))
    for document, requests in zip(prepared.documents, prepared.requests, strict=True):
        ours = prepared.task.grade(document, [answers[request] for request in requests])
        assert ours == prepared.task.grade(document, [theirs[request] for request in requests])


@pytest.mark.slow
@pytest.mark.parametrize('name', TASKS)
def test_log_likelihoods_are_those_of_transformers(engine, torch_log_probs, shared_data, name):
    prepared = read(shared_data / 'eval', name, 200)
    check_parity(engine, torch_log_probs, prepared, ask(engine, [prepared]))


def test_white_space_belongs_to_the_word_behind_it(engine):
    requests = [
        Continuation('Once upon a', ' time'),
        Continuation('Once upon a ', 'time'),
        Continuation('', 'Once'),
        Continuation('  ', 'Once'),
    ]
    answers = dict(engine.answer(requests))
    assert answers[requests[0]] == answers[requests[1]]
    assert answers[requests[0]].is_greedy and answers[requests[0]].log_probability > -0.1
    assert answers[requests[2]].num_tokens < answers[requests[3]].num_tokens


def test_long_texts_lose_their_left_end_and_rolling_ones_do_not(engine):
    length = engine.model.config.max_seq_len
    text = 'Once upon a time, there was a girl. ' * (length // 8)
    long, short = Continuation(text, 'She'), Continuation('Once', ' upon')
    answers = dict(engine.answer([long, short, Rolling(text), Rolling('')]))
    assert answers[long].truncated and not answers[short].truncated
    ids = engine.tokenizer.encode(text)
    assert answers[Rolling(text)].num_tokens == len(ids) > length and not answers[Rolling(text)].truncated
    assert answers[Rolling('')].num_tokens == 0
    assert left_truncated((1, 2, 3, 4), (5, 6), 4) == ([((2, 3, 4), (5, 6))], True)
    assert left_truncated((1, 2), (3, 4, 5), 2) == ([((3,), (4, 5))], True)
    assert left_truncated((1, 2, 3), (4, 5), 4) == ([((1, 2, 3), (4, 5))], False)
    windows = rolling_windows(tuple(range(10, 20)), 1, 4)
    assert [target for _, targets in windows for target in targets] == list(range(10, 20))
    assert windows == [((1,), (10, 11, 12, 13)), ((13,), (14, 15, 16, 17)), ((15, 16, 17), (18, 19))]


def test_a_continuation_that_melts_into_its_context_has_tokens_of_its_own(engine, caplog):
    tokenizer = engine.tokenizer
    assert len(tokenizer.encode('there')) == len(tokenizer.encode('the'))
    answers = dict(engine.answer([Continuation('Hello', ' there'), Continuation('the', 're')]))
    found = answers[Continuation('the', 're')]
    assert math.isfinite(found.log_probability) and found.num_tokens >= 1
    assert "one token with the end of their context: 1, such as 're' of 'the'" in caplog.text
    assert tokenizer.decode(engine._alone('re')) == 're'


def test_a_choice_without_text_is_refused(engine):
    with pytest.raises(InputError, match="the continuation of 'What.' is empty") as error:
        list(engine.answer([Continuation('What?', '')]))
    assert '\n' not in str(error.value)


def test_completions_end_before_their_stop_string(engine, monkeypatch):
    monkeypatch.setattr(generation, 'CHECKED_STEPS', 8)
    prompts = ['Once upon a time', '', 'Lily']
    whole = dict(engine.answer(Completion(prompt, max_new_tokens=40) for prompt in prompts))
    asked = [Completion(prompt, (' she', '.', 'zz'), 40) for prompt in prompts]
    for request, result in engine.answer(asked):
        (text,), (full,) = result.texts, whole[Completion(request.prompt, max_new_tokens=40)].texts
        assert text == full[: min(full.find(stop) for stop in (' she', '.') if stop in full)]
    assert whole[Completion('Once upon a time', max_new_tokens=40)].texts[0].startswith(', there was')


def test_draws_depend_on_seed_and_prompt_alone(engine):
    first, second = (Completion(p, (), 12, 1.0, 0.9, num_samples=3) for p in ('Once', 'The dog'))
    together = dict(engine.answer([first, second]))
    assert len(set(together[first].texts)) > 1
    assert dict(engine.answer([second]))[second] == together[second]
    other = Engine(engine.model, engine.params, engine.tokenizer, seed=1)
    assert dict(other.answer([second]))[second] != together[second]


@pytest.mark.slow
def test_a_mesh_changes_nothing(engine, stories):
    partitioner = Partitioner(make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
    config, params, tokenizer = llama_jax.load(stories, mesh=partitioner.mesh)
    model = llama_jax.LlamaForCausalLM(config, dtype=jnp.float32, partitioner=partitioner)
    spread = Engine(model, params, tokenizer)
    requests = [
        *(Continuation('Once upon a', ending) for ending in (' time', ' dog', ' big red ball')),
        Completion('Once upon a time', ('.',), 40),
        Completion('The', (), 10, 1.0),
        Completion('A dog and a', (), 10),
    ]
    want, found = dict(engine.answer(requests)), dict(spread.answer(requests))
    for request in requests[3:]:
        assert found[request] == want[request]
    for request in requests[:3]:
        # fp32 sums over devices round in another order.
        assert found[request].log_probability == pytest.approx(want[request].log_probability, abs=1e-4)
    assert spread.fingerprint == engine.fingerprint


def test_other_weights_have_another_fingerprint(engine):
    changed = jax.tree.map(jnp.asarray, engine.params) | {'final_norm': engine.params['final_norm'] * 2}
    other = Engine(engine.model, changed, engine.tokenizer)
    assert other.fingerprint != engine.fingerprint
    copy = jax.tree.map(np.asarray, engine.params)
    assert Engine(engine.model, copy, engine.tokenizer).fingerprint == engine.fingerprint


def test_published_weights_complete_as_their_release_does(shared_data):
    stories = shared_data / 'weights/stories260K'
    expected = json.loads((stories / 'expected.json').read_text())
    config, params, tokenizer = llama_jax.load(stories / 'stories260K.pt')
    engine = Engine(llama_jax.LlamaForCausalLM(config), params, tokenizer)
    # Beside others, whose lengths are none of its concern.
    asked = [
        Completion(prompt, max_new_tokens=expected['max_new_tokens'])
        for prompt in ('', 'Lily', 'One day a dog')
    ]
    answers = dict(engine.answer(asked))
    assert answers[asked[0]].texts == (expected['greedy_text'],)
