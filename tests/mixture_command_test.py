"""Runs on prepared folders whose weights change and that leave steps out, stopped and gone on with."""

import json

import numpy as np
import pytest

from llama_jax.data.mixture import Skip, Stage
from tests.command_line import tiny_run


@pytest.fixture(scope='module')
def prepared(commands, corpus, folder):
    """Two folders with what is held out of each, by a recipe; and the tokenizer."""
    from llama_jax.data.datasets import train_tokenizer

    documents = corpus.read_text().split('\n<|endoftext|>\n')
    for number, name in enumerate(('words', 'more')):
        lines = [json.dumps({'text': text}) for text in documents[number::2]]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines))
    train_tokenizer([str(corpus)], 320, folder / 'tokenizer.model')
    recipe = folder / 'recipe.py'
    recipe.write_text(
        'from configs.prepare_data import get_config as plain, source\n'
        'def get_config(recipe=""):\n'
        '    config = plain()\n'
        '    config.sources = {name: source(f"{recipe}/{name}.jsonl") for name in ("words", "more")}\n'
        '    return config\n'
    )
    finished = commands.run(
        'prepare_data', f'--config={recipe}:{folder}', f'--tokenizer={folder}/tokenizer.model', '--seq_len=64',
        f'--output={folder}/data', '--config.validation_fraction=0.2', '--num_workers=1', '--verify',
        '--unit_bytes=4000',
    ).succeeded()  # fmt: skip
    line = commands.run(
        'prepare_data', f'--config={recipe}:{folder}', f'--output={folder}/other', '--separator=|'
    ).error()
    assert '--separator and --config are both given; set --config.sources.NAME.separator instead' in line
    assert 'words: ' in finished.stdout and 'held out' in finished.stdout and 'found equal' in finished.stdout
    return folder / 'data'


def settings(prepared, **changed):
    return {
        'data__train': f'{prepared}/words,{prepared}/more', 'data__tokenizer': prepared.parent / 'tokenizer.model',
        'data__weights': '3,1; 5: 1,2', 'data__skip': '7-8', 'checkpoint__every': 3, 'train__num_steps': 9,
        'data__validation_fraction': 0.1,
    } | changed  # fmt: skip


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_weights_that_change_and_steps_left_out_are_those_of_an_unbroken_run(commands, prepared, tmp_path):
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    first = commands.run('pretrain', *tiny_run(whole, '', **settings(prepared))).succeeded()
    assert 'to be read: words ' in first.stderr
    # Stopped at step 3, and gone on with when later steps were planned anew.
    plans = {3: {'data__weights': '3,1', 'data__skip': ''}, 6: {'data__skip': ''}, 9: {}}
    for steps, changed in plans.items():
        changed = settings(prepared, train__num_steps=steps, **changed)
        commands.run('pretrain', *tiny_run(broken, '', **changed)).succeeded()
    assert [line['loss'] for line in lines(broken) if 'loss' in line][:2] == [
        line['loss'] for line in lines(whole) if 'loss' in line
    ][:2]
    from llama_jax.data.datasets import pretrain_dataset
    from llama_jax.tokenizer.tokenizer import load_tokenizer

    sources = [f'{prepared}/words', f'{prepared}/more']
    data = pretrain_dataset(
        sources, load_tokenizer(prepared.parent / 'tokenizer.model'), 64, weights=(3, 1),
        stages=[Stage(32, (1, 2))], skips=[Skip(48, 16)],
    )  # fmt: skip
    for workdir in (whole, broken):
        logged = {line['step']: line for line in lines(workdir)}
        for step in range(1, 10):
            assert [logged[step][f'rows/{name}'] for name in ('words', 'more')] == data.train.seen(8 * step)
            assert logged[step]['epochs/words'] == data.train.epochs(8 * step)[0]
            assert 0 <= logged[step]['data_wait'] <= 1
        assert {'validation_loss/words', 'validation_loss/more', 'validation_loss'} <= logged[9].keys()
        parts = [logged[9][f'validation_loss/{name}'] for name in ('words', 'more')]
        assert min(parts) <= logged[9]['validation_loss'] <= max(parts)
    changed = settings(prepared, data__weights='3,1; 4: 1,2', train__num_steps=12)
    line = commands.run('pretrain', *tiny_run(whole, '', **changed)).error()
    assert 'data.weights was' in line and 'changes step 4 of 9 taken' in line
    assert np.isfinite(logged[9]['loss'])
