import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from llama_jax.data.examples import Encoder, Example, ExampleRows, collate_examples, example_dataset
from llama_jax.data.record_kinds import Conversation
from llama_jax.errors import InputError
from llama_jax.losses.language_model import language_model_loss
from llama_jax.tokenizer.chat_format import FORMATS, Message, chat_format_for
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests import toy

T = 96
TEXT_FORMATS = [name for name in FORMATS if name != 'llama3']


@pytest.fixture(scope='module')
def tokenizer(shared_data):
    return load_tokenizer(shared_data / 'weights/stories260K/tok512.model')


def random_conversations(rng, count):
    """Of one turn and of several, short ones and some that are too long, some answers not to be learnt."""
    words = ['the', 'cat', 'sat', '1+1', 'é', '\n', 'Once upon a time', '😀']

    def say(longest):
        return 'a ' + ' '.join(rng.choice(words, rng.integers(1, longest)))

    found = []
    for _ in range(count):
        turns = int(rng.integers(1, 4))
        messages = [Message('system', say(4))] * int(rng.integers(2))
        for _ in range(turns):
            messages += [Message('user', say(6)), Message('assistant', say(20))]
        counts = [message.role == 'assistant' and bool(rng.random() < 0.7) for message in messages]
        counts[-1] = True
        found.append(Conversation(tuple(messages), tuple(counts)))
    return found


def pieces_of(row):
    """(tokens, counts) of every segment of a row."""
    for segment in range(1, row['segment_ids'].max() + 1):
        own = row['segment_ids'] == segment
        yield row['tokens'][own], row['counts'][own]


@pytest.mark.parametrize('too_long', ['drop', 'oldest', 'cut'])
@pytest.mark.parametrize('name', TEXT_FORMATS)
def test_rows_hold_whole_examples_each_once(tokenizer, name, too_long):
    """In every format and at every way to shorten: no example lost, none twice, none in pieces, and what counts is
    whole answers with their stop token, but where one was cut."""
    rng = np.random.default_rng(FORMATS.index(name))
    records, chat = random_conversations(rng, 60), chat_format_for(tokenizer, name)
    encoder = Encoder(chat, T, too_long=too_long)
    encoded = [encoder.encode(record) for record in records]
    examples = [example for example in encoded if example]
    assert encoder.dropped == encoded.count(None) and (too_long != 'cut' or encoder.shortened)
    assert encoder.longest == max(len(chat.encode_dialog(record.messages)[0]) for record in records)
    rows = ExampleRows(examples, T)
    found = collections.Counter()
    for row in map(rows.__getitem__, range(len(rows))):
        assert {array.shape for array in row.values()} == {(T + 1,)}
        assert not row['counts'][row['segment_ids'] == 0].any()
        found.update((tokens.tobytes(), counts.tobytes()) for tokens, counts in pieces_of(row))
    assert found == collections.Counter((e.tokens.tobytes(), e.counts.tobytes()) for e in examples)
    assert rows.num_tokens == sum(len(e.tokens) for e in examples) and 0 < rows.fill <= 1
    for record, example in zip(records, encoded, strict=True):
        if not example:
            continue
        ids, mask = chat.encode_dialog(record.messages, counts=record.counts)
        assert example.counts.any() and example.tokens[0] == tokenizer.bos_id
        if len(ids) <= T + 1:
            assert example.tokens.tolist() == ids and example.counts.tolist() == mask
        elif too_long == 'cut':
            assert example.tokens.tolist() == ids[: T + 1] and len(example.tokens) == T + 1
        else:  # the newest turns, behind the system message that there was
            kept = example.record.messages
            system = [message for message in record.messages if message.role == 'system']
            assert list(kept) == [*system, *record.messages[len(record.messages) - len(kept) + len(system) :]]
            assert example.tokens[-1] in chat.stop_ids


def test_a_cut_answer_has_no_stop_token(tokenizer):
    record = Conversation((Message('user', 'Hi'), Message('assistant', 'the cat ' * 60)), (False, True))
    example = Encoder(chat_format_for(tokenizer, 'plain'), T, too_long='cut').encode(record)
    assert len(example.tokens) == T + 1 and tokenizer.eos_id not in example.tokens
    prompt = chat_format_for(tokenizer, 'plain').encode_prompt(record.messages[:1])
    assert example.counts.tolist() == [False] * len(prompt) + [True] * (T + 1 - len(prompt))
    asked = Conversation((Message('user', 'the cat ' * 60), Message('assistant', 'Hi')), (False, True))
    encoder = Encoder(chat_format_for(tokenizer, 'plain'), T, too_long='cut')
    assert encoder.encode(asked) is None and encoder.dropped == 1  # nothing to learn is left


def test_the_last_answer_alone(tokenizer):
    messages = (
        Message('user', 'a'),
        Message('assistant', 'b'),
        Message('user', 'c'),
        Message('assistant', 'd'),
    )
    chat = chat_format_for(tokenizer, 'tulu')
    last = Encoder(chat, T, loss_on='last').encode(Conversation(messages, (False, True, False, True)))
    assert last.counts.tolist() == [
        bool(c) for c in chat.encode_dialog(messages, counts=[False] * 3 + [True])[1]
    ]
    first = Encoder(chat, T, loss_on='last').encode(Conversation(messages, (False, True, False, False)))
    assert first.counts.sum() and not first.counts[last.counts].any()
    for settings, line in (
        ({'loss_on': 'some'}, "loss_on is 'some'"),
        ({'too_long': 'x'}, "too_long is 'x'"),
    ):
        with pytest.raises(InputError, match=line):
            Encoder(chat, T, **settings)


def test_a_batch_counts_answers_and_nothing_across_examples(tokenizer):
    records = random_conversations(np.random.default_rng(1), 20)
    encoder = Encoder(chat_format_for(tokenizer, 'vicuna'), 2 * T)
    rows = ExampleRows([e for e in map(encoder.encode, records) if e], 2 * T)
    batch = collate_examples([rows[i] for i in range(len(rows))])
    counted = collections.Counter(batch.targets[batch.loss_mask].tolist())
    assert counted == sum(
        (collections.Counter(e.tokens[e.counts].tolist()) for e in rows.examples), collections.Counter()
    )
    assert batch.loss_mask.sum() == rows.num_counted
    starts = batch.positions == 0
    assert not batch.loss_mask[:, :-1][starts[:, 1:]].any()  # the last token of an example predicts nothing


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'data.jsonl'
    lines = [{'prompt': f'What is {n}?', 'completion': f'the number {n} ' * (n % 5 + 1)} for n in range(60)]
    path.write_text('\n'.join(map(json.dumps, lines)))
    return path


def read(file, tokenizer, **options):
    encoder = Encoder(chat_format_for(tokenizer, options.pop('name', 'plain')), options.pop('seq_len', T),
                      too_long=options.pop('too_long', 'drop'))  # fmt: skip
    return example_dataset([str(file)], tokenizer, encoder, **options)


def test_every_pass_has_every_example_once_whatever_the_seed(file, tokenizer):
    data = {seed: read(file, tokenizer, seed=seed, validation_fraction=0.2) for seed in (0, 1)}
    held_out = [e.record.messages for e in data[0].validation.examples]
    assert 2 < len(held_out) < 25 and len(held_out) + data[0].rows.num_documents == 60
    assert [e.record.messages for e in data[1].validation.examples] == held_out
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        size = len(data[seed].rows)
        rows = [data[seed].train[epoch * size + i]['tokens'].tobytes() for i in range(size)]
        assert sorted(rows) == sorted(data[seed].rows[i]['tokens'].tobytes() for i in range(size))
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2] and data[0].fingerprint == data[1].fingerprint
    assert read(file, tokenizer, seq_len=T - 1).fingerprint != read(file, tokenizer).fingerprint


def test_nothing_left_to_learn_is_refused(file, tokenizer):
    with pytest.raises(InputError, match=r'nothing to learn is left .*60 conversations are too long for seq_len 4 '
                                         r'\(the longest has \d+ tokens\).*raise seq_len'):  # fmt: skip
        read(file, tokenizer, seq_len=4)
    with pytest.raises(InputError, match='no training data'):
        example_dataset([], tokenizer, Encoder(chat_format_for(tokenizer, 'plain'), T))


def test_what_a_format_does_not_have_is_a_bad_record(file, tokenizer, caplog):
    with file.open('a') as opened:
        opened.write('\n' + json.dumps({'prompt': '[INST] a', 'completion': 'b'}))
    with pytest.raises(InputError, match=r'data.jsonl line 61: message 0 \(user\) contains \[INST\]'):
        read(file, tokenizer, name='llama2')
    assert read(file, tokenizer, name='llama2', on_error='skip').rows.num_documents == 60
    assert 'left out 1 bad records' in caplog.text


@pytest.mark.slow
def test_alpaca_fills_its_rows(shared_data):
    """Best fit leaves under 3 % of rows of 512 empty, where padding to the longest of 16 leaves over half."""
    tokenizer = load_tokenizer(shared_data / 'tokenizers/llama2')
    encoder = Encoder(chat_format_for(tokenizer, 'alpaca'), 512)
    data = example_dataset([f'{shared_data}/finetune/alpaca_en_demo.json'], tokenizer, encoder)
    lengths = [len(example.tokens) for example in data.rows.examples]
    padded = [lengths[i : i + 16] for i in range(0, len(lengths), 16)]
    assert data.rows.fill >= 0.97
    assert sum(lengths) / sum(max(batch) * len(batch) for batch in padded) < 0.5
    assert data.rows.num_documents + encoder.dropped == 999


def random_examples(rng, vocab_size, seq_len):
    """Examples whose answers are of 1 token and of many."""
    for length, answer in ((7, 1), (seq_len // 2, seq_len // 3), (30, 20), (5, 4), (41, 1), (60, 50)):
        counts = np.arange(length) >= length - answer
        record = Conversation((), ())
        yield Example(rng.integers(vocab_size, size=length).astype(np.int32), counts, record)


@pytest.mark.parametrize(
    'kernel', ['chunked', *(pytest.param(k, marks=pytest.mark.slow) for k in ('reference', 'splash'))]
)
def test_packed_examples_learn_as_each_alone(kernel):
    """Losses and gradients, to 1e-5 of the largest: fp32 sums in another order."""
    T, config = 128, dataclasses.replace(toy.CONFIG, max_seq_len=128)
    model = toy.make_model(attention_implementation=kernel).clone(config=config)
    params = toy.make_params(model)
    rows = ExampleRows(list(random_examples(np.random.default_rng(0), config.vocab_size, T)), T)
    assert len(rows) < len(rows.examples)
    alone = [ExampleRows([example], T)[0] for example in rows.examples]
    step = jax.jit(
        jax.value_and_grad(lambda p, b: language_model_loss(model)(p, {}, b, jax.random.key(0))[0])
    )
    loss, gradients = step(params, collate_examples([rows[i] for i in range(len(rows))]))
    losses, all_gradients = zip(
        *(step(params, collate_examples([row] * len(rows))) for row in alone), strict=True
    )
    assert float(loss) == pytest.approx(sum(map(float, losses)) / len(rows), rel=1e-5)
    toy.assert_same_gradients(gradients, jax.tree.map(lambda *g: sum(g) / len(rows), *all_gradients))
