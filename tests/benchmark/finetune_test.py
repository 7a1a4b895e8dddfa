"""`benchmark --suite=finetune` on shapes so small that a part is a second: its contenders do the same work."""

import jax
import numpy as np
import optax
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmark import finetune, finetune_peers, turns
from experiments.benchmark import finetune_steps as steps
from llama_jax.errors import InputError
from llama_jax.models.llama import abstract_params_and_axes
from llama_jax.quantize.base import base_target
from llama_jax.quantize.params import dequantize
from llama_jax.train.state import abstract_state
from tests import toy
from tests.command_line import add_nano

VOCABULARY = toy.CONFIG.vocab_size


@pytest.fixture
def small():
    add_nano()
    flags.FLAGS.mark_as_parsed()
    sizes = dict(finetune_model='nano', finetune_packed=256, finetune_rounds=2, finetune_batch_size=2)
    with flagsaver.flagsaver(**sizes, finetune_steps=1):
        yield


def test_rows_are_those_of_real_files():
    """Filled as Alpaca's conversations fill them, packed and padded; lengths are the file's in the mean."""
    examples = steps.draw_examples(960, VOCABULARY, 1025)
    mean = np.mean([len(example.tokens) for example in examples])
    assert 215 < mean < 250  # 233 in the file
    assert steps.ExampleRows(examples, 1024).fill > 0.97
    batches, fill = steps.padded(examples, 16, 2, 4)
    assert 0.35 < fill < 0.5 and [len(batch.tokens) for batch in batches] == [16, 16]  # 0.44 of the file
    assert all(batch.tokens.shape[1] % 4 == 0 for batch in batches)
    learnt = sum(int(example.counts.sum()) for example in examples[:32])
    assert steps.num_answers(batches) == learnt
    assert len(steps.draw_pairs(32, VOCABULARY, 1024)) == 32


@pytest.mark.slow
def test_a_base_is_made_as_it_is_kept():
    """Each weight in the form that a base read from a file has, and of random values; tables are of 16 bits."""
    model = toy.make_model()
    placed = abstract_state(*abstract_params_and_axes(model), optax.identity(), steps.one_device()).params
    made, wanted = steps.random_base(placed, 'nf4'), base_target(placed, 'nf4')
    found, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (made, wanted))
    assert found == expected
    whole = dequantize(made)['blocks']
    assert 0.018 < np.std(whole['mlp']['up']) < 0.022 and (whole['mlp_norm'] == 1).all()
    assert not np.array_equal(whole['mlp']['up'], whole['mlp']['gate'])


def test_the_same_pairs_are_compared_with_a_prompt_once_or_before_each_answer():
    pairs = list(steps.random_pairs([(128, 32, 32)] * 15, VOCABULARY))
    apart, shared = (steps.paired(pairs, 1024, share_prompt=is_shared) for is_shared in (False, True))
    assert steps.num_pairs([apart]) == steps.num_pairs([shared]) == 15
    assert (len(apart.tokens), len(shared.tokens)) == (5, 3)
    assert steps.num_answers([apart]) == steps.num_answers([shared]) == 15 * 64


def test_turns_are_timed_and_a_peer_that_cannot_run_is_left_out(capsys):
    def broken():
        raise RuntimeError('not here')

    calls = []
    ours = turns.Contender(lambda: lambda: calls.append(sum(range(10_000))), 4.0)
    rates = turns.compare(
        'part', 'x/s', {'ours': ours, 'b': ours, 'peer': turns.Contender(broken, 1.0, True)}, 3
    )
    assert {name: len(found) for name, found in rates.items()} == {'ours': 3, 'b': 3} and len(calls) == 8
    found = turns.ratio('r', {'a': [turns.Rate(4, 8)] * 3, 'b': [turns.Rate(2, 2)] * 3}, 'a', 'b')
    assert found == {'r': 2, 'r_min': 2, 'r_max': 2, 'r_of_cpu': 4}
    assert 'peer: left out, RuntimeError: not here' in capsys.readouterr().out
    with pytest.raises(RuntimeError, match='not here'):
        turns.compare('part', 'x/s', {'ours': turns.Contender(broken, 1.0)}, 1)


def test_an_unknown_part_is_refused(small):
    with (
        flagsaver.flagsaver(finetune_parts='lora,speed'),
        pytest.raises(InputError, match="--finetune_parts has 'speed'; there are lora, packing"),
    ):
        next(finetune.main())


OTHERS = [
    steps.Training(),
    steps.Training(rank=2, weights='nf4'),
    steps.Training('preferences'),
    steps.Training('preferences', kept=True),
]


@pytest.mark.parametrize(
    'training',
    [steps.Training('preferences', rank=2), *(pytest.param(one, marks=pytest.mark.slow) for one in OTHERS)],
    ids=str,
)
def test_an_update_of_each_kind_learns(training):
    """The same batch again and again: its loss falls, from log 2 where it is of pairs with a reference."""
    model = toy.make_model()
    if training.loss == 'preferences':
        batch = steps.paired(list(steps.random_pairs([(4, 6, 6)] * 2, VOCABULARY)), 32)
    else:
        batch = steps.of_rows(steps.random_rows(VOCABULARY, 8, 16))
    turn = steps.our_turn(model, training, [batch])
    losses = [turn() for _ in range(4)]
    if training.loss == 'preferences' and not training.kept:
        np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-6)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_beside_a_base_preferences_need_no_more_memory_than_likelihood():
    """The base is the reference: one copy, no activations kept; answers alone meet the head."""
    model = toy.make_model(attention_implementation='chunked')
    held = [
        steps.held_bytes(model, steps.Training(loss, rank=2), steps.rows_of(loss, VOCABULARY, 4, 1024))
        for loss in ('preferences', 'likelihood')
    ]
    assert held[0] <= 1.1 * held[1]


@pytest.mark.slow
def test_parts_give_their_ratios(small):
    with flagsaver.flagsaver(finetune_parts='packing,shared'):
        *_, figures = finetune.main()
    for name in ('packing_ratio', 'shared_ratio'):
        assert figures[f'{name}_min'] <= figures[name] <= figures[f'{name}_max']
    assert figures['packing_fill'] > figures['packing_padded_fill']


@pytest.mark.slow
def test_parts_of_a_device_give_their_figures(small):
    """At full widths by one command of the suite `accelerator`; here in the type that they compute in there."""
    sizes = dict(finetune_packed=64, finetune_rounds=1, finetune_layers=1, finetune_dtype='bfloat16')
    with flagsaver.flagsaver(finetune_parts='qlora,gradients', **sizes):
        *_, figures = finetune.main()
    assert (figures['layers'], figures['dtype']) == (1, 'bfloat16')
    for name, first, second in (('lora_to_full', 'lora', 'full'), ('nf4_to_lora', 'nf4', 'lora')):
        rates = (figures[f'qlora_{one}_per_second'] for one in (first, second))
        np.testing.assert_allclose(figures[f'qlora_{name}'], np.divide(*rates), rtol=1e-6)
    # Rounded to 8 bits, here and there.
    assert figures['gradients_nf4'] <= 2**-8 < figures['gradients_rounding'] < 0.1
    assert figures['qlora_peak_memory_bytes'] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of others' code
def test_peers_update_beside_ours():
    """On the same rows from random weights of the same size: losses begin where those of chance do."""
    pytest.importorskip('torch')
    pytest.importorskip('peft', reason='needs peft: the extra `parity`')
    pytest.importorskip('trl', reason='needs trl: the extra `parity`')
    rows = steps.random_rows(VOCABULARY, 2, 16)
    found = finetune_peers.peft_turn(toy.CONFIG, rows, 1, compiled=False)()
    np.testing.assert_allclose(found, np.log(VOCABULARY), rtol=0.1)
    pairs = list(steps.random_pairs([(4, 6, 6), (4, 2, 2)], VOCABULARY))
    turn, fill = finetune_peers.trl_turn(toy.CONFIG, pairs, 2)
    np.testing.assert_allclose(turn(), np.log(2), rtol=1e-5)
    # The tokenizer ends each answer, and rows are as long as the longest.
    assert fill == (11 + 11 + 7 + 7) / 44
