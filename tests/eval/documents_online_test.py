"""Items from copies of the Hugging Face hub and from TFDS ask what the publishers' files ask.

The copies are made here, of real items, in the columns and folders of the hub's repositories; TFDS's data sets by
builders with the names and features of TFDS's own.
"""

import json

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.tasks import TASKS, bbh, mmlu

COUNT = 3


def asked(task, documents):
    """What a model is asked, and what is right."""
    return [(task.requests(document), task.answer(document)) for document in documents]


def whole(row):
    return dict(row)


# Task: the hub's repository, {configuration: {split: ...}}, and a row of theirs from a document of ours.
HUB = {
    'boolq': (
        'aps/super_glue', 'boolq', 'validation',
        lambda d: {'question': d['question'], 'passage': d['passage'], 'idx': 0, 'label': int(d['answer'])},
    ),
    'piqa': ('baber/piqa', 'default', 'validation', whole),
    'siqa': ('lighteval/siqa', 'default', 'validation', whole),
    'hellaswag': (
        'Rowan/hellaswag', 'default', 'validation',
        lambda d: {
            'ind': 4, 'activity_label': d['ctx'].partition(': ')[0], 'ctx': '', 'ctx_b': 'the man',
            'ctx_a': d['ctx'].partition(': ')[2] + ' [step]', 'endings': d['endings'], 'label': str(d['label']),
        },
    ),
    'winogrande': ('allenai/winogrande', 'winogrande_xl', 'validation', whole),
    'arc_easy': ('allenai/ai2_arc', 'ARC-Easy', 'test', whole),
    'arc_challenge': ('allenai/ai2_arc', 'ARC-Challenge', 'test', whole),
    'openbookqa': ('allenai/openbookqa', 'main', 'test', whole),
    'nq_open': ('google-research-datasets/nq_open', 'default', 'validation', whole),
    'trivia_qa': ('mandarjoshi/trivia_qa', 'rc.nocontext', 'validation', whole),
    'lambada': (
        'EleutherAI/lambada_openai', 'default', 'test', lambda d: {'text': f'{d["context"]} {d["continuation"]}'},
    ),
    'gsm8k': ('openai/gsm8k', 'main', 'test', whole),
    'human_eval': ('openai/openai_humaneval', 'default', 'test', whole),
    'truthful_qa': (
        'truthfulqa/truthful_qa', 'multiple_choice', 'validation',
        lambda d: {'question': d['question']} | {
            name: {'choices': list(d[name]), 'labels': list(d[name].values())}
            for name in ('mc1_targets', 'mc2_targets')
        },
    ),
    'truthful_qa_gen': (
        'truthfulqa/truthful_qa', 'generation', 'validation',
        lambda d: {
            'type': 'Adversarial', 'category': d['category'], 'question': d['question'], 'best_answer': d['right'][0],
            'correct_answers': [a.rstrip('.') for a in d['right']], 'incorrect_answers': d['wrong'], 'source': '',
        },
    ),
    'crows_pairs': (
        'jannalu/crows_pairs_multilingual', 'english', 'test',
        lambda d: {name: d[name] for name in ('sent_more', 'sent_less', 'stereo_antistereo', 'bias_type')},
    ),
    'winogender': (
        'oskarvanderwal/winogender', 'all', 'test',
        lambda d: {
            'sentid': f'{d["occupation"]}.{d["participant"]}.{d["label"]}.{d["gender"]}.txt',
            'sentence': d['sentence'], 'pronoun': d['pronoun'], 'gender': d['gender'], 'label': d['label'],
        },
    ),
    'real_toxicity_prompts': ('allenai/real-toxicity-prompts', 'default', 'train', whole),
}  # fmt: skip


def write_hub(root, dataset, parts):
    """A repository as it is downloaded: {(configuration, split): rows}, its README saying which file is what."""
    folder, lines = root / dataset, ['---', 'configs:']
    folder.mkdir(parents=True)
    for config in dict.fromkeys(config for config, _ in parts):
        lines += [f'- config_name: {config}', '  data_files:']
        for (owner, split), rows in parts.items():
            if owner == config:
                (folder / f'{config}-{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
                lines += [f'  - split: {split}', f'    path: {config}-{split}.jsonl']
    (folder / 'README.md').write_text('\n'.join([*lines, '---', '']))
    return f'hf://{root}'


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The `datasets` library with a cache of its own, and without a network."""
    library = pytest.importorskip('datasets')
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(library.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    library.disable_progress_bars()
    yield library
    library.enable_progress_bars()


pytestmark = pytest.mark.filterwarnings('ignore')  # both libraries warn of what they use themselves


@pytest.mark.parametrize('name', HUB)
def test_the_hub_asks_what_the_files_ask(library, shared_data, tmp_path, name):
    dataset, config, split, to_row = HUB[name]
    documents = TASKS[name].documents(str(shared_data / 'eval'))[:COUNT]
    hub = write_hub(tmp_path / 'hub', dataset, {(config, split): map(to_row, documents)})
    found = TASKS[name].documents(hub)
    assert len(found) == COUNT and json.loads(json.dumps(found)) == found
    if name == 'hellaswag':  # joined and cleaned, as lm-evaluation-harness does
        documents = [d | {'ctx': d['ctx'] + ' The man'} for d in documents]
    assert asked(TASKS[name], found) == asked(TASKS[name], documents)


def test_the_hub_has_some_tasks_in_parts(library, shared_data, tmp_path, monkeypatch):
    """One configuration a subject or kind; those that hold both the examples and the items."""
    data_dir, root = str(shared_data / 'eval'), tmp_path / 'hub'
    monkeypatch.setattr(mmlu, 'SUBJECTS', ('anatomy', 'virology'))
    monkeypatch.setattr(bbh, 'SUBSETS', ('navigate', 'snarks'))
    ours = {name: TASKS[name].documents(data_dir) for name in ('mmlu', 'bbh', 'math')}
    examples = TASKS['mmlu'].few_shot.load(data_dir)

    def rows(documents, subset, *fields):
        return [{field: d[field] for field in fields} for d in documents if d['subset'] == subset]

    fields = ('question', 'choices', 'answer')
    write_hub(root, 'cais/mmlu', {
        (subject, split): rows(documents, subject, *fields)
        for subject in mmlu.SUBJECTS for split, documents in (('test', ours['mmlu']), ('dev', examples))
    })  # fmt: skip
    write_hub(root, 'lukaemon/bbh', {
        (kind, 'test'): rows(ours['bbh'], kind, 'input', 'target') for kind in bbh.SUBSETS
    })  # fmt: skip
    kinds = TASKS['math'].load.huggingface.configs
    problems = [{key: d[key] for key in ('problem', 'solution')} for d in ours['math'][: len(kinds)]]
    hub = write_hub(
        root,
        'EleutherAI/hendrycks_math',
        {(kind, 'test'): [row] for kind, row in zip(kinds, problems, strict=True)},
    )
    ours['math'] = ours['math'][: len(kinds)]
    for name, documents in ours.items():
        assert asked(TASKS[name], TASKS[name].documents(hub)) == asked(TASKS[name], documents)
    (drawn,) = TASKS['mmlu'].draw(ours['mmlu'][:1], hub)
    assert drawn == TASKS['mmlu'].draw(ours['mmlu'][:1], data_dir)[0] and len(drawn) == 5
    with pytest.raises(
        InputError, match='no chains of thought of bbh in .*; expected the publisher'
    ) as error:
        TASKS['bbh'].draw(ours['bbh'][:1], hub)
    assert '\n' not in str(error.value)


def test_mbpp_of_the_hub_and_bold(library, shared_data, tmp_path):
    root = tmp_path / 'hub'
    fields = ('task_id', 'text', 'code', 'test_list', 'test_setup_code')
    lines = (shared_data / 'eval/mbpp/mbpp.jsonl').read_text().splitlines()[:13]
    rows = [{field: json.loads(line)[field] for field in fields} for line in lines]
    write_hub(root, 'AmazonScience/bold', {('default', 'train'): [
        {'domain': 'gender', 'category': 'American_actors', 'name': 'Ann', 'prompts': ['Ann is', 'Ann was']}
    ]})  # fmt: skip
    hub = write_hub(
        root, 'google-research-datasets/mbpp', {('full', 'prompt'): rows[:10], ('full', 'test'): rows[10:]}
    )
    mbpp, data_dir = TASKS['mbpp'], str(shared_data / 'eval')
    found, files = mbpp.documents(hub), mbpp.documents(data_dir)[:3]
    for ours, theirs in ((files, found), (mbpp.draw(files[:1], data_dir)[0], mbpp.draw(found[:1], hub)[0])):
        assert asked(mbpp, theirs) == asked(mbpp, ours) and len(ours) == 3
    assert [d['prompt'] for d in TASKS['bold'].documents(hub)] == ['Ann is', 'Ann was']


def test_a_malformed_row_of_the_hub_is_named(library, tmp_path):
    hub = write_hub(tmp_path, 'aps/super_glue', {('boolq', 'validation'): [{'question': 'a', 'label': 1}]})
    with pytest.raises(InputError, match=r'aps/super_glue/boolq validation\[0\]: malformed item'):
        TASKS['boolq'].documents(hub)
    with pytest.raises(InputError, match=r'has no .*/super_glue/boolq \(train\)') as error:
        TASKS['boolq'].few_shot.load(hub)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('folder', 'message'),
    [('', "hf:// has no baber/piqa .validation.: Couldn't reach"), ('/none', 'no folder /none/baber/piqa')],
)
def test_no_hub_is_one_line(library, folder, message):
    with pytest.raises(InputError, match=message) as error:
        TASKS['piqa'].documents(f'hf://{folder}')
    assert '\n' not in str(error.value)


# Task: TFDS's name and configuration, the split, and a row of theirs from a document of ours.
TFDS = {
    'boolq': ('bool_q', '', 'validation', whole),
    'piqa': ('piqa', '', 'validation', whole),
    'winogrande': (
        'winogrande', '', 'validation',
        lambda d: {name: d[name] for name in ('sentence', 'option1', 'option2')} | {'label': d['answer']},
    ),
    'arc_easy': ('ai2_arc', 'ARC-Easy', 'test', whole),
    'arc_challenge': ('ai2_arc', 'ARC-Challenge', 'test', whole),
    'openbookqa': (
        'openbookqa', '', 'test',
        lambda d: {
            'question': {'stem': d['question_stem']}
            | {f'choice_{letter}': text for letter, text in zip('ABCD', d['choices']['text'], strict=True)},
            'answerKey': d['answerKey'],
        },
    ),
    'nq_open': ('natural_questions_open', '', 'validation', whole),
    'trivia_qa': ('trivia_qa', 'rc.nocontext', 'validation', whole),
    'gsm8k': ('gsm8k', '', 'test', whole),
    'real_toxicity_prompts': (
        'real_toxicity_prompts', '', 'train', lambda d: {'prompt': {'text': d['prompt']['text']}}
    ),
}  # fmt: skip


def tfds_features(name, config):
    """Those of TFDS's own builder and its version; where it needs TensorFlow to be made, what is read of it."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    try:
        builder = tfds.builder(f'{name}/{config}' if config else name)
        return builder.info.features, builder.version
    except tfds.core.registered.DatasetNotFoundError:
        features = {
            'winogrande': {
                'sentence': text, 'option1': text, 'option2': text, 'label': tfds.features.ClassLabel(names=['1', '2'])
            },
            'gsm8k': {'question': text, 'answer': text, 'annotation': text, 'short_answer': text},
        }  # fmt: skip
        return tfds.features.FeaturesDict(features[name]), tfds.core.Version('1.0.0')


def complete(feature, value):
    """An example with something in every field, as a builder has to give it."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Sequence):
        value = [] if value is None else value
        if isinstance(value, dict):  # a sequence of dictionaries may be given as a dictionary of sequences
            return {key: list(column) for key, column in value.items()}
        return [complete(feature.feature, item) for item in value]
    if isinstance(feature, tfds.features.FeaturesDict):
        return {key: complete(part, (value or {}).get(key)) for key, part in feature.items()}
    if value is None:
        return '' if isinstance(feature, tfds.features.Text) else 0
    return value


def write_tfds(root, name, config, split, rows):
    import tensorflow_datasets as tfds

    features, version = tfds_features(name, config)
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = version
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
            code_path = None  # TFDS would look beside this file for what describes the data set

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(complete(features, row) for row in rows)

        Builder.name = name
        Builder(data_dir=root, file_format='array_record').download_and_prepare()
    return f'tfds://{root}'


@pytest.mark.parametrize('name', TFDS)
def test_tfds_asks_what_the_files_ask(shared_data, tmp_path, name):
    dataset, config, split, to_row = TFDS[name]
    documents = TASKS[name].documents(str(shared_data / 'eval'))[:COUNT]
    found = TASKS[name].documents(write_tfds(tmp_path, dataset, config, split, map(to_row, documents)))
    assert len(found) == COUNT and json.loads(json.dumps(found)) == found
    assert asked(TASKS[name], found) == asked(TASKS[name], documents)


def test_race_of_tfds(tmp_path, monkeypatch):
    from tensorflow_datasets.core.features.feature import TensorInfo

    # To write lists of lists TFDS asks TensorFlow what a string is called; it reads them without.
    monkeypatch.setattr(TensorInfo, 'dtype', property(lambda info: info.np_dtype))
    article = {
        'article': 'Tom has a red kite.', 'questions': ['What has Tom?', 'Which colour?'], 'answers': ['A', 'B'],
        'options': [['A kite', 'A dog', 'A car', 'A hat'], ['blue', 'red', 'old', 'big']],
    }  # fmt: skip
    task = TASKS['race_high']
    documents = task.documents(write_tfds(tmp_path, 'race', 'high', 'test', [article]))
    assert [task.answer(document) for document in documents] == [(0,), (1,)]
    assert task.requests(documents[1])[1].continuation == ' red'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('piqa', 'piqa is not prepared in .*run tfds.builder'),
        ('siqa', 'siqa is not read from tfds://'),
        ('winogrande', 'TFDS has no winogrande .validation. in '),
    ],
)
def test_what_tfds_has_not_is_one_line(tmp_path, name, message):
    with pytest.raises(InputError, match=message) as error:
        TASKS[name].documents(f'tfds://{tmp_path}')
    assert '\n' not in str(error.value)
