"""Whom a process joins, told from the environment of its cluster, and what the processes of a job tell each other."""

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from llama_jax import runtime
from llama_jax.errors import InputError, SystemFailure, SystemRefusal
from llama_jax.lock import Locked

SLURM = {
    'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'node[1-2]', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0', 'SLURM_STEP_TASKS_PER_NODE': '1(x2)', 'SLURM_GPUS_ON_NODE': '8',
}  # fmt: skip
BATCH = {name: value for name, value in SLURM.items() if name != 'SLURM_STEP_NODELIST'}
OPEN_MPI_5 = {'OMPI_COMM_WORLD_SIZE': '16', 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_SIZE': '8'}
OPEN_MPI_4 = OPEN_MPI_5 | {'OMPI_MCA_orte_hnp_uri': '1531576320.0;tcp://10.96.0.1:34911'}
TPU = {'TPU_ML_PLATFORM': 'JAX'}


@pytest.fixture
def joins(monkeypatch):
    """Calls `initialize_distributed` in an environment; what it gave to JAX, None where nothing."""

    def call(environment, *arguments, error=None):
        for name in (*SLURM, *OPEN_MPI_4, 'TPU_WORKER_HOSTNAMES', 'TPU_PROCESS_ADDRESSES', 'MEGASCALE_NUM_SLICES',
                     'TPU_ML_PLATFORM', 'TPU_SKIP_MDS_QUERY', 'JAX_PLATFORMS', 'CUDA_VISIBLE_DEVICES'):  # fmt: skip
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        calls = []

        def initialize(*args, initialization_timeout, **kwargs):
            assert initialization_timeout > 300  # JAX aborts the process then: a refusal must come before
            calls.append((*args, kwargs))
            if error:
                raise error

        monkeypatch.setattr(jax.distributed, 'initialize', initialize)
        runtime.initialize_distributed(*arguments)
        return calls[0] if calls else None

    return call


ALL_8 = {'local_device_ids': list(range(8))}
BY_JAX = {'local_device_ids': None}


@pytest.mark.parametrize(
    ('environment', 'call'),
    [
        ({}, None),
        (SLURM, (ALL_8,)),  # one process a node: with all of its GPUs
        (SLURM | {'SLURM_STEP_TASKS_PER_NODE': '8(x2)', 'SLURM_NTASKS': '16'}, (BY_JAX,)),  # one a GPU
        (SLURM | {'CUDA_VISIBLE_DEVICES': '0,1'}, ({'local_device_ids': [0, 1]},)),
        (BATCH, None),  # the batch script itself, outside of srun
        (SLURM | {'SLURM_NTASKS': '1'}, None),
        (OPEN_MPI_4, (BY_JAX,)),
        (TPU, ({},)),  # Compute Engine: the metadata server tells, even that there is one host only
        (TPU | {'TPU_SKIP_MDS_QUERY': '1'}, None),
        (TPU | {'JAX_PLATFORMS': 'cpu'}, None),
        (TPU | {'TPU_WORKER_HOSTNAMES': 'a,b'}, ({},)),  # GKE
        (TPU | {'TPU_WORKER_HOSTNAMES': 'localhost'}, None),
        (TPU | {'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, ({},)),  # slices of one host each
        (TPU | {'TPU_PROCESS_ADDRESSES': 'a:1,b:1'}, ({},)),
    ],
)
def test_the_cluster_is_recognised(joins, environment, call):
    assert joins(environment) == call


def test_by_hand(joins):
    assert joins({}, 'host:1234', 4, 3) == ('host:1234', 4, 3, BY_JAX)
    assert joins(OPEN_MPI_5, 'host:1234') == ('host:1234', 16, 3, BY_JAX)
    assert joins(SLURM, 'host:1234') == ('host:1234', 2, 1, ALL_8)
    for arguments in (('host:1234',), ('', 4, 3), ('host:1234', 4)):
        with pytest.raises(InputError, match='give all three'):
            joins({}, *arguments)


def test_what_cannot_be_asked_is_told(joins):
    with pytest.raises(
        InputError, match='process_id=4 of num_processes=4: processes are numbered from 0 to 3'
    ):
        joins({}, 'host:1234', 4, 4)
    with pytest.raises(InputError, match="coordinator='host': give HOST:PORT"):
        joins({}, 'host', 4, 3)
    with pytest.raises(InputError, match='process 0 cannot join at coordinator=host:1234 .address in use.'):
        joins({}, 'host:1234', 4, 0, error=RuntimeError('address in use'))
    with pytest.raises(
        InputError, match='16 processes without telling where the first is; give each coordinator'
    ):
        joins(OPEN_MPI_5)
    with pytest.raises(InputError, match='cannot be asked .*no route.* TPU_SKIP_MDS_QUERY'):
        joins(TPU, error=OSError('no route to host'))


def test_processes_that_do_not_come_are_waited_for_as_long_as_asked(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **__: released.wait())
    with pytest.raises(InputError, match='not all processes of the job have joined within 0.1 s'):
        runtime.initialize_distributed('host:1234', 2, 0, timeout=0.1)
    released.set()


def test_what_is_said_once_is_said_once_by_threads_that_come_together(monkeypatch):
    monkeypatch.setattr(runtime, '_LOGGED', set())
    said = []

    class Slow(logging.Logger):
        def log(self, level, message):
            time.sleep(0.05)  # the others come while the first speaks
            said.append(message)

    together = threading.Barrier(4)

    def come(message):
        together.wait(60)
        runtime.log_once(Slow('slow'), logging.INFO, message)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come, ['this', 'this', 'this', 'that']))
    assert sorted(said) == ['that', 'this']


def test_what_a_single_process_refuses_it_says_itself():
    error = InputError('wrong')
    with pytest.raises(InputError) as found, runtime.refused_by_all():
        raise error
    assert found.value is error
    assert runtime.gather_texts('å') == ['å']


def test_what_another_process_refuses_is_refused(monkeypatch):
    told = []

    def gather(text):  # of process 1; process 2 has failed
        told.append(text)
        return ['[]', text, json.dumps([error.__name__, 'no corpus'])]

    monkeypatch.setattr(runtime, 'gather_texts', gather)
    for error in (InputError, SystemRefusal, SystemFailure):
        with pytest.raises(error, match='process 2: no corpus') as found, runtime.refused_by_all():
            pass
        assert found.type is error
        with pytest.raises(InputError, match='^wrong$'), runtime.refused_by_all():
            raise InputError('wrong')
        # The others hear of what is no refusal as well: none may be left waiting.
        with pytest.raises(OSError, match='no disk'), runtime.refused_by_all():
            raise OSError(5, 'no disk')
        assert told[-3:] == [
            '[]',
            '["InputError", "wrong"]',
            '["SystemFailure", "OSError: [Errno 5] no disk"]',
        ]
        with pytest.raises(Locked), runtime.refused_by_all():
            raise Locked('in use')
        assert told[-1] == '["InputError", "in use"]'


def test_several_processes_of_a_command_that_one_runs_are_refused(monkeypatch):
    for name, value in OPEN_MPI_5.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match='convert runs in one process, and the launcher started 16; start it once'
    ):
        runtime.require_single_process('convert')
    monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', '1')
    runtime.require_single_process('convert')


@pytest.mark.parametrize('error', [AssertionError(), RuntimeError("Backend 'cuda' is not known")])
def test_devices_that_are_not_there_are_one_line(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, 'devices', devices)
    monkeypatch.setattr(jax, 'process_count', devices)
    monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
    with pytest.raises(InputError, match="finds no device with JAX_PLATFORMS='cuda'.*; unset it"):
        runtime.check_devices()
    assert runtime.leave_job()  # on the way out there is no looking for devices either


def test_jax_recognises_the_same_clusters(monkeypatch):
    """What the environments above are made of is what this version of JAX looks for."""
    from jax._src.clusters import ompi_cluster, slurm_cluster

    for cluster, environment in ((slurm_cluster.SlurmCluster, SLURM), (ompi_cluster.OmpiCluster, OPEN_MPI_4)):
        assert not cluster.is_env_present()
        with monkeypatch.context() as context:
            for name, value in environment.items():
                context.setenv(name, value)
            assert cluster.is_env_present()
            assert cluster.get_process_count() == int(environment.get('SLURM_NTASKS', 16))
            assert ':' in cluster.get_coordinator_address(timeout_secs=1, override_coordinator_port=None)


def test_where_no_compiled_program_can_be_kept_a_line_says_so(caplog, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
    for folder in ('/proc/none', '~nobody-of-this-name/.cache'):
        caplog.clear()
        monkeypatch.setenv('XDG_CACHE_HOME', folder)
        runtime.enable_compilation_cache()
        assert caplog.messages[0].startswith(
            f'compiled programs are not kept, and are made anew each time: {folder}/'
        )
        assert jax.config.jax_compilation_cache_dir == before
