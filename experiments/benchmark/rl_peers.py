"""The same answers, scores and iterations by Hugging Face's libraries: `generate`, sequence classification, TRL."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.finetune_steps import OPTIMIZER
from experiments.benchmark.huggingface import random_llama
from experiments.benchmark.rl_turns import Size, random_prompts
from experiments.benchmark.turns import Turn
from llama_jax.rl.rollout import Rollout


def drawing(size: Size) -> Turn:
    """`generate` of all answers at once, a prompt repeated for each of its answers, as `num_return_sequences` does."""
    import torch

    model, device = random_llama(size.fitting)
    prompts = torch.tensor(random_prompts(size), dtype=torch.long, device=device)

    def turn() -> None:
        with torch.inference_mode():
            found = model.eval().generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
                num_return_sequences=size.samples, max_new_tokens=size.answer,
            )  # fmt: skip
        assert found.shape == (size.answers, size.prompt + size.answer)

    return turn


def scoring(size: Size, answers: Sequence[Rollout]) -> Turn:
    """`LlamaForSequenceClassification` on all answers at once, padded to the longest."""
    import torch
    import transformers

    config = random_llama(size.fitting)[0].config
    config.num_labels, config.pad_token_id = 1, 0
    model: Any = transformers.LlamaForSequenceClassification(config).eval()
    rows = [one.prompt + one.answer for one in answers]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    ids = torch.tensor(tokens)

    def turn() -> None:
        with torch.inference_mode():
            model(input_ids=ids, attention_mask=(ids != 0).long())

    return turn


def grpo(size: Size, folder: Path) -> Turn:
    """`GRPOTrainer`'s own training of one update on as many answers."""
    import datasets
    import tokenizers
    import transformers
    import trl

    their: Any = trl  # whose names pyright takes for private
    words = {f'<{i}>': i for i in range(size.config.vocab_size)}
    naming = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<0>'))
    naming.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=naming, pad_token='<0>', eos_token='<2>', padding_side='left'
    )
    prompts = [' '.join(f'<{i}>' for i in ids) for ids in random_prompts(size)]
    model = random_llama(size.fitting)[0]
    model.config.pad_token_id, model.generation_config.pad_token_id = 0, 0
    model.save_pretrained(folder / 'start')  # which it reads its reference from

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        return [len(set(text)) / 10 for text in completions]

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of its own code
        arguments = their.GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=size.answers, num_generations=size.samples,
            max_completion_length=size.answer, max_steps=1, beta=0.04, use_cpu=True, bf16=False, report_to='none',
            gradient_checkpointing=False, learning_rate=OPTIMIZER.learning_rate, save_strategy='no',
            disable_tqdm=True, logging_steps=10**6, model_init_kwargs={'dtype': 'float32'},
        )  # fmt: skip
        trainer: Any = their.GRPOTrainer(
            model=str(folder / 'start'), reward_funcs=reward, args=arguments, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list([{'prompt': one} for one in prompts]),
        )  # fmt: skip

    def turn() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            trainer.train()

    return turn
