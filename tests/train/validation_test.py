import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.packing import PackedRows
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.state import TrainState
from llama_jax.train.validation import (
    bits_per_byte,
    count_predicted,
    evaluate_rows,
    make_validation,
)
from tests import toy
from tests.eval.baselines_test import LENGTH, VOCAB, corpus, pairs


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
        jax.jit(table_loss), {'table': table}, rows,
        target=toy.abstract_batch(Partitioner(make_mesh({'data': 4}, jax.devices()[:4])), batch_size, LENGTH),
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
        table_loss, {'table': jnp.zeros((VOCAB, VOCAB))}, rows,
        target=toy.abstract_batch(partitioner, 2, LENGTH), max_rows=3,
    )  # fmt: skip
    targets = [rows[i]['segment_ids'] for i in range(3)]
    assert found.num_tokens == sum(np.sum(ids[:-1] == ids[1:]) for ids in targets)


def test_a_model_is_scored_as_by_hand():
    _, tokens = corpus(1)
    rows = PackedRows(tokens, LENGTH)
    model = toy.make_model()
    params = toy.make_params(model)
    measurement = make_validation(
        model, rows, every=5, target=toy.abstract_batch(Partitioner(make_mesh({'data': 8})), 8, LENGTH),
        view=lambda state: state.params['policy'], num_chunks=2,
    )  # fmt: skip
    found = measurement.measure(TrainState(jnp.int32(5), {'policy': params}, {}), 5, lambda: None)
    assert tuple(found) == measurement.figures
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
    assert count_predicted(rows) == count
    assert found['validation_loss'] == pytest.approx(total / count, rel=1e-5)  # fp32 logits, packed or alone
    assert found['validation_bits_per_byte'] == bits_per_byte(found['validation_loss'], rows)


def test_bits_per_byte_by_arithmetic():
    class Text:
        seq_len, fingerprint, num_documents, num_tokens, num_bytes = 8, '', 10, 110, 400

        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise IndexError

    # 100 tokens are predicted, 2 bits each, of a text of 400 bytes.
    assert bits_per_byte(2 * math.log(2), Text()) == pytest.approx(0.5)


@pytest.mark.parametrize('max_rows', [0, 3, 99])
def test_predicted_tokens_are_counted(max_rows):
    rows = PackedRows(corpus(0)[1], LENGTH)
    found = evaluate_rows(
        jax.jit(table_loss), {'table': jnp.zeros((VOCAB, VOCAB))}, rows,
        target=toy.abstract_batch(Partitioner(make_mesh({}, jax.devices()[:1])), 8, LENGTH), max_rows=max_rows,
    )  # fmt: skip
    assert count_predicted(rows, max_rows) == found.num_tokens
