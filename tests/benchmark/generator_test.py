"""`benchmark --suite=generator`: its pairs do the same work."""

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmark import generator
from tests.command_line import add_nano


@pytest.mark.slow
def test_each_pair_is_measured_in_turns(capsys):
    add_nano()
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(
        generator_model='nano', generator_slots=2, generator_prompts=4, generator_length=3, generator_piece=8,
        generator_rounds=2,
    ):  # fmt: skip
        figures = generator.main()
    for name in ('slots', 'prefix', 'pieces'):
        assert figures[f'{name}_seconds'] > 0 and figures[f'{name}_ratio'] > 0
    assert '32 tokens of a prompt, 24 of them known' in capsys.readouterr().out


def test_turns_leave_out_what_compiles():
    calls = []
    found = generator.in_turns([lambda: calls.append('a'), lambda: calls.append('b')], rounds=2)
    assert calls == list('ababab') and [len(times) for times in found] == [2, 2]
