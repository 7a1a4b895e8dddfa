"""A folder of PEFT, `adapter_config.json` and `adapter_model.safetensors`: read, merged into its base, and written.

Names of tensors are `base_model.model.` and the module's name in transformers, then `.lora_A.weight` [r, in] and
`.lora_B.weight` [out, r]; of the embedding `.lora_embedding_A` [r, V] and `.lora_embedding_B` [D, r].
"""

import collections
import dataclasses
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from etils import epath

from llama_jax.convert.adapter import Adapter, LowRank, Place, check_written_apart, merged
from llama_jax.convert.mapping import Source, layers_of, weights_of
from llama_jax.convert.peft_config import CONFIG_FILE, PeftConfig, read_config
from llama_jax.convert.safetensors_file import Entry, open_safetensors, write_safetensors
from llama_jax.convert.tensors import ALL, Computed, Tensor
from llama_jax.convert.torch_file import open_torch_file, weights
from llama_jax.errors import InputError, did_you_mean
from llama_jax.models.config import LlamaConfig
from llama_jax.placement import cast

WEIGHTS_FILE, TORCH_FILE = 'adapter_model.safetensors', 'adapter_model.bin'
PREFIX = 'base_model.model.'
_PARTS = ('lora_A', 'lora_B', 'lora_embedding_A', 'lora_embedding_B', 'lora_magnitude_vector')
# Behind a module's name: the part, and of some releases the adapter's name.
_NAME = re.compile(
    rf'(?P<module>[\w.]+?)\.(?:(?P<part>{"|".join(_PARTS)})(?:\.default)?(?:\.weight)?|'
    r'(?:modules_to_save(?:\.default)?\.|base_layer\.)?(?P<whole>weight)|'
    r'token_adapter\.(?P<rows>trainable_tokens_delta)(?:\.default)?)'
)
_EMBED = 'model.embed_tokens'


def base_of(folder: epath.Path) -> str:
    """Where the base is that an adapter was trained beside: a path, or hf://... where the file says so.

    Raises:
      InputError: it is not said, or not there.
    """
    name = read_config(folder).base
    if name.startswith('hf://'):
        return name
    for place in (epath.Path(name), folder / name) if name else ():
        if place.exists():
            return str(place)
    found = f'names its base {name}, which is no path here' if name else 'does not name its base'
    raise InputError(
        f'{folder / CONFIG_FILE} {found}; give the base beside the adapter, or write into base_model_name_or_path a '
        'path (of any format), or hf://ORGANISATION/MODEL to download it'
    )


def open_merged(folder: epath.Path, base: Source) -> Source:
    """The model that the adapter in a folder and its base are together; reads headers only.

    Raises:
      InputError: the adapter is damaged, or not of this base.
    """
    adapter = open_adapter(folder, base.config)
    if ('score', 0) in adapter.whole and not base.config.scalar_head:  # its head gives way to the adapter's
        tensors = {path: layers for path, layers in base.tensors.items() if path != 'head'}
        tensors['score'] = [adapter.whole['score', 0]]
        base = Source(_scoring(base.config), tensors, base.origin)
    return merged(base, adapter)


def _scoring(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, scalar_head=True, tie_embeddings=False)


def open_adapter(folder: epath.Path, config: LlamaConfig) -> Adapter:
    """The adapter in a folder, of a model of this architecture.

    Raises:
      InputError: a file is missing or damaged; a tensor is missing, surplus, misnamed, or not as is configured.
    """
    settings = read_config(folder)
    if config.scalar_head and not settings.scores:
        raise InputError(f'{folder} is an adapter of a language model, and its base is a reward model')
    config = _scoring(config) if settings.scores else config
    modules = modules_of(config)
    parts, whole, rows = _sorted_tensors(_open_weights(folder), modules, str(folder))
    low_rank = {}
    for module, place in modules.items():
        found = parts.pop(module, {})
        if settings.selects(module) or found:
            low_rank[place] = _low_rank(module, found, settings, str(folder))
        elif (settings.saves(module) or module == 'score') and place not in whole:
            raise InputError(
                f'{folder} has no tensor {PREFIX}{module}.weight, which {settings.path.name} says was trained'
            )
    return Adapter(
        low_rank, whole, str(folder), rows=_trained_rows(rows, settings, config), ties=settings.ties
    )


def modules_of(config: LlamaConfig) -> dict[str, Place]:
    """Every module of transformers' model, with its weight and layer in ours."""
    places = [(w, layer) for w in weights_of(config) for layer in layers_of(w, config)]
    modules = {w.name('huggingface', layer).removesuffix('.weight'): (w.path, layer) for w, layer in places}
    return modules if 'lm_head' in modules or config.scalar_head else modules | {'lm_head': ('head', 0)}


def _open_weights(folder: epath.Path) -> Mapping[str, Tensor]:
    if (folder / WEIGHTS_FILE).exists():
        return open_safetensors(folder / WEIGHTS_FILE)
    if (folder / TORCH_FILE).exists():
        return weights(open_torch_file(folder / TORCH_FILE), str(folder / TORCH_FILE), ())
    raise InputError(f'{folder} has neither {WEIGHTS_FILE} nor {TORCH_FILE}; copy the file there')


def _sorted_tensors(
    found: Mapping[str, Tensor], modules: Mapping[str, Place], folder: str
) -> tuple[dict[str, dict[str, Tensor]], dict[Place, Tensor], Tensor | None]:
    """(by module the parts of its adapter, whole weights, rows of the embedding).

    Raises:
      InputError: a tensor has no place in this model.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[Place, Tensor] = {}
    rows = None
    for name, tensor in found.items():
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        module = match['module'] if match and name.startswith(PREFIX) else ''
        if match is None or module not in modules or (match['rows'] and module != _EMBED):
            known = [f'{PREFIX}{m}.{p}.weight' for m in modules for p in ('lora_A', 'lora_B')]
            bias = '; a Llama has no biases' if 'bias' in name else ''
            raise InputError(
                f'{folder}: tensor {name} has no place in this model{bias}: {did_you_mean(name, known)}'
            )
        if tensor.dtype.kind != 'f' and tensor.dtype.name != 'bfloat16':
            raise InputError(f'{folder}: tensor {name} holds {tensor.dtype}, no weights')
        if match['rows']:
            rows = tensor
        elif match['whole']:
            if modules[module] in whole:
                raise InputError(f'{folder}: {name} and another tensor are both the weight of {module}')
            whole[modules[module]] = (
                _one_row(tensor, f'{folder}: tensor {name}') if module == 'score' else tensor
            )
        else:
            parts.setdefault(module, {})[match['part']] = tensor
    return parts, whole, rows


def _one_row(tensor: Tensor, where: str) -> Computed:
    """A score's matrix as the vector that it is."""
    if len(tensor.shape) != 2 or tensor.shape[0] != 1:
        raise InputError(
            f'{where} has shape {list(tensor.shape)}; a reward model gives one score, it must be [1, D]'
        )
    return Computed(tuple(tensor.shape[1:]), tensor.dtype, lambda rows, _: tensor.read(ALL, rows)[0])


def _low_rank(module: str, found: Mapping[str, Tensor], settings: PeftConfig, folder: str) -> LowRank:
    """The adapter of one module, out of its parts."""
    is_embed = module == _EMBED
    of_a, of_b = _PARTS[2:4] if is_embed else _PARTS[:2]
    if not settings.selects(module):
        name = f'{PREFIX}{module}.{next(iter(found))}'
        raise InputError(f'{folder}: tensor {name} is of a module that {settings.path.name} does not name')
    for part in (of_a, of_b):
        if part not in found:
            raise InputError(
                f'{folder} has no tensor {PREFIX}{module}.{part}.weight, which {settings.path.name} says was trained'
            )
    if surplus := set(found) - {of_a, of_b, 'lora_magnitude_vector'}:
        raise InputError(f'{folder}: tensor {PREFIX}{module}.{min(surplus)} has no place in such a module')
    magnitude = found.get('lora_magnitude_vector')
    if is_embed and magnitude is not None:
        raise InputError(f'{folder}: DoRA of the embedding is not read; merge it by PEFT')
    a, b = found[of_a], found[of_b]
    rank = settings.rank_of(module)
    for part, tensor, axis in ((of_a, a, 0), (of_b, b, 1)):
        if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
            raise InputError(
                f'{folder}: tensor {PREFIX}{module}.{part}.weight has shape {list(tensor.shape)}; with the rank {rank} '
                f'of {settings.path.name} it must be {["rank", "in"] if axis == 0 else ["out", "rank"]}'
            )
    a, b = (_turned(b), _turned(a)) if is_embed else (a, b)
    return LowRank(a, b, settings.scale_of(module), magnitude, f'{PREFIX}{module}')


def _turned(tensor: Tensor) -> Computed:
    """The transpose of a matrix."""
    shape = (tensor.shape[1], tensor.shape[0])
    return Computed(shape, tensor.dtype, lambda rows, columns: tensor.read(columns, rows).T)


def _trained_rows(
    rows: Tensor | None, settings: PeftConfig, config: LlamaConfig
) -> tuple[tuple[int, ...], Tensor] | None:
    if rows is None and not settings.tokens:
        return None
    shape = (len(settings.tokens), config.embed_dim)
    found = tuple(rows.shape) if rows is not None else None
    if rows is None or found != shape or max(settings.tokens) >= config.vocab_size:
        raise InputError(
            f'{settings.path.parent}: tensor {PREFIX}{_EMBED}.token_adapter.trainable_tokens_delta has shape {found}, '
            f'for trainable_token_indices of {settings.path.name} it must be {shape}, and ids below {config.vocab_size}'
        )
    return settings.tokens, rows


# Writing.


def write(
    adapter: Adapter,
    config: LlamaConfig,
    folder: epath.Path,
    *,
    base: str,
    dtype: np.dtype | None = None,
    files: Mapping[str, bytes] = types.MappingProxyType({}),
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes an adapter as a folder that PEFT loads.

    Args:
      adapter: what was trained.
      config: of its base.
      folder: local, exists and is empty.
      base: the base's place, as `adapter_config.json` names it.
      dtype: float32, float16 or bfloat16; None keeps each tensor's own.
      files: written beside, by name, such as the tokenizer's.
      progress: called with the number of bytes written since the last call.

    Raises:
      InputError: PEFT has no place for what was trained; or a value is beyond the type.
    """
    check_written_apart(adapter, config, 'peft')
    entries, ranks, alphas = [], {}, {}
    for module, place in modules_of(config).items():
        added = adapter.low_rank.get(place)
        if (
            tensor := adapter.whole.get(place)
        ) is not None:  # PEFT's own way where there is an adapter as well
            name = f'{module}.weight' if added is None else f'{module}.base_layer.weight'
            entries.append(_entry(f'{PREFIX}{name}', tensor, dtype))
        if added is None:
            continue
        is_embed = module == _EMBED
        a, b = (_turned(added.b), _turned(added.a)) if is_embed else (added.a, added.b)
        ending = '' if is_embed else '.weight'
        for part, tensor in zip(_PARTS[2:4] if is_embed else _PARTS[:2], (a, b), strict=True):
            entries.append(_entry(f'{PREFIX}{module}.{part}{ending}', tensor, dtype))
        ranks[module] = added.a.shape[0]
        alphas[module] = float(f'{added.scale * ranks[module]:.15g}')  # 16, not 15.999999999999998
    write_safetensors(folder / WEIGHTS_FILE, entries, progress)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    rank, alpha = _usual(ranks), _usual(alphas)
    settings = {
        'peft_type': 'LORA',
        'task_type': 'SEQ_CLS' if config.scalar_head else 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'r': rank,
        'lora_alpha': alpha,
        'rank_pattern': {module: own for module, own in ranks.items() if own != rank},
        'alpha_pattern': {module: own for module, own in alphas.items() if own != alpha},
        'target_modules': _named(ranks, config),
        'modules_to_save': [
            m for m, place in modules_of(config).items() if place in adapter.whole and m not in ranks
        ]
        or None,
        'lora_dropout': 0.0,
        'bias': 'none',
        'fan_in_fan_out': False,
        'init_lora_weights': True,
        'use_rslora': False,
        'use_dora': False,
        'inference_mode': True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + '\n')


def _entry(name: str, tensor: Tensor, dtype: np.dtype | None) -> Entry:
    chosen = np.dtype(dtype or tensor.dtype)
    is_score = name == f'{PREFIX}score.weight'  # a matrix of one row

    def read(rows: slice) -> np.ndarray:
        return cast(tensor.read()[None] if is_score else tensor.read(rows), chosen, name)

    return Entry(name, (1, *tensor.shape) if is_score else tuple(tensor.shape), chosen, read)


def _usual(values: Mapping[str, int | float]) -> int | float:
    """The most frequent one."""
    return collections.Counter(values.values()).most_common(1)[0][0]


def _named(modules: Iterable[str], config: LlamaConfig) -> list[str]:
    """The modules by the ends of their names where all layers have one, else each by its own."""
    chosen, names = set(modules), set()
    for module in chosen:
        kind = module.rpartition('.')[2]
        alike = {m for m in modules_of(config) if m.rpartition('.')[2] == kind}
        names.add(kind if alike <= chosen else module)
    return sorted(names)
