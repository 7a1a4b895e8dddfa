"""The chain of Llama 2-Chat, killed in each of its stages and started again: the same files, the same table."""

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


def seconds_of_each(process) -> dict[str, float]:
    """What each file took, once the whole has ended well."""
    began, shown = {}, []
    with process:
        for line in process.stdout:
            shown.append(line)
            if found := re.match(r'== (\S+)$', line):
                began[found[1]] = time.monotonic()
    assert process.wait() == 0, ''.join(shown[-30:])
    ends = [*list(began.values())[1:], time.monotonic()]
    return {file: end - at for (file, at), end in zip(began.items(), ends, strict=True)}


def kill(process, file, seconds) -> None:
    """So long after it began to make a file, with what it has started."""
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line.strip() == f'== {file}':
            break
    else:
        raise AssertionError(f'{file} was not made: {"".join(shown[-30:])}')
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, file


@pytest.mark.long
def test_killed_in_each_of_its_stages_it_ends_in_the_same_table(commands, folder):
    made, whole, chosen = folder / 'chat', folder / 'whole', random.Random()
    small_data.write(made / 'data', size=300)
    run = tiny_run(
        folder / 'base', made / 'data/text.txt', data__vocab_size=512, model__vocab_size=512, data__seq_len=256,
        train__num_steps=100, checkpoint__every=0, log__every=50,
    )  # fmt: skip
    commands.run('pretrain', *run).succeeded()
    environment = {
        'CHECKPOINT': str(folder / 'base'), 'EXAMS': '', 'ANSWER_TOKENS': '16', 'XLA_FLAGS': '',
    }  # fmt: skip
    taken = seconds_of_each(script('tiny', made, **environment))
    print(f'{len(taken)} files in {sum(taken.values()):.0f} s', flush=True)
    made.rename(whole)
    shutil.copytree(whole / 'data', made / 'data')
    unfinished = []
    for file, seconds in taken.items():
        # What was compiled is there by now: a file is made sooner than before.
        seconds *= chosen.uniform(0.2, 0.6)
        kill(script('tiny', made, **environment), file, seconds)
        unfinished += [file] if not (made / file).exists() else []
        print(f'{file}: killed after {seconds:.1f} s, {file in unfinished and "unfinished"}', flush=True)
    process = script('tiny', made, **environment)
    shown, _ = process.communicate()
    assert process.returncode == 0, shown
    print(f'killed {len(taken)} times, {len(unfinished)} of them within a file\n{shown}')
    assert 2 * len(unfinished) > len(taken)
    assert {file.relative_to(made) for file in made.rglob('*.json*')} == {
        file.relative_to(whole) for file in whole.rglob('*.json*')
    }
    for file in taken:
        if file.endswith('report.json'):
            assert_same((whole / file).parent, (made / file).parent)
        else:
            assert (made / file).read_bytes() == (whole / file).read_bytes(), file
    assert (made / 'table.json').read_bytes() == (whole / 'table.json').read_bytes()
