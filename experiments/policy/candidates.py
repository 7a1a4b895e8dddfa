"""Prompts that are answered many times, and their scored candidates, which are kept prompt by prompt."""

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from experiments.policy.rewards import Judges
from llama_jax import runtime
from llama_jax.data.messages import one_or_more_messages
from llama_jax.data.preferences import encode_answer
from llama_jax.data.record_kinds import Prompted
from llama_jax.data.records import read_records
from llama_jax.errors import InputError
from llama_jax.item_log import ItemLog
from llama_jax.json_file import show_json
from llama_jax.rl.context_distillation import PREPROMPT_KEY, with_preprompt
from llama_jax.rl.rejection import Candidate
from llama_jax.rl.rewards import judge
from llama_jax.rl.rollout import Rollout, Sampling
from llama_jax.tokenizer.chat_format import ChatFormat, Message

# A prompt behind a preprompt is drawn by a number of its own, above those of all prompts.
_NUMBER_BITS = 32


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt of this shard.

    Attributes:
      index: its number among all.
      record: as the rewards get it; `prompt` is a text, or messages.
      messages: the prompt's.
      ids: the same as tokens.
      behind: preprompts, and the prompt's tokens behind each.
    """

    index: int
    record: dict[str, Any]
    messages: tuple[Message, ...]
    ids: list[int]
    behind: tuple[tuple[str, list[int]], ...] = ()

    @property
    def key(self) -> str:
        """The same for the same prompt."""
        return key_of(self.messages)


def key_of(messages: Sequence[Message]) -> str:
    """The same for the same conversation."""
    return json.dumps([[message.role, _content(message)] for message in messages])


def asked_of(
    records: Sequence[Prompted],
    chat_format: ChatFormat,
    shard: tuple[int, int],
    preprompts: Sequence[str] = (),
) -> list[Asked]:
    """The prompts of a shard; with preprompts also as they are behind each of these, or behind the record's own.

    Raises:
      InputError: names the record that cannot be asked.
    """
    found = []
    for index, record in enumerate(records):
        if index % shard[1] != shard[0]:
            continue
        try:
            ids = chat_format.encode_prompt(record.messages)
            behind = tuple(
                (preprompt, chat_format.encode_prompt(with_preprompt(record.messages, preprompt)))
                for preprompt in _own_preprompts(record, preprompts)
            )
        except InputError as error:
            raise InputError(f'{record.place}: {error}') from None
        found.append(
            Asked(
                index,
                {**record.fields, 'prompt': shown_prompt(record.messages)},
                record.messages,
                ids,
                behind,
            )
        )
    return found


def _own_preprompts(record: Prompted, preprompts: Sequence[str]) -> Sequence[str]:
    own = record.fields.get(PREPROMPT_KEY)
    if not preprompts or own is None:
        return preprompts
    if not isinstance(own, str) or not own.strip():
        raise InputError(f'its {PREPROMPT_KEY} is {show_json(own)}; it must be a text')
    return [own]


def draw_all(
    asked: Sequence[Asked], draw: Callable[[list[list[int]], list[int]], Iterable[list[Rollout]]]
) -> Iterator[list[Rollout]]:
    """All answers to a prompt, numbered through, as soon as they are there: those without a preprompt first.

    They stand behind the prompt alone, as they are judged and learnt.

    Args:
      asked: prompts.
      draw: (token ids, numbers to draw by) -> the answers of each.
    """
    by_index, groups = {one.index: one for one in asked}, collections.defaultdict(dict)
    variants = [
        (one.index | variant << _NUMBER_BITS, ids)
        for one in asked
        for variant, ids in enumerate([one.ids, *(ids for _, ids in one.behind)])
    ]
    for rollouts in draw([ids for _, ids in variants], [number for number, _ in variants]):
        variant, index = divmod(rollouts[0].record, 1 << _NUMBER_BITS)
        one, found = by_index[index], groups[index]
        found[variant] = rollouts
        if len(found) == 1 + len(one.behind):
            everyone = [rollout for _, group in sorted(groups.pop(index).items()) for rollout in group]
            yield [
                dataclasses.replace(rollout, record=index, sample=sample, prompt=tuple(one.ids))
                for sample, rollout in enumerate(everyone)
            ]


def shown_prompt(messages: Sequence[Message]) -> str | list[dict[str, str]]:
    """A prompt as a line of JSON holds it, from which the same is read."""
    plain = tuple(Message(message.role, _content(message)) for message in messages)
    text = plain[0].content
    if len(plain) == 1 and one_or_more_messages(text, 'prompt', role='user') == plain:
        return text
    return [{'role': message.role, 'content': message.content} for message in plain]


def _content(message: Message) -> str:
    return f'{message.content}\n\n{message.input}' if message.input else message.content


def read_pool(sources: Sequence[str]) -> dict[str, list[tuple[str, bool, str]]]:
    """(text, whether a stop token ended it, the file) of earlier candidates, by prompt; each text once."""
    found: dict[str, dict[str, tuple[str, bool, str]]] = collections.defaultdict(dict)
    for source in sources:
        for record in read_records([source], kind=Prompted):
            candidates = record.fields.get('candidates')
            if candidates is None:
                candidates = [record.fields]
            for one in candidates if isinstance(candidates, list) else [None]:
                one = one if isinstance(one, dict) else {}
                if not isinstance(text := one.get('completion'), str):
                    raise InputError(
                        f'{record.place} holds no candidates; a pool is what rejection_sampling has written'
                    )
                if text.strip():
                    found[key_of(record.messages)].setdefault(
                        text, (text, bool(one.get('stopped', True)), source)
                    )
    return {key: list(texts.values()) for key, texts in found.items()}


def from_pool(
    one: Asked,
    pool: Sequence[tuple[str, bool, str]],
    chat_format: ChatFormat,
    first: int,
) -> list[tuple[Rollout, str]]:
    """Earlier answers as this policy's tokens, with the files that they are from; numbered from `first` on."""
    found = []
    for number, (text, stopped, origin) in enumerate(pool, first):
        said = Message('assistant', text, is_cut=not stopped)
        _, answer = encode_answer(chat_format, one.messages, [said])
        ids = tuple(answer.tokens.tolist())
        found.append((Rollout(one.index, number, tuple(one.ids), ids, (), stopped, text), origin))
    return found


def complete(
    asked: Sequence[Asked],
    log: ItemLog | None,
    judges: Judges,
    sampling: Sampling,
    drawn: Callable[[Sequence[Asked]], Iterable[list[Rollout]]],
    joined: Callable[[Asked], list[tuple[Rollout, str]]],
) -> dict[int, list[Candidate]]:
    """The scored candidates of each prompt by its number; what the log holds is not done again.

    All processes do so together. A prompt's candidates are scored by themselves, so that they do not depend on where a
    command was killed.
    """
    known = {index: item['candidates'] for index, item in log.items.items()} if log else {}
    done = set(json.loads(runtime.bytes_from_main_process(json.dumps(sorted(known)).encode())))
    found = {index: [Candidate(**one) for one in candidates] for index, candidates in known.items()}
    # The longest first: the cache then never has to grow for a late one.
    left = sorted((one for one in asked if one.index not in done), key=lambda one: -len(one.ids))
    by_index = {one.index: one for one in left}
    is_quiet = not runtime.is_main_process()
    with tqdm(
        total=len(asked), initial=len(asked) - len(left), unit='prompt', disable=is_quiet or None
    ) as bar:
        for rollouts in drawn(left) if left else ():
            one = by_index[rollouts[0].record]
            others = joined(one)
            everyone = [*rollouts, *(rollout for rollout, _ in others)]
            rewarded = judge(judges.rewards, everyone, [one.record] * len(everyone))
            temperatures = sampling.temperatures
            drawn_at = [
                (t, '', said) for said in ('', *(said for said, _ in one.behind)) for t in temperatures
            ]
            drawn_at += [(0.0, origin, '') for _, origin in others]
            candidates = [
                Candidate(
                    rollout.text, float(rewarded.total[place]),
                    {name: float(values[place]) for name, values in rewarded.parts.items()}, rollout.stopped,
                    len(rollout.answer), *own,
                )
                for place, (rollout, own) in enumerate(zip(everyone, drawn_at, strict=True))
            ]  # fmt: skip
            found[one.index] = candidates
            if log:
                log.add({'index': one.index, 'candidates': [dataclasses.asdict(c) for c in candidates]})
            bar.update()
    return found
