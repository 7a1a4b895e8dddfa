"""The first step of a policy and of a reward model beside TRL's trainers, on the batch that theirs makes."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.preferences import Answer, EncodedPair
from llama_jax.losses.dpo import PreferenceLoss, preference_loss, ratio_sums
from llama_jax.losses.reward import reward_loss
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.reward import LlamaForRewardModel
from tests.losses import pairs_parity_test as plain
from tests.losses.pairs_parity_test import RELEASE, gradient_norm, our_batch, our_steps, torch_policy
from tests.models.parity_test import RELEASES, random_params, small_config

pytestmark = pytest.mark.slow
pairs, params, torch = plain.pairs, plain.params, plain.torch  # fixtures


@pytest.fixture(scope='module')
def trl():
    pytest.importorskip('datasets', reason='needs datasets: the extra `parity`')
    return pytest.importorskip('trl', reason='needs trl: the extra `parity`')


@pytest.fixture(scope='module')
def tokenizer(torch):
    """Of words that are the ids' names."""
    import tokenizers
    import transformers

    words = {f'<{i}>': i for i in range(small_config(RELEASE).vocab_size)}
    naming = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<0>'))
    naming.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=naming, pad_token='<0>', eos_token='<2>', bos_token='<1>'
    )


def as_text(ids) -> str:
    return ''.join(f' <{i}>' for i in ids)


def dataset_of(pairs, **columns):
    import datasets

    names = 'chosen', 'rejected'
    return datasets.Dataset.from_list([
        {'prompt': as_text(pair.prompt)}
        | {name: as_text(answer.tokens) for name, answer in zip(names, pair.answers, strict=True)}
        | {name: values[i] for name, values in columns.items()}
        for i, pair in enumerate(pairs)
    ])  # fmt: skip


def pairs_of(batch, margins) -> list[EncodedPair]:
    """What a batch of TRL holds: all preferred, then all others, padded at their right."""
    ids, mask, counted = (
        np.asarray(batch[name]) for name in ('input_ids', 'attention_mask', 'completion_mask')
    )
    number, found = len(ids) // 2, []
    for i in range(number):
        rows = [ids[row][mask[row] > 0] for row in (i, i + number)]
        begins = [int(np.argmax(counted[row])) for row in (i, i + number)]
        answers = [
            Answer(row[begin:].astype(np.int32), np.ones(len(row) - begin, bool))
            for row, begin in zip(rows, begins, strict=True)
        ]
        found.append(EncodedPair(rows[0][: begins[0]].astype(np.int32), (answers[0], answers[1]), margins[i]))
    return found


@pytest.mark.parametrize('kind', ['sigmoid', 'ipo', 'hinge', 'robust', 'sigmoid_norm'])
def test_a_policys_first_step_is_trls(torch, trl, tokenizer, params, pairs, tmp_path, kind):
    """Loss and gradient norm to 1e-5, from a reference that is another model."""
    other = random_params(RELEASES[RELEASE], np.random.default_rng(1), 0.3)
    smoothing = 0.1 if kind == 'robust' else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of others' code
        trainer = trl.DPOTrainer(
            model=torch_policy(params).train(), ref_model=torch_policy(other),
            args=trl.DPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=len(pairs), max_steps=1, use_cpu=True, bf16=False,
                report_to='none', beta=0.3, loss_type=[kind], label_smoothing=smoothing, max_length=None,
                gradient_checkpointing=False,
            ),
            processing_class=tokenizer, train_dataset=dataset_of(pairs),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
    wanted = loss.item(), gradient_norm(torch, trainer.model)
    ours = LlamaForCausalLM(small_config(RELEASE), dtype=jnp.float32)
    loss_fn = preference_loss(ours, PreferenceLoss(kind, beta=0.3, label_smoothing=smoothing))
    found, _ = our_steps(loss_fn, params, other, our_batch(pairs_of(batch, [0.0] * len(pairs))))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5)


def test_a_first_step_on_answers_that_were_judged_alone_is_trls(
    torch, trl, tokenizer, params, pairs, tmp_path
):
    """KTO: with the baseline of the answers to other prompts that are in TRL's batch."""
    import datasets

    other = random_params(RELEASES[RELEASE], np.random.default_rng(1), 0.3)
    judged = datasets.Dataset.from_list([
        {'prompt': as_text(pair.prompt), 'completion': as_text(pair.answers[i % 2].tokens), 'label': i % 2 == 0}
        for i, pair in enumerate(pairs)
    ])  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of others' code
        trainer = trl.KTOTrainer(
            model=torch_policy(params).train(), ref_model=torch_policy(other),
            args=trl.KTOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=len(pairs), max_steps=1, use_cpu=True, bf16=False,
                report_to='none', beta=0.3, desirable_weight=1.5, max_length=None, gradient_checkpointing=False,
            ),
            processing_class=tokenizer, train_dataset=judged,
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
    wanted = loss.item(), gradient_norm(torch, trainer.model)

    def alone(prefix):
        ids, mask, counted = (
            np.asarray(batch[f'{prefix}{name}'])
            for name in ('input_ids', 'attention_mask', 'completion_mask')
        )
        found = []
        for row, good in enumerate(batch['label']):
            tokens, begin = (
                ids[row][mask[row] > 0].astype(np.int32),
                int(np.argmax(counted[row][mask[row] > 0])),
            )
            answer = Answer(tokens[begin:], np.ones(len(tokens) - begin, bool))
            found.append(EncodedPair(tokens[:begin], (answer, None) if good else (None, answer)))
        return our_batch(found)

    ours = LlamaForCausalLM(small_config(RELEASE), dtype=jnp.float32)
    policy_loss = PreferenceLoss('kto', beta=0.3, desirable=1.5)
    total, number = jax.jit(ratio_sums(ours, policy_loss))(params, other, alone('KL_'))
    held = alone('')
    held = held.replace(baseline=jnp.full_like(held.baseline, jnp.maximum(total / number, 0)))
    assert number == len(pairs)
    found, _ = our_steps(preference_loss(ours, policy_loss), params, other, held)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5)


def test_a_reward_models_first_step_is_trls(torch, trl, tokenizer, params, pairs, tmp_path):
    """With margins, of classification's head without a bias."""
    import transformers

    score = np.random.default_rng(3).normal(0, 0.1, params['embed'].shape[1]).astype(np.float32)
    whole = torch_policy(params)
    whole.config.num_labels, whole.config.pad_token_id = 1, 0
    scored = transformers.LlamaForSequenceClassification(whole.config).float()
    scored.model.load_state_dict(whole.model.state_dict())
    scored.score.weight.data = torch.tensor(score)[None]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of others' code
        trainer = trl.RewardTrainer(
            model=scored.train(),
            args=trl.RewardConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=len(pairs), max_steps=1, use_cpu=True, bf16=False,
                report_to='none', max_length=None, gradient_checkpointing=False, disable_dropout=True,
            ),
            processing_class=tokenizer, train_dataset=dataset_of(pairs, margin=[pair.margin for pair in pairs]),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
    wanted = loss.item(), gradient_norm(torch, trainer.model)
    # Where an answer begins, a score does not ask.
    margins = batch['margin'].tolist()
    held = pairs_of(
        dict(batch)
        | {
            'completion_mask': np.ones_like(batch['input_ids']) * (np.arange(batch['input_ids'].shape[1]) > 0)
        },
        margins,
    )
    ours = LlamaForRewardModel(
        dataclasses.replace(small_config(RELEASE), scalar_head=True), dtype=jnp.float32
    )
    weights = {name: leaf for name, leaf in params.items() if name != 'head'} | {'score': score}
    found, _ = our_steps(reward_loss(ours, margin='large'), weights, {}, our_batch(held))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5)
