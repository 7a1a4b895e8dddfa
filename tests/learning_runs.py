"""Commands that teach stories260K, a model of simple stories: what the files share that test whether it learns."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest

from tests.command_line import CommandLine

# One seed is in the slow suite.
SEEDS = [pytest.param(0, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))]
OPTIMISED = "import os; os.environ['XLA_FLAGS'] = ''"  # these programs run for longer than they compile


def once_a_seed(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path, int], Any]
) -> Callable[[int], Any]:
    """seed -> what is made of a folder and it, the first time that it is asked for."""
    return functools.cache(lambda seed: make(tmp_path_factory.mktemp(f'{name}{seed}'), seed))


def train(
    commands: CommandLine,
    command: str,
    recipe: str,
    workdir: pathlib.Path,
    checkpoint: pathlib.Path,
    config: Mapping[str, Any],
) -> pathlib.Path:
    """Runs `experiments COMMAND --config=configs/RECIPE` on plain text in float32, to its end; its workdir."""
    config = {
        'data.format': 'plain', 'model.dtype': 'float32', 'model.remat': 'none', 'log.tensorboard': False,
    } | dict(config)  # fmt: skip
    commands.run(
        command, f'--config=configs/{recipe}', f'--workdir={workdir}', f'--checkpoint={checkpoint}',
        *(f'--config.{key}={value}' for key, value in config.items()), before=OPTIMISED,
    ).succeeded()  # fmt: skip
    return workdir


def draw(
    commands: CommandLine,
    checkpoint: pathlib.Path,
    prompts: pathlib.Path,
    rewards: str,
    output: pathlib.Path,
    *more: str,
) -> list[dict]:
    """Answers of `experiments.rejection_sampling` to plain prompts, scored: the lines of its file."""
    commands.run(
        'rejection_sampling', f'--checkpoint={checkpoint}', f'--prompts={prompts}', f'--rewards={rewards}',
        f'--output={output}', '--chat_format=plain', '--batch_size=256', *more, before=OPTIMISED,
    ).succeeded()  # fmt: skip
    return read_lines(output)


def read_lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_lines(file: pathlib.Path, lines: Iterable[Mapping]) -> pathlib.Path:
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return file
