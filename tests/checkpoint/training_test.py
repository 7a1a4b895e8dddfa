import errno
import gc
import json
import logging
import os
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.checkpoint.integrity import find_damage, record_files
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.checkpoint.weights import check_step, latest_step, open_params, save_params
from llama_jax.errors import InputError, SystemFailure, SystemRefusal
from llama_jax.partitioning import make_mesh
from llama_jax.placement import place


def sharding(num_devices=8, *axes):
    return NamedSharding(make_mesh({'fsdp': num_devices}, jax.devices()[:num_devices]), PartitionSpec(*axes))


def make_state(step):
    weights = jax.device_put(jnp.arange(64.0).reshape(16, 4) + step, sharding(8, 'fsdp'))
    return {
        'params': {'w': weights, 'b': jax.device_put(jnp.full(4, step / 2), sharding())},
        'moment': weights / 3,
        'step': jax.device_put(jnp.int32(step), sharding()),
    }


def abstract(state, num_devices=8):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding(num_devices, *(['fsdp'] if x.ndim == 2 else []))
        ),
        state,
    )


def assert_same(restored, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), restored, wanted)


def save_steps(folder, steps, keep=3):
    checkpointer = Checkpointer(folder, keep)
    for step in steps:
        checkpointer.save(step, make_state(step), {'rows_consumed': 8 * step})
    checkpointer.close()


def restore(folder, num_devices=8):
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.restore_latest(abstract(make_state(0), num_devices))
    finally:
        checkpointer.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
    save_steps(folder, [3, 7])
    return folder


def test_the_newest_steps_are_kept_and_restored_onto_any_mesh(tmp_path):
    assert restore(tmp_path) is None
    save_steps(tmp_path, [1, 2, 3, 4], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['3', '4']
    for num_devices in (8, 2, 1):
        step, state, metadata = restore(tmp_path, num_devices)
        assert (step, metadata) == (4, {'rows_consumed': 32})
        assert_same(state, make_state(4))
        assert state['params']['w'].sharding == sharding(num_devices, 'fsdp')


def test_saving_returns_when_the_buffers_may_be_reused(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    state = make_state(1)
    checkpointer.save(1, state, {})
    state = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf * 0 - 1, x), donate_argnums=0)(state)
    checkpointer.wait()
    assert_same(checkpointer.restore_latest(abstract(state))[1], make_state(1))
    checkpointer.close()


def test_a_file_cut_short_is_harmless_or_its_step_is_passed_over(saved, tmp_path, caplog):
    files = [path.relative_to(saved) for path in (saved / '7').rglob('*') if path.is_file()]
    assert len(files) > 10
    passed_over = set()
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        os.truncate(folder / file, (folder / file).stat().st_size // 2)
        caplog.clear()
        with caplog.at_level(logging.WARNING, 'llama_jax'):
            step, state, metadata = restore(folder)
        assert_same(state, make_state(step))
        assert metadata == {'rows_consumed': 8 * step}
        if step == 3:
            passed_over.add(file)
            assert 'checkpoint of step 7 is damaged' in caplog.text
            assert (folder / '7.damaged').is_dir()
    # Beside the items lie Orbax's notes about the step, which restoring can do without.
    assert {file for file in files if len(file.parts) > 2} <= passed_over


def test_a_missing_file_and_one_of_another_size_are_noticed(saved, tmp_path):
    data = max((saved / '7').rglob('*'), key=lambda path: path.is_file() and path.stat().st_size)
    for name, change in (('gone', os.unlink), ('grown', lambda path: os.truncate(path, 10**6))):
        shutil.copytree(saved, tmp_path / name)
        change(tmp_path / name / data.relative_to(saved))
        assert restore(tmp_path / name)[0] == 3
        assert latest_step(tmp_path / name).name == '3'


def test_one_flipped_bit_is_noticed_in_every_file(saved, tmp_path, caplog):
    shutil.copytree(saved, tmp_path / 'run')
    step = tmp_path / 'run/7'
    files = [path for path in step.rglob('*') if path.is_file() and path.parent != step]
    assert len(files) > 8 and find_damage(epath.Path(step)) == ''
    for number, file in enumerate(files):
        content = file.read_bytes()
        flip_a_bit(file, number)
        assert (
            find_damage(epath.Path(step)) == f'{file.relative_to(step)} has not the content that was written'
        )
        assert find_damage(epath.Path(step), hashes=False) == ''
        shares = [find_damage(epath.Path(step), share=(process, 3)) for process in range(3)]
        assert sorted(map(bool, shares)) == [False, False, True]  # each process looks at some of the files
        file.write_bytes(content)
    record = step / 'files.json'
    content = record.read_bytes()
    for number in range(0, 8 * len(content), 97):
        flip_a_bit(record, number)
        assert find_damage(epath.Path(step))
        record.write_bytes(content)
    data = max(files, key=lambda path: path.stat().st_size)
    flip_a_bit(data, 5000)
    for find in (latest_step, lambda folder: check_step(folder / '3')):
        assert find(tmp_path / 'run').name == '3'
    with pytest.raises(InputError, match=f'7 is damaged: .*{data.name} has not the content that was written'):
        check_step(step)
    assert restore(tmp_path / 'run')[0] == 3
    assert f'step 7 is damaged ({data.relative_to(step)} has not the content' in caplog.text


def flip_a_bit(file, number):
    content = bytearray(file.read_bytes())
    content[number // 8 % len(content)] ^= 1 << number % 8
    file.write_bytes(content)


def test_contents_are_not_compared_where_nobody_wants_it(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'run')
    flip_a_bit(tmp_path / 'run/7/state/_sharding', 8)
    checkpointer = Checkpointer(tmp_path / 'run', verify=False)
    assert checkpointer.restore_latest(abstract(make_state(0)))[0] == 7
    checkpointer.close()


def test_steps_of_before_there_were_checksums_are_restored(saved, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(saved, folder)
    for step in ('3', '7'):
        record = json.loads((folder / step / 'files.json').read_text())
        (folder / step / 'files.json').unlink()
        sizes = {name: entry['bytes'] for name, entry in record.items()}
        (folder / step / 'file_sizes.json').write_text(json.dumps(sizes))
    assert restore(folder)[0] == 7
    os.truncate(folder / '7/state/_METADATA', 5)
    assert restore(folder)[0] == 3


def test_a_step_is_read_back_after_it_was_written(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.check_latest()  # there is none
    checkpointer.save(3, make_state(3), {})
    checkpointer.check_latest()
    flip_a_bit(tmp_path / '3/state/manifest.ocdbt', 300)
    with pytest.raises(
        SystemFailure, match='3 was written, and cannot be read back: state/manifest.ocdbt has not'
    ):
        checkpointer.check_latest()
    (tmp_path / '3/state/manifest.ocdbt').unlink()
    with pytest.raises(SystemFailure, match='were not put together'):
        record_files(epath.Path(tmp_path), 3)
    checkpointer.close()


def test_a_path_loads_whatever_its_characters_or_is_refused(tmp_path):
    (tmp_path / 'there').mkdir()
    (tmp_path / 'link').symlink_to('there')
    folder = tmp_path / 'link/a b%20#ä\'"$~:|;{}&=,+日/checkpoints'
    save_steps(f'{folder}/', [3])
    assert restore(folder)[0] == 3
    stored = open_params(latest_step(folder))
    np.testing.assert_array_equal(stored['b'].read((slice(0, 4),)), make_state(3)['params']['b'])
    save_params(folder.parent / 'streamed', stored)
    np.testing.assert_array_equal(
        open_params(folder.parent / 'streamed/0')['w'].read((slice(0, 16), slice(0, 4))),
        make_state(3)['params']['w'],
    )
    assert [path.name for path in tmp_path.iterdir() if path.name not in ('there', 'link')] == []
    for name in ('a*b', 'a?b', 'a[b', 'a\\b', 'a\udcff'):
        with pytest.raises(InputError, match='checkpoints cannot be kept under'):
            Checkpointer(tmp_path / name)
        assert not os.path.exists(tmp_path / name)


def test_after_a_damaged_step_its_number_is_saved_again(saved, tmp_path):
    folder = tmp_path / 'checkpoints'
    shutil.copytree(saved, folder)
    (folder / '7/state/manifest.ocdbt').unlink()
    checkpointer = Checkpointer(folder)
    step, state, _ = checkpointer.restore_latest(abstract(make_state(0)))
    assert step == 3
    for step in (5, 7):
        checkpointer.save(step, make_state(step), {'rows_consumed': 8 * step})
    checkpointer.close()
    assert sorted(path.name for path in folder.iterdir()) == ['3', '5', '7', '7.damaged']
    assert restore(folder)[0] == 7


def test_only_damaged_steps_are_an_error(saved, tmp_path):
    folder = tmp_path / 'checkpoints'
    shutil.copytree(saved, folder)
    (folder / '3/files.json').unlink()
    (folder / '7/files.json').write_text('[]')
    with pytest.raises(InputError, match='damaged'):
        latest_step(folder)
    with pytest.raises(InputError, match=r'all checkpoints under .* are damaged \(steps \[3, 7\]'):
        restore(folder)


def test_content_that_breaks_a_checksum_is_passed_over(saved, tmp_path):
    folder = tmp_path / 'checkpoints'
    shutil.copytree(saved, folder)
    data = max((folder / '7').rglob('*'), key=lambda path: path.is_file() and path.stat().st_size)
    for file in (
        *(folder / '7/state/d').iterdir(),
        data,
    ):  # as after a loss of power: the right size, and zeros
        file.write_bytes(bytes(file.stat().st_size))
    assert restore(folder)[0] == 3
    assert (folder / '7.damaged').is_dir()


def test_content_that_does_not_decompress_is_passed_over(tmp_path):
    """Without a word of the other reads, which fail or end later."""
    # Values of so many bytes lie in a file of their own, without the checksum that the index has.
    state = {f'w{n}': jax.random.normal(jax.random.key(n), (64, 64)) for n in range(32)}
    checkpointer = Checkpointer(tmp_path)
    for step in (3, 7):
        checkpointer.save(step, state, {})
    checkpointer.wait()
    sizes = {path: path.stat().st_size for path in (tmp_path / '7').rglob('*') if path.is_file()}
    data = [path for path, size in sizes.items() if size > 10_000]
    assert data
    for path in data:
        path.write_bytes(bytes(sizes[path]))
    step, restored, _ = checkpointer.restore_latest(state)
    checkpointer.close()
    assert step == 3 and (tmp_path / '7.damaged').is_dir()
    assert_same(restored, state)
    gc.collect()  # what was left behind would warn, which fails a test


def asked_until_it_fails(checkpointer):
    while True:
        checkpointer.raise_failure()


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, capfd):
    state = {f'w{n}': jax.random.normal(jax.random.key(n), (64, 64)) for n in range(8)}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state, {})
    checkpointer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # its signal is one that Python ignores
    try:
        checkpointer.save(7, state, {})
        with pytest.raises(
            SystemRefusal, match='the checkpoint of step 7 under .* stay: File too large; allow'
        ):
            asked_until_it_fails(checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpointer.wait()  # was told
    gc.collect()
    assert capfd.readouterr().err == ''
    checkpointer = Checkpointer(tmp_path)
    step, restored, _ = checkpointer.restore_latest(state)
    checkpointer.save(7, state, {})
    checkpointer.close()
    assert step == 3 and sorted(path.name for path in tmp_path.iterdir()) == ['3', '7']
    assert_same(restored, state)


def test_an_error_that_orbax_goes_on_from_is_a_line_of_our_log(tmp_path, capfd, caplog, monkeypatch):
    read_text = type(epath.Path()).read_text

    def failing(path, *arguments, **options):
        if path.name == '_CHECKPOINT_METADATA':
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(type(epath.Path()), 'read_text', failing)
    save_steps(tmp_path, [3])
    said = [record for record in caplog.records if 'Failed to read Metadata file' in record.getMessage()]
    assert said and {record.name for record in said} == {'llama_jax.checkpoint.failures'}
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('keep', [0, 1, 2])
def test_so_many_of_the_newest_are_kept_and_zero_keeps_all(tmp_path, keep):
    save_steps(tmp_path, [1, 2, 3])
    save_steps(tmp_path, [4], keep=keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['1', '2', '3', '4'][-keep:]
    with pytest.raises(
        InputError, match='checkpoints to keep: -1; give the number of the newest that stay, or 0'
    ):
        Checkpointer(tmp_path, keep=-1)


def test_a_good_checkpoint_of_another_state_is_left_alone(saved):
    target = abstract(make_state(0))
    del target['moment']
    checkpointer = Checkpointer(saved)
    with pytest.raises(InputError, match='7 cannot be restored: .*do not match'):
        checkpointer.restore_latest(target)
    checkpointer.close()
    assert sorted(path.name for path in saved.iterdir()) == ['3', '7']


def test_a_save_that_was_cut_off_is_cleared_away(saved, tmp_path):
    folder = tmp_path / 'checkpoints'
    shutil.copytree(saved, folder)
    shutil.copytree(saved / '7/state', folder / '9.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp')
    assert latest_step(folder).name == '7'
    assert restore(folder)[0] == 7
    deadline = time.monotonic() + 60
    while (folder / '9.orbax-checkpoint-tmp').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(path.name for path in folder.iterdir()) == ['3', '7']


def test_weights_alone_are_restored_cast_and_placed(saved):
    target = {
        'w': jax.ShapeDtypeStruct((16, 4), jnp.bfloat16, sharding=sharding(2, 'fsdp')),
        'b': jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=sharding(2)),
    }
    stored = open_params(latest_step(saved))
    params = {name: place(name, stored[name], wanted) for name, wanted in target.items()}
    assert_same(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(7)['params']))
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, target)


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(InputError, match='no checkpoint under'):
        latest_step(tmp_path / 'none')
