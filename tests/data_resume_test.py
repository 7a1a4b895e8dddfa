"""A run on prepared folders, stopped and gone on with on other devices: its rows, and where each token came from."""

import hashlib
import json
import random

import numpy as np
import pytest

from experiments.preparation.inspection import describe_passage, rows_of_step
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.provenance import passages_of, read_text, reading_of
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests.command_line import tiny_run

NUM_STEPS, BATCH_SIZE, SEQ_LEN = 12, 24, 64

# Each process writes down the hashes of the rows that its devices hold, field by field.
RECORD = """
import hashlib, json
import jax, numpy as np
import llama_jax.train.validation  # has its own batches, which are not written down
from llama_jax.data import loader

jax.config.update('jax_enable_compilation_cache', False)  # process 0 alone would find its programs


def record(rows, target, *, rows_consumed, original=loader.batches, **options):
    step = rows_consumed // target.tokens.shape[0]
    with open('FILE-PROCESS', 'w') as file:
        for batch in original(rows, target, rows_consumed=rows_consumed, **options):
            step += 1
            for name, array in vars(batch).items():
                for shard in array.addressable_shards:
                    for row, values in enumerate(np.asarray(shard.data, np.int32), shard.index[0].start or 0):
                        digest = hashlib.sha256(values.tobytes()).hexdigest()
                        print(json.dumps([step, row, name, digest]), file=file, flush=True)
            yield batch


loader.batches = record
"""


@pytest.fixture(scope='module')
def prepared(commands, corpus, folder):
    """Two sources in several units, and the tokenizer."""
    from llama_jax.data.datasets import train_tokenizer

    documents = corpus.read_text().split('\n<|endoftext|>\n')
    train_tokenizer([str(corpus)], 320, folder / 'tokenizer.model')
    for number, name in enumerate(('words', 'more')):
        lines = [json.dumps({'body': {'text': text}}) for text in documents[number::2]]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines))
        commands.run(
            'prepare_data', f'--input={folder}/{name}.jsonl', f'--tokenizer={folder}/tokenizer.model',
            f'--seq_len={SEQ_LEN}', f'--output={folder}/{name}', '--text_key=body.text', '--num_workers=1',
            '--unit_bytes=3000',
        ).succeeded()  # fmt: skip
    return folder


def train(commands, prepared, workdir, num_steps, num_processes=1, num_devices=1):
    arguments = tiny_run(
        workdir, '', data__train=f'{prepared}/words,{prepared}/more', data__weights='3,1; 5: 1,2', data__skip='7',
        data__tokenizer=prepared / 'tokenizer.model', data__validation_fraction=0.0, checkpoint__every=100,
        train__num_steps=num_steps, train__batch_size=BATCH_SIZE, mesh__data=num_processes * num_devices, mesh__fsdp=1,
    )  # fmt: skip
    record = RECORD.replace('FILE', f'{workdir}.to-{num_steps}')
    for process in commands.run_processes(
        'pretrain', *arguments, num_processes=num_processes, num_devices=num_devices, before=record
    ):
        process.succeeded()


def batches(workdir):
    """{(step, row, field): hash} of what was trained on; later runs go over what a former one had read ahead."""
    found = {}
    files = sorted(
        workdir.parent.glob(f'{workdir.name}.to-*'), key=lambda file: int(file.name.split('-')[-2])
    )
    for file in files:
        last = int(file.name.split('-')[-2])
        for step, *place, digest in map(json.loads, file.read_text().splitlines()):
            if step <= last:
                assert found.setdefault((step, *place), digest) == digest
    return found


@pytest.fixture(scope='module')
def whole(commands, prepared):
    train(commands, prepared, prepared / 'whole', NUM_STEPS, num_devices=4)
    return prepared / 'whole'


@pytest.mark.slow
def test_five_resumptions_on_other_devices_read_the_batches_of_an_unbroken_run(commands, prepared, whole):
    wanted = batches(whole)
    assert len(wanted) == NUM_STEPS * BATCH_SIZE * 5  # fields of a batch
    broken = prepared / 'broken'
    for steps, processes, devices in ((2, 1, 4), (4, 1, 1), (6, 3, 1), (8, 2, 1), (10, 1, 8), (12, 2, 2)):
        train(commands, prepared, broken, steps, processes, devices)
    assert batches(broken) == wanted


@pytest.mark.slow
def test_the_records_that_are_named_hold_the_tokens_of_the_rows(commands, prepared, whole):
    digests, tokenizer = batches(whole), load_tokenizer(prepared / 'tokenizer.model')
    rng = random.Random(0)
    places = rng.sample([(step, row) for step in range(1, NUM_STEPS + 1) for row in range(BATCH_SIZE)], 100)
    sources = set()
    for step, row in places:
        found = rows_of_step(str(whole), step)[row]
        ids = []
        for passage in passages_of(found.rows, found.number):
            text = read_text(passage.file, reading_of(found.rows), passage.record)
            own = tokenizer.encode(text, bos=True, eos=True)
            assert passage.begin == len(ids)
            ids += own[passage.first_token : passage.first_token + passage.end - passage.begin]
        ids = np.array(ids + [0] * SEQ_LEN, np.int32)[:SEQ_LEN]
        assert hashlib.sha256(ids.tobytes()).hexdigest() == digests[step, row, 'tokens']
        sources.add(found.name)
    assert sources == {'words', 'more'}
    shown = commands.run('prepare_data', f'--inspect={whole}', '--step=7').succeeded().stdout
    for place, found in enumerate(rows_of_step(str(whole), 7)):
        assert f'step 7 row {place}: {found.name} row {found.number}, pass {found.epoch}\n' in shown
        for passage in passages_of(found.rows, found.number):
            assert f'  {describe_passage(passage)}\n' in shown
    line = commands.run('prepare_data', f'--inspect={whole}').error()
    assert f'{whole} has no manifest of prepared rows; of a workdir give a step too' in line
    assert 'steps count from 1' in commands.run('prepare_data', f'--inspect={whole}', '--step=0').error()
    assert 'row and step are both' in (
        commands.run('prepare_data', f'--inspect={whole}', '--step=1', '--row=0').error()
    )


@pytest.mark.slow
def test_a_folder_and_its_rows_are_shown(commands, prepared):
    words = f'--inspect={prepared}/words'
    shown = commands.run('prepare_data', words, f'--output={prepared}/words.png').succeeded().stdout
    assert '50 documents' in shown and 'left out: 0 bad records' in shown and 'held out: 0 documents' in shown
    assert 'copies: 0 of 50 documents' in shown
    assert (prepared / 'words.png').read_bytes().startswith(b'\x89PNG')
    shown = commands.run(
        'prepare_data', words, '--row=1', f'--tokenizer={prepared}/tokenizer.model'
    ).succeeded().stdout  # fmt: skip
    assert shown.startswith(f'row 1 of {prepared}/words: 65 of 65 tokens, of which ')
    texts = [json.loads(line)['body']['text'] for line in (prepared / 'words.jsonl').read_text().splitlines()]
    rows = PreparedRows(prepared / 'words')
    for passage in passages_of(rows, 1):
        line = shown.split(f'  {describe_passage(passage)}\n')[1].splitlines()[0].strip()
        assert line.removeprefix('<BOS>').removesuffix('<EOS>').strip('. ') in texts[passage.record]
        assert line.endswith('<EOS>') == passage.is_whole and line.startswith('<BOS>') == (
            not passage.first_token
        )
    for arguments, line in (
        (['--row=99999'], 'row is 99999; '), (['--num_workers=2'], '--num_workers is for preparing'),
    ):  # fmt: skip
        assert line in commands.run('prepare_data', words, *arguments).error()
    assert '--row is of --inspect=DIR' in commands.run('prepare_data', '--row=1').error()
    assert '--output is required' in commands.run('prepare_data', '--seq_len=4').error()
