"""`adapter_config.json` of PEFT: which modules of a Llama have an adapter, of which rank and scale.

Modules are named as in transformers. Where the file holds regular expressions, they are matched as PEFT does, within
a limit of time: a stranger's may take for ever.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import regex
from etils import epath

from llama_jax.errors import InputError
from llama_jax.json_file import read_object, show_json

CONFIG_FILE = 'adapter_config.json'
_MAX_PATTERN = 4096  # characters
_MAX_COUNTED = 2  # parts of a pattern that are repeated so and so often, at most 99 times each
_SECONDS = 5.0  # for one match, which takes microseconds
_LAYER = r'(?:^|.*?\.)%s\.(?P<index>\d+)\.'
_HEADS = ('lm_head', 'score')  # which `all-linear` leaves out
_PLAIN_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal')  # which leave the base as it is
# What changes what an adapter means, and what it must be to be read.
_MUST_BE_OFF = (
    'layer_replication', 'target_parameters', 'megatron_config', 'arrow_config', 'use_qalora',
    'alora_invocation_tokens', 'lora_bias', 'use_bdlora', 'velora_config', 'monteclora_config', 'kasa_config',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says.

    Attributes:
      base: where the base is, a path or a name on the hub; '' where it is not said.
      scores: whether it makes a reward model of its base.
      rank: of adapters without a pattern of their own.
      alpha: likewise.
      rslora: `scale` is alpha / sqrt(rank), not alpha / rank.
      ranks: by regular expression of a module's name.
      alphas: likewise.
      targets: names or ends of names of modules, or one regular expression, or 'all-linear'.
      excluded: likewise, those that are not meant.
      layers: numbers of those with adapters; None: all.
      layers_patterns: what stands before the number of a layer; (): anything.
      saved: names or ends of names of modules that were trained whole.
      tokens: ids of the embedding's rows that were trained.
      ties: whether what is tied to a trained embedding follows it.
      path: the file, for messages.
    """

    base: str
    scores: bool
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_patterns: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: tuple[int, ...]
    ties: bool
    path: epath.Path

    def selects(self, module: str) -> bool:
        """Whether a module has an adapter, as PEFT tells."""
        if self.excluded and self._is_among(self.excluded, module):
            return False
        if any(self._match(rf'(^|.*\.)({name})($|\..*)', module) for name in self.saved):
            return False
        if self.targets == 'all-linear':
            return module not in (*_HEADS, 'model.embed_tokens')
        if not self._is_among(self.targets, module):
            return False
        if isinstance(self.targets, str) or module in self.targets or self.layers is None:
            return True
        for pattern in self.layers_patterns or (r'[^.]*',):
            if found := self._match(_LAYER % f'(?:{pattern})', module, prefix=True):
                return int(found['index']) in self.layers
        return False

    def saves(self, module: str) -> bool:
        """Whether a module was trained whole."""
        return any(module.endswith(name) for name in self.saved)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter."""
        return self.ranks.get(self._pattern_of(module, self.ranks), self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's adapter is multiplied by."""
        alpha = self.alphas.get(self._pattern_of(module, self.alphas), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _pattern_of(self, module: str, patterns: Iterable[str]) -> str:
        return next((p for p in patterns if self._match(rf'(.*\.)?({p})$', module, prefix=True)), '')

    def _is_among(self, names: str | Sequence[str], module: str) -> bool:
        if isinstance(names, str):
            return bool(self._match(names, module))
        return any(module == name or module.endswith(f'.{name}') for name in names)

    def _match(self, pattern: str, module: str, prefix: bool = False) -> Any:
        """The match of a pattern with a module's name, or with how it begins.

        Raises:
          InputError: it is no regular expression, or would take too much time, or memory: so many copies of a part.
        """
        counted = pattern.replace('\\{', '').count('{')
        try:
            if counted > _MAX_COUNTED or len(re.findall(r'\{\d{1,2}(,\d{0,2})?\}', pattern)) < counted:
                raise TimeoutError
            return (regex.match if prefix else regex.fullmatch)(pattern, module, timeout=_SECONDS)
        except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
            why = 'takes too much' if isinstance(error, TimeoutError) else 'is no regular expression'
            raise InputError(
                f'{self.path}: the pattern {show_json(pattern)} {why}; name the modules instead'
            ) from None


def read_config(folder: epath.Path) -> PeftConfig:
    """What the folder's `adapter_config.json` says.

    Raises:
      InputError: it is missing or damaged, or describes what is no low-rank adapter, or what cannot be merged.
    """
    path = folder / CONFIG_FILE
    values = read_object(path)
    kind = values.get('peft_type')
    if kind != 'LORA':
        raise InputError(f'{path}: peft_type is {show_json(kind)}; only LORA is read')
    for key in _MUST_BE_OFF:
        if values.get(key):
            raise InputError(
                f'{path}: {key} is {show_json(values[key])}, which is not read; merge it by PEFT'
            )
    if (task := values.get('task_type')) not in (None, 'CAUSAL_LM', 'SEQ_CLS'):
        raise InputError(
            f'{path}: task_type is {show_json(task)}; those of language models, CAUSAL_LM, and of '
            'reward models, SEQ_CLS, are read'
        )
    start = values.get('init_lora_weights', True)
    if start not in _PLAIN_STARTS or isinstance(start, int) and not isinstance(start, bool):
        raise InputError(
            f'{path}: init_lora_weights is {show_json(start)}, which changed the base as well; save the adapter by '
            'PEFT with path_initial_model_for_weight_conversion, or merge it there'
        )
    base = values.get('base_model_name_or_path') or ''
    if not isinstance(base, str) or len(base) > 4096 or not base.isprintable():
        raise InputError(f'{path}: base_model_name_or_path is {show_json(base)}, it must be a path or a name')
    read = _Reader(values, path)
    return PeftConfig(
        base=base,
        scores=task == 'SEQ_CLS',
        rank=read.rank('r', values.get('r', 8)),
        alpha=read.alpha('lora_alpha', values.get('lora_alpha', 8)),
        rslora=read.flag('use_rslora'),
        ranks={key: read.rank('rank_pattern', value) for key, value in read.patterns('rank_pattern').items()},
        alphas={
            key: read.alpha('alpha_pattern', value) for key, value in read.patterns('alpha_pattern').items()
        },
        targets=read.names('target_modules', ('q_proj', 'v_proj')),
        excluded=read.names('exclude_modules', ()),
        layers=read.layers(),
        layers_patterns=_as_tuple(read.names('layers_pattern', ())),
        saved=_as_tuple(read.names('modules_to_save', ())),
        tokens=read.tokens(),
        ties=read.flag('ensure_weight_tying'),
        path=path,
    )


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Values of a file by their key, each refused in one line where it is not what it must be."""

    values: Mapping[str, Any]
    path: epath.Path

    def refusal(self, key: str, allowed: str) -> InputError:
        return InputError(f'{self.path}: {key} is {show_json(self.values.get(key))}, it must be {allowed}')

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= 1 << 16:
            raise self.refusal(key, f'ranks from 1 to {1 << 16}')
        return value

    def alpha(self, key: str, value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e6:
            raise self.refusal(key, 'numbers of at most 1e6')
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key) or False
        if not isinstance(value, bool):
            raise self.refusal(key, 'true or false')
        return value

    def patterns(self, key: str) -> dict[str, Any]:
        value = self.values.get(key) or {}
        if not isinstance(value, dict) or any(len(pattern) > _MAX_PATTERN for pattern in value):
            raise self.refusal(key, 'an object of patterns of names')
        return value

    def names(self, key: str, default: tuple[str, ...]) -> str | tuple[str, ...]:
        value = self.values.get(key) or default
        if isinstance(value, str) and len(value) <= _MAX_PATTERN:
            return 'all-linear' if value.lower() == 'all-linear' else value
        if isinstance(value, list | tuple) and all(
            isinstance(v, str) and 0 < len(v) <= _MAX_PATTERN for v in value
        ):
            return tuple(value)
        raise self.refusal(key, 'a list of names, or one pattern')

    def layers(self) -> tuple[int, ...] | None:
        value = self.values.get('layers_to_transform')
        if value is None or value == []:
            return None
        value = value if isinstance(value, list) else [value]
        if any(type(layer) is not int or layer < 0 for layer in value):
            raise self.refusal('layers_to_transform', 'numbers of layers')
        return tuple(value)

    def tokens(self) -> tuple[int, ...]:
        value = self.values.get('trainable_token_indices') or []
        if isinstance(value, dict) and set(value) == {'embed_tokens'}:
            value = value['embed_tokens']
        if not isinstance(value, list) or any(type(row) is not int or not 0 <= row < 2**31 for row in value):
            raise self.refusal('trainable_token_indices', 'ids of tokens of embed_tokens')
        return tuple(value)
