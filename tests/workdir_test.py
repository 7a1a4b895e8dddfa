"""Whose run a workdir holds, also where what says so is damaged."""

import json

import pytest
from etils import epath

from configs.pretrain import get_config
from experiments.workdir import CONFIG_FILE, check_data, check_workdir, record_run
from llama_jax.types import InputError

RECORD = {'config': {'seed': 0}, 'base_checkpoint': '', 'data_fingerprint': 'abc'}
DAMAGED = {
    'nested deep': b'{"config": ' + b'[' * 100_000,
    'nested deep and whole': b'{"a":' * 900 + b'1' + b'}' * 900,
    'no fingerprint': json.dumps({**RECORD, 'data_fingerprint': None}).encode(),
    'no base': b'{"config": {}, "data_fingerprint": ""}',
    'a list': b'[1]',
    'another type': json.dumps({**RECORD, 'config': [1]}).encode(),
    'cut off': json.dumps(RECORD).encode()[:20],
    'empty': b'',
    'zeros': bytes(100),
    'not UTF-8': json.dumps(RECORD).encode().replace(b'abc', b'\xff'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_a_damaged_record_is_one_line_or_its_copy_in_a_checkpoint_serves(tmp_path, caplog, case):
    workdir, config = epath.Path(tmp_path), get_config('tiny')
    record_run(workdir, config, '', 'abc')
    whole = (workdir / CONFIG_FILE).read_bytes()
    (workdir / CONFIG_FILE).write_bytes(DAMAGED[case])
    for check in (lambda: check_workdir(workdir, config, ''), lambda: check_data(workdir, 'abc')):
        with pytest.raises(
            InputError, match=r'^\S+config.json is damaged \(.*\), and no checkpoint has a copy; restore'
        ):
            check()
    for step in ('3', '12'):
        metadata = workdir / f'checkpoints/{step}/metadata/metadata'
        metadata.parent.mkdir(parents=True)
        metadata.write_bytes(whole if step == '3' else DAMAGED[case])
    check_workdir(workdir, config, '')
    assert 'config.json is damaged (' in caplog.text and 'the copy in checkpoint 3 is used' in caplog.text
    check_data(workdir, 'abc')
    (workdir / CONFIG_FILE).unlink()
    with pytest.raises(InputError, match='the data of workdir .* have changed'):
        check_data(workdir, 'other')
    config.optimizer.learning_rate = 1.0
    with pytest.raises(InputError, match='belongs to another run: --config.optimizer.learning_rate was'):
        check_workdir(workdir, config, '')
