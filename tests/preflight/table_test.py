"""The tables of docs/preflight.md have every run that they are said to hold, and no bound that somebody exceeded."""

import pytest

from experiments.preflight_table import PAGE, ROWS, Row


def cells_of(row: Row) -> list[str]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(row.key)]
    assert len(lines) == 1, 'renew with: python -m experiments.preflight_table --only=TOPOLOGY'
    assert 'does not fit' not in lines[0]
    return [cell.strip() for cell in lines[0].strip('|').split('|')]


@pytest.mark.parametrize(
    'row', [row for row in ROWS if row.step == 'train'], ids=lambda row: f'{row.model} on {row.topology}'
)
def test_every_train_step_is_there_and_fits(row: Row):
    _, _, size, memory, _, _, _, bound, published, involuntary, _ = cells_of(row)
    batch, length = row.settings['train.batch_size'], row.settings.get('data.seq_len', 4096)
    assert size == f'{batch} x {length:,}'
    used, available = map(float, memory.split(' of '))
    assert used <= available
    assert involuntary == 'none'
    assert published == ('' if row.published is None else f'{row.published[0]:.1f} % ({row.published[1]})')
    if row.published is not None:
        assert float(bound.rstrip('%')) >= row.published[0], 'a bound that somebody exceeded is none'


@pytest.mark.parametrize('row', [row for row in ROWS if row.rows], ids=lambda row: row.topology)
def test_every_decode_step_is_there_and_fits(row: Row):
    """No program is faster than reading; of 69 billion weights in int8 each of 8 parts has 8.6 GB, the cache on top."""
    _, _, size, memory, read, reading, tokens, program, _ = cells_of(row)
    assert size == f'{row.weights}, {row.rows} x 4,096'
    used, available = map(float, memory.split(' of '))
    assert used <= available
    of_cache = row.rows / 2 * 4096 * 80 * 2 * 128 * 2 / 1e9
    assert float(read) == pytest.approx(68.7 / 8 + of_cache, rel=0.01)
    assert float(program.split(' ')[0]) >= float(reading.removesuffix(' ms'))
    assert float(tokens.replace(',', '')) == pytest.approx(
        1e3 * row.rows / float(reading.removesuffix(' ms')), rel=0.01
    )
