import dataclasses

import numpy as np
import pytest
from etils import epath

from llama_jax import export, pretrained
from llama_jax.convert.mapping import Source
from llama_jax.convert.tensors import BFLOAT16
from llama_jax.convert.weight_mean import mean_of
from llama_jax.errors import InputError
from tests import toy
from tests.convert.in_memory import InMemory, matrices, random_source

CONFIG = dataclasses.replace(toy.CONFIG, num_layers=2, head_dim=4)


def shifted(seed: int, dtype=np.float32) -> Source:
    rng = np.random.default_rng(seed)
    source = random_source(CONFIG)
    tensors = {
        path: [InMemory((t.values + rng.normal(size=t.shape)).astype(dtype)) for t in layers]
        for path, layers in source.tensors.items()
    }
    return Source(CONFIG, tensors, f'model {seed}')


def test_mean_of_three_models_in_any_type(tmp_path):
    """Summed wider than they are stored: in bf16 the sum of three is off by one in some hundred."""
    sources = [shifted(seed, BFLOAT16) for seed in range(3)]
    exact = {
        name: np.mean([matrices(s, 'huggingface')[name].astype(np.float64) for s in sources], axis=0)
        for name in matrices(sources[0], 'huggingface')
    }
    mean = mean_of(sources)
    for name, found in matrices(mean, 'huggingface').items():
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, exact[name].astype(np.float32), err_msg=name)
    tensor, want = mean.tensors['blocks/mlp/up'][1], exact['model.layers.1.mlp.up_proj.weight']
    np.testing.assert_array_equal(tensor.read(slice(3, 7), slice(2, 9)), want[3:7, 2:9].astype(np.float32))

    for to in ('huggingface', 'orbax', 'meta'):  # without a type: that of the three, cast once
        export.save(tmp_path / to, mean, None, to=to)
        written = pretrained.open(tmp_path / to).source
        export.verify(written, mean)
        for name, found in matrices(written, 'huggingface').items():
            assert found.dtype == BFLOAT16
            np.testing.assert_array_equal(
                found, exact[name].astype(np.float32).astype(BFLOAT16), err_msg=name
            )
    export.save(tmp_path / 'wide', mean, None, to='huggingface', dtype='float32')
    written = pretrained.open(epath.Path(tmp_path / 'wide')).source
    export.verify(written, mean, dtype='float32')
    assert written.dtype == np.float32


def test_models_that_have_no_mean():
    other = dataclasses.replace(shifted(1), config=dataclasses.replace(CONFIG, rope_theta=5e5))
    with pytest.raises(
        InputError, match=r'model 1 has rope_theta 500000\.0, model 0 10000\.0; there is a mean only'
    ):
        mean_of([shifted(0), other])
