"""Local paths and addresses of buckets; results read ahead."""

import errno
import os

import pytest
from etils import epath

from llama_jax import storage
from llama_jax.errors import InputError, SystemRefusal


def test_prefetched_results_come_in_order_and_errors_where_they_belong():
    assert list(storage.prefetch([lambda i=i: i for i in range(20)])) == list(range(20))
    results = storage.prefetch([lambda: 1, lambda: 1 // 0, lambda: 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize('address', ['https://huggingface.co/a/b', 's3://bucket/a', 'memory://a'])
def test_an_address_that_is_neither_local_nor_in_a_bucket_of_google_is_refused(address):
    with pytest.raises(InputError, match=rf'{address} is no path; give a local one or gs://BUCKET/PATH'):
        storage.enable_bucket(address)


def test_a_place_is_checked_and_nothing_is_left(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'empty').mkdir()
    storage.check_place(tmp_path / 'a/b/c', folder=True)
    storage.check_place(tmp_path / 'empty', folder=True)
    storage.check_place(tmp_path / 'file', folder=False)
    storage.check_place(tmp_path / 'a/b.json', folder=False)
    for place, folder, message in (
        ('file', True, 'is a file; name a folder'),
        ('empty', False, 'is a folder; name a file'),
        ('file/a/b', True, 'file is no folder'),
        ('file/b.json', False, 'file is no folder'),
    ):
        with pytest.raises(InputError, match=message):
            storage.check_place(tmp_path / place, folder=folder)
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'empty'}


def test_folders_above_go_again_where_nothing_came_of_it(tmp_path):
    place = epath.Path(tmp_path / 'a/b/c')

    def fail():
        with storage.new_folder(place) as folder:
            (folder / 'half').write_text('')
            raise InputError('wrong')

    with pytest.raises(InputError, match='wrong'):
        fail()
    assert not any(tmp_path.iterdir())


def test_what_another_command_has_written_meanwhile_stays(tmp_path):
    place = epath.Path(tmp_path / 'a')

    def write():
        with storage.new_folder(place) as folder:
            (folder / 'file').write_text('mine')
            place.mkdir()
            (place / 'file').write_text('theirs')

    with pytest.raises(InputError, match='a has been written by another command meanwhile'):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (place / 'file').read_text() == 'theirs'


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    file = epath.Path(tmp_path / 'file')
    storage.write_atomically(file, 'before')

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(
        SystemRefusal, match='file cannot be written: No space left on device; make room there'
    ):
        storage.write_atomically(file, 'after')
    assert file.read_text() == 'before' and [path.name for path in tmp_path.iterdir()] == ['file']
