"""The chain of Llama 2-Chat, killed in its stages and started again: the same files, the same table."""

import json
import os
import random
import re
import shutil
import signal
import time

import pytest

from experiments.recipes import small_data
from tests.command_line import tiny_run
from tests.ppo_kill_test import assert_same
from tests.recipes_test import script

# One of each kind, and what is made of files that others have made.
KILLED = (
    'sft/report.json', 'safety/report.json', 'distilled.jsonl', 'v2.jsonl', 'v4.jsonl', 'v5/report.json',
    'ghost.jsonl', 'chat/report.json', 'dpo/report.json', 'judged/v5.jsonl', 'probed/chat.jsonl', 'table.md',
)  # fmt: skip


def kill(process, stage, seconds) -> None:
    """So long after it began to make a file."""
    for line in process.stdout:
        if line.strip() == f'== {stage}':
            break
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, stage


def finish(process) -> dict[str, float]:
    """Seconds that each file took."""
    began = []
    shown = []
    for line in process.stdout:
        shown.append(line)
        if found := re.match(r'== (\S+)$', line):
            began.append((found[1], time.monotonic()))
    assert process.wait() == 0, ''.join(shown[-30:])
    ends = [at for _, at in began[1:]] + [time.monotonic()]
    return {file: end - at for (file, at), end in zip(began, ends, strict=True)}


@pytest.mark.long
def test_killed_in_its_stages_it_ends_in_the_same_table(commands, folder):
    """Each is made again of what the others have made, killed twice, and then to its end."""
    made, chosen = folder / 'chat', random.Random()
    small_data.write(made / 'data', size=40)
    run = tiny_run(
        folder / 'base',
        made / 'data/text.txt',
        data__vocab_size=400,
        model__vocab_size=400,
        data__seq_len=256,
    )
    commands.run('pretrain', *run).succeeded()
    environment = {'CHECKPOINT': str(folder / 'base'), 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'}
    taken = finish(script('tiny', made, **environment))
    shutil.copytree(made, folder / 'whole')
    for stage in KILLED:
        first, _, inside = stage.partition('/')
        place = made / (first if inside == 'report.json' else stage)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        for _ in range(2):
            seconds = chosen.uniform(0, 0.8) * taken[stage]
            print(f'{stage}: killed after {seconds:.1f} of {taken[stage]:.1f} s')
            kill(script('tiny', made, **environment), stage, seconds)
            if (made / stage).exists():  # faster than before
                break
        (made / 'table.md').unlink(missing_ok=True)
        finish(script('tiny', made, **environment))
        if inside == 'report.json':
            assert_same(folder / 'whole' / first, place)
        for file in {stage, 'table.md', 'table.json'}:
            if not file.endswith('report.json'):
                assert (made / file).read_bytes() == (folder / 'whole' / file).read_bytes(), file
    print((made / 'table.md').read_text())
    steps = json.loads((made / 'table.json').read_text())['steps']
    assert len(steps) == 8 + 3 and {'helpful', 'safety', 'distilled', 'v5'} <= {one['stage'] for one in steps}
