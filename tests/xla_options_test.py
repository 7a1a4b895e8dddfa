"""Compiler settings: read, merged, proved to be known before a run; on the CPU's compiler, which knows XLA's own."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from llama_jax.errors import InputError
from llama_jax.xla_options import parse


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
    twice = 'xla_backend_optimization_level=0,xla_backend_optimization_level=1'
    assert parse(twice, mesh) == {'xla_backend_optimization_level': 1}


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('xla_no_such=1,xla_backend_optimization_level=0', 'refuses the XLA options xla_no_such;'),
        ('xla_backend_optimization_level=high', 'refuses the XLA options xla_backend_optimization_level;'),
        ('fast', "the XLA option 'fast' has no value; write NAME=VALUE"),
    ],
)
def test_what_would_not_compile_is_refused(mesh, text, message):
    with pytest.raises(InputError, match=message):
        parse(text, mesh)
