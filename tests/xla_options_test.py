"""Compiler settings: read, merged, proved to be known before a run; on the CPU's compiler, which knows XLA's own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from llama_jax.types import InputError
from llama_jax.xla_options import PRESETS, Preset, parse, unknown


@pytest.fixture(scope='module')
def mesh():
    return Mesh(np.array(jax.devices()), ('x',))


def test_values_are_read_by_their_form(mesh):
    text = 'xla_gpu_enable_latency_hiding_scheduler=true, --xla_gpu_all_gather_combine_threshold_bytes=5'
    assert parse(text, mesh) == {
        'xla_gpu_enable_latency_hiding_scheduler': True,
        'xla_gpu_all_gather_combine_threshold_bytes': 5,
    }
    assert parse('', mesh) == {}


def test_later_settings_outweigh_a_preset(mesh, monkeypatch):
    options = {'xla_backend_optimization_level': 0, 'xla_cpu_enable_fast_math': False}
    monkeypatch.setitem(PRESETS, 'mine', Preset(('cpu',), options, 'for a test'))
    assert parse('mine,xla_backend_optimization_level=1', mesh) == options | {
        'xla_backend_optimization_level': 1
    }


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('xla_no_such=1,xla_backend_optimization_level=0', 'refuses the XLA options xla_no_such;'),
        ('xla_backend_optimization_level=high', 'refuses the XLA options xla_backend_optimization_level;'),
        ('tpu_overlap', "'tpu_overlap' are for TPU; this is a 'cpu'"),
        ('fast', "unknown preset of XLA options 'fast'; choose from"),
    ],
)
def test_what_would_not_compile_is_refused(mesh, text, message):
    with pytest.raises(InputError, match=message):
        parse(text, mesh)


def test_what_a_preset_names_and_this_compiler_does_not_know_is_left_out(mesh, monkeypatch, caplog):
    known = {'xla_backend_optimization_level': 0}
    monkeypatch.setitem(PRESETS, 'mine', Preset(('cpu',), known | {'xla_no_such': 1}, 'for a test'))
    assert parse('mine', mesh) == known
    assert 'left out the XLA option xla_no_such' in caplog.text


def test_this_jaxlib_knows_the_settings_for_gpus(mesh):
    """They are in every jaxlib's compiler; those for TPUs are in libtpu, see tests/preflight/compile_test.py."""
    gone = [name for name in unknown(PRESETS['gpu_overlap'].options, mesh) if '_pipelined_' not in name]
    assert gone == []
