"""What is said while text is prepared."""

import logging
import types

from experiments.preparation import progress_line
from llama_jax.data.preparation import Advance


def test_a_line_has_bytes_documents_tokens_units_and_the_time_that_is_left(caplog, monkeypatch):
    times = iter([0, 0, 20, 20, 24, 50])
    monkeypatch.setattr(progress_line, 'time', types.SimpleNamespace(monotonic=lambda: float(next(times))))
    caplog.set_level(logging.INFO, 'llama_jax.prepare_data')
    with progress_line.Progress() as said:
        said.advance(Advance('reading', 0, 4))
        said.advance(Advance('reading', 1, 4, documents=1500, num_bytes=3_000_000))
        # A stage has a time of its own, from when it began.
        said.advance(Advance('writing', 0, 8, all_bytes=12_000_000))
        said.advance(Advance('writing', 1, 8, 700, 1_000_000, 250_000, 12_000_000))  # too early for a line
        said.advance(Advance('writing', 2, 8, 1400, 3_000_000, 500_000, 12_000_000))
    assert caplog.messages == [
        'reading: 1,500 documents, 1 of 4 files, 3.0 MB',
        'writing: 1,400 documents, 500,000 tokens, 2 of 8 units, 3.0 MB, 90 s left',
    ]
