import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.packing import PackedRows, TokenizedCorpus
from llama_jax.eval.perplexity import bits_per_byte, evaluate_rows, fit_baselines
from llama_jax.losses.language_model import evaluate_loss, language_model_loss
from llama_jax.partitioning import Partitioner, make_mesh
from tests import toy

VOCAB, LENGTH = 12, 8


def corpus(seed, num_documents=9):
    """Documents of a language that prefers x + 1 after x, with BOS 0 and EOS 1."""
    rng = np.random.default_rng(seed)
    documents = []
    for size in rng.integers(1, 12, size=num_documents):
        body = 2 + (rng.integers(10) + np.cumsum(rng.random(size) < 0.8)) % 10
        documents.append(np.concatenate([[0], body, [1]]).astype(np.uint16))
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    return documents, TokenizedCorpus(np.concatenate(documents), starts, num_bytes=500, fingerprint='')


def pairs(documents):
    return [(int(a), int(b)) for document in documents for a, b in zip(document, document[1:], strict=False)]


def table_loss(params, batch):
    """A bigram model: params['table'][v, w] is log p(w | v)."""
    losses = -params['table'][batch.tokens, batch.targets]
    return jnp.sum(losses, where=batch.loss_mask), jnp.sum(batch.loss_mask, dtype=jnp.float32)


@pytest.mark.parametrize('batch_size', [4, 8])
def test_perplexity_is_the_mean_over_all_predicted_tokens(batch_size):
    documents, tokens = corpus(0)
    rows = PackedRows(tokens, LENGTH)
    assert len(rows) % batch_size  # so that the last batch is padded
    table = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (VOCAB, VOCAB)))
    found = evaluate_rows(
        jax.jit(table_loss), {'table': table}, rows, batch_size=batch_size,
        partitioner=Partitioner(make_mesh({'data': 4}, jax.devices()[:4])),
    )  # fmt: skip
    losses = [-float(table[a, b]) for a, b in pairs(documents)]
    assert found.num_tokens == len(losses) == tokens.num_tokens - tokens.num_documents
    assert found.nats_per_token == pytest.approx(
        math.fsum(losses) / len(losses), rel=1e-6
    )  # fp32 sums of a batch
    assert found.bits_per_byte == pytest.approx(math.fsum(losses) / math.log(2) / 500, rel=1e-6)


def test_only_the_first_rows_are_read_where_asked():
    rows = PackedRows(corpus(0)[1], LENGTH)
    partitioner = Partitioner(make_mesh({}, jax.devices()[:1]))
    found = evaluate_rows(
        table_loss, {'table': jnp.zeros((VOCAB, VOCAB))}, rows, batch_size=2, partitioner=partitioner, max_rows=3,
    )  # fmt: skip
    targets = [rows[i]['segment_ids'] for i in range(3)]
    assert found.num_tokens == sum(np.sum(ids[:-1] == ids[1:]) for ids in targets)


def test_a_model_is_scored_as_by_hand():
    _, tokens = corpus(1)
    rows = PackedRows(tokens, LENGTH)
    model = toy.make_model()
    params = toy.make_params(model)
    found = evaluate_rows(
        evaluate_loss(language_model_loss(model)), params, rows, batch_size=8,
        partitioner=Partitioner(make_mesh({'data': 8})),
    )  # fmt: skip
    apply = jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({'params': params}, tokens)[0][0]))
    total = count = 0
    for row in (rows[i] for i in range(len(rows))):
        for segment in set(row['segment_ids'].tolist()) - {0}:
            piece = row['tokens'][row['segment_ids'] == segment]
            # Alone at the start of a row; what is behind it is not seen.
            alone = np.pad(piece, (0, LENGTH + 1 - len(piece)))[None, :]
            log_p = np.asarray(apply(jnp.asarray(alone)))
            total -= log_p[np.arange(len(piece) - 1), piece[1:]].sum()
            count += len(piece) - 1
    assert found.num_tokens == count
    assert found.nats_per_token == pytest.approx(total / count, rel=1e-5)  # fp32 logits, packed or alone


def test_bits_per_byte_by_arithmetic():
    class Text:
        seq_len, fingerprint, num_documents, num_tokens, num_bytes = 8, '', 10, 110, 400

        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise IndexError

    # 100 tokens are predicted, 2 bits each, of a text of 400 bytes.
    assert bits_per_byte(2 * math.log(2), Text()) == pytest.approx(0.5)


def test_count_models_by_hand():
    (train, train_tokens), (validation, validation_tokens) = corpus(2, 30), corpus(3)
    rows, held_out = PackedRows(train_tokens, LENGTH), PackedRows(validation_tokens, LENGTH)
    found = fit_baselines(
        (rows[i] for i in range(len(rows))), (held_out[i] for i in range(len(held_out))), VOCAB
    )

    seen = pairs(train)
    followers, contexts = collections.Counter(b for _, b in seen), collections.Counter(a for a, _ in seen)
    together = collections.Counter(seen)

    def unigram(b):
        return (followers[b] + 1) / (len(seen) + VOCAB)

    def bigram(a, b, share):
        if not contexts[a]:
            return unigram(b)
        return share * together[a, b] / contexts[a] + (1 - share) * unigram(b)

    scored = pairs(validation)
    loss = -np.mean([math.log(unigram(b)) for _, b in scored])
    assert found.unigram == pytest.approx(loss, rel=1e-9)
    shares = np.linspace(0.05, 0.95, 19)
    losses = [-np.mean([math.log(bigram(a, b, share)) for a, b in scored]) for share in shares]
    assert found.bigram == pytest.approx(min(losses), rel=1e-9)
    assert found.bigram < found.unigram - 0.3  # what x tells of the next token
