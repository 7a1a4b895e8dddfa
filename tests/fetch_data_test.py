"""What `tests.fetch_data` brings from a hub is what the tests read: the same questions, weights and expected text."""

import json
import shutil

import pytest

from llama_jax.eval.tasks import TASKS, bbh, mmlu
from tests import fetch_data
from tests.eval.documents_online_test import COUNT, HUB, asked, library, write_hub  # noqa: F401 - a fixture
from tests.pretrained_test import Hub

MBPP = ('prompt', 'test', 'validation', 'train')
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # the hub's libraries warn of their own


@pytest.fixture
def hub(shared_data, tmp_path, monkeypatch):
    """A hub with some items of each benchmark, two of the parts of those that have parts, and no weights."""
    monkeypatch.setattr(mmlu, 'SUBJECTS', ('anatomy', 'virology'))
    monkeypatch.setattr(bbh, 'SUBSETS', ('navigate', 'snarks'))
    data_dir, parts = str(shared_data / 'eval'), {}
    for name, (dataset, config, split, to_row) in HUB.items():
        rows = list(map(to_row, TASKS[name].documents(data_dir)[:COUNT]))
        parts.setdefault(dataset, {})[config, 'validation' if name == 'openbookqa' else split] = rows
    for dataset, config, split, file in (
        ('openai/gsm8k', 'main', 'train', 'gsm8k/train.jsonl'),
        *(('google-research-datasets/mbpp', 'full', part, 'mbpp/mbpp.jsonl') for part in MBPP),
    ):  # fmt: skip
        lines = (shared_data / 'eval' / file).read_text().splitlines()
        parts.setdefault(dataset, {})[config, split] = list(map(json.loads, lines[:COUNT]))
    math, kinds = TASKS['math'].documents(data_dir), TASKS['math'].load.huggingface.configs
    parts['EleutherAI/hendrycks_math'] = {
        (kind, 'test'): [{key: d[key] for key in ('problem', 'solution')}]
        for kind, d in zip(kinds, math, strict=False)
    }
    questions = {'test': TASKS['mmlu'].documents(data_dir), 'dev': TASKS['mmlu'].few_shot.load(data_dir)}
    parts['cais/mmlu'] = {
        (subject, split): [
            {key: d[key] for key in ('question', 'choices', 'answer')} for d in documents if d['subset'] == subject
        ]
        for subject in mmlu.SUBJECTS for split, documents in questions.items()
    }  # fmt: skip
    parts['lukaemon/bbh'] = {
        (kind, 'test'): [
            {key: d[key] for key in ('input', 'target')}
            for d in TASKS['bbh'].documents(data_dir)
            if d['subset'] == kind
        ]
        for kind in bbh.SUBSETS
    }
    unknown = {'tau/commonsense_qa'}  # of which there are no items here
    wanted = {source.huggingface.dataset for source in fetch_data.sources().values()} - unknown
    assert wanted <= parts.keys()
    for dataset, splits in parts.items():
        found = write_hub(tmp_path / 'hub', dataset, splits)
    return found


def test_the_benchmarks_ask_what_they_asked(library, hub, shared_data, tmp_path):  # noqa: F811
    place = tmp_path / 'brought'
    failures = fetch_data.fetch(place, hub)
    assert [line.split()[0] for line in failures] == ['no', 'stories260K:'] and 'commonsense_qa' in failures[
        0
    ]
    for name in [*HUB, 'mmlu', 'bbh', 'math']:
        documents = TASKS[name].documents(str(shared_data / 'eval'))
        found = TASKS[name].documents(str(place / 'eval'))
        if name == 'hellaswag':  # the hub has the marks of WikiHow, which are taken out
            assert len(found) == COUNT
        elif name not in ('mmlu', 'bbh', 'math'):
            assert asked(TASKS[name], found) == asked(TASKS[name], documents[:COUNT]), name
        else:
            assert asked(TASKS[name], found) == asked(TASKS[name], documents[: len(found)]), name
    assert len((place / 'eval/mbpp/mbpp.jsonl').read_text().splitlines()) == 4 * COUNT
    assert not list(place.rglob('*.part'))
    kept = place / 'eval/piqa/validation.jsonl'
    kept.write_text('kept')
    fetch_data.fetch(place, hub)
    assert kept.read_text() == 'kept'


def test_the_weights_are_those_that_the_tests_know(shared_data, tmp_path, monkeypatch):
    theirs = shared_data / 'weights/stories260K'
    for repository, name, _ in fetch_data.WEIGHTS:
        copy = tmp_path / 'hub' / repository.split('/')[1] / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(theirs / copy.name, copy)
    Hub(tmp_path / 'hub', monkeypatch)
    fetch_data.weights(tmp_path / 'brought')
    for _, name, _ in fetch_data.WEIGHTS:
        file = name.rpartition('/')[2]
        assert (tmp_path / 'brought' / file).read_bytes() == (theirs / file).read_bytes()
    found, expected = (
        json.loads((folder / 'expected.json').read_text()) for folder in (tmp_path / 'brought', theirs)
    )
    assert {key: expected[key] for key in found} == found
    copy.write_bytes(b'another')
    (tmp_path / 'brought' / copy.name).unlink()
    with pytest.raises(fetch_data.InputError, match='SHA-256'):
        fetch_data.weights(tmp_path / 'brought')
