"""That a policy learns from its answers: stories260K, a model of simple stories, rewarded for a word that few hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.models.llama import LlamaForCausalLM
from tests.frontier_plot import least_divergence, plot_ways
from tests.learning_runs import draw, train, write_lines
from tests.policy_runs import logged

WORD = 'happy'
WHO = ('girl named Lily', 'boy named Tim', 'dog named Max', 'cat named Tom', 'bird', 'bear', 'girl named Mia',
       'boy named Ben')  # fmt: skip
WAYS = {
    'grpo': ('grpo.py', {'optimizer.learning_rate': 2e-4, 'train.num_steps': 12, 'algorithm.beta': 0.1}),
    # Its reward comes at the end alone, and all of it counts at every token.
    'ppo': ('ppo.py', {
        'optimizer.learning_rate': 3e-4, 'train.num_steps': 14, 'algorithm.beta': 0.05,
        'algorithm.constants': 'trace=1',
    }),
}  # fmt: skip
NUM_TOKENS = 48
# Of rejection sampling: answers to a prompt that each round draws, and how all that hold the word are learnt. The
# first draws most, since few of the base's stories have it; many stories to an update move the policy least for them.
ROUNDS = (1024, 128, 128)
BEST = {
    'data.too_long': 'cut', 'train.batch_size': 64, 'train.num_epochs': 2.0, 'optimizer.learning_rate': 5e-4,
    'optimizer.warmup_steps': 2, 'optimizer.eps': 1e-8, 'eval.sample_tokens': 0,
}  # fmt: skip
# Of preferences: answers to a prompt, stories without the word that each with it is preferred to, how that is learnt.
NUM_COMPARED, NUM_OTHERS = 64, 4
PREFERRED = {
    'data.seq_len': 256, 'train.batch_size': 4, 'train.num_epochs': 1.0, 'optimizer.learning_rate': 3e-4,
    'optimizer.warmup_steps': 5, 'loss.nll': 0.0, 'log.every': 1,
}  # fmt: skip


class Stories:
    """Prompts and the reward in a folder, and the commands on them."""

    def __init__(self, commands, folder, weights, seed):
        self.commands, self.folder, self.seed = commands, folder, seed
        self.base, self.tokenizer = weights / 'stories260K.pt', weights / 'tok512.model'
        (folder / 'reward.py').write_text(
            f'def score(prompt, answer, record):\n    return float({WORD!r} in answer)\n'
        )
        self.prompts = write_lines(
            folder / 'prompts.jsonl',
            ({'prompt': f'Once upon a time, there was a little {who}.'} for who in WHO),
        )
        self.reward = f'{folder / "reward.py"}:score'

    def train(self, command, recipe, name, checkpoint, data, config):
        config = {
            'data.train': data, 'data.validation_fraction': 0.0, 'data.tokenizer': self.tokenizer,
            'train.loss_chunks': 1, 'optimizer.weight_decay': 0.0, 'seed': self.seed,
        } | config  # fmt: skip
        return train(self.commands, command, f'{recipe}:checkpoint', self.folder / name, checkpoint, config)

    def by_policy_gradients(self, way):
        recipe, own = WAYS[way]
        config = {
            'data.seq_len': 256, 'rollout.batch_size': 128, 'rollout.samples': 16, 'rollout.slots': 128,
            'rollout.max_new_tokens': NUM_TOKENS, 'train.batch_size': 128,
            'checkpoint.every': own['train.num_steps'], 'eval.every': 0, 'log.every': 1,
            'algorithm.rewards': self.reward,
        } | own  # fmt: skip
        run = self.train('ppo', recipe, way, self.base, self.prompts, config)
        return [(line['kl'], line['reward']) for line in logged(run)]

    def by_rejection_sampling(self):
        """The best answers are learnt, where they end for want of room without the end: each is cut a token before."""
        checkpoint, points = self.base, []
        for number, samples in enumerate(ROUNDS):
            kept = self.draw(checkpoint, f'kept{number}', samples)
            points.append(self.told(checkpoint, kept))
            shortest = min(len(self.tokens(line['prompt'])) for line in kept)
            config = BEST | {'data.seq_len': shortest + NUM_TOKENS - 2}
            data = self.folder / f'kept{number}.jsonl'
            checkpoint = self.train('sft', 'sft.py', f'sft{number}', checkpoint, data, config)
        return [*points, self.told(checkpoint, self.draw(checkpoint, 'last', 64))]

    def by_preferences(self):
        """Each story with the word is preferred to some without it, of the same prompt."""
        drawn, rng, pairs = self.draw(self.base, 'kept0', NUM_COMPARED), np.random.default_rng(self.seed), []
        for line in drawn:
            if 'candidates' in line:
                others = [one['completion'] for one in line['candidates'] if not one['score']]
            pairs += [
                {'prompt': line['prompt'], 'chosen': line['completion'], 'chosen_stopped': line['stopped'],
                 'rejected': other, 'rejected_stopped': False}
                for other in rng.choice(others, NUM_OTHERS, replace=False)
            ]  # fmt: skip
        file = write_lines(self.folder / 'pairs.jsonl', pairs)
        run = self.train('dpo', 'dpo.py', 'dpo', self.base, file, PREFERRED)
        return [self.told(self.base, drawn), self.told(run, self.draw(run, 'last', 32))]

    def draw(self, checkpoint, name, samples):
        """The lines of the file of all stories with the word; a prompt's first has all that were drawn."""
        return draw(
            self.commands, checkpoint, self.prompts, self.reward, self.folder / f'{name}.jsonl',
            f'--samples={samples}', f'--max_new_tokens={NUM_TOKENS}', '--keep=threshold', '--threshold=0.5',
            f'--tokenizer={self.tokenizer}',
            f'--seed={len(ROUNDS) * self.seed + int(name[-1]) if name[-1].isdigit() else 1000 + self.seed}',
        )  # fmt: skip

    def tokens(self, text):
        return tuple(llama_jax.load_tokenizer(self.tokenizer).encode(text, bos=True))

    def told(self, checkpoint, lines):
        """(nats an answer from the base, share with the word); nats by the first 32 to each prompt."""
        answers = [
            (line['prompt'], one['completion'], one['score'])
            for line in lines
            for one in line.get('candidates', ())
        ]
        share = float(np.mean([reward for *_, reward in answers]))
        some = [
            (line['prompt'], one['completion']) for line in lines for one in line.get('candidates', ())[:32]
        ]
        if checkpoint == self.base:
            return 0.0, share
        texts = [(len(self.tokens(prompt)), self.tokens(prompt + answer)) for prompt, answer in some]
        away = log_probabilities(checkpoint, texts) - log_probabilities(self.base, texts)
        return float(np.mean(away)), share


def log_probabilities(checkpoint, texts):
    """Of each text behind its first tokens: (their number, all tokens)."""
    config, params, _ = llama_jax.load(checkpoint)
    model, width = LlamaForCausalLM(config, dtype=jnp.float32), max(len(ids) for _, ids in texts)
    tokens = np.array([(*ids, *[0] * (width - len(ids))) for _, ids in texts])
    counted = np.array([[start <= place < len(ids) for place in range(1, width)] for start, ids in texts])

    def sums(params, tokens, counted):
        logits, _ = model.apply({'params': params}, tokens)
        log_p = jax.nn.log_softmax(logits[:, :-1])
        of_next = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.where(counted, of_next, 0.0).sum(axis=1)

    found = jax.jit(sums, compiler_options={'xla_backend_optimization_level': 3})(params, tokens, counted)
    return np.asarray(found, np.float64)


@pytest.fixture(scope='module')
def ways(folder):
    """{seed: {way: its points}}; at the end each seed's are drawn."""
    found = {}
    yield found
    for seed, of_seed in found.items():
        file = folder / f'shares_{seed}.png'
        plot_ways(
            file, of_seed, f'share with {WORD!r}', np.mean([points[0][1] for points in of_seed.values()])
        )
        print(f'\nshares over nats, seed {seed}: {file}')


@pytest.mark.long
@pytest.mark.parametrize(
    ('way', 'seed'),
    [*((way, seed) for way in (*WAYS, 'rejection sampling') for seed in (0, 1, 2)), ('dpo', 0)],
)  # fmt: skip
def test_a_word_comes_to_most_stories_within_few_nats(commands, shared_data, tmp_path, ways, way, seed):
    """Of stories of 48 tokens few hold it at first, four fifths at last; by DPO, of few pairs, three times as many."""
    stories = Stories(commands, tmp_path, shared_data / 'weights/stories260K', seed)
    others = {'rejection sampling': stories.by_rejection_sampling, 'dpo': stories.by_preferences}
    points = stories.by_policy_gradients(way) if way in WAYS else others[way]()
    ways.setdefault(seed, {})[way] = points
    (_, p), (nats, q) = points[0], np.mean(points[-3:] if way in WAYS else points[-1:], axis=0)
    print(
        f'{way}, seed {seed}: {WORD} in {p:.0%} of stories, then in {q:.0%} at {nats:.2f} nats '
        f'({least_divergence(q, p):.2f} at least)\n  ' + ', '.join(f'{y:.0%} at {x:.1f}' for x, y in points)
    )
    assert p <= 0.2 and q >= (3 * p if way == 'dpo' else 0.8) and nats <= 10
