"""The command line: what a command takes, what is told of what goes wrong, and what is checked before any work."""

import ast
import errno
import os
import pathlib
import re

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import ppo, pretrain
from experiments import launch
from experiments.run import config_file, settings
from experiments.run.data_schedule import schedule_of
from experiments.run.failures import describe_failure
from llama_jax.errors import InputError, SystemFailure, SystemRefusal, did_you_mean
from llama_jax.eval.tasks import find_task
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import Partitioner, make_mesh

EXPERIMENTS = pathlib.Path(launch.__file__).parent
COMMANDS = sorted(
    file for file in EXPERIMENTS.rglob('*.py') if re.search(r'DEFINE_\w+\(|define_\w+\(', file.read_text())
    and file.name != 'launch.py'
)  # fmt: skip
# Strings that name no file.
NO_PATHS = {
    'chat', 'compare', 'topology', 'only', 'remat', 'model', 'convert_models', 'attention_shapes', 'rating_command',
    'axis_rules', 'text_key', 'separator', 'prompt', 'system', 'stop', 'mesh', 'override', 'decode_batches',
    'decode_model', 'generator_model', 'finetune_model', 'finetune_parts', 'finetune_read', 'finetune_remat',
    'shard', 'logit_bias', 'suffix', 'host', 'cors_origins', 'name',
    'temperatures', 'key_map', 'regex', 'on_error', 'chat_format', 'probe', 'stages', 'data_parts', 'rl_model',
    'rl_parts', 'data_contenders', 'decode_weights', 'serve_model', 'serve_clients', 'serve_schema',
}  # fmt: skip


def holders(file):
    """{flag: (name of its holder, '' of one among several, kind of definition)} that a file defines."""
    found, tree = {}, ast.parse(file.read_text())
    named = {
        id(node.value): ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (call := ast.unparse(node.func)).startswith(
            ('flags.DEFINE', 'launch.define')
        ):
            holder = named.get(id(node), '')
            if node.args or holder:
                name = node.args[0].value if node.args else call.removeprefix('launch.define_')
                found[name] = holder, call
    return found


@pytest.mark.parametrize('file', COMMANDS, ids=lambda file: file.stem)
def test_a_command_uses_every_flag_that_it_has(file):
    source = file.read_text()
    found = holders(file)
    assert found or 'launch.define_processes()' in source
    users = ''.join(path.read_text() for path in EXPERIMENTS.rglob('*.py'))
    for name, (holder, kind) in found.items():
        if holder:
            assert re.search(rf'\b{holder}\b(\.value|,|\))', source), f'--{name} is defined and not used'
        else:
            assert re.search(rf"given(\['{name}'\]|\.get\('{name}')", users), (
                f'--{name} is defined and not used'
            )
        strings = ('flags.DEFINE_string', 'flags.DEFINE_list', 'flags.DEFINE_multi_string')
        assert kind not in strings or name in NO_PATHS, f'--{name}: a path (define_path), or one of NO_PATHS'


def test_no_flag_is_of_all_commands():
    """What `launch` defines, it defines where a command asks for it."""
    defined = [
        node
        for node in ast.parse((EXPERIMENTS / 'launch.py').read_text()).body
        if isinstance(node, ast.Assign)
    ]
    assert not any('DEFINE' in ast.unparse(node) for node in defined)
    joins = re.compile(r'\bdefine_(processes|run|sampled_policy|shared_model|spread_model)\(\)')
    commands = [file for file in COMMANDS if file.parent == EXPERIMENTS]
    joining = [file.stem for file in commands if joins.search(file.read_text())]
    assert joining == [
        'dpo', 'evaluate', 'generate', 'ghost_attention', 'ppo', 'pretrain', 'rejection_sampling', 'reward_model',
        'serve', 'sft',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('given', 'wanted'),
    [
        ('~/runs/t', 'HOME/runs/t'), ('~', 'HOME'), ('a~b', 'a~b'), ('gs://b/~/c', 'gs://b/~/c'),
        ('x.txt,~/y.txt, ~/z', 'x.txt,HOME/y.txt, HOME/z'), ('tfds:lm1b:train@~/tfds', 'tfds:lm1b:train@HOME/tfds'),
        ('piqa,perplexity:~/a.txt', 'piqa,perplexity:HOME/a.txt'), ('', ''),
    ],
)  # fmt: skip
def test_the_users_folder_is_found_in_every_path(monkeypatch, given, wanted):
    monkeypatch.setenv('HOME', '/home/me')
    wanted = wanted.replace('HOME', '/home/me')
    values = flags.FlagValues()
    holder = flags.DEFINE(
        launch._PathParser(), 'place', '', 'a path', flag_values=values, serializer=flags.ArgumentSerializer()
    )
    values(['command', f'--place={given}'])
    assert holder.value == wanted
    config = ConfigDict({section: {} for section in ('data', 'eval', 'log', 'algorithm')})
    for key in config_file.PATH_KEYS:
        section, _, name = key.partition('.')
        config[section][name] = given
    config_file.expand_user(config)
    assert set(config_file.flatten(config).values()) == {wanted}


@pytest.mark.parametrize(
    ('default', 'given', 'words'),
    [
        (None, '', 'is empty'), ('native', ' ', 'is empty'), (None, 'a.txt,', 'names an empty path'),
        ('', 'a.txt, ,b.txt', 'names an empty path'),
    ],
)  # fmt: skip
def test_no_path_is_empty(default, given, words):
    """It would be the current folder."""
    values = flags.FlagValues()
    flags.DEFINE(
        launch._PathParser(default),
        'place',
        default,
        'x',
        flag_values=values,
        serializer=flags.ArgumentSerializer(),
    )
    with pytest.raises(flags.IllegalFlagValueError, match=f'flag --place={given}: it {words}'):
        values(['command', f'--place={given}'])


def test_a_number_that_is_none_is_refused_without_python_s_words():
    for name, define, kind in (
        ('count', flags.DEFINE_integer, 'a whole number'),
        ('rate', flags.DEFINE_float, 'a number'),
    ):
        values = flags.FlagValues()
        define(name, 1, '', flag_values=values)
        with pytest.raises(flags.IllegalFlagValueError) as refused:
            values(['command', f'--{name}=1e9x'])
        assert launch._in_words(str(refused.value)) == f'flag --{name}=1e9x: it must be {kind}'


def test_keys_that_name_files_are_expanded():
    tasks = pretrain, ppo
    keys = {key for task in tasks for key in config_file.flatten(task.get_config('tiny'))}
    assert set(config_file.PATH_KEYS) <= keys


@pytest.fixture
def given(monkeypatch, tmp_path):
    """A command line that names a workdir, and a configuration that names data."""
    values = flags.FlagValues()
    flags.DEFINE(
        launch._PathParser(),
        'workdir',
        '',
        'a path',
        flag_values=values,
        serializer=flags.ArgumentSerializer(),
    )
    values(['command', f'--workdir={tmp_path}/run'])
    monkeypatch.setattr(flags, 'FLAGS', values)
    return tmp_path


def test_who_is_told_what_of_a_failure(given):
    def told(error):
        return describe_failure(error, launch._given_paths())

    inside = str(given / 'run/checkpoints/4')
    assert told(FileNotFoundError(errno.ENOENT, 'No such file', inside)) == (f'{inside}: No such file', 2)
    above = str(given)
    assert told(PermissionError(errno.EACCES, 'Permission denied', above)) == (
        f'{above}: Permission denied; allow it, or name another place, then start again',
        2,
    )
    # What the command line does not name is a defect of ours, and keeps its traceback.
    assert told(FileNotFoundError(errno.ENOENT, 'No such file', '/proc/nothing'))[1] == 0
    assert told(OSError('of no number'))[1] == 0
    assert told(KeyError('x'))[1] == 0
    # What only the user can grant is asked of them, named file or not.
    for number, remedy in (
        (errno.ENOSPC, 'make room there'), (errno.EDQUOT, 'make room there, or raise the quota'),
        (errno.EFBIG, 'allow larger files (ulimit -f)'), (errno.EROFS, 'allow it, or name another place'),
    ):  # fmt: skip
        line = f'{os.strerror(number)}; {remedy}, then start again'
        assert told(OSError(number, os.strerror(number))) == (line, 2)
        assert told(OSError(number, os.strerror(number), '/proc/x')) == (f'/proc/x: {line}', 2)
    assert told(PermissionError(errno.EPERM, 'Operation not permitted'))[1] == 0  # of no file
    assert told(SystemRefusal('the disk is full')) == ('the disk is full', 2)
    # The machine's failures are nobody's fault.
    assert told(OSError(errno.EIO, 'Input/output error')) == ('Input/output error', 1)
    assert told(SystemFailure('the disk')) == ('the disk', 1)
    assert told(FloatingPointError('loss is nan')) == ('loss is nan', 1)
    assert told(BrokenPipeError(errno.EPIPE, 'Broken pipe'))[1] == 1
    assert told(InputError('wrong')) == ('wrong', 2)


def test_who_knows_the_flags_names_them():
    names = ('--config.optimizer.beta1', '--config.optimizer.beta2')
    for line, wanted in (
        ('beta2 is 2; it must be below 1', '--config.optimizer.beta2 is 2; it must be below 1'),
        ('nothing fits', 'nothing fits (set by --config.optimizer.beta1, --config.optimizer.beta2)'),
        ('give --config.optimizer.beta1 less', 'give --config.optimizer.beta1 less'),
    ):
        with pytest.raises(InputError, match=f'^{re.escape(wanted)}$'), launch.flags_named(*names):
            raise InputError(line)


def test_what_was_not_given_is_not_said_to_have_set_it(monkeypatch):
    own = flags.FlagValues()
    for name in ('output', 'dtype'):
        flags.DEFINE_string(name, '', '', flag_values=own)
    config = ConfigDict({'data': {'train': 'x', 'validation': ''}, 'mesh': {'data': -1}})
    config_flags.DEFINE_config_dict('config', config, flag_values=own)
    own(['command', '--output=y'])
    monkeypatch.setattr(flags, 'FLAGS', own)
    for names, told in (
        ('--output --dtype', '--output'),
        ('--dtype --unknown', '--dtype, --unknown'),  # a default of theirs, then
        (
            '--config.data.train --config.data.validation --config.mesh.*',
            '--config.data.train, --config.mesh.*',
        ),
    ):
        with (
            pytest.raises(InputError, match=re.escape(f'(set by {told})')),
            launch.flags_named(*names.split()),
        ):
            raise InputError('nothing fits')


def test_a_knob_that_is_none_is_named_by_its_key():
    for key in ('dtype', 'remat', 'attention'):
        config = pretrain.get_config('tiny')
        config.model[key] = 'ful'
        with pytest.raises(InputError, match=f'^unknown --config.model.{key}=ful; choose from'):
            settings.make_model(config, PRESETS['tiny'], Partitioner(make_mesh({'data': -1})))


NUMBERS = {
    key for key, value in config_file.flatten(pretrain.get_config('tiny')).items()
    if isinstance(value, int | float) and not isinstance(value, bool)
}  # fmt: skip
ELSEWHERE = {key for key in NUMBERS if key.startswith(settings._CHECKED_ELSEWHERE)}


@pytest.mark.parametrize('key', sorted(NUMBERS - ELSEWHERE))
def test_a_setting_out_of_range_is_named_before_anything_is_read(key):
    config = pretrain.get_config('tiny')
    settings.check_settings(config)
    section, _, name = key.rpartition('.')
    place = config[section] if section else config
    nothing = [0] if key in settings._POSITIVE else []
    too_large = [float('nan')] if isinstance(place[name], float) else [2**31]
    for value in (-1, *nothing, *too_large):
        place[name] = value
        with pytest.raises(InputError, match=rf'^--config\.{key}=\S+ is out of range: it must be at least'):
            settings.check_settings(config)


def test_ranges_are_of_keys_that_there_are():
    assert {*settings._POSITIVE, *settings._BELOW} <= NUMBERS - ELSEWHERE
    assert {key for key in ELSEWHERE if not key.startswith(('mesh.', 'optimizer.'))} == {'data.vocab_size'}


def test_what_is_used_late_is_checked_early(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    for values, message in (
        ({'log.profile_start': 600, 'log.profile_steps': 2}, 'profile_start=600 is not before the last'),
        (
            {'log.wandb': 'project'},
            r"wandb=project needs the package wandb: pip install 'llama_jax\[wandb\]'",
        ),
        ({'optimizer.beta2': 1.5}, r'^--config\.optimizer\.beta2 is 1\.5; it must be from 0 to below 1'),
    ):
        config = pretrain.get_config('tiny')
        for key, value in values.items():
            section, _, name = key.partition('.')
            config[section][name] = value
        with pytest.raises(InputError, match=message):
            settings.check_settings(config)
    config = pretrain.get_config('tiny')
    for weights, message in (
        ('1,2', '2 weights for 1 data sources'),
        ('nan', 'positive'),
        ('a', 'give numbers'),
    ):
        config.data.weights = weights
        with pytest.raises(InputError, match=message):
            schedule_of(config)
    config.eval.tasks, config.eval.data_dir = 'mbpp', 'x'
    with pytest.raises(InputError, match=r'executes generated code.*set by --config\.eval\.tasks'):
        settings.prepare_tasks(config)


@pytest.mark.parametrize(
    ('batch_size', 'parts', 'message'),
    [
        (
            8,
            2,
            r'are 4 rows at a time, .* the 8 devices .*; make the batch a multiple of 16, or take it in 1$',
        ),
        (32, 8, r'are 4 rows at a time, .*; make the batch a multiple of 64, or take it in 4$'),
        (
            1 << 24,
            1,
            r'batch_size=16777216 rows .* are more than 2,147,483,648 tokens a step; make them fewer$',
        ),
        (12, 1, r'batch size 12 .* must be a multiple of 8 \(set by --config\.train\.batch_size'),
    ],
)
def test_the_advice_about_a_batch_helps(batch_size, parts, message):
    config = pretrain.get_config('tiny')
    partitioner = Partitioner(make_mesh({'fsdp': 8}))
    config.train.batch_size, config.train.num_microbatches = batch_size, parts
    with pytest.raises(InputError, match=message) as error:
        settings.check_sizes(config, 256, partitioner)
    if multiple := re.search(r'multiple of (\d+)', str(error.value)):
        config.train.batch_size = int(multiple[1])
        settings.check_sizes(config, 256, partitioner)
    if fewer := re.search(r'take it in (\d+)', str(error.value)):
        config.train.batch_size, config.train.num_microbatches = batch_size, int(fewer[1])
        settings.check_sizes(config, 256, partitioner)


@pytest.mark.parametrize(
    ('number', 'status', 'line'),
    [
        (errno.EPIPE, 1, 'what read the output has closed it'),
        (errno.ENOSPC, 2, 'No space left on device; make room there, then start again'),
    ],
)
def test_help_that_cannot_be_written_is_not_the_configurations_fault(
    monkeypatch, capsys, number, status, line
):
    def closed(argv):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(launch.flags, 'FLAGS', closed)
    with pytest.raises(SystemExit) as ended:
        launch._parse_flags(['command', '--help'])
    assert (ended.value.code, capsys.readouterr().err) == (status, f'error: {line}\n')


def test_a_name_is_suggested_once():
    assert did_you_mean('hellaswag', ['hellaswag', 'piqa', 'hellaswag']) == 'did you mean hellaswag?'
    with pytest.raises(InputError, match=r"unknown task 'hellaswagg'; did you mean hellaswag\?$"):
        find_task('hellaswagg')
    assert did_you_mean('llama3', PRESETS).startswith('did you mean llama3_8b or ')


@pytest.mark.parametrize(
    'name', ['', 'llama', 'llama2', 'llama3', 'code_llama', 'stories', 'llama3_', 'x_y', '7b']
)
def test_the_name_of_no_model_is_refused_by_name(name):
    config = pretrain.get_config(name)
    with pytest.raises(InputError, match=f'unknown model {name!r}'):
        settings.find_preset(config.model.preset)


def test_a_configuration_that_fails_is_told_in_a_line(tmp_path):
    file = tmp_path / 'failing.py'
    file.write_text("def get_config():\n    return {}['x']\n")
    line = config_file.describe_error(KeyError('x'), [f'--config={file}'])
    assert line == f"--config={file} cannot be loaded: KeyError: 'x'" and os.sep in line


def test_help_of_a_command_shows_what_others_define_for_it():
    launch.define_path('for_this_test', '', 'a path')
    try:
        own = flags.FLAGS.get_key_flags_for_module(__name__)
        assert [flag.name for flag in own] == ['for_this_test']
    finally:
        delattr(flags.FLAGS, 'for_this_test')
