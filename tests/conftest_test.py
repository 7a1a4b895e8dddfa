"""What all tests stand on."""

import types

from tests import conftest


def test_a_cached_program_that_another_run_removes_stops_no_run(tmp_path, monkeypatch):
    """Listed, and gone before it is looked at, as a link to nothing is."""
    (tmp_path / 'gone-cache').symlink_to(tmp_path / 'nothing')
    (tmp_path / 'kept-cache').write_text('program')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))
    conftest.pytest_sessionstart(types.SimpleNamespace(config=None))
    assert (tmp_path / 'kept-cache').exists()
