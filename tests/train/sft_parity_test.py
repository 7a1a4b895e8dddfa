"""Fine-tuning beside other people's: a plain PyTorch loop over Hugging Face's Llama, and TRL's SFTTrainer.

They see each example by itself, padded or not; ours packs them. Same weights, same examples, same AdamW.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.data.examples import Encoder, ExampleRows, collate_examples
from llama_jax.data.record_kinds import Conversation
from llama_jax.data.records import read_records
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.train.optimizer import OptimizerConfig, make_optimizer
from llama_jax.train.state import new_state
from llama_jax.train.step import train_step
from tests.reference import huggingface_llama

pytestmark = pytest.mark.slow
STEPS, BATCH, T = 20, 6, 192
LEARNING_RATE = 1e-3


@pytest.fixture(scope='module')
def start(shared_data):
    """(configuration, weights, examples) of stories260K and Alpaca's short ones."""
    pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    weights = shared_data / 'weights/stories260K'
    config, params, tokenizer = llama_jax.load(weights / 'stories260K.pt')
    encoder = Encoder(chat_format_for(tokenizer, 'plain'), T)
    records = read_records([f'{shared_data}/finetune/alpaca_en_demo.json'], kind=Conversation)
    examples = [example for example in map(encoder.encode, records) if example][: STEPS * BATCH]
    assert len(examples) == STEPS * BATCH
    return config, jax.device_get(params), examples


def make_peer(config, params):
    hparams = {'rope_theta': config.rope_theta, 'rope_scaling': None, 'norm_eps': config.norm_eps}
    return huggingface_llama.make_model(hparams, params, config.max_seq_len).train()


def make_batches(examples):
    """The rows that examples pack into, with empty ones up to a batch of always as many."""
    for i in range(0, len(examples), BATCH):
        rows = ExampleRows(examples[i : i + BATCH], 2 * T)
        empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
        packed = [rows[j] for j in range(len(rows))]
        assert len(packed) < BATCH
        yield jax.tree.map(jnp.asarray, collate_examples([*packed, *[empty] * (BATCH - len(packed))]))


def torch_loss(model, examples):
    """Sums over each example alone, divided once."""
    import torch

    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.tokens)[None].long()
        labels = torch.where(torch.tensor(example.counts)[None], ids, -100)
        logits = model(input_ids=ids, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction='sum')
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def test_twenty_steps_equal_a_torch_loop(start):
    """Every loss and the last weights to 1e-4: fp32 sums in another order, carried through 20 updates of Adam."""
    import torch

    config, params, examples = start
    model = LlamaForCausalLM(config, dtype=jnp.float32)
    tx = make_optimizer(
        OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=1.0), LEARNING_RATE
    )
    step = jax.jit(
        functools.partial(train_step, loss_fn=language_model_loss(model), tx=tx, num_microbatches=2)
    )
    state, ours = new_state(jax.tree.map(jnp.asarray, params), tx), []
    for batch in make_batches(examples):
        state, metrics = step(state, {}, batch, jax.random.key(0))
        ours.append(float(metrics['loss']))

    peer, theirs = make_peer(config, params), []
    groups = [
        {'params': [p for p in peer.parameters() if p.ndim > 1], 'weight_decay': 0.1},
        {'params': [p for p in peer.parameters() if p.ndim == 1], 'weight_decay': 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-6)
    for i in range(0, len(examples), BATCH):
        loss = torch_loss(peer, examples[i : i + BATCH])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        theirs.append(loss.item())

    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1] < ours[0]
    found = huggingface_llama._state_dict(jax.device_get(state.params))
    for name, weight in peer.state_dict().items():
        np.testing.assert_allclose(
            found[name], weight.numpy(), atol=1e-4 * float(weight.abs().max()), err_msg=name
        )


def test_the_first_step_is_trls(start, tmp_path):
    """Loss and gradient norm of one batch, to 1e-5: theirs is padded to its longest example."""
    trl = pytest.importorskip('trl', reason='needs trl: the extra `parity`')
    datasets = pytest.importorskip('datasets', reason='needs datasets: the extra `parity`')
    import tokenizers
    import torch
    import transformers

    config, params, examples = start
    first = examples[:BATCH]
    words = {f'<{i}>': i for i in range(config.vocab_size)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of others' code
        naming = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<0>'))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=naming, pad_token='<0>', eos_token='<2>'
        )
        trainer = trl.SFTTrainer(
            model=make_peer(config, params),
            args=trl.SFTConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=BATCH, max_steps=1, use_cpu=True, bf16=False,
                report_to='none', completion_only_loss=True, max_length=None, gradient_checkpointing=False,
            ),
            processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([
                {'input_ids': e.tokens.tolist(), 'completion_mask': e.counts.astype(int).tolist()} for e in first
            ]),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in trainer.model.parameters() if p.grad is not None]
        )
    assert int((batch['labels'] != -100).sum()) == sum(int(e.counts.sum()) for e in first)

    model = LlamaForCausalLM(config, dtype=jnp.float32)
    found, metrics = gradients_and_loss(model, params, next(make_batches(first)))
    assert float(metrics) == pytest.approx(loss.item(), rel=1e-5)
    assert found == pytest.approx(float(norm), rel=1e-5)


def gradients_and_loss(model, params, batch):
    def mean(params):
        loss, weight, _ = language_model_loss(model)(params, {}, batch, jax.random.key(0))
        return loss / weight

    loss, gradients = jax.jit(jax.value_and_grad(mean))(params)
    return float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))), loss
