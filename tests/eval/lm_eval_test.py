"""Our model under lm-evaluation-harness gives the numbers of the harness's own model of transformers."""

import json
import math
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from llama_jax.errors import InputError
from llama_jax.eval.harness import evaluate, prepare
from llama_jax.eval.lm_eval import language_model
from llama_jax.eval.lm_eval_requests import completion
from llama_jax.eval.task import Continuation
from llama_jax.eval.tasks import find_task
from tests.command_line import REPOSITORY

pytest.importorskip('lm_eval')
pytestmark = pytest.mark.slow

LIMIT = 25


def choice_task(name, text, choices, target, **more):
    return {
        'task': name,
        'output_type': 'multiple_choice',
        'doc_to_text': text,
        'doc_to_choice': choices,
        'doc_to_target': target,
        'metric_list': [{'metric': metric} for metric in ('acc', 'acc_norm')],
    } | more


def other_task(name, kind, metric, **more):
    return {'task': name, 'output_type': kind, 'metric_list': [{'metric': metric}]} | more


# The harness's own definitions of these tasks, on local files.
TASKS = {
    'hellaswag': choice_task('hellaswag', '{{ctx}}', '{{endings}}', '{{label}}'),
    'piqa': choice_task(
        'piqa', 'Question: {{goal}}\nAnswer:', '{{[sol1, sol2]}}', '{{label}}', num_fewshot=1,
        fewshot_split='validation',
    ),
    'story': other_task(
        'story', 'generate_until', 'exact_match', doc_to_text='{{ctx}}', doc_to_target='{{endings[0]}}',
        generation_kwargs={'until': ['.', '\n'], 'max_gen_toks': 24},
    ),
    'rolling': other_task(
        'rolling', 'loglikelihood_rolling', 'word_perplexity', doc_to_text='', doc_to_target='{{ctx}} {{endings[0]}}'
    ),
}  # fmt: skip
FILES = {'piqa': 'piqa/validation.jsonl'}


@pytest.fixture(scope='module')
def tasks(shared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tasks')
    found = []
    for name, task in TASKS.items():
        source = shared_data / 'eval' / FILES.get(name, 'hellaswag/validation.jsonl')
        lines = source.read_text().splitlines()[: LIMIT if name != 'story' else 6]
        file = folder / f'{name}.jsonl'
        file.write_text('\n'.join(lines))
        files = {'data_files': {'validation': str(file)}}
        found.append(
            {'dataset_path': 'json', 'dataset_kwargs': files, 'validation_split': 'validation'} | task
        )
    return found


class Request:
    """What the harness hands over."""

    def __init__(self, *args):
        self.args = args


def run(model, tasks, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of datasets and of transformers
        return lm_eval.simple_evaluate(
            model, tasks=[dict(task) for task in tasks], task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0, **options,
        )  # fmt: skip


@pytest.fixture(scope='module', autouse=True)
def offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        patch.setenv('HF_DATASETS_CACHE', str(tmp_path_factory.mktemp('datasets')))
        yield


@pytest.fixture(scope='module')
def ours(engine, tasks):
    return run(language_model(engine), tasks)


@pytest.fixture(scope='module')
def huggingface(huggingface_folder):
    """The harness's own model of transformers."""
    torch = pytest.importorskip('torch')
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        models = pytest.importorskip('lm_eval.models.huggingface', exc_type=ImportError)
        model = models.HFLM(pretrained=str(huggingface_folder), device='cpu', batch_size=16, dtype='float32')
    torch.set_num_threads(1)  # several cost more than they give for so small a model
    yield model
    torch.set_num_threads(threads)


def test_the_numbers_are_those_of_the_harness_with_transformers(ours, tasks, huggingface):
    check_equal(ours, run(huggingface, tasks))


def check_equal(ours, theirs):
    for name in ours['results']:
        found = {key: value for key, value in ours['results'][name].items() if ',' in key}
        wanted = {key: theirs['results'][name][key] for key in found}
        if name == 'rolling':
            # A perplexity is as exact as its sums, in fp32.
            assert found['word_perplexity,none'] == pytest.approx(wanted['word_perplexity,none'], rel=1e-5)
        else:
            assert found == wanted
        for our, their in zip(ours['samples'][name], theirs['samples'][name], strict=True):
            assert our['doc_id'] == their['doc_id']
            for mine, other in zip(our['filtered_resps'], their['filtered_resps'], strict=True):
                if isinstance(mine, tuple | list):
                    # fp32 sums of some 100 terms in another order.
                    assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
                elif isinstance(mine, float):
                    assert mine == pytest.approx(other, rel=1e-5)
                else:
                    assert mine == other


@pytest.mark.parametrize('name', ['hellaswag', 'piqa'])
def test_the_numbers_are_those_of_our_own_harness(ours, engine, shared_data, name):
    prepared = prepare(
        find_task(name), str(shared_data / 'eval'), limit=LIMIT, num_fewshot=TASKS[name].get('num_fewshot')
    )
    found = evaluate(prepared, engine, progress=False)
    if name == 'hellaswag':  # of piqa the examples are drawn from another pool
        for metric in ('acc', 'acc_norm'):
            assert found[metric] == ours['results'][name][f'{metric},none']
    assert found['n'] == LIMIT


def test_chat_templates_are_applied(engine, tasks):
    model = language_model(
        engine, "{% for m in messages %}{{ bos_token + m['content'] + eos_token }}{% endfor %}"
    )
    found = run(model, [TASKS['hellaswag'] | tasks[0]], apply_chat_template=True, limit=2)
    prompt = found['samples']['hellaswag'][0]['arguments'][0][0]
    assert prompt.startswith('<s>') and prompt.endswith('</s>')


def test_rendering_a_conversation_changes_no_answer(engine):
    model = language_model(engine)
    requests = [Request('Once </s> upon', ' a time'), Request('Once upon', ' a time')]
    before = model.loglikelihood(requests)
    alone = dict(engine.answer([Continuation('Once upon', ' a time')]))
    model.apply_chat_template([{'role': 'user', 'content': 'hi'}])
    assert model.loglikelihood(requests) == before
    assert before[1][0] == alone[Continuation('Once upon', ' a time')].log_probability
    # As transformers' tokenizers read it.
    assert model._engine.tokenizer.encode('<s>Once</s>', bos=True) == [1, *engine.tokenizer.encode('Once'), 2]
    texts = ['Once upon', 'Once</s>', 'a time']
    found = model._engine.tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in found] == [model._engine.tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize(
    'pieces',
    ['hi there', [{'type': 'text', 'text': 'hi '}, {'type': 'text', 'text': 'there'}], ['hi ', 'there']],
)
def test_a_message_may_come_in_pieces(engine, pieces):
    model = language_model(
        engine, "{% for m in messages %}[{{ m['role'] }}: {{ m['content'] | trim }}]{% endfor %}"
    )
    messages = [{'role': 'user', 'content': pieces}]
    assert model.apply_chat_template(messages) == '[user: hi there]'
    assert model.apply_chat_template(messages, add_generation_prompt=False) == '[user: hi there'
    with pytest.raises(InputError, match='reads text only'):
        model.apply_chat_template([{'role': 'user', 'content': [{'type': 'image', 'image': 'x.png'}]}])


def test_a_template_that_takes_no_system_message_is_given_none(engine, caplog):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    messages = [{'role': 'system', 'content': 'be good'}, {'role': 'user', 'content': 'hi'}]
    assert language_model(engine, template).apply_chat_template(messages) == 'hi'
    assert 'rendered without the system message' in caplog.text


def test_the_numbers_are_equal_behind_a_chat_template_too(engine, tasks, huggingface, monkeypatch):
    template = (
        "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        '{% if add_generation_prompt %}{{ bos_token }}assistant:{% endif %}'
    )
    monkeypatch.setattr(huggingface.tokenizer, 'chat_template', template)
    chosen, options = tasks[:3], {'apply_chat_template': True, 'fewshot_as_multiturn': True, 'limit': 6}
    ours = run(language_model(engine, template), chosen, **options)
    check_equal(ours, run(huggingface, chosen, **options))
    prompt = ours['samples']['piqa'][0]['arguments'][0][0]
    assert prompt.count('user: ') == 2 and prompt.endswith('assistant:')


def test_it_needs_no_torch(engine, tasks, stories, tmp_path):
    """In an interpreter that finds every package but those."""
    packages = tmp_path / 'packages'
    packages.mkdir()
    for folder in map(Path, filter(None, sys.path)):
        if folder.name == 'site-packages':
            for package in folder.iterdir():
                if not package.name.startswith(('torch', 'functorch', 'accelerate')):
                    (packages / package.name).symlink_to(package)
    value = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']['entry-points'][
        'lm_eval.models'
    ]
    program = f"""
import importlib.metadata, json, sys, lm_eval, lm_eval.models
from lm_eval.api.registry import model_registry
from lm_eval.tasks import TaskManager
entry = importlib.metadata.EntryPoint('llama_jax', {value['llama_jax']!r}, 'lm_eval.models')
model_registry.register(entry.name, target=entry)
model = 'llama_jax'
found = lm_eval.simple_evaluate(
    model, model_args={{'pretrained': {str(stories)!r}, 'dtype': 'float32'}}, tasks={tasks!r},
    task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, limit=2,
)
print(json.dumps(['torch' in sys.modules, {{name: found['results'][name] for name in found['results']}}]))
"""
    environment = os.environ | {'PYTHONPATH': f'{REPOSITORY}{os.pathsep}{packages}'}
    finished = subprocess.run(
        [sys.executable, '-S', '-c', program], env=environment, capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    has_torch, found = json.loads(finished.stdout.splitlines()[-1])
    assert not has_torch
    wanted = run(language_model(engine), tasks, limit=2)['results']
    for name, metrics in wanted.items():
        for key, value in metrics.items():
            assert found[name][key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6))


ODD = {  # arguments of a generation, and what is said of them where they cannot be followed
    'num_beams': ({'num_beams': 4}, 'num_beams=4 are not supported'),
    'several': (
        {'typical_p': 0.5, 'temperature': 1.0, 'penalty_alpha': 2},
        'penalty_alpha=2, typical_p=0.5 are not supported',
    ),
    'negative length': ({'max_gen_toks': -1}, 'max_gen_toks is -1'),
    'length': ({'max_gen_toks': 'many'}, "invalid literal for int() with base 10: 'many'"),
    'temperature': ({'temperature': -1.0}, 'temperature is -1.0'),
    'top_p': ({'temperature': 1.0, 'top_p': 0}, 'top_p is 0'),
    'penalty': ({'repetition_penalty': 0}, 'repetition_penalty is 0'),
    'least length': ({'min_new_tokens': 9, 'max_gen_toks': 8}, 'min_new_tokens is 9; it must be at most'),
    'surrogate': (None, 'surrogates not allowed'),
}


def test_an_odd_generation_is_said_and_ends_no_run(engine, caplog):
    plain = {'until': '.', 'max_gen_toks': 8, 'do_sample': False}
    requests = [Request('Once upon a time', plain)]
    requests += [
        Request('Once', arguments) if arguments else Request('\ud800', plain) for arguments, _ in ODD.values()
    ]
    same = {  # nothing in these changes a greedy text
        'num_beams': 1, 'temperature': 1.0, 'top_k': 50, 'top_p': 0.1, 'repetition_penalty': 1.0, 'until': ['.', None],
        'length_penalty': 1.0, 'early_stopping': False, 'max_new_tokens': 8.0, 'max_gen_toks': None,
    }  # fmt: skip
    requests += [Request('Once upon a time', plain | same), Request('Once', plain | {'max_gen_toks': 0})]
    requests += [Request('Once upon a time', {'until': None, 'max_gen_toks': 8}), Request('Lily', None)]
    texts = language_model(engine).generate_until(requests)
    first, *odd, again, nothing, endless, long = texts
    assert first and '.' not in first and odd == [''] * len(ODD) and nothing == ''
    assert again == first and endless.startswith(first) and len(long) > len(first)
    assert not [said for _, said in ODD.values() if said not in caplog.text]
    assert caplog.text.count('1 of 14 requests cannot be answered') == len(ODD)


def test_settings_of_drawing_are_asked_for_where_they_matter():
    plain = {'until': '.', 'max_gen_toks': 12}
    neutral = {'top_k': -1, 'repetition_penalty': 1.0, 'presence_penalty': 0, 'min_new_tokens': 0}
    assert completion('a', plain | {'temperature': 1.0} | neutral) == completion(
        'a', plain | {'temperature': 1.0}
    )
    asked = completion('a', plain | {'top_k': 5.0, 'min_p': 0.1, 'frequency_penalty': 1, 'temperature': 1.0})
    assert asked.further == (('frequency_penalty', 1.0), ('min_p', 0.1), ('top_k', 5))
    greedy = completion('a', plain | {'top_k': 5, 'min_p': 0.1, 'frequency_penalty': 1})
    assert greedy.further == (('frequency_penalty', 1.0),)


def test_settings_of_drawing_reach_the_sampler(engine):
    """One token alone is kept by a top-k of 1, or a min-p of 1: what is drawn is then the most likely text."""
    plain = {'until': None, 'max_gen_toks': 12}
    drawn = plain | {'do_sample': True, 'temperature': 1.5}
    one_kept = [drawn | {'top_k': 1}, drawn | {'min_p': 1.0}, plain | {'min_p': 0.5, 'presence_penalty': 0}]
    penalised = [plain | {'repetition_penalty': 5.0}]
    requests = [Request('Once upon a time', arguments) for arguments in (plain, drawn, *one_kept, *penalised)]
    likely, free, *texts = language_model(engine).generate_until(requests)
    assert texts[:3] == [likely] * 3 and free != likely
    assert likely != texts[3]


def test_an_odd_likelihood_is_said_and_ends_no_run(engine, caplog):
    model = language_model(engine)
    requests = [Request('Hello', ' there'), Request('the', 're'), Request('Hello', ''), Request('', 'Once')]
    odd = [Request('Hello', '\ud800'), Request('Hello', 7), Request('Hello', ' there', {'visual': []})]
    found = model.loglikelihood([*requests, *odd])
    assert all(math.isfinite(value) for value, _ in found[:4]) and found[2] == (0.0, True)
    assert found[4:] == [(-math.inf, False)] * 3
    assert found[:2] == model.loglikelihood(requests[:2])  # whatever is beside them
    rolling = model.loglikelihood_rolling([Request('Once upon'), Request(''), Request('\ud800')])
    assert all(map(math.isfinite, rolling[:2])) and rolling[2] == -math.inf
    for said in ('surrogates not allowed', "'7' is no text but int", 'positional arguments'):
        assert said in caplog.text
