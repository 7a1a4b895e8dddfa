"""The programs of policy gradients beside the update, compiled for a topology: a step of generation, and the score.

What the update works with stays on the devices while they run; it is counted beside them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.policy.memory import gathers_weights, held, sampler_arguments
from experiments.policy.objective import is_compared, make_scorer, sampler_partitioner
from experiments.run import settings
from experiments.run.objective import Objective, compile_step, forward_flops_per_token, objective_of, scored
from llama_jax.chips import GIB
from llama_jax.models.config import LlamaConfig
from llama_jax.preflight import compile as ahead
from llama_jax.preflight.decode import bytes_to_read, decode_step
from llama_jax.preflight.report import Work, device_bytes, step_report
from llama_jax.preflight.topology import Topology
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.throughput import training_flops_per_token


def drawing_programs(
    config: ConfigDict, llama: LlamaConfig, devices: Sequence[Any], topology: Topology, xla_options: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, what it is, its report) of each; judges are not known here, and not counted.

    The report of `preflight.report`, with `beside`, bytes that lie on a device while it runs and are no arguments of
    it, in which `hbm.total` is counted up to `fits`; of generation also `copy`, the sampler's weights.
    """
    partitioner = settings.make_partitioner(config, devices)
    model = settings.make_model(config, llama, partitioner)
    tx = make_optimizer(made := settings.make_optimizer_config(config), make_schedule(made, 1))
    objective = objective_of(config, model, partitioner)
    options = settings.compiler_options(xla_options, partitioner)
    target, _ = compile_step(objective, tx, partitioner, config.train.num_microbatches, options)
    drawing = sampler_partitioner(config, partitioner, devices)
    sampler = model.clone(remat='none', partitioner=drawing)
    longest = config.data.seq_len - config.rollout.max_new_tokens
    plan = held(config, objective, target, sampler, longest=longest)

    whole_rows, arguments = sampler_arguments(config, objective, target, sampler, longest)
    weights, cache, tokens = arguments
    compiled = ahead.compile_ahead(decode_step(whole_rows), *arguments, compiler_options=options)
    rows = tokens.shape[0]
    causal, full = training_flops_per_token(llama, cache.max_len)
    work = Work(
        rows, (causal / 3 * rows, full / 3 * rows), device_bytes(weights), kv_cache=plan['generate']['cache'],
        must_read=bytes_to_read(weights, cache),
    )  # fmt: skip
    report = step_report(compiled, work, topology, ahead.places(drawing.mesh))
    copy, cached = (plan['generate'][name] for name in ('copy', 'cache'))
    report |= {
        'copy': copy, 'mesh': dict(drawing.mesh.shape), 'rows': rows,
        'gathers_weights': gathers_weights(report.get('collectives', {}), weights),
    }  # fmt: skip
    yield (
        'generate', f'a step of generation of {rows} rows x {cache.max_len} tokens',
        with_beside(report, sum(plan['generate'].values()) - copy - cached),
    )  # fmt: skip

    score = make_scorer(config, scored(model))
    compiled = ahead.compile_ahead(score, target.params, objective.frozen, objective.batch)
    batch = config.train.batch_size * config.data.seq_len
    read = (*objective.models, *([llama] if is_compared(config) else []))
    causal, full = forward_flops_per_token(read, config.data.seq_len)
    arguments_of = device_bytes(target.params) + device_bytes(objective.frozen)
    work = Work(batch, (causal * batch, full * batch), arguments_of)
    report = step_report(compiled, work, topology, ahead.places(partitioner.mesh))
    yield (
        'score',
        f'score of {config.train.batch_size} rows',
        with_beside(report, device_bytes(target.opt_state)),
    )


def unread(config: ConfigDict, objective: Objective) -> int:
    """Bytes of a device that an update does not read: a policy's reference speaks where answers are scored."""
    return device_bytes(objective.frozen) if 'algorithm' in config and not config.lora.rank else 0


def with_beside(report: dict[str, Any], beside: int) -> dict[str, Any]:
    """The report of a program, with bytes of a device that lie beside it while it runs."""
    fits = report['fits'] and report['hbm']['total'] + beside <= report['hbm']['available']
    return report | {'beside': beside, 'fits': fits}


def beside_line(report: dict[str, Any]) -> str:
    """What lies beside a program, and what follows of it."""
    hbm = report['hbm']
    together = hbm['total'] + report['beside']
    lines = [
        f'  beside it, of training: {report["beside"] / GIB:.2f} GiB a device; in all {together / GIB:.2f} of '
        f'{hbm["available"] / GIB:.2f}'
    ]
    if 'copy' in report:
        lines.append(f"  the sampler's copy of the weights: {report['copy'] / GIB:.2f} GiB a device")
    if report.get('gathers_weights'):
        lines.append(
            '  each token brings weights from other devices: place the copy by --config.rollout.mesh, as in '
            'data=-1 or data=-1,tensor=8'
        )
    return '\n'.join(lines)
