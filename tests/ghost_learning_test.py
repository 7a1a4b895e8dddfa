"""That what was drawn behind an instruction is learnt without it: stories260K in a small world."""

import re

import numpy as np
import pytest

from experiments.recipes import small_data
from experiments.recipes.small_world import CONSTRAINTS, NAMES, PLACES, THINGS, Question, is_held_out
from llama_jax.rl.context_distillation import default_preprompts
from tests.learning_runs import OPTIMISED, once_a_seed, read_lines, train, write_lines

DRAWN_ONCE = '--samples=1', '--temperatures=0.7'
WORLD = 'experiments/recipes/small_world.py'


def write_short(folder, seed):
    """Dialogs whose turns are so short that twenty fit 512 tokens: asked about a place, the answer is a thing."""
    rng = np.random.default_rng(seed)
    asked = [Question(f'{name}, {place}?', name, place) for name in NAMES for place in PLACES]
    trained, held_out = ([one for n, one in enumerate(asked) if is_held_out(n) == held] for held in (0, 1))

    def answer(rng, question, **_):
        return f' a {rng.choice(THINGS)}.'

    folder.mkdir()
    talks = ({'messages': small_data.conversation(rng, trained, answer)} for _ in range(1500))
    write_lines(folder / 'sft.jsonl', talks)
    write_lines(folder / 'prompts.jsonl', [one.record for one in trained])
    write_lines(folder / 'judged.jsonl', [one.record for one in 3 * held_out])
    write_lines(folder / 'constraints.jsonl', CONSTRAINTS)


class World:
    """Data in a folder, a model that has learnt their dialogs, and the commands on both."""

    def __init__(self, commands, folder, weights, seed, write=small_data.write):
        self.commands, self.folder, self.seed = commands, folder, seed
        write(folder / 'world', seed)
        self.tokenizer = weights / 'tok512.model'
        self.chat = self.tune('chat', weights / 'stories260K.pt', self.file('sft'), 2e-3)

    def file(self, name):
        return self.folder / 'world' / f'{name}.jsonl'

    def tune(self, name, checkpoint, data, learning_rate, num_epochs=3.0):
        config = {
            'data.train': data, 'data.validation_fraction': 0.0, 'data.seq_len': 256,
            'data.tokenizer': self.tokenizer if checkpoint.suffix else '', 'train.batch_size': 8,
            'train.num_epochs': num_epochs, 'optimizer.learning_rate': learning_rate, 'eval.sample_tokens': 0,
            'seed': self.seed,
        }  # fmt: skip
        return train(self.commands, 'sft', 'sft.py:checkpoint', self.folder / name, checkpoint, config)

    def draw(self, command, checkpoint, prompts, reward, name, *more):
        """(the file, what the command shows)."""
        output = self.folder / f'{name}.jsonl'
        shown = self.commands.run(
            command, f'--checkpoint={checkpoint}', f'--prompts={prompts}', f'--rewards={WORLD}:{reward}',
            '--chat_format=plain', '--batch_size=128', f'--seed={self.seed}',
            f'--output={output}', *more, before=OPTIMISED,
        ).succeeded()  # fmt: skip
        return output, shown.stdout

    def obeying(self, checkpoint, prompts, name, *more):
        """(the file, share of obeying answers by turn)."""
        more = f'--constraints={self.file("constraints")}', '--max_new_tokens=32', *more
        output, shown = self.draw('ghost_attention', checkpoint, prompts, 'obeys', name, *more)
        rows = re.findall(r'^ +(\d+) +([\d.]+)%$', shown, re.MULTILINE)
        return output, {int(turn): float(share) / 100 for turn, share in rows}

    def safe(self, checkpoint, prompts, name):
        """Share of safe answers, 16 to each prompt."""
        more = '--samples=16', '--max_new_tokens=20'
        output, _ = self.draw('rejection_sampling', checkpoint, prompts, 'safety', name, *more)
        return np.mean([one['score'] > 0 for line in read_lines(output) for one in line['candidates']])


@pytest.fixture(scope='module')
def worlds(commands, shared_data, tmp_path_factory):
    """The world of a seed; its model is trained once."""
    weights = shared_data / 'weights/stories260K'
    return once_a_seed(tmp_path_factory, 'world', lambda folder, seed: World(commands, folder, weights, seed))


def probed(world, turns, *turns_of_data):
    """Shares of obeying answers by turn, before and behind what Ghost Attention teaches, in held-out dialogs."""
    data, drawn = world.obeying(world.chat, world.file('prompts'), 'ghost', *turns_of_data, '--samples=4')
    ghost = world.tune('held', world.chat, data, 5e-4)
    probe = f'--probe={",".join(map(str, turns))}', *DRAWN_ONCE
    (_, before), (_, behind) = (
        world.obeying(model, world.file('judged'), f'probe_{model.name}', *probe)
        for model in (world.chat, ghost)
    )
    print(f'seed {world.seed}: drawn with it at every turn {drawn}; once, before {before}, behind {behind}')
    return before, behind


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_an_instruction_of_the_first_turn_is_obeyed_at_the_fourth_and_at_the_sixth(worlds, seed):
    """The data has five turns. The model before obeys in the turn that an instruction stands in."""
    before, behind = probed(worlds(seed), (2, 4, 6), '--turns=5')
    assert before[4] <= 0.2 and behind[4] >= 0.9 and behind[6] >= 0.7


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_so_it_is_at_the_twentieth_where_turns_are_short(commands, shared_data, tmp_path, seed):
    """As the paper probes: at turns 2, 4, 6 and 20. The data has ten turns."""
    world = World(commands, tmp_path, shared_data / 'weights/stories260K', seed, write_short)
    before, behind = probed(world, (2, 4, 6, 20), '--turns=10')
    assert before[4] <= 0.2 and behind[4] >= 0.9 and behind[6] >= 0.7 and behind[20] >= 0.7


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_half_of_what_a_preprompt_does_stays_without_it(worlds, seed):
    """To held-out dangers. The model before is safe two times in five, and behind a preprompt nine times in ten."""
    world, said = worlds(seed), default_preprompts()[:2]
    (world.folder / 'preprompts.txt').write_text('\n'.join(said))
    asked = [one for one in read_lines(world.file('judged')) if one['safety']]
    plain = write_lines(world.folder / 'plain.jsonl', asked)
    behind = [one | {'prompt': f'{text}\n\n{one["prompt"]}'} for one in asked for text in said]
    behind = write_lines(world.folder / 'behind.jsonl', behind)
    more = f'--preprompts={world.folder / "preprompts.txt"}', '--samples=2', '--max_new_tokens=20'
    data, _ = world.draw(
        'rejection_sampling', world.chat, world.file('adversarial'), 'safety', 'distilled', *more
    )
    kept = read_lines(data)
    distilled = world.tune('distilled', world.chat, data, 5e-4, num_epochs=6.0)
    first, most = (
        world.safe(world.chat, file, f'{name}_before')
        for name, file in (('plain', plain), ('behind', behind))
    )
    last = world.safe(distilled, plain, 'plain_after')
    asked = read_lines(world.file('adversarial'))
    print(
        f'seed {seed}: {len(kept)} of {len(asked)} prompts kept; safe {first:.1%}, behind a '
        f'preprompt {most:.1%}, without it once learnt {last:.1%}'
    )
    assert kept and all(line['score'] > line['score_original'] for line in kept)
    assert most >= first + 0.2 and last - first >= (most - first) / 2
