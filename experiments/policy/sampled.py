"""A policy that is sampled and judged, by flags: what is wrong with them is said before anything is loaded."""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from etils import epath

from experiments import launch
from experiments.launch import flags_named
from experiments.policy.candidates import Asked, draw_all
from experiments.policy.rewards import Judges, Term, check_rewards, open_rewards, parse_rewards
from experiments.prompting.loading import define_reading, define_spread, load_weights, make_model, open_model
from experiments.prompting.prompt_file import check_output, parse_shard
from experiments.run.settings import partitioner_of_flags
from experiments.run.trained_format import chat_format_of
from llama_jax import pretrained, runtime
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner
from llama_jax.rl.rollout import Rollout, Sampling, check_room, rollouts_by_record
from llama_jax.tokenizer.chat_format import FORMATS, ChatFormat
from llama_jax.tokenizer.protocol import Tokenizer, required
from llama_jax.types import Params

flags.disclaim_key_flags()  # they are those of the command that asks for them


def define_sampled_policy() -> launch.Flags:
    """--checkpoint, --rewards and what else says how answers are drawn and judged; see `request_of`."""
    launch.define_processes()
    return launch.Flags(
        checkpoint=launch.define_path(
            'checkpoint', None, 'the policy: anything that is a Llama, as for generate', required=True
        ),
        rewards=launch.define_path(
            'rewards', None, 'what answers are scored by, each with =WEIGHT: reward models, task:NAME, '
            'FILE.py:function, helpfulness:CKPT with safety:CKPT, missing_stop, overlong:TOKENS', required=True,
        ),
        output=launch.define_path('output', None, 'the file of what is kept, in JSON Lines', required=True),
        samples=flags.DEFINE_integer('samples', 16, 'answers to a prompt, at each temperature'),
        temperatures=flags.DEFINE_list('temperatures', ['1.0'], 'of the draws, by commas'),
        max_new_tokens=flags.DEFINE_integer('max_new_tokens', 256, 'of an answer'),
        chat_format=flags.DEFINE_enum(
            'chat_format', '', ['', *FORMATS],
            "how a conversation is spelled, as data.format in training; '': as the checkpoint was trained",
        ),
        key_map=flags.DEFINE_string('key_map', '', 'keys of records, OURS=THEIRS by commas, as prompt=question'),
        shard=flags.DEFINE_string('shard', '0/1', 'which part of the work, for several commands: 0/4 to 3/4'),
        seed=flags.DEFINE_integer('seed', 0, 'of the draws'),
        batch_size=flags.DEFINE_integer('batch_size', 64, 'answers that are drawn together', 1, 1 << 16),
        allow_code_execution=flags.DEFINE_boolean(
            'allow_code_execution', False, 'task: may run generated programs, in a sandbox'
        ),
        **define_reading(),
        **define_spread(),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """What the flags ask for, nothing of which is loaded.

    Attributes:
      given: the flags of `define_sampled_policy` by name.
      sampling: how answers are drawn.
      terms: rewards.
      shard: (which part, of how many).
      partitioner: places weights and rows.
    """

    given: dict[str, Any]
    sampling: Sampling
    terms: list[Term]
    shard: tuple[int, int]
    partitioner: Partitioner


def request_of(given: dict[str, Any], *, plots: bool = True) -> Request:
    """What the flags ask for.

    Args:
      given: the flags of `define_sampled_policy` by name.
      plots: whether a plot is drawn beside the output.

    Raises:
      InputError: flags are wrong by themselves, or the output cannot be written.
    """
    names = ('samples', 'temperatures', 'max_new_tokens', 'batch_size', 'shard')
    with flags_named(*(f'--{name}' for name in names)):
        temperatures = _temperatures(given['temperatures'])
        sampling = Sampling(
            temperatures[0], given['max_new_tokens'], given['samples'], given['batch_size'], temperatures[1:]
        )
        shard = parse_shard(given['shard'])
    with flags_named('--rewards', '--allow_code_execution'):
        terms = parse_rewards(given['rewards'])
        check_rewards(terms, given['allow_code_execution'])
    with flags_named('--output'):
        if runtime.is_main_process():
            check_output(given['output'])
            if plots:
                check_plot(given['output'])
    return Request(given, sampling, terms, shard, partitioner_of_flags(given['mesh'], given['axis_rules']))


def plot_beside(output: str) -> epath.Path:
    """The plot that is drawn beside the file of an output."""
    return epath.Path(output).with_suffix('.png')


def check_plot(output: str) -> None:
    """Refuses an output whose plot would replace itself, or another file than that of a command that was killed."""
    if (plot := plot_beside(output)) == epath.Path(output):
        raise InputError(
            f'{output} is where the plot goes that is drawn beside it; name the file of answers otherwise, as '
            f'{plot.with_suffix(".jsonl")}'
        )
    if plot.exists() and not epath.Path(f'{output}.partial').exists():
        raise InputError(
            f'{plot} is there already, where the plot of {output} goes; remove it, or write to another place'
        )


def _temperatures(given: Sequence[str]) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in given)
    except ValueError:
        found = ()
    if not found or len(set(found)) < len(found) or not all(1e-6 <= one < math.inf for one in found):
        raise InputError(
            f'temperatures are {",".join(given)!r}; write different numbers above 0 by commas, as in 0.7,1.0,1.3'
        )
    return found


class SampledPolicy:
    """A policy opened by its request; `load` brings its weights and its judges."""

    tokenizer: Tokenizer
    chat_format: ChatFormat
    stop_ids: tuple[int, ...]
    judges: Judges

    def __init__(self, request: Request):
        """Raises InputError where the checkpoint, its tokenizer or its place do not fit what is asked for."""
        given, self.request = request.given, request
        self._opened = open_model(given)
        with flags_named('--tokenizer'):
            self.tokenizer = required(
                pretrained.load_tokenizer(given['tokenizer'])
                if given['tokenizer']
                else self._opened.tokenizer
            )
        self._model = make_model(self._opened, given, request.partitioner)
        with flags_named('--chat_format'):
            self.chat_format = chat_format_of(self._opened, self.tokenizer, given['chat_format'])
        self.stop_ids = tuple(sorted({*self.tokenizer.stop_ids, *self.chat_format.stop_ids}))
        self._weights: Params = {}

    def check_room(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises InputError where a prompt leaves no room for an answer."""
        check_room(prompts, self.request.sampling.max_new_tokens, self._opened.config.max_seq_len)

    def load(self) -> dict[str, Any]:
        """Loads the weights and the judges; what answers and their scores follow from, beside the prompts."""
        given, sampling = self.request.given, self.request.sampling
        params, _ = load_weights(self._opened, given, self._model)
        fingerprint = Engine(self._model, params, self.tokenizer).fingerprint
        self._weights = unstack(params, self._model.dtype, delete=True)
        with flags_named('--rewards'):
            self.judges = open_rewards(
                self.request.terms, tokenizer=self.tokenizer, max_new_tokens=sampling.max_new_tokens,
                partitioner=self.request.partitioner, dtype=self._model.dtype, allow_code=given['allow_code_execution'],
                whitened=False,
            )  # fmt: skip
        return {
            'model': fingerprint, 'shard': given['shard'], 'rewards': self.judges.identity,
            'temperatures': [sampling.temperature, *sampling.ladder], 'samples': sampling.samples,
            'max_new_tokens': sampling.max_new_tokens, 'batch_size': sampling.num_slots, 'seed': given['seed'],
            'chat_format': given['chat_format'], 'stop_ids': list(self.stop_ids),
        }  # fmt: skip

    def drawn(self, asked: Sequence[Asked]) -> Iterator[list[Rollout]]:
        """All answers to each prompt, as soon as they are there."""
        draw = functools.partial(
            rollouts_by_record, self._model, self._weights, self.tokenizer, sampling=self.request.sampling,
            seed=self.request.given['seed'], stop_ids=self.stop_ids,
        )  # fmt: skip
        return draw_all(asked, lambda ids, numbers: draw(ids, records=numbers))


def hash_of(values: Any) -> str:
    """The same for the same values, such as those of a file."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
