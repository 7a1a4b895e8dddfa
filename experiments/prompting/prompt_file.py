"""Completing the prompts of a file, item by item: killed, the same command goes on.

A line of the file is {"prompt": TEXT} or {"messages": [...]}, beside it settings of its own ("temperature", "seed", ...
as `Sampler` names them); whatever else it holds comes back with its answer. The answers are one file, in the order of
the prompts, that is there when all are; until then they wait beside it, in FILE.partial.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from llama_jax import lock, runtime, storage
from llama_jax.errors import InputError
from llama_jax.inference.chat import check_messages
from llama_jax.inference.sampling import Sampler
from llama_jax.item_log import ItemLog
from llama_jax.json_file import parse_object, read_lines, show_json

SETTINGS = tuple(field.name for field in dataclasses.fields(Sampler))
_OURS = ('index', 'completion', 'stopped')


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of the file.

    Attributes:
      index: its place among the lines, from 0.
      line: as it was given.
      prompt: text, or messages of a conversation.
      sampler: its settings.
    """

    index: int
    line: dict[str, Any]
    prompt: str | list[dict[str, Any]]
    sampler: Sampler


def parse_shard(text: str) -> tuple[int, int]:
    """'1/4' as (1, 4): the second of four.

    Raises:
      InputError: it is no part of a whole.
    """
    part, slash, parts = text.partition('/')
    if slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts):
        return int(part), int(parts)
    raise InputError(f'shard is {text!r}; it must be a part and their number, from 0/4 to 3/4')


def read_items(path: str, sampler: Sampler, shard: tuple[int, int] = (0, 1)) -> tuple[list[Item], str]:
    """The items of a shard, every so many-th line, and a hash of the whole file.

    Args:
      path: local or `gs://...`.
      sampler: settings of lines that do not name them; each is drawn by a seed of its own, made of this one and of its
        number.
      shard: (which, of how many).

    Raises:
      InputError: the file is not there or empty, or a line is none of the above.
    """
    items, sha256, number = [], hashlib.sha256(), 0
    try:
        with epath.Path(path).open('rb') as raw, io.BufferedReader(raw) as file:
            for number, line in enumerate(read_lines(file, path), 1):
                sha256.update(line)
                if (number - 1) % shard[1] == shard[0]:
                    items.append(
                        _item(number - 1, parse_object(line, f'{path} line {number}'), path, sampler)
                    )
    except OSError as error:
        raise InputError(f'{path} cannot be read: {error.strerror or error}') from error
    if not number:
        raise InputError(f'{path} is empty; give it a line {{"prompt": TEXT}} for each')
    return items, sha256.hexdigest()


def _item(index: int, line: dict[str, Any], path: str, sampler: Sampler) -> Item:
    place = f'{path} line {index + 1}'
    kinds = [kind for kind in ('prompt', 'messages') if kind in line]
    if len(kinds) != 1:
        raise InputError(
            f'{place} has {" and ".join(kinds) or sorted(line)}; it must have a prompt or messages'
        )
    if taken := [key for key in _OURS if key in line]:
        raise InputError(f'{place} has the key {taken[0]!r}, which its answer has too; name it otherwise')
    prompt = line[kinds[0]]
    if kinds == ['prompt'] and not isinstance(prompt, str):
        raise InputError(f'{place}: its prompt is {show_json(prompt)}; it must be a text')
    number = hashlib.sha256(f'{sampler.seed} {index}'.encode()).digest()
    own: dict[str, Any] = {'seed': int.from_bytes(number[:4], 'little') >> 1}
    own |= {name: _setting(name, line[name], place) for name in SETTINGS if name in line}
    try:
        messages = prompt if isinstance(prompt, str) else check_messages(prompt)
        return Item(index, line, messages, dataclasses.replace(sampler, **own))
    except InputError as error:
        raise InputError(f'{place}: {error}') from None


def _setting(name: str, value: Any, place: str) -> Any:
    if name == 'logit_bias' and isinstance(value, dict):
        with contextlib.suppress(ValueError):
            return {int(token): bias for token, bias in value.items()}
    kinds = {'logit_bias': ()}.get(name, int if isinstance(getattr(Sampler(), name), int) else (int, float))
    if isinstance(value, bool) or not isinstance(value, kinds):
        what = {'logit_bias': 'an object of biases by token id'}.get(name, 'a number, whole where it counts')
        raise InputError(f'{place}: {name} is {show_json(value)}; it must be {what}')
    return value


def check_output(output: str) -> None:
    """Refuses a file that cannot be written, or that is there: nothing finished is taken away."""
    storage.check_place(output, folder=False)
    if epath.Path(output).exists():
        raise InputError(f'{output} is there already; remove it, or write to another place')


@contextlib.contextmanager
def open_output(output: str, header: dict[str, Any]) -> Iterator[ItemLog | None]:
    """What is finished already, on process 0; no other command may write it meanwhile.

    Args:
      output: the file, which must not be there yet.
      header: what the answers depend on.

    Raises:
      InputError: it is there, or what waits beside it depends on other things.
    """
    path, log = epath.Path(output), None
    with contextlib.ExitStack() as at_exit:
        with runtime.refused_by_all():
            if runtime.is_main_process():
                check_output(output)
                with storage.system_failures(f'{output} cannot be held'):
                    at_exit.callback(lock.hold(path, beside=True))
                log = at_exit.enter_context(contextlib.closing(ItemLog(f'{output}.partial', header)))
        yield log


def complete_items(
    items: Sequence[Item],
    prompts: Sequence[Sequence[int]],
    log: ItemLog | None,
    complete: Callable[[list[Sequence[int]], list[Sampler]], Iterable[tuple[int, dict[str, Any]]]],
) -> dict[int, dict[str, Any]]:
    """What is written of each completion by index; what the log holds is not done again. All processes do so together.

    Args:
      items: all of them.
      prompts: their token ids.
      log: of process 0, where the completions are to be kept.
      complete: (place, what is written) of each prompt, as they end, by their settings; they must not depend on one
        another.
    """
    kept = log.items if log else {}
    known = {number: {k: v for k, v in item.items() if k != 'index'} for number, item in kept.items()}
    done = set(json.loads(runtime.bytes_from_main_process(json.dumps(sorted(known)).encode())))
    # The longest first: the cache then never has to grow for a late one.
    places = [place for place, item in enumerate(items) if item.index not in done]
    places.sort(key=lambda place: -len(prompts[place]))
    if not places:
        return known
    is_quiet = not (runtime.is_main_process() and log)
    with tqdm(
        total=len(items), initial=len(items) - len(places), unit='prompt', disable=is_quiet
    ) as progress:
        samplers = [items[place].sampler for place in places]
        for number, answer in complete([prompts[place] for place in places], samplers):
            known[index := items[places[number]].index] = answer
            if log:
                log.add({'index': index, **answer})
            progress.update()
    return known


def answer_lines(items: Sequence[Item], completions: Mapping[int, dict[str, Any]]) -> list[str]:
    """A line of JSON for each item, in the order of the prompts."""
    answers = [{'index': item.index, **item.line, **completions[item.index]} for item in items]
    return [json.dumps(answer) for answer in answers]


def write_answers(output: str, lines: Sequence[str]) -> None:
    """The file of all answers, for which what waited beside it goes."""
    storage.write_atomically(epath.Path(output), ''.join(f'{line}\n' for line in lines))
    epath.Path(f'{output}.partial').unlink(missing_ok=True)
