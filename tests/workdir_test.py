"""Whose run a workdir holds, what may differ when it goes on, and from what another one may start."""

import json

import pytest
from etils import epath

from configs import dpo, ppo, pretrain, reward_model, sft
from configs.pretrain import get_config
from experiments.run import config_file, workdir
from experiments.run.record import CONFIG_FILE
from experiments.run.workdir import check_data, check_own_files, check_workdir, record_run
from llama_jax.checkpoint.model_file import save_config
from llama_jax.errors import InputError
from llama_jax.models.presets import PRESETS

RECORD = {'config': {'seed': 0}, 'base_checkpoint': '', 'data_fingerprint': 'abc'}
DAMAGED = {
    'nested deep': b'{"config": ' + b'[' * 100_000,
    'nested deep and whole': b'{"a":' * 900 + b'1' + b'}' * 900,
    'no fingerprint': json.dumps({**RECORD, 'data_fingerprint': None}).encode(),
    'no base': b'{"config": {}, "data_fingerprint": ""}',
    'a list': b'[1]',
    'another type': json.dumps({**RECORD, 'config': [1]}).encode(),
    'weights are a number': json.dumps({**RECORD, 'config': {'data': {'weights': 1}}}).encode(),
    'a seed in words': json.dumps({**RECORD, 'config': {'seed': 'one'}}).encode(),
    'text is cut by a text': json.dumps({**RECORD, 'unit_bytes': '5'}).encode(),
    'history is a number': json.dumps({**RECORD, 'history': 5}).encode(),
    'history of numbers': json.dumps({**RECORD, 'history': [5]}).encode(),
    'history without steps': json.dumps({**RECORD, 'history': [{'key': 'seed'}]}).encode(),
    'fork is a number': json.dumps({**RECORD, 'fork': 5}).encode(),
    'fork of nothing': json.dumps({**RECORD, 'fork': {'from': 'runs/a'}}).encode(),
    'cut off': json.dumps(RECORD).encode()[:20],
    'empty': b'',
    'zeros': bytes(100),
    'not UTF-8': json.dumps(RECORD).encode().replace(b'abc', b'\xff'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_record_is_one_line_or_its_copy_in_a_checkpoint_serves(tmp_path, caplog, case):
    folder, config = epath.Path(tmp_path), get_config('tiny')
    record_run(folder, config, '', 'abc')
    whole = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).write_bytes(DAMAGED[case])
    for check in (lambda: check_workdir(folder, config, ''), lambda: check_data(folder, 'abc')):
        with pytest.raises(
            InputError, match=r'^\S+config.json is damaged \(.*\), and no checkpoint has a copy; restore'
        ):
            check()
    for step in ('3', '12'):
        metadata = folder / f'checkpoints/{step}/metadata/metadata'
        metadata.parent.mkdir(parents=True)
        metadata.write_bytes(whole if step == '3' else DAMAGED[case])
    check_workdir(folder, config, '')
    assert 'config.json is damaged (' in caplog.text and 'the copy in checkpoint 3 is used' in caplog.text
    check_data(folder, 'abc')
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(InputError, match='the data of workdir .* have changed'):
        check_data(folder, 'other')
    config.optimizer.learning_rate = 1.0
    with pytest.raises(InputError, match='belongs to another run: --config.optimizer.learning_rate was'):
        check_workdir(folder, config, '')


@pytest.mark.parametrize('name', ['metrics.jsonl', 'loss.png', 'params.json', 'checkpoints/0/files.json'])
def test_a_folder_with_files_of_something_else_is_no_new_workdir(tmp_path, name):
    folder, config = epath.Path(tmp_path), get_config('tiny')
    (folder / 'notes.txt').write_text('of no concern')
    check_workdir(folder, config, '')
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('mine')
    with pytest.raises(
        InputError, match=r'^--workdir=\S+ (has a|holds a checkpoint).* choose a new --workdir'
    ):
        check_workdir(folder, config, '')
    record_run(folder, config, '', 'abc')
    check_workdir(folder, config, '')


def test_another_tokenizer_that_no_run_has_left_is_not_replaced(tmp_path):
    folder, files = epath.Path(tmp_path), {'tokenizer.model': b'new', 'tokenizer.json': b'{}'}
    check_own_files(folder, files)
    (folder / 'tokenizer.model').write_bytes(b'new')
    check_own_files(folder, files)
    (folder / 'tokenizer.model').write_bytes(b'mine')
    with pytest.raises(InputError, match='has another tokenizer.model, though no run has begun there'):
        check_own_files(folder, files)
    (folder / 'model.json').write_text('{"name": "of another program"}')
    with pytest.raises(InputError, match='in which no run has begun: .*model.json does not describe a model'):
        check_own_files(folder, files)
    save_config(folder, PRESETS['tiny'])  # what a run that was stopped as it began leaves
    check_own_files(folder, files)
    (folder / 'model.json').unlink()
    record_run(folder, get_config('tiny'), '', 'abc')
    check_own_files(folder, files)


@pytest.fixture
def begun(tmp_path):
    """A workdir with the record of a run of `tiny`."""
    folder = epath.Path(tmp_path / 'run')
    workdir.record_run(folder, pretrain.get_config('tiny'), '', 'f' * 64)
    return folder


def changed(key, value):
    config = pretrain.get_config('tiny')
    section, _, name = key.rpartition('.')
    (config[section] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('train.bath_size', 'unknown config key; did you mean train.batch_size'),
        ('train.num_steps', 'as it is; leave it out'),
        ('mesh.fsdp', 'as it is; leave it out'),
        ('model.preset', 'start a new run from the weights by --checkpoint'),
        ('optimizer.name', 'start a new run from the weights by --checkpoint'),
        ('data.tokenizer', 'start a new run from the weights by --checkpoint'),
    ],
)
def test_keys_that_cannot_be_overridden_are_refused(key, message):
    with pytest.raises(InputError, match=f'^--override={key}: .*{message}'):
        workdir.check_overrides([key], pretrain.get_config('tiny'))


def test_every_key_is_free_or_overridable_or_in_the_weights():
    tasks = pretrain, sft, reward_model, dpo, ppo
    of_objective = ('lora.', 'loss.', 'reward.', 'rollout.', 'algorithm.')
    keys = {key for task in tasks for key in config_file.flatten(task.get_config())} | {'data_fingerprint'}
    assert set(workdir._OVERRIDABLE) <= keys
    fixed = {key for key in keys if not key.startswith(workdir._FREE) and key not in workdir._OVERRIDABLE}
    # What is trained, what it begins from, and what it is to minimise.
    assert {key for key in fixed if not key.startswith(of_objective)} == {
        'model.preset', 'model.vocab_size', 'model.weights', 'data.tokenizer', 'data.vocab_size', 'data.format',
        'data.share_prompt', 'optimizer.name',
    }  # fmt: skip
    parts = {key.partition('.')[0] for key in keys if key.startswith(of_objective)}
    assert parts == {'lora', 'loss', 'reward', 'rollout', 'algorithm'}


@pytest.mark.parametrize(('key', 'value'), [('optimizer.beta2', 0.9), ('data.train', 'x'), ('seed', 7)])
def test_a_change_is_refused_or_written_down(begun, key, value):
    config = changed(key, value)
    before = config_file.flatten(pretrain.get_config('tiny'))[key]
    with pytest.raises(
        InputError, match=rf'--config\.{key} was .*, let it change by --override={key}, or choose'
    ):
        workdir.check_workdir(begun, config, '')
    changes = workdir.check_workdir(begun, config, '', [key])
    assert changes == [{'key': key, 'before': before, 'after': value}]
    record = workdir.record_run(begun, config, '', 'f' * 64, step=5, changes=changes)
    assert record == json.loads((begun / 'config.json').read_text())
    assert record['history'] == [{'step': 5, 'key': key, 'before': before, 'after': value}]
    assert workdir.check_workdir(begun, config, '', [key]) == []
    # The history grows, and is kept by launches that change nothing.
    again = workdir.record_run(begun, pretrain.get_config('tiny'), '', 'f' * 64, step=9, changes=changes)
    assert [change['step'] for change in again['history']] == [5, 9]
    assert workdir.record_run(begun, config, '', 'f' * 64, step=9)['history'] == again['history']


def test_other_documents_need_leave(begun):
    with pytest.raises(InputError, match='have changed since it was started .*by --override=data.train'):
        workdir.check_data(begun, '0' * 64, ['seed'])
    assert workdir.check_data(begun, 'f' * 64) == []
    [change] = workdir.check_data(begun, '0' * 64, ['data.train'])
    assert change['key'] == 'data_fingerprint'


def test_what_no_run_can_start_from_is_refused(begun, tmp_path):
    config, new = pretrain.get_config('tiny'), epath.Path(tmp_path / 'new')
    with pytest.raises(InputError, match='is --workdir itself'):
        workdir.open_fork(str(begun), begun, config)
    with pytest.raises(InputError, match='is no workdir of a run'):
        workdir.open_fork(str(tmp_path), new, config)
    for given in (str(begun), f'{begun}@3'):
        with pytest.raises(InputError, match=r'no checkpoint.*\(set by --fork\)'):
            workdir.open_fork(given, new, config)
    with pytest.raises(
        InputError, match="optimizer.name 'adamw', this run 'lion'; .* set --config.optimizer.name="
    ):
        workdir.open_fork(str(begun), new, changed('optimizer.name', 'lion'))
    assert {path.name for path in tmp_path.iterdir()} == {'run'}
    assert {path.name for path in begun.iterdir()} == {'config.json'}


def test_processes_that_find_other_newest_steps_of_a_fork_are_refused(monkeypatch):
    fork = workdir.Fork('runs/a', epath.Path('runs/a'), epath.Path('runs/a/checkpoints/10'), [], 'abc')
    workdir.check_same_fork(fork)
    workdir.check_same_fork(None)
    monkeypatch.setattr(workdir.runtime, 'gather_texts', lambda text: [text, text.replace('10', '15')])
    with pytest.raises(InputError, match=r'checkpoints/10 and runs/a/checkpoints/15 as .* --fork=runs/a@10$'):
        workdir.check_same_fork(fork)


def test_a_runs_tokenizer_keeps_what_its_files_say(tmp_path):
    """A fine-tune's stop tokens and added tokens go into the workdir, and come back when the run resumes."""
    pytest.importorskip('tokenizers', reason="needs tokenizers: pip install 'llama_jax[hf]'")
    from experiments.run.start import find_tokenizer
    from llama_jax.tokenizer.conversion import own_files
    from tests.tokenizer import kinds

    folder, workdir = tmp_path / 'base', epath.Path(tmp_path / 'run')
    folder.mkdir()
    workdir.mkdir()
    files, stop_ids, _ = kinds.kinds()['dolphin']
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tokenizer = find_tokenizer(str(folder), None, workdir, None)
    assert set(tokenizer.stop_ids) == stop_ids
    for name, data in own_files(tokenizer).items():
        (workdir / name).write_bytes(data)
    (workdir / 'config.json').write_text('{}')
    again = find_tokenizer('', None, workdir, None)
    assert (again.sha256, again.ends) == (tokenizer.sha256, tokenizer.ends)
    # Of a damaged record the copy in a checkpoint serves, and the tokenizer needs none.
    save_config(workdir, PRESETS['tiny'])
    (workdir / 'config.json').write_text('{"config": ')
    again = find_tokenizer('', None, workdir, None)
    assert (again.sha256, again.ends) == (tokenizer.sha256, tokenizer.ends)
