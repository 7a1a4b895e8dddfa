"""Figures: what they draw is what they were given, and they touch no global state."""

import jax
import numpy as np
import pytest

from llama_jax import figures
from llama_jax.errors import InputError
from llama_jax.partitioning import Partitioner, make_mesh


def test_a_layout_names_the_devices_of_each_part():
    shapes = {'whole': {'data': 8}, 'rows': {'fsdp': 8}, 'both': {'fsdp': 4, 'tensor': 2}}
    arrays = {}
    for name, sizes in shapes.items():
        partitioner = Partitioner(make_mesh(sizes))
        axes = (None, 'embed', 'mlp')
        arrays[name] = jax.device_put(
            np.zeros((2, 8, 4), np.float32),
            partitioner.tree_shardings(jax.ShapeDtypeStruct((2, 8, 4), 'f4'), axes),
        )
    whole, rows, both = figures.layouts(arrays).axes
    assert [text.get_text() for text in whole.texts] == ['0-7']
    assert [text.get_text() for text in rows.texts] == list('01234567')
    # fsdp splits embed, which are rows; tensor splits mlp, which are columns.
    places = {text.get_text(): text.get_position() for text in both.texts}
    assert len(places) == 8 and places['0'] == (0.25, 0.125) and places['1'] == (0.75, 0.125)
    assert places['2'] == (0.25, 0.375)
    with pytest.raises(InputError, match=r'flat has shape \(8,\)'):
        figures.layouts({'flat': np_on_device()})


def np_on_device():
    return jax.device_put(
        np.zeros(8, np.float32),
        Partitioner(make_mesh({'fsdp': 8})).tree_shardings(jax.ShapeDtypeStruct((8,), 'f4'), ('embed',)),
    )


def test_memory_is_stacked_up_to_the_total():
    memory = {'parameters': 2**30, 'optimizer': 2 * 2**30, 'activations': 2**29, 'available': 4 * 2**30}
    [axes] = figures.memory_bars({'a run': memory}).axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == [1.0, 3.0, 3.5] and axes.lines[0].get_xdata()[0] == 4.0
    with pytest.raises(InputError, match='a run tells of no part'):
        figures.memory_bars({'a run': {'available': 1}})


def test_a_roofline_is_in_milliseconds_and_leaves_out_what_there_is_not():
    terms = {'compute': 0.5, 'hbm': 0.25, 'ici': 0.1, 'dcn': 0.0, 'bound': 'compute'}
    [axes] = figures.rooflines({'here': terms, 'there': terms}).axes
    assert [bar.get_width() for bar in axes.patches] == [500, 250, 100] * 2
    assert [label.get_text() for label in axes.get_yticklabels()][0] == 'matrix products'


def test_bars_have_intervals_and_marks():
    [axes] = figures.bars(
        {'a': 0.5, 'b': 0.25}, 'share', 'x', intervals={'a': (0.4, 0.8)}, marks={'b': 0.3}
    ).axes
    [segments] = [
        collection.get_segments() for collection in axes.collections if hasattr(collection, 'get_segments')
    ]
    np.testing.assert_allclose([segment[:, 0] for segment in segments], [[0.4, 0.8], [0.25, 0.25]])
    assert list(axes.lines[-1].get_xdata()) == [0.3, 0.3]


def test_calibration_is_the_share_of_right_answers_by_how_sure():
    sure, right = np.array([0.55, 0.7, 0.95, 0.97]), np.array([True, False, True, True])
    above, below = figures.calibration(sure, right, num_bins=4).axes
    np.testing.assert_allclose(above.lines[1].get_xdata(), [0.625, 0.96])
    np.testing.assert_allclose(above.lines[1].get_ydata(), [0.5, 1.0])
    assert 'expected error 0.08' in above.get_title()  # (2 * 0.125 + 2 * 0.04) / 4 = 0.0825
    assert [bar.get_height() for bar in below.patches] == [2, 2]
    for wrong in (np.array([]), np.array([1.5])):
        with pytest.raises(InputError, match='from 0 to 1'):
            figures.calibration(wrong, np.ones(len(wrong), bool))


def test_nothing_global_is_touched():
    import matplotlib
    from matplotlib import pyplot

    before = matplotlib.get_backend(), pyplot.get_fignums()
    figures.bars({'a': 1.0}, 'share', 'x')._repr_png_()
    assert (matplotlib.get_backend(), pyplot.get_fignums()) == before
