"""The same updates by Hugging Face's libraries: adapters by PEFT, preferences by TRL's `DPOTrainer`.

Each is a function that makes updates until its turn is over, on random weights of the same shape.
"""

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.benchmark.finetune_steps import OPTIMIZER, RANK
from experiments.benchmark.huggingface import random_llama
from experiments.benchmark.turns import Turn
from llama_jax.data.preferences import EncodedPair
from llama_jax.models.config import LlamaConfig


def peft_turn(config: LlamaConfig, rows: np.ndarray, steps: int, *, compiled: bool) -> Turn:
    """Adapters of all linears beside a base in float32: SDPA attention, AdamW (fused), clipping at the same norm."""
    import peft
    import torch

    base, device = random_llama(config)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules='all-linear', lora_dropout=0.0, task_type='CAUSAL_LM'
    )
    model: Any = peft.get_peft_model(base, lora).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _adamw(torch, trained)
    forward = torch.compile(model) if compiled else model
    tokens = torch.tensor(rows[:, :-1], dtype=torch.long, device=device)
    targets = torch.tensor(rows[:, 1:], dtype=torch.long, device=device).reshape(-1)

    def turn() -> float:
        loss: Any = None
        for _ in range(steps):
            logits = forward(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().view(-1, config.vocab_size), targets)
            loss.backward()
            _update(torch, trained, optimizer)
        return float(loss.detach())

    return turn


def trl_turn(config: LlamaConfig, pairs: Sequence[EncodedPair], batch_size: int) -> tuple[Turn, float]:
    """(`DPOTrainer`'s own step on all pairs with a live reference, so many at a time; the share that is no padding)."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    their: Any = trl  # whose names pyright takes for private
    # Of words that are the ids' names: what it is given as text comes back as these ids.
    words = {f'<{i}>': i for i in range(config.vocab_size)}
    naming = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<0>'))
    naming.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=naming, pad_token='<0>', eos_token='<2>'
    )
    records = [
        {name: ''.join(f' <{i}>' for i in ids) for name, ids in _parts(pair).items()} for pair in pairs
    ]
    policy, reference = random_llama(config)[0], random_llama(config)[0]
    policy.config.pad_token_id = reference.config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of its own code
        arguments = their.DPOConfig(
            output_dir=folder, per_device_train_batch_size=batch_size, max_steps=1, use_cpu=True, bf16=False,
            report_to='none', max_length=None, gradient_checkpointing=False,
        )  # fmt: skip
        trainer: Any = their.DPOTrainer(
            model=policy.train(), ref_model=reference, args=arguments, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(records),
        )  # fmt: skip
        batches = list(trainer.get_train_dataloader())
    trained = list(trainer.model.parameters())
    optimizer = _adamw(torch, trained)
    tokens = sum(int(batch['attention_mask'].sum()) for batch in batches)
    slots = sum(batch['attention_mask'].numel() for batch in batches)

    def turn() -> float:
        loss: Any = None
        for batch in batches:
            loss = trainer.compute_loss(trainer.model, dict(batch))
            loss.backward()
            _update(torch, trained, optimizer)
        return float(loss.detach())

    return turn, tokens / slots


def _parts(pair: EncodedPair) -> dict[str, np.ndarray]:
    first, second = (answer.tokens for answer in pair.answers if answer is not None)
    return {'prompt': pair.prompt, 'chosen': first, 'rejected': second}


def _adamw(torch: Any, weights: Sequence[Any]) -> Any:
    c = OPTIMIZER
    return torch.optim.AdamW(
        weights,
        lr=c.learning_rate,
        betas=(c.beta1, c.beta2),
        eps=c.eps,
        weight_decay=c.weight_decay,
        fused=True,
    )


def _update(torch: Any, weights: Sequence[Any], optimizer: Any) -> None:
    torch.nn.utils.clip_grad_norm_(weights, OPTIMIZER.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
