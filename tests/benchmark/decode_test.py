"""`benchmark --suite=decode` beside what users would otherwise take."""

import json

import pytest


@pytest.mark.slow
def test_peers_complete_beside_ours(commands, tmp_path):
    pytest.importorskip('transformers')
    pytest.importorskip('llama_cpp')
    file = tmp_path / 'figures.json'
    finished = commands.run(
        'benchmark', '--suite=decode', '--decode_model=tiny', '--decode_peer', '--decode_batches=1,2',
        '--decode_prompt=8', '--decode_tokens=6', '--decode_rounds=2', f'--json={file}',
    ).succeeded()  # fmt: skip
    figures = json.loads(file.read_text())
    for name in ('huggingface', 'llama_cpp_float32'):
        assert figures[f'batch_1_{name}_tokens_per_second'] > 0
        ratio = figures['batch_1_tokens_per_second'] / figures[f'batch_1_{name}_tokens_per_second']
        assert figures[f'batch_1_ratio_to_{name}'] == pytest.approx(ratio)
        assert f'{name}: ours is ' in finished.stdout
    assert 'batch_2_ratio_to_huggingface' in figures and 'batch_2_ratio_to_llama_cpp_float32' not in figures
    both = ('--suite=decode', '--decode_peer', '--decode_weights=int8')
    assert 'has weights of its own' in commands.run('benchmark', *both).error()
