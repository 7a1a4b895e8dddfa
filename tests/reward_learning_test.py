"""That reward models learn: a score that is known, and how much better an answer is rated."""

import functools
import gzip
import hashlib
import json
import re

import numpy as np
import pytest

import llama_jax
from llama_jax.tokenizer.tokenizer import load_tokenizer
from tests.learning_runs import SEEDS, train, write_lines

WORDS = ('dog', 'cat', 'ball', 'cake', 'hat', 'tree', 'boat', 'sun', 'bird', 'car', 'toy', 'bed')


def trained(commands, shared_data, workdir, files, seed, base=None, **overrides):
    """The report of a reward model that begins as stories260K, or as another base.

    Args:
      commands: that run it.
      shared_data: the folder with stories260K.
      workdir: of the run.
      files: to train on, and held out.
      seed: of the run.
      base: where it does not begin as stories260K.
      overrides: of the configuration.
    """
    weights = shared_data / 'weights/stories260K'
    config = {
        'data.train': files[0], 'data.validation': files[1], 'data.weights': '', 'data.seq_len': 128,
        'data.tokenizer': weights / 'tok512.model', 'train.batch_size': 8, 'train.loss_chunks': 1,
        'train.num_epochs': 1.0, 'optimizer.learning_rate': 1e-3, 'optimizer.warmup_steps': 10,
        'reward.margin': 'none', 'seed': seed,
    } | overrides  # fmt: skip
    train(
        commands, 'reward_model', 'reward_model.py:checkpoint', workdir, base or weights / 'stories260K.pt', config
    )  # fmt: skip
    return json.loads((workdir / 'report.json').read_text())


def drawn_pairs(rng, worth, number, rated=False):
    """(pairs, how often the better by their scores was preferred): what is liked of three things, by their worth.

    Preferred is a with probability sigmoid(score(a) - score(b)); where rated, always the better one, rated 0 to 3 by
    the quarter that the difference is in.
    """
    picks = [[rng.choice(len(WORDS), size=3, replace=False) for _ in range(2)] for _ in range(2 * number)]
    picks = [pick for pick in picks if set(pick[0]) != set(pick[1])][:number]
    differences = np.array([worth[a].sum() - worth[b].sum() for a, b in picks])
    first = differences > 0 if rated else rng.random(len(picks)) < 1 / (1 + np.exp(-differences))
    ratings = np.searchsorted(np.quantile(abs(differences), [0.25, 0.5, 0.75]), abs(differences))
    lines = []
    for pick, preferred, rating in zip(picks, first, ratings, strict=True):
        one, other = (f'a {WORDS[i]}, a {WORDS[j]} and a {WORDS[k]}.' for i, j, k in pick)
        better, worse = (one, other) if preferred else (other, one)
        more = {'margin': int(rating)} if rated else {}
        lines.append({'prompt': 'Lily has', 'chosen': better, 'rejected': worse, **more})
    return lines, np.mean(first == (differences > 0))


@pytest.mark.parametrize('seed', SEEDS)
def test_a_known_score_is_found(commands, shared_data, tmp_path, seed):
    """As often right as who knows it, and right as often as it says."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=len(WORDS))
    lines, _ = drawn_pairs(rng, worth, 3000)
    held_out, best = drawn_pairs(rng, worth, 2000)
    files = [
        write_lines(tmp_path / f'{name}.jsonl', some) for name, some in (('train', lines), ('test', held_out))
    ]
    report = trained(commands, shared_data, tmp_path / 'run', files, seed, **{'train.num_epochs': 2.0})
    print(
        f'seed {seed}: right in {100 * report["accuracy"]:.1f} % of {report["pairs"]}, who knows the score in '
        f'{100 * best:.1f} %; calibration error {report["calibration_error"]:.3f}'
    )
    assert report['accuracy'] >= best - 0.02 and report['calibration_error'] <= 0.05


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_large_margin_widens_gaps_by_rating(commands, shared_data, tmp_path, seed):
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=len(WORDS))
    lines, held_out = (drawn_pairs(rng, worth, number, rated=True)[0] for number in (3000, 1000))
    files = [
        write_lines(tmp_path / f'{name}.jsonl', some) for name, some in (('train', lines), ('test', held_out))
    ]
    gaps = {}
    for margin in ('none', 'large'):
        report = trained(commands, shared_data, tmp_path / margin, files, seed, **{'reward.margin': margin})
        gaps[margin] = np.array([report['gap_by_margin'][rating] for rating in '0123'])
    wider = gaps['large'] - gaps['none']
    print(f'seed {seed}: gaps by rating ' + ', '.join(f'{name} {gap.round(2)}' for name, gap in gaps.items()))
    assert (np.diff(gaps['large']) > 0).all() and (np.diff(wider) > 0).all() and wider[0] > 0


def place_in_story(sentences, size_of):
    """(the last 150 tokens of sentences before them, the last two sentences), or None where two of them are too long.

    Args:
      sentences: a story, or its beginning.
      size_of: the number of tokens.
    """
    last, before = ' '.join(sentences[-2:]), sentences[:-2]
    sizes = [size_of(sentence) + 1 for sentence in before]
    first = next((i for i in range(len(before)) if sum(sizes[i:]) <= 150), len(before))
    return (' '.join(before[first:]), last) if before[first:] and size_of(last) <= 80 else None


def pairs_of_continuations(stories, size_of, rng, places):
    """How each story goes on against how two others do: in its last two sentences, and so in the two before those.

    Args:
      stories: their sentences.
      size_of: the number of tokens.
      rng: draws the others, of those that have as many sentences behind the place.
      places: how many of each story.
    """
    for behind in range(0, 2 * places, 2):
        begun = [story[: len(story) - behind] for story in stories if len(story) - behind >= 4]
        found = [place for place in (place_in_story(sentences, size_of) for sentences in begun) if place]
        for number, (before, own) in enumerate(found):
            for other in rng.choice(np.delete(np.arange(len(found)), number), 2, replace=False):
                yield {'prompt': before, 'chosen': f' {own}', 'rejected': f' {found[other][1]}'}


def base_that_knows_its_stop_token(shared_data, folder):
    """stories260K, which never read its stop token, with that of a full stop in its place."""
    config, params, tokenizer = llama_jax.load(shared_data / 'weights/stories260K/stories260K.pt')
    full_stop = tokenizer.encode('The end.')[-1]
    params['embed'] = params['embed'].at[tokenizer.eos_id].set(params['embed'][full_stop])
    llama_jax.save(folder, config, params, tokenizer)
    return folder


@pytest.mark.long
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_storys_own_ending_is_told_from_anothers(commands, shared_data, tmp_path, seed):
    """Of 414 stories, by a model that was trained on 1,500 others."""
    tokenizer = load_tokenizer(shared_data / 'weights/stories260K/tok512.model')
    size_of = functools.cache(lambda text: len(tokenizer.encode(text)))
    text = (shared_data / 'text/tinystories_2MiB_sample.txt').read_text()
    stories = [' '.join(story.split()) for story in text.split('<|endoftext|>')]
    stories = [re.split(r'(?<=[.!?"])\s+(?=[A-Z"])', story) for story in stories]
    stories = [story for story in stories if len(story) >= 6 and place_in_story(story, size_of)]
    rng = np.random.default_rng(seed)
    stories = [stories[number] for number in rng.permutation(len(stories))]
    files = [
        write_lines(tmp_path / f'{name}.jsonl', pairs_of_continuations(some, size_of, rng, places))
        for name, some, places in (('train', stories[:1500], 6), ('test', stories[1500:], 1))
    ]
    settings = {
        'data.seq_len': 352, 'data.share_prompt': True, 'train.batch_size': 20,
        'optimizer.learning_rate': 2e-3, 'optimizer.warmup_steps': 20,
    }  # fmt: skip
    base = base_that_knows_its_stop_token(shared_data, tmp_path / 'base')
    report = trained(commands, shared_data, tmp_path / 'run', files, seed, base=base, **settings)
    print(
        f'seed {seed}: right in {100 * report["accuracy"]:.1f} % of {report["pairs"]} after {report["step"]} updates; '
        f'the longer one is in {100 * report["longer_is_better"]:.1f} %, a bag of words in '
        f'{100 * report["bag_of_words"]:.1f} %'
    )
    assert report['pairs'] >= 800 and report['accuracy'] >= 0.75


@pytest.mark.long
def test_which_of_two_answers_is_harmless_is_learnt_a_little(commands, shared_data, tmp_path):
    """Each fifth of the prompts by a model that was trained on the others: all pairs that rows hold are judged once."""
    with gzip.open(shared_data / 'finetune/hh_harmless_base_test.jsonl.gz', 'rt') as file:
        lines = [json.loads(line) for line in file]
    prompts = [line['chosen'].rpartition('\n\nAssistant:')[0] for line in lines]
    folds = np.array([hashlib.sha256(prompt.encode()).digest()[0] % 5 for prompt in prompts])
    settings = {
        'data.format': 'hh', 'data.on_error': 'skip', 'data.too_long': 'oldest', 'data.seq_len': 256,
        'data.share_prompt': True, 'train.batch_size': 4, 'optimizer.warmup_steps': 20,
    }  # fmt: skip
    counts, shares = [], []
    for fold in range(5):
        files = [
            write_lines(tmp_path / f'{name}{fold}.jsonl', (lines[place] for place in np.flatnonzero(chosen)))
            for name, chosen in (('train', folds != fold), ('test', folds == fold))
        ]
        report = trained(commands, shared_data, tmp_path / f'run{fold}', files, 0, **settings)
        counts.append(report['pairs'])
        shares.append([report[key] for key in ('accuracy', 'longer_is_better', 'bag_of_words')])
        print(f'fold {fold}, {counts[-1]} pairs: {_said(shares[-1])}', flush=True)
    right, *rules = np.average(shares, axis=0, weights=counts)
    z = (right - 0.5) / (0.25 / sum(counts)) ** 0.5
    print(
        f'all {sum(counts)} pairs: {_said([right, *rules])}, z {z:.1f}; '
        "the paper's two models of 70B are right in 71.0 and 74.7 %"
    )
    assert sum(counts) >= 1300 and z >= 3


def _said(shares):
    right, longer, words = (f'{100 * share:.1f} %' for share in shares)
    return f'right in {right}; the longer one is in {longer}, a bag of words in {words}'
