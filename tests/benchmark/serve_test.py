"""`benchmark --suite=serve`: a server as a process, clients that stream, and the generator alone."""

import json
import re

import pytest

from experiments.benchmark.accelerator import FIGURES


@pytest.mark.slow
def test_clients_stream_beside_the_generator(commands, folder):
    file = folder / 'figures.json'
    done = commands.run(
        'benchmark', '--suite=serve', '--serve_model=nano', '--serve_clients=1,2', '--serve_tokens=4',
        '--serve_rounds=1', '--noserve_peer', f'--json={file}',
        '--serve_schema={"type": "string", "minLength": 99}',
    ).succeeded()  # fmt: skip
    figures = json.loads(file.read_text())
    for number in (1, 2):
        ours, alone = (figures[f'{name}_{number}_tokens_per_second'] for name in ('server', 'generator'))
        assert figures[f'{number}_ratio_to_generator'] == pytest.approx(ours / alone)
        assert figures[f'server_{number}_first_seconds'] > 0
    kept = {name for name in figures if re.fullmatch(FIGURES['serve'], name)}
    assert {'server_ready_seconds', '2_ratio_to_generator', 'server_2_tokens_per_second'} <= kept
    assert figures['dtype'] == 'float32' and 0 < figures['server_ready_seconds'] < 120
    assert 0 < figures['2_mask_ms'] < figures['2_ruled_step_ms'] and figures['2_ruled_ratio_to_generator'] > 0
    assert 'after the generator alone' in done.stdout
    refused = commands.run('benchmark', '--suite=serve', '--serve_clients=0').error()
    assert '--serve_clients=0 must be whole numbers' in refused
