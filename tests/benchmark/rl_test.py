"""`benchmark --suite=rl` on shapes so small that a part is a second: its contenders do the same work."""

import json
import re

import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmark import rl
from experiments.benchmark.accelerator import FIGURES
from experiments.benchmark.rl_turns import Size, random_answers, random_prompts
from llama_jax.errors import InputError
from tests import toy
from tests.command_line import add_nano


def test_answers_are_of_many_lengths_and_none_is_too_long():
    size = Size(toy.CONFIG, 3, 4, 16, 20)
    answers = random_answers(size)
    assert [(one.record, one.sample) for one in answers] == [(r, s) for r in range(3) for s in range(4)]
    lengths = [len(one.answer) for one in answers]
    assert min(lengths) >= 5 and max(lengths) <= 20 and len(set(lengths)) > 3
    assert answers[4].prompt == tuple(random_prompts(size)[1]) and size.new_tokens == 240


def test_an_unknown_part_is_refused():
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(rl_parts='rollout'), pytest.raises(InputError, match="has 'rollout'; there are"):
        next(rl.main())


def test_layers_are_of_the_phases_alone():
    flags.FLAGS.mark_as_parsed()
    with (
        flagsaver.flagsaver(rl_parts='phases,grpo', rl_layers=2),
        pytest.raises(InputError, match='--rl_lay'),
    ):
        next(rl.main())


@pytest.mark.slow
def test_phases_of_an_iteration_stand_beside_decoding_and_sft(commands, folder):
    file = folder / 'figures.json'
    commands.run(
        'benchmark', '--suite=rl', '--rl_parts=phases', '--rl_model=nano', '--rl_layers=1', '--rl_prompt=16',
        '--rl_answer=8', '--rl_prompts=2', '--rl_samples=2', '--rl_rounds=1', f'--json={file}',
    ).succeeded()  # fmt: skip
    figures = json.loads(file.read_text())
    assert figures['phases_layers'] == 1 and figures['phases_answer_length'] == 8
    assert all(re.fullmatch(FIGURES['rl'], name) for name in figures if name.startswith('phases_'))
    of_iteration = sum(figures[f'phases_{name}_seconds'] for name in ('rollout', 'score', 'update'))
    assert of_iteration == pytest.approx(figures['phases_iteration_seconds'])
    drawn, decoded = (figures[f'phases_{name}_tokens_per_second'] for name in ('rollout', 'decode'))
    assert drawn == pytest.approx(2 * 2 * 8 / figures['phases_rollout_seconds'])
    assert figures['phases_rollout_to_decode'] == pytest.approx(drawn / decoded)
    of_sft = figures['phases_update_mfu'] / figures['phases_sft_mfu']
    assert figures['phases_update_to_sft'] == pytest.approx(of_sft) and of_sft > 0
    assert 0 <= figures['phases_sampler_gap'] < 1e-4


@pytest.mark.slow
def test_answers_are_drawn_and_an_iteration_goes_through(tmp_path):
    add_nano()
    flags.FLAGS.mark_as_parsed()
    sizes = {'rl_model': 'nano', 'rl_prompt': 16, 'rl_answer': 8, 'rl_prompts': 2, 'rl_samples': 2}
    with flagsaver.flagsaver(**sizes, rl_rounds=1, rl_parts='prefix', rl_scratch=str(tmp_path)):
        *_, figures = rl.main()
    json.dumps(figures)
    assert figures['prefix_once_per_second'] > 0 and figures['prefix_once_to_each'] > 0
