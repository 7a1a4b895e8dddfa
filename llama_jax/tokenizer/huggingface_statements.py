"""What the files of a Hugging Face folder state of its tokens, beside the vocabulary itself: ids, names, flags.

Order of authority. Stop ids: every one that `generation_config.json` gives (else `config.json`), and the tokenizer's
EOS. BOS and EOS: what `tokenizer.json` puts around a text, the name in `tokenizer_config.json`, in
`special_tokens_map.json`, the id in `generation_config.json`, in `config.json`, and only then what such a token is
usually called.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from etils import epath

from llama_jax.errors import InputError
from llama_jax.json_file import parse_object, read_bytes, show_json
from llama_jax.tokenizer.tiktoken_tokenizer import meta_stop_ids
from llama_jax.tokenizer.vocabulary import MAX_TOKENS, Ends

_MAP, _CONFIG = 'special_tokens_map.json', 'tokenizer_config.json'
_ADDED, _GENERATION, _MODEL = 'added_tokens.json', 'generation_config.json', 'config.json'
STATING_FILES = (_CONFIG, _MAP, _ADDED, _GENERATION, _MODEL)
_USUAL = {
    'bos_token': ('<|begin_of_text|>', '<s>'),
    'eos_token': ('<|end_of_text|>', '</s>', '<|eot_id|>'),
    'pad_token': (),
}
_MAX_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is read whole wherever the text has it."""

    content: str
    special: bool


@dataclasses.dataclass(frozen=True)
class Statements:
    """What the files say.

    Attributes:
      names: of 'bos_token', 'eos_token' and 'pad_token', the first counts.
      ids: of the same, the first counts.
      stop_ids: that a model's generation is said to end at; empty where nothing is said.
      add_bos: None where nothing is said.
      add_eos: None where nothing is said.
      added: tokens by id.
      rows: of the embedding; 0 where nothing is said.
    """

    names: Mapping[str, list[str]]
    ids: Mapping[str, list[int]]
    stop_ids: tuple[int, ...]
    add_bos: bool | None
    add_eos: bool | None
    added: Mapping[int, AddedToken]
    rows: int

    def ends(
        self,
        id_of: Callable[[str], int | None],
        path: str,
        special_tokens: Mapping[str, int],
        *,
        size: int,
        around: tuple[list[int], list[int]] | None = None,
        own: Ends | None = None,
    ) -> Ends:
        """How texts begin and end.

        Args:
          id_of: a name's id.
          path: of the vocabulary, for messages.
          special_tokens: name to id.
          size: of the vocabulary, beyond which an id is none.
          around: ids that the vocabulary's own file puts before and behind a text; None where it says nothing of it.
          own: what the vocabulary's own file says else.

        Raises:
          InputError: no EOS is found.
        """
        found: dict[str, int | None] = {}
        for key, usual in _USUAL.items():
            by_name = [id for name in self.names[key] if (id := id_of(name)) is not None]
            by_usual = [id for name in usual if (id := id_of(name)) is not None]
            said = {'bos_token': own and own.bos_id, 'eos_token': own and own.eos_id}.get(key)
            owned = [] if said is None else [said]
            by_id = [id for id in self.ids[key] if id < size]
            found[key] = next(iter([*by_name, *owned, *by_id, *by_usual]), None)
        if around and around[0]:
            found['bos_token'] = around[0][0]
        eos_id = found['eos_token']
        if eos_id is None:
            wanted = show_json(', '.join([*self.names['eos_token'], *_USUAL['eos_token']]))[1:-1]
            raise InputError(f'{path} holds none of {wanted} for its eos_token; Llama needs one')
        stop_ids = tuple(sorted({eos_id, *self.stop_ids}))
        if not self.stop_ids:
            stop_ids = meta_stop_ids(eos_id, special_tokens)
        add_bos, add_eos = self.add_bos is not False, self.add_eos is True
        if around:
            add_bos, add_eos = bool(around[0]), bool(around[1])
        bos_id = found['bos_token']
        return Ends(bos_id, eos_id, stop_ids, add_bos and bos_id is not None, add_eos, found['pad_token'])


def stating_files(folder: epath.Path) -> dict[str, bytes]:
    """Those of a folder, by name; beside our `model.json` stands a run's `config.json`, which says of no tokenizer."""
    is_ours = (folder / 'model.json').is_file()
    found = {name: folder / name for name in STATING_FILES if not (is_ours and name == _MODEL)}
    return {name: read_bytes(file, _MAX_BYTES) for name, file in found.items() if file.is_file()}


def read_statements(files: Mapping[str, bytes], folder: str) -> Statements:
    """What files of these names say.

    Raises:
      InputError: one is damaged, or says what is no id, name or flag.
    """
    read = {
        name: parse_object(files[name], f'{folder}/{name}') if name in files else {} for name in STATING_FILES
    }
    names = {key: _names(read, key) for key in _USUAL}
    ids = {
        key: [
            id for file in (_GENERATION, _MODEL) for id in _ids(read[file], f'{key}_id', f'{folder}/{file}')
        ]
        for key in _USUAL
    }
    stop_ids = _ids(read[_GENERATION], 'eos_token_id', f'{folder}/{_GENERATION}')
    stop_ids = stop_ids or _ids(read[_MODEL], 'eos_token_id', f'{folder}/{_MODEL}')
    flags = {}
    for key in ('add_bos_token', 'add_eos_token'):
        flags[key] = value = read[_CONFIG].get(key)
        if not isinstance(value, bool | None):
            raise InputError(
                f'{folder}/{_CONFIG}: {key} is {show_json(value)}; it must be true, false or null'
            )
    rows = read[_MODEL].get('vocab_size')
    return Statements(
        names, ids, tuple(stop_ids), flags['add_bos_token'], flags['add_eos_token'], _added(read, folder),
        rows if type(rows) is int and rows > 0 else 0,
    )  # fmt: skip


def _names(read: Mapping[str, dict], key: str) -> list[str]:
    found = []
    for file in (_CONFIG, _MAP):
        name = read[file].get(key)
        name = name.get('content') if isinstance(name, dict) else name
        found += [name] if isinstance(name, str) and name else []
    return found


def _ids(values: dict, key: str, place: str) -> list[int]:
    """One id or several; a negative one stands for none, as in the first Llamas' files."""
    value = values.get(key)
    listed = [] if value is None else value if isinstance(value, list) else [value]
    for id in listed:
        if type(id) is not int or id >= 2**31:
            raise InputError(f'{place}: {key} is {show_json(value)}; it must be an id or a list of ids')
    return [id for id in listed if id >= 0]


def _added(read: Mapping[str, dict], folder: str) -> dict[int, AddedToken]:
    """Tokens that are said to be added: all of them, or those of an older list that knows no flags."""
    decoder = read[_CONFIG].get('added_tokens_decoder') or {}
    if not isinstance(decoder, dict):
        raise InputError(
            f'{folder}/{_CONFIG}: added_tokens_decoder is {show_json(decoder)}; it must be an object'
        )
    found = {}
    for id, token in decoder.items():
        content = token.get('content') if isinstance(token, dict) else token
        if (
            not isinstance(content, str)
            or not content
            or not re.fullmatch('[0-9]{1,9}', id)
            or int(id) >= MAX_TOKENS
        ):
            raise InputError(
                f'{folder}/{_CONFIG}: added_tokens_decoder holds {show_json({id: token})}; an id and a token belong '
                'there'
            )
        found[int(id)] = AddedToken(content, bool(token.get('special')) if isinstance(token, dict) else False)
    special = {name for file in (_CONFIG, _MAP) for name in _special_names(read[file])}
    for content, id in read[_ADDED].items():
        if type(id) is not int or not 0 <= id < MAX_TOKENS or not content:
            raise InputError(
                f'{folder}/{_ADDED} gives {show_json(content)} the id {show_json(id)}; that is none'
            )
        found.setdefault(id, AddedToken(content, content in special))
    return found


def _special_names(values: dict) -> list[str]:
    listed = values.get('additional_special_tokens')
    tokens = [value for key, value in values.items() if key.endswith('_token')]
    tokens += listed if isinstance(listed, list) else []
    names = [token.get('content') if isinstance(token, dict) else token for token in tokens]
    return [name for name in names if isinstance(name, str)]
