"""Tokens per second of a whole update (forward, backward, clipping, AdamW), ours and Hugging Face's.

Same model, batch and precision; where torch and transformers are installed, Hugging Face's Llama runs eagerly and
through `torch.compile`. The contenders take turns, so that a machine whose speed drifts is equally unkind to all; the
figure of each is its median.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import launch
from experiments.benchmark.huggingface import random_llama
from experiments.benchmark.peak import peak_memory_bytes
from experiments.benchmark.profile import show_kernels
from experiments.benchmark.turns import has_peer
from experiments.prompting.checkpoint import DTYPES, dtype_name
from experiments.run.settings import compiler_options, find_preset
from llama_jax.data.lm_batch import lm_batch
from llama_jax.errors import error_line
from llama_jax.losses.language_model import language_model_loss
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import LlamaForCausalLM, abstract_params_and_axes, init_params
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.train.optimizer import OPTIMIZERS, OptimizerConfig, make_optimizer
from llama_jax.train.state import abstract_state, new_state, shardings_of
from llama_jax.train.step import compile_train_step
from llama_jax.train.throughput import peak_flops_per_device, training_flops_per_token

_MODEL = flags.DEFINE_string('model', 'stories_15m', 'a preset')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 8, 'rows in an update', lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer('seq_len', 0, "tokens in a row; 0: the preset's context", lower_bound=0)
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU')
_LAYERS = flags.DEFINE_integer('layers', 0, "of the model; 0: the preset's", lower_bound=0)
_OPTIMIZER_NAME = flags.DEFINE_enum('optimizer', 'adamw', OPTIMIZERS, 'of ours; Hugging Face has AdamW')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'turns that each contender takes', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 4, 'updates in a turn', lower_bound=1)
_REMAT = flags.DEFINE_string('remat', 'attention', 'see models.remat.REMAT_POLICIES')
_UNROLL = flags.DEFINE_integer('unroll', 1, 'layers per step of the scan', lower_bound=1)
_LOSS_CHUNKS = flags.DEFINE_integer(
    'loss_chunks', 4, 'parts of the sequence whose logits are held at a time', lower_bound=1
)
_XLA_OPTIONS = launch.define_xla_options()
_PROFILE = flags.DEFINE_boolean('profile', False, 'show the kernels that take most of one update')
_PEER = flags.DEFINE_boolean('peer', True, 'measure Hugging Face beside, where it is installed')

# What every contender trains with; the learning rate is constant.
_OPTIMIZER = OptimizerConfig(learning_rate=1e-4, eps=1e-8)

Step = Callable[[], float]  # one update; the loss before it


def main() -> dict[str, Any]:
    """Times a training step of every contender in turns, and prints a table."""
    config = find_preset(_MODEL.value)
    config = dataclasses.replace(config, num_layers=_LAYERS.value or config.num_layers)
    seq_len = _SEQ_LEN.value or config.max_seq_len
    dtype = dtype_name(_DTYPE.value)
    rows = np.random.default_rng(0).integers(
        0, config.vocab_size, (_BATCH_SIZE.value, seq_len + 1), dtype=np.int32
    )

    model = LlamaForCausalLM(
        config, dtype=DTYPES[dtype], remat=_REMAT.value, unroll=_UNROLL.value,
        partitioner=Partitioner(make_mesh({'fsdp': -1})),
    )  # fmt: skip
    recipe = dataclasses.replace(_OPTIMIZER, name=_OPTIMIZER_NAME.value)
    contenders: dict[str, Callable[[], Step]] = {
        'llama_jax': functools.partial(our_step, model, recipe, rows, _LOSS_CHUNKS.value, _XLA_OPTIONS.value),
    }
    if _PEER.value and has_peer('huggingface', 'torch', 'transformers'):
        contenders['huggingface_eager'] = functools.partial(
            huggingface_step, config, rows, dtype, compiled=False
        )
        contenders['huggingface_compiled'] = functools.partial(
            huggingface_step, config, rows, dtype, compiled=True
        )

    figures: dict[str, Any] = {
        'model': _MODEL.value, 'batch_size': _BATCH_SIZE.value, 'seq_len': seq_len, 'dtype': dtype,
        'layers': config.num_layers, 'optimizer': _OPTIMIZER_NAME.value, 'remat': _REMAT.value,
        'unroll': _UNROLL.value, 'loss_chunks': _LOSS_CHUNKS.value,
    }  # fmt: skip
    steps: dict[str, Step] = {}
    for name, make in contenders.items():
        start = time.perf_counter()
        try:
            steps[name] = make()
            figures[f'{name}_first_loss'] = steps[name]()
        except Exception as error:  # a peer that cannot run here must not hide our own figure
            if name == 'llama_jax':
                raise
            steps.pop(name, None)
            print(f'{name}: left out, {type(error).__name__}: {error_line(error)}')
            continue
        figures[f'{name}_first_step_seconds'] = time.perf_counter() - start

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # the second step may still allocate
    for _ in range(_ROUNDS.value):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(_STEPS.value):
                step()
            seconds[name].append((time.perf_counter() - start) / _STEPS.value)

    tokens = _BATCH_SIZE.value * seq_len
    causal, full = training_flops_per_token(config, seq_len)
    peak = peak_flops_per_device() * jax.device_count()
    print(
        f'\n{_MODEL.value}, {_BATCH_SIZE.value} x {seq_len} tokens, {dtype}, {jax.devices()[0].device_kind}'
    )
    print(f'{"":24}{"tokens/s":>10}{"min":>10}{"max":>10}{"first step s":>14}{"first loss":>12}')
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        figures[f'{name}_tokens_per_second'] = rate
        print(
            f'{name:24}{rate:10,.0f}{tokens / max(times):10,.0f}{tokens / min(times):10,.0f}'
            f'{figures[f"{name}_first_step_seconds"]:14.1f}{figures[f"{name}_first_loss"]:12.4f}'
        )
    ours = figures['llama_jax_tokens_per_second']
    figures |= {
        'llama_jax_tokens_per_second_per_device': ours / jax.device_count(),
        'mfu_causal': ours * causal / peak,
        'mfu_full': ours * full / peak,
        'peak_flops_per_device': peak / jax.device_count(),
        'peak_memory_bytes': peak_memory_bytes(),
    }
    print(
        f'MFU {figures["mfu_causal"]:.1%} causal, {figures["mfu_full"]:.1%} full, of {peak / 1e12:.2f} TFLOP/s'
    )
    if _PROFILE.value:
        figures |= show_kernels(steps['llama_jax'], statistics.median(seconds['llama_jax']))
    if peers := [name for name in steps if name != 'llama_jax']:
        best = max(figures[f'{name}_tokens_per_second'] for name in peers)
        # Turn by turn, so that drift cancels.
        turns = zip(*(seconds[name] for name in peers), strict=True)
        figures['ratio_to_best_peer'] = ours / best
        ratios = [min(theirs) / mine for theirs, mine in zip(turns, seconds['llama_jax'], strict=True)]
        spread = f'turn by turn {min(ratios):.2f} to {max(ratios):.2f}'
        print(f'ratio to the better of Hugging Face: {ours / best:.2f} ({spread})')
    return figures


def our_step(
    model: LlamaForCausalLM, recipe: OptimizerConfig, rows: np.ndarray, loss_chunks: int, xla_options: str
) -> Step:
    """Our training step on all devices."""
    partitioner = model.partitioner
    assert partitioner is not None
    tx = make_optimizer(recipe, recipe.learning_rate)
    target = abstract_state(*abstract_params_and_axes(model), tx, partitioner)
    start = jax.jit(lambda key: new_state(init_params(model, key), tx), out_shardings=shardings_of(target))
    state = start(jax.random.key(0))
    batch = jax.device_put(
        lm_batch(rows, np.ones_like(rows)), partitioner.batch_sharding(len(rows), rows.shape[1] - 1)
    )
    step_fn = compile_train_step(
        target,
        loss_fn=language_model_loss(model, num_chunks=loss_chunks),
        tx=tx,
        compiler_options=compiler_options(xla_options, partitioner),
    )
    rng = jax.random.key(1)

    def step() -> float:
        nonlocal state
        state, metrics = step_fn(state, {}, batch, rng)
        return float(metrics['loss'])

    return step


def huggingface_step(config: LlamaConfig, rows: np.ndarray, dtype: str, *, compiled: bool) -> Step:
    """The same update by Hugging Face's Llama: SDPA attention, AdamW (fused), clipping at the same norm."""
    import torch

    model, device = random_llama(config)
    c = _OPTIMIZER
    decayed = [weight for name, weight in model.named_parameters() if not name.endswith('norm.weight')]
    norms = [weight for name, weight in model.named_parameters() if name.endswith('norm.weight')]
    optimizer = torch.optim.AdamW(
        [{'params': decayed, 'weight_decay': c.weight_decay}, {'params': norms, 'weight_decay': 0.0}],
        lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True,
    )  # fmt: skip
    forward = torch.compile(model) if compiled else model
    tokens = torch.tensor(rows[:, :-1], dtype=torch.long, device=device)
    targets = torch.tensor(rows[:, 1:], dtype=torch.long, device=device).reshape(-1)

    def step() -> float:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == 'bfloat16'):
            logits = forward(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, config.vocab_size), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
