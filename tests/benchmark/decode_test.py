"""`benchmark --suite=decode` beside what users would otherwise take."""

import json

import pytest

from experiments.benchmark import decode, decode_peers
from llama_jax.errors import InputError


def test_steps_that_noise_hides_give_no_figure(capsys):
    """A negative number of tokens a second once stood there."""

    def slow_first(number: int) -> float:
        return 1.0 if number == 1 else 0.5

    times = decode.take_turns({'ours': float, 'peer': slow_first, 'other': float}, tokens=5, rounds=3)
    assert [*times] == ['ours', 'other'] and times['ours'].step == 1
    assert 'peer: left out, 5 tokens took no longer than one' in capsys.readouterr().out
    with pytest.raises(InputError, match='--decode_tokens=5: 5 tokens took no longer than one; give more'):
        decode.take_turns({'ours': slow_first}, tokens=5, rounds=3)


def test_llama_cpp_reads_its_prompt_in_every_turn(monkeypatch):
    """By itself it reads a prompt's last token alone where it still holds the rest."""

    class Opened:
        num_tokens = 0

        def reset(self):
            self.num_tokens = 0

        def generate(self, ids, **_):
            assert self.num_tokens == 0
            self.num_tokens = len(ids)
            yield from range(8)

    monkeypatch.setattr(decode_peers, '_opened', [Opened()])
    for number in (8, 1):
        assert decode_peers._complete_by_llama_cpp([1, 2, 3], number) > 0


@pytest.mark.slow
def test_peers_complete_beside_ours(commands, tmp_path):
    pytest.importorskip('transformers')
    pytest.importorskip('llama_cpp')
    file = tmp_path / 'figures.json'
    finished = commands.run(
        'benchmark', '--suite=decode', '--decode_model=tiny', '--decode_peer', '--decode_batches=1,2',
        '--decode_prompt=8', '--decode_tokens=64', '--decode_rounds=3', f'--json={file}',
    ).succeeded()  # fmt: skip
    figures = json.loads(file.read_text())
    for name in ('huggingface', 'llama_cpp_float32'):
        if f'{name}: left out' in finished.stdout:  # a busy machine hides what this small model takes
            continue
        assert figures[f'batch_1_{name}_tokens_per_second'] > 0
        ratio = figures['batch_1_tokens_per_second'] / figures[f'batch_1_{name}_tokens_per_second']
        assert figures[f'batch_1_ratio_to_{name}'] == pytest.approx(ratio)
        assert f'{name}: ours is ' in finished.stdout
    assert 'batch_2_ratio_to_llama_cpp_float32' not in figures
    both = ('--suite=decode', '--decode_peer', '--decode_weights=int8')
    assert 'has weights of its own' in commands.run('benchmark', *both).error()
