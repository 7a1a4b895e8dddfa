"""`benchmark --suite=finetune` on shapes so small that a part is a second: its contenders do the same work."""

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.benchmark import finetune, finetune_peers
from experiments.benchmark import finetune_steps as steps
from llama_jax.errors import InputError
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
    ours = finetune.Contender(lambda: lambda: calls.append(sum(range(10_000))), 4.0)
    rates = finetune.compare(
        'part', 'x/s', {'ours': ours, 'b': ours, 'peer': finetune.Contender(broken, 1.0, True)}, 3
    )
    assert {name: len(found) for name, found in rates.items()} == {'ours': 3, 'b': 3} and len(calls) == 8
    found = finetune.ratio('r', {'a': [finetune.Rate(4, 8)] * 3, 'b': [finetune.Rate(2, 2)] * 3}, 'a', 'b')
    assert found == {'r': 2, 'r_min': 2, 'r_max': 2, 'r_of_cpu': 4}
    assert 'peer: left out, RuntimeError: not here' in capsys.readouterr().out
    with pytest.raises(RuntimeError, match='not here'):
        finetune.compare('part', 'x/s', {'ours': finetune.Contender(broken, 1.0)}, 1)


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
