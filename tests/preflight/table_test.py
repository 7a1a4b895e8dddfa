"""The table of docs/preflight.md: it has every run that it is said to hold, and no bound that somebody has exceeded."""

import pytest

from experiments.preflight_table import PAGE, ROWS, Row, key


@pytest.mark.parametrize('row', ROWS, ids=lambda row: f'{row.model} on {row.topology}')
def test_every_row_is_there_and_fits(row: Row):
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(key(row))]
    assert len(lines) == 1, 'renew with: python -m experiments.preflight_table --only=TOPOLOGY'
    cells = [cell.strip() for cell in lines[0].strip('|').split('|')]
    assert 'does not fit' not in lines[0]
    _, _, size, memory, _, _, _, bound, published, involuntary, _ = cells
    batch, length = row.settings['train.batch_size'], row.settings.get('data.seq_len', 4096)
    assert size == f'{batch} x {length:,}'
    used, available = map(float, memory.split(' of '))
    assert used <= available
    assert involuntary == 'none'
    assert published == ('' if row.published is None else f'{row.published[0]:.1f} % ({row.published[1]})')
    if row.published is not None:
        assert float(bound.rstrip('%')) >= row.published[0], 'a bound that somebody exceeded is none'
