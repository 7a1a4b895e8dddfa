"""That an instruction given once is held to: stories260K on dialogs of a small world, before and behind the data."""

import re

import pytest

from experiments.recipes import small_data
from tests.sft_learning_test import OPTIMISED

TURNS = (2, 4, 6)
PROBE = f'--probe={",".join(map(str, TURNS))}', '--samples=1', '--temperatures=0.7'


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_an_instruction_of_the_first_turn_is_obeyed_at_the_fourth_and_at_the_sixth(
    commands, shared_data, tmp_path, seed
):
    """The data has five turns. The model before obeys in the turn that an instruction stands in."""
    weights, world = shared_data / 'weights/stories260K', tmp_path / 'world'
    small_data.write(world, seed)

    def tune(name, checkpoint, data, learning_rate):
        config = {
            'data__train': data, 'data__format': 'plain', 'data__validation_fraction': 0.0, 'data__seq_len': 256,
            'data__tokenizer': weights / 'tok512.model' if checkpoint.suffix else '', 'model__dtype': 'float32',
            'train__batch_size': 8, 'train__num_epochs': 3.0, 'optimizer__learning_rate': learning_rate,
            'model__remat': 'none', 'eval__sample_tokens': 0, 'log__tensorboard': False, 'seed': seed,
        }  # fmt: skip
        overrides = (f'--config.{key.replace("__", ".")}={value}' for key, value in config.items())
        arguments = (
            '--config=configs/sft.py:checkpoint',
            f'--workdir={tmp_path / name}',
            f'--checkpoint={checkpoint}',
        )
        commands.run('sft', *arguments, *overrides, before=OPTIMISED).succeeded()
        return tmp_path / name

    def draw(checkpoint, prompts, *more):
        shown = commands.run(
            'ghost_attention', f'--checkpoint={checkpoint}', f'--prompts={world / prompts}',
            f'--constraints={world / "constraints.jsonl"}', '--rewards=experiments/recipes/small_world.py:obeys',
            '--max_new_tokens=32', '--chat_format=plain', f'--seed={seed}', *more,
        ).succeeded()  # fmt: skip
        rows = re.findall(r'^ +(\d+) +([\d.]+)%$', shown.stdout, re.MULTILINE)
        return {int(turn): float(share) / 100 for turn, share in rows}

    chat = tune('chat', weights / 'stories260K.pt', world / 'sft.jsonl', 2e-3)
    data = f'--output={tmp_path / "ghost.jsonl"}'
    drawn = draw(chat, 'prompts.jsonl', '--turns=5', '--samples=4', data)
    ghost = tune('ghost', chat, tmp_path / 'ghost.jsonl', 5e-4)
    before, behind = (
        draw(model, 'judged.jsonl', *PROBE, f'--output={tmp_path / model.name}.jsonl')
        for model in (chat, ghost)
    )
    print(f'seed {seed}: drawn with it at every turn {drawn}; once, before {before}, behind {behind}')
    assert before[4] <= 0.2 and behind[4] >= 0.9 and behind[6] >= 0.7
