"""Where the time of GRPO with adapters goes, and what the same work takes outside of it, for the suite `rl`.

An iteration of the real run: answers drawn, looked at by the policy and its reference, one update. Beside it, with the
same sizes and weights, stand decoding alone, by `generate_tokens`, which the suite `decode` times, and an update of SFT
with adapters on as many answers. They run one after the other, as a device may not hold them together.
"""

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import grpo as grpo_config
from experiments.benchmark import rl_turns as turns
from experiments.benchmark.decode import median
from experiments.benchmark.decode_peers import write_gguf
from experiments.benchmark.finetune_steps import RANK, Training, Turn, our_turn, packed
from experiments.benchmark.rl_turns import Size
from llama_jax.data.examples import Example
from llama_jax.data.record_kinds import Conversation
from llama_jax.inference.generate import generate_tokens
from llama_jax.inference.sampling import Sampler
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.unstacked import unstack
from llama_jax.train.throughput import peak_flops_per_device, training_flops_per_token

_REMAT = 'full'  # of the recipe of large models, and so of SFT here
_PHASES = 'rollout', 'score', 'update'


def measure_phases(size: Size, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds by phase, and its figures beside those of decoding and of SFT, in a table."""
    dtype = jnp.dtype('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    model = LlamaForCausalLM(size.fitting, dtype=dtype, remat=_REMAT)
    base, decoded = _base_and_decoding(size, model, rounds, folder)
    gc.collect()
    of_sft = _sft_seconds(size, model, rounds)
    gc.collect()
    seconds, told = _iterations(size, base, dtype.name, rounds, folder)
    # As if prompts met the head too, which both leave out.
    tokens = size.answers * (size.prompt + size.answer)
    flops = tokens * training_flops_per_token(size.config, size.prompt + size.answer, frozen=True)[0]
    peak = peak_flops_per_device() * jax.device_count()
    drawn = size.new_tokens / seconds['rollout']
    figures = {
        'layers': size.config.num_layers, 'dtype': dtype.name, **{f'{name}_seconds': seconds[name] for name in seconds},
        'rollout_tokens_per_second': drawn, 'decode_tokens_per_second': decoded, 'rollout_to_decode': drawn / decoded,
        'update_mfu': flops / seconds['update'] / peak, 'sft_mfu': flops / of_sft / peak,
        'update_to_sft': of_sft / seconds['update'],
        **{name: told[name] for name in ('sampler_gap', 'sampler_gap_max', 'answer_length')},
    }  # fmt: skip
    print(
        f'{size.prompts} x {size.samples} answers of {size.answer} tokens, {size.config.num_layers} layers, '
        f'{dtype.name}: {", ".join(f"{name} {seconds[name]:.2f} s" for name in seconds)}'
    )
    print(f'rollout: {drawn:,.0f} new tokens/s, {drawn / decoded:.2f} of decoding alone ({decoded:,.0f})')
    print(
        f'update: MFU {figures["update_mfu"]:.1%} causal, {figures["update_to_sft"]:.2f} of that of SFT '
        f'({figures["sft_mfu"]:.1%})'
    )
    print(
        f'sampler gap: {told["sampler_gap"]:.2g} nats a token, at most {told["sampler_gap_max"]:.2g}',
        flush=True,
    )
    return {f'phases_{name}': value for name, value in figures.items()}


def _base_and_decoding(size: Size, model: LlamaForCausalLM, rounds: int, folder: Path) -> tuple[Path, float]:
    """(a checkpoint of random weights, new tokens/s of `generate_tokens` with them, prompts read as often as drawn)."""
    cast = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(model.dtype), init_params(model, key)))
    params = cast(jax.random.key(0))
    base = Path(write_gguf(size.fitting, params, str(folder), jnp.dtype(model.dtype).name))
    params = unstack(params, model.dtype, delete=True)
    ids = np.repeat(turns.random_prompts(size), size.samples, axis=0).tolist()

    def complete() -> None:
        generate_tokens(model, params, ids, max_new_tokens=size.answer, sampler=Sampler(), stop_ids=())

    return base, size.new_tokens / _median_seconds(complete, rounds)


def _sft_seconds(size: Size, model: LlamaForCausalLM, rounds: int) -> float:
    """Of an update with adapters on as many answers, packed as those of a policy are."""
    rng, examples = np.random.default_rng(0), []
    for _ in range(size.answers):
        length = size.prompt + size.answer
        ids = rng.integers(3, size.config.vocab_size, length, dtype=np.int32)
        examples.append(Example(ids, np.arange(length) >= size.prompt, Conversation((), ())))
    batches = packed(examples, size.row, size.answers, 1)
    chunks = grpo_config.get_config('checkpoint').train.loss_chunks
    training = Training(rank=RANK, weights=jnp.dtype(model.dtype).name, loss_chunks=chunks)
    return _median_seconds(our_turn(model, training, batches), rounds)


def _median_seconds(turn: Turn, rounds: int) -> float:
    """Of so many turns, after one that compiles."""
    turn()

    def once() -> float:
        start = time.perf_counter()
        turn()
        return time.perf_counter() - start

    return median(once, rounds)


def _iterations(
    size: Size, base: Path, dtype: str, rounds: int, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """(median seconds of each phase, what the run tells of the last iteration)."""
    words = [chr(letter) for letter in range(ord('a'), ord('z') + 1)]
    prompts = turns.write_prompts(size, base, words, folder)
    config = grpo_config.get_config('checkpoint')
    config.model.update(dtype=dtype, weights=dtype, remat=_REMAT)
    config.lora.rank = RANK
    turn, tell = turns.iterating(config, size, folder, base, prompts)
    turn()
    found, told = {name: [] for name in (*_PHASES, 'iteration')}, {}
    for _ in range(rounds):
        start = time.perf_counter()
        turn()
        whole = time.perf_counter() - start
        told = tell()
        for name in _PHASES:
            found[name].append(whole * told[f'share_{name}'])
        found['iteration'].append(whole)
    return {name: statistics.median(each) for name, each in found.items()}, told
