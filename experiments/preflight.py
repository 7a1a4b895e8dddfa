"""Whether a run fits on a TPU topology, what it communicates and how fast it can be: from a machine without a TPU.

    python -m experiments.preflight --config=configs/pretrain.py:llama2_70b --topology=v5p:4x4x8 [--json=FILE]

Compiles the very step that a command would run with the same --config keys. Where it does not fit, tries changes that
leave what is learnt as it is, and names those that help. With --decode_batch, a step of generation too.
"""

import dataclasses
import importlib.metadata
import json
import logging
import resource
from typing import Any

import jax
import optax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from experiments import launch
from experiments.policy.preflight import beside_line, drawing_programs, unread, with_beside
from experiments.run import settings
from experiments.run.config_file import flatten
from experiments.run.objective import Objective, compile_step, forward_flops_per_token, objective_of
from llama_jax import storage
from llama_jax.chips import GIB
from llama_jax.errors import InputError
from llama_jax.json_file import check_replaceable
from llama_jax.models.config import LlamaConfig
from llama_jax.models.kv_cache import CACHE_DTYPES
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.partitioning import Partitioner
from llama_jax.preflight import compile as ahead
from llama_jax.preflight.advice import Attempt, Bounds, Knobs, find_fit
from llama_jax.preflight.decode import bytes_to_read, decode_arguments, decode_step
from llama_jax.preflight.report import (
    Work,
    describe,
    device_bytes,
    stacked_weight_shapes,
    step_report,
)
from llama_jax.preflight.topology import Topology
from llama_jax.quantize.forms import DTYPES
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import abstract_state
from llama_jax.train.throughput import training_flops_per_token

_CONFIG = launch.define_config()
_TOPOLOGY = flags.DEFINE_string(
    'topology',
    None,
    '[SLICESx]CHIP:AxB[xC], as v5e:4x4 or 2xv5p:4x4x8, or an accelerator type, as v5litepod-16 or v5p-256',
    required=True,
)
_JSON = launch.define_path('json', '', 'file for the report')
_XLA_OPTIONS = launch.define_xla_options()
_DECODE_BATCH = flags.DEFINE_integer(
    'decode_batch', 0, 'rows of a decode step to compile too; 0: none', lower_bound=0
)
_DECODE_WEIGHTS = flags.DEFINE_enum(
    'decode_weights', 'auto', ['auto', *DTYPES], "of the decode step; auto: the computation's type"
)
_DECODE_CACHE = flags.DEFINE_enum(
    'decode_cache', 'auto', CACHE_DTYPES, "of the decode step; auto: the computation's type"
)
_TRAIN = flags.DEFINE_boolean('train', True, 'compile the train step; --notrain: the decode step alone')
_MAX_TRIES = flags.DEFINE_integer(
    'max_tries', 6, 'compilations in search of what fits; 0: none', lower_bound=0
)

logger = logging.getLogger('llama_jax.preflight')


def main() -> None:
    """Compiles, reports, and looks for what fits where it does not."""
    ahead.require_libtpu()
    topology = Topology.parse(_TOPOLOGY.value)
    devices = ahead.topology_devices(topology)
    config = _CONFIG.value
    if _JSON.value:
        storage.check_place(_JSON.value, folder=False)
        with launch.flags_named('--json'):
            check_replaceable(epath.Path(_JSON.value), ('topology', 'mesh', 'process_memory'))
    settings.check_settings(config)
    llama = settings.fit_vocabulary(config, settings.find_preset(config.model.preset), 0)
    logger.info('%s on %s: %d devices', config.model.preset, topology, len(devices))
    decoder = None
    if _DECODE_BATCH.value:
        decoder = make_decoder(
            config, llama, devices, _DECODE_BATCH.value, _DECODE_WEIGHTS.value, _DECODE_CACHE.value
        )
    elif {_DECODE_WEIGHTS.value, _DECODE_CACHE.value} != {'auto'} or not _TRAIN.value:
        raise InputError(
            '--decode_weights, --decode_cache and --notrain are about a decode step: add --decode_batch=ROWS'
        )
    partitioner = settings.make_partitioner(config, devices)
    report = {
        'model': config.model.preset,
        'topology': str(topology),
        'chips': topology.num_chips,
        'devices': len(devices),
        'chip': dataclasses.asdict(topology.chip),
        'mesh': dict(partitioner.mesh.shape),
        'settings': settings_of(config),
        'versions': {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')},
    }
    title = f'{config.model.preset} on {topology}'
    if _TRAIN.value:
        compiled, work, partitioner = compile_training(config, llama, devices, _XLA_OPTIONS.value)
        report['train'] = step_report(compiled, work, topology, ahead.places(partitioner.mesh))
        line = settings_line(report['settings'])
        print(describe(f'{title}, train step of {line}', report['train']), flush=True)
        if beside := unread(config, make_objective(config, llama, devices)[0]):
            report['train'] = with_beside(report['train'], beside)
            print(beside_line(report['train']), flush=True)
        if found := compile_before(config, llama, devices, _XLA_OPTIONS.value):
            report['before'] = step_report(*found, topology, ahead.places(partitioner.mesh))
            print(describe(f'{title}, the pass before each update', report['before']), flush=True)
        if not compiled.fits and _MAX_TRIES.value:
            report['search'] = search(
                config, llama, devices, compiled, work, partitioner, _XLA_OPTIONS.value, _MAX_TRIES.value
            )
    if _TRAIN.value and 'algorithm' in config:
        for name, text, figures in drawing_programs(config, llama, devices, topology, _XLA_OPTIONS.value):
            report[name] = figures
            print(describe(f'{title}, {text}', figures) + '\n' + beside_line(figures), flush=True)
    if decoder:
        assert decoder[0].partitioner is not None
        mesh = decoder[0].partitioner.mesh
        report['decode'] = step_report(
            *compile_decode(*decoder, _XLA_OPTIONS.value), topology, ahead.places(mesh)
        )
        report['decode'] |= {
            'mesh': dict(mesh.shape), 'rows': _DECODE_BATCH.value, 'weights': _DECODE_WEIGHTS.value,
            'cache': _DECODE_CACHE.value,
        }  # fmt: skip
        rows = f'{_DECODE_BATCH.value} rows'
        if _DECODE_WEIGHTS.value != 'auto':
            rows += f', {_DECODE_WEIGHTS.value} weights'
        if _DECODE_CACHE.value != 'auto':
            rows += f', {_DECODE_CACHE.value} cache'
        if mesh.shape != partitioner.mesh.shape:
            rows += f' on a mesh of fsdp={mesh.shape["fsdp"]}, context=1'
        print(describe(f'{title}, decode step of {rows}', report['decode']))
    report['process_memory'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    print(f'memory of this process: {report["process_memory"]:.2f} GiB at most')
    if _JSON.value:
        storage.write_atomically(epath.Path(_JSON.value), json.dumps(report, indent=2) + '\n')


def compile_training(
    config: ConfigDict, llama: LlamaConfig, devices: list[Any], xla_options: str
) -> tuple[ahead.Compiled, Work, Partitioner]:
    """The train step of a configuration's objective, compiled for these devices, and what it is to do."""
    objective, partitioner = make_objective(config, llama, devices)
    optimizer = settings.make_optimizer_config(config)
    tx = make_optimizer(optimizer, make_schedule(optimizer, config.train.num_steps or 1))
    options = settings.compiler_options(xla_options, partitioner)
    target, step_fn = compile_step(objective, tx, partitioner, config.train.num_microbatches, options)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    gradients = device_bytes(target.params)
    tokens = config.train.batch_size * config.data.seq_len
    causal, full = objective.flops_per_token(config.data.seq_len)
    work = Work(
        tokens=tokens,
        flops=(causal * tokens, full * tokens),
        parameters=gradients + device_bytes(objective.frozen) - unread(config, objective),
        optimizer=device_bytes(target.opt_state),
        gradients=gradients,
        num_layers=llama.num_layers,
        weight_shapes=stacked_weight_shapes(settings.make_model(config, llama, partitioner)),
    )
    return ahead.compile_ahead(step_fn, target, objective.frozen, objective.batch, rng), work, partitioner


def make_objective(
    config: ConfigDict, llama: LlamaConfig, devices: list[Any]
) -> tuple[Objective, Partitioner]:
    """What a configuration trains, on these devices; its sizes divide over them."""
    partitioner = settings.make_partitioner(config, devices)
    settings.check_sizes(config, llama.max_seq_len, partitioner)
    return objective_of(config, settings.make_model(config, llama, partitioner), partitioner), partitioner


def compile_before(
    config: ConfigDict, llama: LlamaConfig, devices: list[Any], xla_options: str
) -> tuple[ahead.Compiled, Work] | None:
    """The pass that an objective makes before each update, on a batch of its own; None where it makes none."""
    objective, partitioner = make_objective(config, llama, devices)
    if (before := objective.before) is None:
        return None
    target = abstract_state(objective.params, objective.axes, optax.identity(), partitioner)
    tokens = config.train.batch_size * config.data.seq_len
    causal, full = forward_flops_per_token(objective.read_before, config.data.seq_len)
    held = device_bytes(target.params) + device_bytes(objective.frozen)
    work = Work(tokens, (causal * tokens, full * tokens), held, num_layers=llama.num_layers)

    def measure(params: Any, frozen: Any, batch: Any) -> jax.Array:
        return before(objective.view(params, frozen), frozen, batch)

    options = settings.compiler_options(xla_options, partitioner)
    compiled = ahead.compile_ahead(
        jax.jit(measure), target.params, objective.frozen, objective.batch, compiler_options=options
    )
    return compiled, work


def make_decoder(
    config: ConfigDict, llama: LlamaConfig, devices: list[Any], rows: int, weights: str, cache: str
) -> tuple[LlamaForCausalLM, tuple[Any, ...]]:
    """A model and the arguments of its `decode_step`: so many rows, a cache of data.seq_len tokens.

    On the mesh of training, but for `context`: a row that grows is not split, so `fsdp` takes its devices.
    """
    mesh = settings.make_partitioner(config, devices).mesh.shape
    config = config.copy_and_resolve_references()
    config.mesh.fsdp, config.mesh.context = mesh['fsdp'] * mesh['context'], 1
    partitioner = settings.make_partitioner(config, devices)
    if rows % (parts := partitioner.axis_size('batch')):
        raise InputError(
            f'--decode_batch={rows} does not divide over {parts} devices; make it a multiple of {parts}'
        )
    model = settings.make_model(config, llama, partitioner).clone(cache_dtype=cache)
    length = config.data.seq_len
    return model, decode_arguments(model, rows, length, None if weights == 'auto' else weights)


def compile_decode(
    model: LlamaForCausalLM, arguments: tuple[Any, ...], xla_options: str
) -> tuple[ahead.Compiled, Work]:
    """One token more for every row."""
    params, cache, tokens = arguments
    assert model.partitioner is not None
    options = settings.compiler_options(xla_options, model.partitioner)
    compiled = ahead.compile_ahead(decode_step(model), params, cache, tokens, compiler_options=options)
    # A forward pass is a third of training's FLOPs; on average half of the cache is full.
    rows, length = tokens.shape[0], cache.max_len
    causal, full = (flops / 3 * rows for flops in training_flops_per_token(model.config, length))
    return compiled, Work(
        rows,
        (causal, full),
        device_bytes(params),
        kv_cache=device_bytes(cache.arrays),
        must_read=bytes_to_read(params, cache),
    )


def settings_of(config: ConfigDict) -> dict[str, Any]:
    """What memory and speed depend on, by config key."""
    keys = (
        'train.batch_size', 'data.seq_len', 'train.num_microbatches', 'train.loss_chunks', 'model.remat',
        'model.attention', 'model.dtype', 'model.unroll', 'optimizer.name', 'mesh.axis_rules',
    )  # fmt: skip
    flat = flatten(config)
    if flat.get('lora.rank'):
        keys += ('model.weights', *(f'lora.{name}' for name in config.lora))
    return {key: flat[key] for key in keys}


def settings_line(values: dict[str, Any]) -> str:
    """The settings in a few words."""
    return (
        f'{values["train.batch_size"]} x {values["data.seq_len"]} tokens in {values["train.num_microbatches"]} '
        f'microbatches, remat {values["model.remat"]}'
        + (f', adapters beside {values["model.weights"]}' if 'lora.rank' in values else '')
    )


def search(
    config: ConfigDict,
    llama: LlamaConfig,
    devices: list[Any],
    compiled: ahead.Compiled,
    work: Work,
    partitioner: Partitioner,
    xla_options: str,
    max_tries: int,
) -> dict[str, Any]:
    """Compiles with other settings until one fits; says which flags that are."""
    mesh = partitioner.mesh.shape
    start = Knobs(
        config.model.remat, config.train.num_microbatches, config.train.loss_chunks, mesh['data'], mesh['fsdp'],
        mesh['context'], config.mesh.axis_rules,
    )  # fmt: skip
    logits = config.data.seq_len * llama.vocab_size * 4 // partitioner.axis_size('vocab')
    bounds = Bounds(
        config.train.batch_size, partitioner.axis_size('batch') * partitioner.axis_size('length'),
        config.data.seq_len, logits, rules_over_slices(config, partitioner),
    )  # fmt: skip

    def attempt(knobs: Knobs) -> Attempt:
        logger.info('trying %s', ' '.join(changes(start, knobs)))
        tried = config.copy_and_resolve_references()
        tried.model.remat, tried.train.num_microbatches = knobs.remat, knobs.num_microbatches
        tried.train.loss_chunks, tried.mesh.axis_rules = knobs.loss_chunks, knobs.axis_rules
        tried.mesh.data, tried.mesh.fsdp, tried.mesh.context = knobs.data, knobs.fsdp, knobs.context
        compiled, work, _ = compile_training(tried, llama, devices, xla_options)
        found = outcome(knobs, compiled, work, batch_bytes(config, bounds))
        logger.info('  %s: %s', 'fits' if found.fits else 'does not fit', of_available(found))
        return found

    failed = outcome(start, compiled, work, batch_bytes(config, bounds))
    tried, fitting = find_fit(failed, bounds, attempt, max_tries)
    flags_that_fit = changes(start, fitting.knobs) if fitting else []
    if fitting:
        print(f'  it fits, {of_available(fitting)}, with {" ".join(flags_that_fit)}')
    elif failed.state + failed.gradients > failed.available:
        print(
            f'  state and gradients alone take {(failed.state + failed.gradients) / GIB:.2f} GiB of '
            f'{failed.available / GIB:.2f}: more chips, or weights split further (--config.mesh.*), are needed'
        )
    else:
        print(f'  nothing fitted in {len(tried)} tries; more chips, fewer rows or shorter ones are needed')
    return {
        'tried': [dataclasses.asdict(one) for one in tried],
        'fits_with': flags_that_fit,
        'total': fitting.total if fitting else 0,
    }


def of_available(attempt: Attempt) -> str:
    """The memory that an attempt needs, of that which there is."""
    needed = f'{attempt.total / GIB:.2f}' if attempt.temporaries else 'an unknown part'
    return f'{needed} of {attempt.available / GIB:.2f} GiB'


def batch_bytes(config: ConfigDict, bounds: Bounds) -> int:
    """Bytes of one device's part of a batch: four arrays of int32 and one of bool."""
    return config.train.batch_size * config.data.seq_len * 17 // bounds.parts


def rules_over_slices(config: ConfigDict, partitioner: Partitioner) -> str:
    """Axis rules that split weights over slices as well; '' where there is one slice, or they do."""
    embed = dict(partitioner.rules)['embed']
    if partitioner.mesh.shape['dcn_data'] == 1 or 'dcn_data' in embed:
        return ''
    rules = [rule for rule in config.mesh.axis_rules.split(',') if not rule.strip().startswith('embed=')]
    return ','.join([*filter(None, rules), '+'.join(['embed=dcn_data', *embed])])


def outcome(knobs: Knobs, compiled: ahead.Compiled, work: Work, batch: int) -> Attempt:
    """A compilation as the search sees it."""
    state = compiled.memory.arguments if compiled.memory else work.parameters + work.optimizer + batch
    temporaries = max(0, compiled.needed - state)
    return Attempt(knobs, compiled.fits, state, work.gradients, temporaries, compiled.available)


def changes(start: Knobs, knobs: Knobs) -> list[str]:
    """The flags that lead from one to the other."""
    keys = {
        'remat': 'model.remat', 'num_microbatches': 'train.num_microbatches', 'loss_chunks': 'train.loss_chunks',
        'data': 'mesh.data', 'fsdp': 'mesh.fsdp', 'context': 'mesh.context', 'axis_rules': 'mesh.axis_rules',
    }  # fmt: skip
    return [
        f'--config.{key}={getattr(knobs, name)}'
        for name, key in keys.items()
        if getattr(knobs, name) != getattr(start, name)
    ]


if __name__ == '__main__':
    ahead.isolate_process()
    launch.run(main)
