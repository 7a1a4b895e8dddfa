"""The commands of docs/data.md, one after the other: from files to a trained model, on a disk and in a bucket."""

import json
import math
import os
import re
import shlex
import signal

import pytest
from etils import epath

from llama_jax.data.sources import read_documents
from llama_jax.storage import enable_bucket
from tests.command_line import REPOSITORY, CommandLine, wait_for
from tests.reference.fake_gcs import FakeGCS

SOURCES = {
    'c4': ('c4_demo.jsonl', ''),
    'common_crawl': ('common_crawl_sample.jsonl', ''),
    'arxiv': ('arxiv_sample.jsonl', ''),
    'stories': ('tinystories_2MiB_sample.txt', '<|endoftext|>'),
    'books': ('tinyshakespeare.txt', '\n\n'),
}
# Of the page's run: a smaller model in less time.
SMALL = [
    f'--config.{key}'
    for key in ('model.preset=nano', 'train.batch_size=1', 'eval.max_rows=16', 'eval.sample_tokens=0')
]


def section():
    """(the recipe, the commands as lists of words) of the page."""
    page = (REPOSITORY / 'docs/data.md').read_text().partition('## From files to perplexity')[2]
    recipe, commands = (re.search(rf'```{kind}\n(.*?)```', page, re.S)[1] for kind in ('python', 'bash'))
    return recipe, [shlex.split(line) for line in commands.replace('\\\n', '').splitlines()]


def placed(text, place):
    """With folders of `place` for those that stand on the page."""
    return re.sub(r"(?<=[=,:'])(text|data|runs)/", rf'{place}/\1/', text)


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    if request.param == 'disk':
        yield str(tmp_path), {}
        return
    with FakeGCS() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        enable_bucket('gs://bucket')
        yield 'gs://bucket', server.environment()


# What gcsfs sends at once.
@pytest.mark.filterwarnings('ignore:Sending a large body directly with raw bytes:ResourceWarning')
@pytest.mark.long
@pytest.mark.parametrize('place', ['disk', 'bucket'], indirect=True)
def test_from_files_to_what_each_source_is_predicted_with(place, folder, tmp_path, shared_data):
    place, environment = place
    text = epath.Path(place) / 'text'
    text.mkdir(parents=True, exist_ok=True)
    files = {file: shared_data / 'text' / file for file, _ in SOURCES.values()}
    for name, file in (
        files | {'tokenizer.model': shared_data / 'tokenizers/llama2/tokenizer.model'}
    ).items():
        (text / name).write_bytes(file.read_bytes())
    recipe, (prepare, pretrain, evaluate) = section()
    (tmp_path / 'five.py').write_text(placed(recipe, place))
    commands = CommandLine(folder, **environment)

    def words(command):
        name = command[2].removeprefix('experiments.')
        given = [placed(word, place).replace('=FILE.py', f'={tmp_path}/five.py') for word in command[3:]]
        return name, *given

    said = commands.run(*words(prepare)).succeeded()
    assert 'read back and found equal' in said.stdout
    check_report(epath.Path(place) / 'data/five', shared_data)
    workdir = epath.Path(place) / 'runs/five'
    pid = commands.start(*words(pretrain), *SMALL)
    last = workdir / 'checkpoints/100' / ('commit_success.txt' if environment else '')
    wait_for(last.exists, 600)
    os.kill(pid, signal.SIGKILL)
    assert commands.wait().status == -signal.SIGKILL
    assert 'resum' in commands.run(*words(pretrain), *SMALL).succeeded().stderr
    logged = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert logged[-1]['step'] == 200
    validated = [line for line in logged if 'validation_loss' in line]
    rows = 200 * json.loads((workdir / 'config.json').read_text())['config']['train']['batch_size']
    before = rows * 99 / 200
    for name, first, then in zip(SOURCES, (4, 1, 2, 2, 1), (1, 1, 2, 1, 3), strict=True):
        share = before * first / 10 + (rows - before) * then / 8
        assert abs(logged[-1][f'rows/{name}'] - share) <= 4  # two of each stage
        losses = [line[f'validation_loss/{name}'] for line in validated]
        print(name, [round(loss, 3) for loss in losses], logged[-1][f'rows/{name}'])
        assert len(losses) == 4 and losses[-1] < losses[0], name
    commands.run(*words(evaluate)).succeeded()
    found = json.loads((workdir / 'perplexity/results.json').read_text())
    assert found.keys() == {f'perplexity:{text}/{file}' for file, _ in SOURCES.values()}
    for name, (file, _) in SOURCES.items():
        result = found[f'perplexity:{text}/{file}']
        print(name, result)
        assert 1 <= result['n'] <= 3
        # The first texts of each are no fair sample of what was held out.
        held_out = logged[-1][f'validation_loss/{name}']
        assert abs(math.log(result['token_perplexity']) - held_out) < 1, name


def check_report(folder, shared_data):
    """Every document of every file is accounted for."""
    report = json.loads((folder / 'report.json').read_text())
    assert report['sources'].keys() == SOURCES.keys()
    for name, (file, separator) in SOURCES.items():
        row = report['sources'][name]
        documents = list(read_documents(str(shared_data / 'text' / file), separator=separator))
        kept = row['train']['documents'] + row['validation']['documents']
        assert (row['records'], row['bad']) == (kept + row['empty'], 0) and kept == len(documents)
        text_bytes = row['train']['text_bytes'] + row['validation']['text_bytes']
        assert text_bytes == sum(len(document.encode()) for document in documents)
        assert min(row['train']['rows'], row['validation']['rows']) > 0
        print(name, {key: row[key] for key in ('records', 'empty', 'held_out')}, row['train']['tokens'])
