"""`benchmark --suite=attention` on a shape so small that all of it is seconds: its figures, and that it finds fault."""

import json

import pytest

TINY = ['--suite=attention', '--attention_shapes=1,64,4,2,16', '--attention_rounds=1']

# A kernel that does not honour segment ids; one case finds it.
WRONG = """
import experiments.benchmark.attention
import llama_jax.ops.attention as front
chunked = front.chunked_attention
front.chunked_attention = lambda q, k, v, q_ids, kv_ids, *rest, **more: chunked(q, k, v, None, None, *rest, **more)
experiments.benchmark.attention.KERNELS = {'cpu': ('chunked',)}
experiments.benchmark.attention._CPU_CASES = [(8, 64, True, 'bfloat16')]
"""


@pytest.mark.slow
def test_it_checks_and_times_every_kernel_of_the_machine(commands, tmp_path):
    file = tmp_path / 'figures.json'
    finished = commands.run('benchmark', *TINY, f'--json={file}').succeeded()
    figures = json.loads(file.read_text())
    assert 'WRONG' not in finished.stdout
    assert figures['kernels'] == 'reference,chunked' and figures['1x64x4x2x16_auto'] == 'chunked'
    for kernel in ('reference', 'chunked'):
        assert figures[f'{kernel}_correct'] is True and figures[f'{kernel}_leak'] == 0
        assert 0 < figures[f'{kernel}_float32_gradient_error'] < figures[f'{kernel}_bfloat16_gradient_error']
        assert figures[f'1x64x4x2x16_{kernel}_both_ms'] > 0


def test_a_wrong_kernel_ends_it_with_an_error(commands, tmp_path):
    file = tmp_path / 'figures.json'
    finished = commands.run('benchmark', *TINY, f'--json={file}', before=WRONG)
    assert finished.status == 1
    assert finished.stderr.splitlines()[-1].startswith('error: wrong attention kernel: chunked;')
    assert 'WRONG to 1e-02' in finished.stdout and 'WRONG: documents leak by' in finished.stdout
    assert not file.exists()  # a wrong kernel's times say nothing
