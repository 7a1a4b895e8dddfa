"""Real processes that join over loopback: what a pod's hosts do, on one machine."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.models.llama import LlamaForCausalLM
from tests.command_line import figures, saved_steps, tiny_run, wait_for

NUM_STEPS, BATCH_SIZE, SEQ_LEN = 6, 8, 64

# Only process 0 finds its programs in JAX's cache. While the others compile it would wait for them, gloo for 30 s only.
WITHOUT_CACHE = """
import jax
jax.config.update('jax_enable_compilation_cache', False)
"""

# Each process writes down its devices' parts of every batch that is trained on, and which rows it read for them.
RECORD = (
    WITHOUT_CACHE
    + """
import json
import llama_jax.train.validation  # has its own batches, which are not written down
from llama_jax.data import loader


class Rows:
    def __init__(self, rows):
        self.rows, self.read = rows, set()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read.add(int(index))
        return self.rows[index]


def record(rows, target, *, rows_consumed, original=loader.batches, **options):
    rows, first, batch_size = Rows(rows), rows_consumed, target.tokens.shape[0]
    with open('FOLDER/batches-PROCESS', 'w') as file:
        for batch in original(rows, target, rows_consumed=first, **options):
            parts = {}
            for name, array in vars(batch).items():
                parts[name] = [[s.index[0].start or 0, s.index[1].start or 0, s.data.tolist()]
                               for s in array.addressable_shards]
            read = sorted(row - rows_consumed for row in rows.read if 0 <= row - rows_consumed < batch_size)
            print(json.dumps([rows_consumed // batch_size + 1, read, parts]), file=file, flush=True)
            rows_consumed += batch_size
            yield batch


loader.batches = record
"""
)


def arguments(workdir, corpus, **overrides):
    settings = {
        'train__num_steps': NUM_STEPS,
        'checkpoint__every': 3,
        'eval__every': 3,
        'data__seq_len': SEQ_LEN,
    }
    return tiny_run(workdir, corpus, **settings | overrides)


def train(commands, workdir, corpus, num_processes, num_devices=1, quiet=True, **mesh):
    """A run of so many processes; each must end well, and if `quiet`, the first alone must have said anything."""
    workdir.mkdir(exist_ok=True)  # for what is recorded
    finished = commands.run_processes(
        'pretrain', *arguments(workdir, corpus, **mesh), num_processes=num_processes, num_devices=num_devices,
        before=RECORD.replace('FOLDER', str(workdir)),
    )  # fmt: skip
    for process in finished:
        process.succeeded()
    assert not quiet or not any('step' in process.stderr + process.stdout for process in finished[1:])
    return workdir


@pytest.fixture(scope='module')
def alone(folder, commands, corpus):
    return train(commands, folder / 'alone', corpus, 1)


@pytest.fixture(scope='module')
def two(folder, commands, corpus):
    return train(commands, folder / 'two', corpus, 2)


@pytest.fixture(scope='module')
def four(folder, commands, corpus):
    return train(commands, folder / 'four', corpus, 4, mesh__data=2, mesh__fsdp=2)


def batches(workdir):
    """{step: {field: [B, T]}}, put together from what the devices of all processes held."""
    found = {}
    for file in sorted(workdir.glob('batches-*')):
        for step, _, parts in map(json.loads, file.read_text().splitlines()):
            for name, shards in parts.items():
                whole = found.setdefault(step, {}).setdefault(name, np.full((BATCH_SIZE, SEQ_LEN), -1))
                for row, column, values in shards:
                    part = whole[row : row + len(values), column : column + len(values[0])]
                    assert ((part == -1) | (part == values)).all()  # two devices hold the same part
                    part[...] = values
    assert found and all((whole >= 0).all() for batch in found.values() for whole in batch.values())
    return found


def rows_read(workdir):
    """Of the first batch, by each process."""
    files = sorted(workdir.glob('batches-*'))
    return [json.loads(file.read_text().splitlines()[0])[1] for file in files]


def assert_same_batches(workdir, other):
    found, wanted = batches(workdir), batches(other)
    assert list(found)[-1] == NUM_STEPS and set(found) <= set(wanted) == set(range(1, NUM_STEPS + 1))
    for step, batch in found.items():
        assert set(batch) == set(wanted[step]) and len(batch) == 5
        for name, whole in batch.items():
            np.testing.assert_array_equal(whole, wanted[step][name], err_msg=f'{name} of step {step}')
    assert max(len(np.unique(ids)) for ids in found[NUM_STEPS]['segment_ids']) > 1  # rows are packed


def losses(workdir):
    """Of every step; and of every validation."""
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line['step'] for line in lines if 'validation_loss' in line] == [3, 6]
    return [line[name] for name in ('loss', 'validation_loss') for line in lines if name in line]


def assert_same_losses(workdir, other):
    # Sums are taken in another order, which fp32 rounds differently.
    np.testing.assert_allclose(losses(workdir), losses(other), rtol=1e-6)


def stopped_at_3(workdir, copy):
    """A workdir like that of a run that was stopped after half of its steps."""
    shutil.copytree(workdir, copy, ignore=shutil.ignore_patterns('batches-*', 'report.json'))
    shutil.rmtree(copy / f'checkpoints/{NUM_STEPS}')
    return copy


def test_two_processes_train_as_one(alone, two):
    assert_same_batches(two, alone)
    assert_same_losses(two, alone)
    assert losses(two)[NUM_STEPS - 1] < losses(two)[0] - 0.5
    assert saved_steps(two) == [3, 6]
    found, wanted = (json.loads((workdir / 'report.json').read_text()) for workdir in (two, alone))
    assert found.pop('sample') == wanted.pop('sample')
    assert found == pytest.approx(wanted, rel=1e-6)


def test_a_process_reads_the_rows_of_its_own_devices_alone(alone, two):
    first, second = rows_read(two)
    assert len(first) == len(second) == BATCH_SIZE / 2
    assert sorted(first + second) == rows_read(alone)[0] == list(range(BATCH_SIZE))


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(commands, corpus, two, tmp_path):
    resumed = train(commands, stopped_at_3(two, tmp_path / 'run'), corpus, 2)
    assert figures(resumed) == figures(two) and losses(resumed) == losses(two)
    assert list(batches(resumed)) == [4, 5, 6]
    assert_same_batches(resumed, two)


@pytest.mark.slow
def test_damage_that_one_process_meets_is_passed_over_by_all(commands, corpus, two, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(two, workdir, ignore=shutil.ignore_patterns('batches-*', 'report.json'))
    for file in (workdir / f'checkpoints/{NUM_STEPS}/state/ocdbt.process_1/d').iterdir():
        file.write_bytes(bytes(file.stat().st_size))  # of the right size, as after a loss of power
    resumed = train(commands, workdir, corpus, 2, quiet=False)  # each process warns
    assert list(batches(resumed)) == [4, 5, 6] and losses(resumed) == losses(two)
    assert saved_steps(resumed) == [3, 6] and (workdir / f'checkpoints/{NUM_STEPS}.damaged').is_dir()


@pytest.mark.slow
def test_four_processes_train_as_one_and_go_on_bit_for_bit(commands, corpus, alone, four, tmp_path):
    assert_same_batches(four, alone)
    assert_same_losses(four, alone)
    assert sorted(sum(rows_read(four), [])) == list(range(BATCH_SIZE))
    resumed = train(commands, stopped_at_3(four, tmp_path / 'run'), corpus, 4, mesh__data=2, mesh__fsdp=2)
    assert figures(resumed) == figures(four) and losses(resumed) == losses(four)
    assert_same_batches(resumed, four)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('num_processes', 'num_devices', 'mesh'),
    [
        (1, 1, {}),
        (1, 2, {'fsdp': 2}),
        (1, 8, {'data': 2, 'fsdp': 2, 'tensor': 2}),
        (2, 1, {'tensor': 2}),
        (2, 1, {'context': 2}),
        (2, 2, {'tensor': 4}),
        (4, 1, {'context': 2, 'tensor': 2}),
    ],
    ids=str,
)
def test_four_processes_checkpoint_goes_on_elsewhere(
    commands, corpus, alone, four, tmp_path, num_processes, num_devices, mesh
):
    sizes = {f'mesh__{name}': size for name, size in ({'fsdp': 1} | mesh).items()}
    resumed = train(
        commands, stopped_at_3(four, tmp_path / 'run'), corpus, num_processes, num_devices, **sizes
    )
    assert figures(resumed)[:3] == figures(four)[:3]
    assert_same_losses(resumed, four)
    assert list(batches(resumed)) == [4, 5, 6]
    assert_same_batches(resumed, alone)
    if num_processes > 1:  # all of them share every row
        assert rows_read(resumed) == [list(range(BATCH_SIZE))] * num_processes


@pytest.mark.slow
@pytest.mark.parametrize(('num_processes', 'num_devices'), [(1, 4), (2, 2)])
def test_the_same_mesh_goes_on_bit_for_bit_in_fewer_processes(
    commands, corpus, four, tmp_path, num_processes, num_devices
):
    resumed = train(
        commands, stopped_at_3(four, tmp_path / 'run'), corpus, num_processes, num_devices, mesh__data=2, mesh__fsdp=2
    )  # fmt: skip
    assert figures(resumed) == figures(four) and losses(resumed) == losses(four)
    assert list(batches(resumed)) == [4, 5, 6]
    assert_same_batches(resumed, four)


# Counts the bytes that are asked for of a checkpoint's file, used or not.
COUNT = (
    WITHOUT_CACHE
    + """
import math
from llama_jax import pretrained
from llama_jax.convert import tensors
from llama_jax.models.presets import PRESETS
from llama_jax.errors import InputError

PRESETS['stories_260k'] = pretrained.open('CHECKPOINT').config
read = []


def count(path, offset, shape, dtype, original=tensors.read_array):
    read.append(math.prod(shape) * dtype.itemsize)
    if len(read) == 5 and PROCESS == DAMAGED:
        raise InputError('page 5 is torn')
    return original(path, offset, shape, dtype)


def params(*args, original=pretrained.Checkpoint.params, **options):
    read.clear()
    loaded = original(*args, **options)
    with open('FOLDER/bytes-PROCESS', 'w') as file:
        file.write(str(sum(read)))
    return loaded


tensors.read_array, pretrained.Checkpoint.params = count, params
"""
)


def continue_from(commands, corpus, checkpoint, workdir, num_processes, damaged=-1, **settings):
    workdir.mkdir()
    settings = {'model__preset': 'stories_260k', 'train__num_steps': 1, 'model__vocab_size': 0, **settings}
    before = COUNT.replace('CHECKPOINT', str(checkpoint)).replace('FOLDER', str(workdir))
    return commands.run_processes(
        'pretrain', *arguments(workdir, corpus, **settings), f'--checkpoint={checkpoint}',
        num_processes=num_processes,
        num_devices=8 // num_processes, before=before.replace('DAMAGED', str(damaged)),
    )  # fmt: skip


@pytest.mark.slow
def test_processes_together_read_a_foreign_checkpoint_once_and_train_on_it(
    commands, corpus, shared_data, tmp_path
):
    checkpoint = shared_data / 'weights/stories260K/stories260K.gguf'
    runs = {'one': (1, {}), 'fsdp': (2, {}), 'replicas': (2, {'mesh__data': 2, 'mesh__fsdp': 4})}
    for name, (num_processes, mesh) in runs.items():
        for process in continue_from(commands, corpus, checkpoint, tmp_path / name, num_processes, **mesh):
            process.succeeded()
        np.testing.assert_allclose(
            [loss for _, loss, _ in figures(tmp_path / name)],
            [loss for _, loss, _ in figures(tmp_path / 'one')],
            rtol=1e-6,
        )
        read = [int((tmp_path / name / f'bytes-{i}').read_text()) for i in range(num_processes)]
        assert 0.9 * checkpoint.stat().st_size < sum(read) <= 1.02 * checkpoint.stat().st_size, name
        assert max(read) <= (1.0 if num_processes == 1 else 0.7) * checkpoint.stat().st_size, name


@pytest.mark.slow
def test_what_one_process_cannot_read_ends_all_in_one_line(commands, corpus, shared_data, tmp_path):
    checkpoint = shared_data / 'weights/stories260K/stories260K.gguf'
    first, second = continue_from(commands, corpus, checkpoint, tmp_path / 'run', 2, damaged=1)
    assert 'process 1: page 5 is torn' in first.error()
    assert 'page 5 is torn' in second.error()


@pytest.mark.slow
def test_two_processes_tell_the_published_story_by_the_logits_of_one(commands, shared_data):
    """`expected.json` text for text, by shards of weights and cache on both; logits beside one pass without a cache."""
    stories = shared_data / 'weights/stories260K'
    expected = json.loads((stories / 'expected.json').read_text())
    processes = commands.run_processes(
        'generate', f'--checkpoint={stories / "stories260K.pt"}', '--prompt=', '--format=jsonl',
        '--mesh=fsdp=2,tensor=4', f'--max_new_tokens={expected["max_new_tokens"]}', '--logprobs=2', '--echo',
        num_processes=2, num_devices=4,
    )  # fmt: skip
    (line,) = processes[0].succeeded().stdout.splitlines()
    processes[1].succeeded()
    told = json.loads(line)
    assert told['completion'] == expected['greedy_text']
    config, params, tokenizer = llama_jax.load(stories / 'stories260K.pt')
    scores = [*told['prompt_scores'], *told['scores']]
    tokens = [score['token'] for score in scores]
    assert tokens[: told['prompt_tokens']] == [tokenizer.bos_id]
    model = LlamaForCausalLM(config, dtype=np.float32)
    logits, _ = model.apply({'params': params}, jax.numpy.array([tokens], np.int32))
    wanted = np.asarray(jax.nn.log_softmax(logits[0, :-1]))[np.arange(len(tokens) - 1), tokens[1:]]
    # Sums of fp32 in another order: logits are of the order of 10.
    np.testing.assert_allclose([score['log_probability'] for score in scores[1:]], wanted, atol=2e-5)


# Kills the process after so many finished prompts.
KILLED = """
import os, llama_jax.item_log as log
add, count = log.ItemLog.add, iter(range(100))
def adds(self, item):
    add(self, item)
    if next(count) == PROMPTS:
        os.kill(os.getpid(), 9)
log.ItemLog.add = adds
"""


@pytest.mark.slow
def test_processes_complete_a_file_together_and_go_on_where_they_were_killed(commands, shared_data, tmp_path):
    checkpoint = shared_data / 'weights/stories260K/stories260K.gguf'
    prompts, texts = tmp_path / 'prompts.jsonl', ['', 'Once', 'Lily saw', 'The big dog', 'One day', 'Tom']
    lines = [{'prompt': text, 'temperature': 0.7 * (n % 2)} for n, text in enumerate(texts)]
    prompts.write_text(''.join(json.dumps(line) + '\n' for line in lines))

    def complete(output, num_processes, mesh, before=''):
        return commands.run_processes(
            'generate', f'--checkpoint={checkpoint}', f'--prompts={prompts}', f'--output={output}', f'--mesh={mesh}',
            '--max_new_tokens=24', '--batch_size=2', num_processes=num_processes, num_devices=8 // num_processes,
            before=before,
        )  # fmt: skip

    for process in complete(tmp_path / 'one.jsonl', 1, 'data=2,tensor=4'):
        process.succeeded()
    whole = (tmp_path / 'one.jsonl').read_bytes()
    assert json.loads(whole.splitlines()[0])['completion'].startswith(
        'Once upon a time, there was a little girl'
    )
    output = tmp_path / 'two.jsonl'
    for number in (0, 1, 1):
        assert any(
            process.status
            for process in complete(output, 2, 'data=2,tensor=4', KILLED.replace('PROMPTS', str(number)))
        )
        assert not output.exists()
    for process in complete(output, 2, 'data=2,tensor=4'):
        process.succeeded()
    assert output.read_bytes() == whole


# Stands for a second process, which says what this one does, but for a fingerprint.
OTHER_DATA = """
import re
from llama_jax import runtime
runtime.gather_texts = lambda text: [text, '0' * 64 if re.fullmatch('[0-9a-f]{64}', text) else text]
"""


def test_processes_that_find_other_documents_are_refused(commands, corpus, tmp_path):
    [finished] = commands.run_processes(
        'pretrain', *arguments(tmp_path / 'run', corpus), num_processes=1, before=OTHER_DATA
    )
    assert 'process 1 finds other documents in --config.data.train than process 0' in finished.error()
    assert not (tmp_path / 'run').exists()


# What both processes of a job are given, what one of them is (None: it is not started), and what those started say.
REFUSED = {
    'no process 0': ([], {'process_0': None}, [JOINED := 'not all processes of the job have joined within 2 s']),
    'no process 1': ([], {'process_1': None}, [JOINED]),
    'a number too high': ([], {'process_0': None, 'process_1': ['--process_id=2']}, ['numbered from 0 to 1']),
    'other seeds': (
        [], {'process_1': ['--config.seed=1']},
        ['process 1 was started with --config.seed=1, process 0 with --config.seed=0'] * 2,
    ),
    'a wrong mesh': (['--config.mesh.tensor=3'], {}, ['impossible mesh (dcn_data=1'] * 2),
    # Only process 0 trains a tokenizer, and sees that it cannot.
    'no text': (['--config.data.train=EMPTY'], {}, ["source 'EMPTY' holds", "process 0: source 'EMPTY' holds"]),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_wrong_is_one_line_from_each_process(commands, corpus, folder, tmp_path, case):
    both, one, messages = REFUSED[case]
    empty = folder / 'empty.txt'
    empty.write_text('')
    finished = commands.run_processes(
        'pretrain', *arguments(tmp_path / 'run', corpus),
        '--initialization_timeout=2' if None in one.values() else '--initialization_timeout=300',
        *(argument.replace('EMPTY', str(empty)) for argument in both), num_processes=2, timeout=240, **one,
    )  # fmt: skip
    assert len(finished) == len(messages)
    for process, message in zip(finished, messages, strict=True):
        assert message.replace('EMPTY', str(empty)) in process.error()
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('signum', 'process'), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 1)]
)
def test_a_signal_to_one_process_has_all_save_and_end(commands, corpus, tmp_path, signum, process):
    workdir = tmp_path / 'run'
    pids = commands.start_processes(
        'pretrain', *arguments(workdir, corpus, train__num_steps=10_000, eval__every=0, checkpoint__every=0),
        num_processes=2, before=WITHOUT_CACHE,
    )  # fmt: skip
    wait_for(lambda: (workdir / 'metrics.jsonl').exists() and len(figures(workdir)) >= 3, 300)
    os.kill(pids[process], signum)
    for finished in commands.wait_processes(pids, timeout=120):
        finished.succeeded()
    (step,) = saved_steps(workdir)
    assert len(figures(workdir)) == step < 10_000
