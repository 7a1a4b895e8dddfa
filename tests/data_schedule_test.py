"""Weights by step, steps that are left out, and what of it may change when a run goes on."""

import json
import re
import types

import pytest

from configs import pretrain
from experiments.run import workdir as workdirs
from experiments.run.data_schedule import constant_weights, describe_mixture, parse_schedule, schedule_of
from llama_jax.data.mixture import Skip, Stage, mix
from llama_jax.errors import InputError


def test_a_schedule_is_read_as_it_is_written():
    schedule = parse_schedule('67, 15; 200: 1,0 ;300:2,2', '11-20, 30', 2)
    assert schedule.weights == (67, 15) and schedule.stages == ((200, (1, 0)), (300, (2, 2)))
    assert schedule.in_rows(8) == ([Stage(1592, (1, 0)), Stage(2392, (2, 2))], [Skip(80, 80), Skip(232, 8)])
    assert [schedule.weights_at(step) for step in (1, 199, 200, 300)] == [(67, 15), (67, 15), (1, 0), (2, 2)]
    assert parse_schedule('', '', 3).weights is None
    config = pretrain.get_config('llama_7b')
    assert schedule_of(config).weights[:2] == (67, 15)
    config.data.weights += '; 5: ' + config.data.weights
    with pytest.raises(InputError, match='later stages, which pretraining alone takes'):
        constant_weights(config)


@pytest.mark.parametrize(
    ('weights', 'skip', 'line'),
    [
        ('1,2;1:2,1', '', "'1:2,1' is no later stage; write STEP: WEIGHTS"),
        ('1,2;5:1,1;5:2,1', '', "'5:2,1' is no later stage"),
        ('1,2;x:1,1', '', "'x:1,1' is no later stage"),
        ('1,2;5:1', '', 'are 1 weights for 2 data sources'),
        (';5:1,1', '', 'later stages and no weights to begin with'),
        ('1,-1', '', 'each must be a positive number, or 0 for never'),
        ('1,nan', '', 'each must be a positive number'),
        ('0,0', '', 'and one not 0'),
        ('1,b', '', "could not convert string to float: 'b'"),
        ('', '5-3', "'5-3' are no steps; write FIRST-LAST"),
        ('', '0', "'0' are no steps"),
        ('', '5-9,9', "'9' are no steps"),
        ('', 'a', "'a' are no steps"),
    ],
)
def test_what_is_no_schedule_is_refused_in_a_line_with_its_key(weights, skip, line):
    with pytest.raises(InputError, match=line) as caught:
        parse_schedule(weights, skip, 2)
    assert str(caught.value).startswith('--config.data.')


@pytest.mark.parametrize(
    ('before', 'after', 'step'),
    [
        (('1,2', ''), ('1,2; 7: 1,1', ''), 7),
        (('1,2; 7: 1,1', ''), ('1,2; 9: 1,1', ''), 7),
        (('1,2; 7: 1,1', ''), ('1.0, 2.00; 7: 1,1; 12: 3,4', ''), 12),
        (('1,2', ''), ('2,1', ''), 1),
        (('', ''), ('1,2', ''), 1),
        (('1,2', '5-6'), ('1,2', '5-6,9'), 9),
        (('1,2', '5-6'), ('1,2', '5-7'), 5),
        (('1,2', ''), ('1,2', '8; 7: 1'), None),
        (('1,2; 9: 1,1', '20'), ('1,2', '11,20'), 9),
    ],
)
def test_the_first_step_that_differs_is_found(before, after, step):
    if step is None:
        with pytest.raises(InputError):
            parse_schedule(*after)
        return
    one, other = parse_schedule(*before), parse_schedule(*after)
    assert one.first_difference(other) == other.first_difference(one) == step
    assert one.first_difference(one) == float('inf')


def test_steps_to_come_may_change_and_steps_taken_may_not(tmp_path):
    config = pretrain.get_config('llama_7b')
    record = {'config': json.loads(config.to_json()), 'base_checkpoint': '', 'data_fingerprint': ''}
    del record['config']['data']['skip']  # of a run that was begun before there was such a key
    (tmp_path / 'config.json').write_text(json.dumps(record))
    (tmp_path / 'checkpoints/40').mkdir(parents=True)
    assert workdirs.check_workdir(tmp_path, config, '') == []
    config.data.skip = '41-50'
    config.data.weights += '; 60: 1,1,1,1,1,1,0'
    assert workdirs.check_workdir(tmp_path, config, '') == []
    config.data.skip = '40-50'
    with pytest.raises(
        InputError, match=r'--config.data.skip was .* changes step 40 of 40 taken; change later steps'
    ):
        workdirs.check_workdir(tmp_path, config, '')
    changes = workdirs.check_workdir(tmp_path, config, '', ['data.skip', 'data.weights'])
    assert [change['key'] for change in changes] == ['data.skip', 'data.weights']
    assert workdirs.unit_bytes_of(tmp_path) == 0
    assert workdirs.unit_bytes_of(tmp_path / 'new') == workdirs.UNIT_BYTES


def test_how_often_llamas_sources_are_read_is_told_as_the_paper_has_it():
    """LLaMA's Table 1: 1.4T tokens; a source has as many (in billions) as its share and its epochs there say."""
    names = ('common_crawl', 'c4', 'github', 'wikipedia', 'books', 'arxiv', 'stackexchange')
    weights, unique = (67, 15, 4.5, 4.5, 4.5, 2.5, 2), (852.7, 198.1, 98.4, 25.7, 28.3, 33.0, 27.2)
    rows = [range(int(billions * 1e9) // 2048) for billions in unique]
    data = types.SimpleNamespace(names=names, train=mix(rows, weights, seed=0))
    told = describe_mixture(data, 1_400_000_000_000 // 2048)
    assert re.findall(r'rows, (\S+) epochs', told) == ['1.10', '1.06', '0.64', '2.45', '2.23', '1.06', '1.03']
    assert told.startswith('to be read: common_crawl 67.0% of the rows')
