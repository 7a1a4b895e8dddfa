"""Fine-tuning as a user runs it: what goes in, what a workdir holds then, what is refused."""

import json
import pathlib
import re

import pytest
from etils import epath

from experiments.run import held_out_answers
from llama_jax import pretrained
from llama_jax.inference.chat import Chat
from llama_jax.tokenizer.chat_format import chat_format_for
from tests.command_line import figures

PAGE = pathlib.Path(__file__).resolve().parents[1] / 'docs/finetuning.md'


@pytest.fixture(scope='module')
def records(folder):
    path = folder / 'records.json'
    words = ['cat', 'dog', 'sun', 'moon', 'boy']
    asked = [(words[n % 5], words[n % 3] if n % 2 else '') for n in range(40)]
    path.write_text(
        json.dumps([{'instruction': f'Say {a}.', 'input': b, 'output': f'The {a}.'} for a, b in asked])
    )
    return path


@pytest.fixture(scope='module')
def base(shared_data):
    weights = shared_data / 'weights/stories260K'
    return [
        f'--checkpoint={weights / "stories260K.pt"}',
        f'--config.data.tokenizer={weights / "tok512.model"}',
    ]


def sizes(recipe, workdir, records, **overrides):
    """Arguments of a run that takes seconds; `overrides` are config keys with `__` for the dot."""
    config = {
        'data__train': records, 'data__format': 'plain', 'data__seq_len': 64, 'data__validation_fraction': 0.2,
        'train__batch_size': 4, 'train__loss_chunks': 1, 'model__dtype': 'float32', 'model__remat': 'none',
        'optimizer__warmup_steps': 0, 'optimizer__learning_rate': 1e-3, 'eval__sample_tokens': 4,
        'checkpoint__every': 2, 'log__every': 1, 'log__tensorboard': False,
    } | overrides  # fmt: skip
    return [
        f'--config=configs/sft.py:checkpoint{recipe}', f'--workdir={workdir}',
        *(f'--config.{key.replace("__", ".")}={value}' for key, value in config.items()),
    ]  # fmt: skip


@pytest.fixture(scope='module')
def run(commands, folder, records, base):
    """The workdir of a finished run."""
    workdir = folder / 'sft'
    commands.run('sft', *sizes('', workdir, records), *base).succeeded()
    return workdir


def test_a_run_learns_the_answers_and_shows_them_beside_the_bases(run, records, base):
    report = json.loads((run / 'report.json').read_text())
    rows = report['rows']
    assert report['step'] == -(-2 * rows // 4) == len(figures(run))  # two passes
    assert report['validation_loss'] < 0.9 * report['base_loss']
    assert report['answers'] and all({*item} == {'prompt', 'base', 'answer'} for item in report['answers'])
    assert report['examples'] + len(report['answers']) == 40 and 0.5 < report['fill'] <= 1
    # The weights go on from the checkpoint's, and inference talks to them as training did.
    tuned, origin = pretrained.open(str(run)), pretrained.open(base[0].partition('=')[2])
    assert tuned.config == origin.config and tuned.template
    question = [{'role': 'user', 'content': 'Say cat.'}]
    asked = Chat(tuned.tokenizer, tuned.template).encode_prompt(question)
    assert asked == chat_format_for(tuned.tokenizer, 'plain').encode_prompt(question)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_losses(commands, run, records, base, tmp_path):
    (tmp_path / 'exam.txt').write_text('The cat. The dog.')
    exams = {'eval__tasks': f'perplexity:{tmp_path}/exam.txt', 'eval__every': 2}
    arguments = [*sizes('', tmp_path / 'run', records, **exams), *base]
    steps = {'train__num_epochs': 0, 'train__num_steps': 2}
    commands.run('sft', *sizes('', tmp_path / 'run', records, **steps), *base).succeeded()
    finished = commands.run('sft', *arguments).succeeded()
    assert 'resuming at step 2' in finished.stderr
    # The cosine is another for a run of 2 steps; but the loss of its first, and all batches, are the same.
    assert figures(tmp_path / 'run')[0] == figures(run)[0]
    assert [step for step, *_ in figures(tmp_path / 'run')] == [step for step, *_ in figures(run)]
    logged = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    examined = [line['step'] for line in logged if any(name.startswith('perplexity:') for name in line)]
    # With the validation, on the way too; what the first command did not ask for is made up for.
    assert logged[-1]['step'] > 4 and examined == [2, 4, logged[-1]['step']]
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    before = json.loads((run / 'report.json').read_text())
    assert report['base_loss'] == before['base_loss']  # found before the first step, and kept
    assert [item['base'] for item in report['answers']] == [item['base'] for item in before['answers']]
    error = commands.run('sft', *sizes('', tmp_path / 'run', records, data__format='hh'), *base).error()
    assert "--config.data.format was 'plain' and is 'hh'" in error


def test_rows_can_be_looked_at(commands, records, base, tmp_path):
    finished = commands.run('sft', *sizes('', tmp_path / 'run', records), *base, '--inspect=2').succeeded()
    lines = finished.stdout.splitlines()
    assert sum(line.startswith('row ') for line in lines) == 2
    examples = [line for line in lines if re.match(r'  \d+: ', line)]
    assert examples and all(
        re.search(r'Say \w+\.(\n)?.*»The \w+\.<stop>«$', line) or '»' not in line for line in examples
    )
    assert re.search(r'rows of 65 tokens, \d+\.\d % full', finished.stdout)
    assert (tmp_path / 'run/lengths.png').read_bytes().startswith(b'\x89PNG')
    assert not (tmp_path / 'run/config.json').exists()  # nothing has begun


def test_what_is_wrong_is_one_line(commands, records, base, tmp_path):
    bad = tmp_path / 'bad.jsonl'
    bad.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    for arguments, words in (
        (sizes('', tmp_path / 'run', bad), f'{bad} line 1: the conversation ends with the user'),
        (sizes('', tmp_path / 'run', bad, data__on_error='skip'), '--config.data.on_error'),
        (sizes('', tmp_path / 'run', records, data__seq_len=4), 'nothing to learn is left'),
        (sizes('', tmp_path / 'run', records, data__format='llama3'), 'needs <|start_header_id|>, which'),
        (sizes('', tmp_path / 'run', records, data__key_map='a'), "--config.data.key_map is 'a'"),
        (sizes('', tmp_path / 'run', records, data__too_long='x'), "--config.data.too_long is 'x'"),
    ):
        assert words in commands.run('sft', *arguments, *base).error(), words
        assert not (tmp_path / 'run').exists()
    error = commands.run('sft', *sizes('', tmp_path / 'run', records), *base[1:]).error()
    assert '--config.model.preset=checkpoint needs --checkpoint' in error
    error = commands.run('sft', '--config=configs/sft.py:nano,alpac', f'--workdir={tmp_path / "run"}').error()
    assert error.startswith(
        "error: --config=configs/sft.py:nano,alpac: unknown recipe 'alpac'; did you mean alpaca"
    )
    error = commands.run('sft', f'--workdir={tmp_path / "run"}').error()
    assert '--config is required, such as --config=configs/sft.py:llama2_7b' in error


def commands_of_the_page(name):
    """Options of every command of that name on the page."""
    blocks = '\n'.join(re.findall(r'```bash\n(.*?)```', PAGE.read_text(), re.DOTALL)).replace('\\\n', ' ')
    return [
        line.split()[3:] for line in blocks.splitlines() if line.startswith(f'python -m experiments.{name} ')
    ]


@pytest.mark.slow
def test_every_command_of_the_page_runs(commands, records, base, tmp_path):
    """With a small model, small rows and one step; what else they say is as it stands there."""
    found = commands_of_the_page('sft')
    assert len(found) >= 4
    for number, options in enumerate(found):
        (config,) = (option for option in options if option.startswith('--config='))
        recipe = config.partition(',')[2]
        small = sizes(
            f',{recipe}' if recipe else '', tmp_path / f'run{number}', records, train__num_epochs=0,
            train__num_steps=1, data__seq_len=256, eval__sample_tokens=0,
        )  # fmt: skip
        small = [option for option in small if not (recipe and option.startswith('--config.data.format='))]
        replaced = {option.partition('=')[0] for option in [*small, *base]}
        kept = [option for option in options if option.partition('=')[0] not in replaced]
        kept_keys = {option.partition('=')[0] for option in kept}
        small = [option for option in small if option.partition('=')[0] not in kept_keys]
        commands.run('sft', *small, *base, *kept).succeeded()


@pytest.mark.slow
def test_the_objective_that_the_page_adds_is_trained(commands, run, records, base, tmp_path):
    """Its program stands beside the commands: it begins at 0 where a model is its own teacher, and falls to another."""
    (program,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    assert len(program.splitlines()) < 60
    (tmp_path / 'distill.py').write_text(program)
    beside = f'import experiments; experiments.__path__.append({str(tmp_path)!r})'
    losses = {}
    for name, teacher in (('itself', base[0].partition('=')[2]), ('another', run)):
        options = [*sizes('', tmp_path / name, records, train__num_epochs=4), *base, f'--teacher={teacher}']
        commands.run('distill', *options, before=beside).succeeded()
        losses[name] = [loss for _, loss, _ in figures(tmp_path / name)]
    assert losses['itself'][0] == pytest.approx(0, abs=1e-6)  # log-probabilities of fp32, of the same program
    assert losses['another'][0] > 0.1 and losses['another'][-1] < 0.5 * losses['another'][0]
    wrong = [*sizes('', tmp_path / 'wrong', records, lora__rank=2), *base, f'--teacher={run}']
    error = commands.run('distill', *wrong, before=beside).error()
    assert 'distilling trains all weights' in error and not (tmp_path / 'wrong').exists()


@pytest.mark.parametrize(
    'content',
    ['{', '[]', '{}', '{"base_answers": "a"}', '{"base_answers": [1, 2]}', '{"base_answers": ["a"]}',
     '{"base_answers": ["a", "b"], "base_loss": "low"}'],
)  # fmt: skip
def test_damaged_answers_of_the_base_are_left_out_of_the_report(tmp_path, caplog, content):
    file = epath.Path(tmp_path / 'base.json')
    file.write_text('{"base_answers": ["a", "b"], "base_loss": 1.5}')
    assert held_out_answers._kept(file, 2) == {'base_answers': ['a', 'b'], 'base_loss': 1.5}
    file.write_text(content)
    assert held_out_answers._kept(file, 2) == {} and 'base.json is left out of the report: ' in caplog.text
