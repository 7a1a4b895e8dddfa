"""What a policy is asked while it is trained: prompts of records, in an order that has no end."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.launch import flags_named
from experiments.run.config_file import split_list
from experiments.training import Plan
from llama_jax.data.record_kinds import Prompted
from llama_jax.data.records import parse_key_map, read_records
from llama_jax.errors import InputError, refusals_of
from llama_jax.rl.rollout import check_room
from llama_jax.tokenizer.chat_format import ChatFormat, chat_format_for

logger = logging.getLogger('llama_jax.prompts')


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts with their records.

    Attributes:
      ids: of the tokens of each.
      records: what each is of, for what judges answers.
      trained: numbers of those that are trained on.
      held_out: numbers of those that are not.
      stop_ids: any of these ends an answer.
      seed: of the order.
      fingerprint: hash of all of them.
    """

    ids: Sequence[tuple[int, ...]]
    records: Sequence[Mapping[str, Any]]
    trained: Sequence[int]
    held_out: Sequence[int]
    stop_ids: tuple[int, ...]
    seed: int
    fingerprint: str

    def taken(self, number: int) -> int:
        """The prompt that is taken after so many others: each pass has every one once, in another order."""
        passed, place = divmod(number, len(self.trained))
        return int(self.trained[_order(self.seed, passed, len(self.trained))[place]])


@functools.lru_cache(maxsize=2)
def _order(seed: int, passed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, passed]).permutation(number)


def read_prompts(plan: Plan) -> Prompts:
    """Reads and encodes the sources.

    Raises:
      InputError: a source or record cannot be read, nothing is left, or prompts leave no room for answers.
    """
    config = plan.config
    with flags_named('--config.data.format'):
        chat_format = chat_format_for(plan.tokenizer, config.data.format)
    with flags_named('--config.data.key_map'):
        key_map = parse_key_map(config.data.key_map)
    with flags_named('--config.data.train', '--config.data.validation'):
        read = functools.partial(_read, chat_format=chat_format, key_map=key_map)
        trained, given = (read(split_list(text)) for text in (config.data.train, config.data.validation))
    fraction = 0.0 if given else config.data.validation_fraction
    kept = [one for one in trained if not _is_held_out(one[0], fraction)]
    held_out = given or [one for one in trained if _is_held_out(one[0], fraction)]
    if not kept:
        raise InputError(
            f'--config.data.train={config.data.train} has no prompt to train on, of {len(trained)}; give some, or a '
            f'smaller --config.data.validation_fraction than {fraction:g}'
        )
    together = [*kept, *held_out]
    room = min(plan.model.config.max_seq_len, config.data.seq_len + 1)
    with flags_named('--config.rollout.max_new_tokens', '--config.data.seq_len'):
        check_room([ids for ids, _ in together], config.rollout.max_new_tokens, room)
    known = [together, len(kept), chat_format.stop_ids, plan.tokenizer.sha256]
    fingerprint = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    logger.info('prompts: %s; held out: %s', f'{len(kept):,}', f'{len(held_out):,}')
    return Prompts(
        [ids for ids, _ in together], [record for _, record in together], range(len(kept)),
        range(len(kept), len(together)), chat_format.stop_ids, config.seed, fingerprint,
    )  # fmt: skip


def _read(
    sources: Sequence[str], *, chat_format: ChatFormat, key_map: Mapping[str, str]
) -> list[tuple[tuple[int, ...], Mapping[str, Any]]]:
    found = []
    for record in read_records(sources, kind=Prompted, key_map=key_map) if sources else ():
        with refusals_of(record.place):
            found.append((tuple(chat_format.encode_prompt(record.messages)), record.fields))
    return found


def _is_held_out(ids: tuple[int, ...], fraction: float) -> bool:
    digest = hashlib.sha256(json.dumps(ids).encode()).digest()
    return int.from_bytes(digest[:8], 'big') < fraction * 2**64
