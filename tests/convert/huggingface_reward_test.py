"""Reward models as transformers' LlamaForSequenceClassification, against transformers itself where it is installed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax import export, pretrained
from llama_jax.convert import huggingface
from llama_jax.errors import InputError
from llama_jax.models.reward import LlamaForRewardModel
from tests import toy
from tests.convert.in_memory import random_source

CONFIG = dataclasses.replace(toy.CONFIG, num_layers=2, scalar_head=True)
STOP = 2


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    made = epath.Path(tmp_path_factory.mktemp('reward'))
    huggingface.write(random_source(CONFIG), made, bos_id=1, eos_ids=[STOP])
    return made


def scores(folder, tokens) -> np.ndarray:
    config, params, _ = pretrained.load(folder)
    model = LlamaForRewardModel(config)
    return np.asarray(jax.jit(lambda p: model.apply({'params': p}, jnp.asarray(tokens)))(params))


def test_scores_are_transformers_whatever_side_is_padded(folder, tmp_path):
    torch = pytest.importorskip('torch', reason='needs torch: the extra `parity`')
    transformers = pytest.importorskip('transformers', reason='needs transformers: the extra `parity`')
    torch.set_num_threads(1)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_labels == 1 and model.config.pad_token_id not in (None, STOP)

    rng, lengths, width = np.random.default_rng(0), (5, 17, 24), 24
    rows = [[*rng.integers(3, 64, size=n - 1), STOP] for n in lengths]
    ours = scores(folder, np.array([row + [0] * (width - len(row)) for row in rows], np.int32))
    wanted = [ours[i, n - 1] for i, n in enumerate(lengths)]
    assert np.std(wanted) > 0.1  # so that the tolerance means something
    for left in (False, True):
        padding = [[model.config.pad_token_id] * (width - len(row)) for row in rows]
        ids = [p + row if left else row + p for p, row in zip(padding, rows, strict=True)]
        seen = [[0] * len(p) + [1] * len(row) for p, row in zip(padding, rows, strict=True)]
        mask = torch.tensor(seen if left else [row[::-1] for row in seen])
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor(ids), attention_mask=mask).logits[:, 0].numpy()
        # The same sums in another order: some roundings of fp32 (6e-8 each) of values of order 10.
        np.testing.assert_allclose(theirs, wanted, atol=1e-5, rtol=1e-5)

    model.save_pretrained(tmp_path / 'theirs')
    again = pretrained.load(tmp_path / 'theirs')[1]
    jax.tree.map(np.testing.assert_array_equal, again, pretrained.load(folder)[1])


def test_it_goes_through_our_own_format_bit_for_bit(folder, tmp_path):
    source = huggingface.open_source(folder)
    export.save(tmp_path / 'ours', source, None, to='orbax')
    written = pretrained.open(tmp_path / 'ours')
    assert written.config == CONFIG
    export.verify(written.source, source)
    export.save(tmp_path / 'again', written.source, None, to='huggingface')
    assert (tmp_path / 'again/model.safetensors').read_bytes() == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('to', ['meta', 'gguf'])
def test_formats_without_a_place_for_the_score_are_refused(folder, to, tmp_path):
    with pytest.raises(InputError, match=f'is a reward model, and {to} has no place for its score'):
        export.save(tmp_path / 'out', huggingface.open_source(folder), None, to=to)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        ({'id2label': {'0': 'bad', '1': 'good'}}, 'num_labels is 2: a classifier'),
        ({'id2label': None}, 'num_labels is 2: a classifier'),  # transformers' default
        ({'hidden_size': 64}, 'score.weight has shape|has shape'),
    ],
)
def test_a_classifier_is_no_reward_model(folder, labels, message, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(values | labels))
    with pytest.raises(InputError, match=message):
        huggingface.open_source(epath.Path(tmp_path))
