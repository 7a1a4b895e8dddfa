"""open(), load(): any checkpoint of a Llama, its parts found once and its weights placed by any partitioner."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from llama_jax.checkpoint.model_file import (
    CHECKPOINTS,
    MODEL_FILE,
    read_adapters,
    read_config,
    read_quantization,
)
from llama_jax.checkpoint.weights import check_step, latest_step, open_params
from llama_jax.convert import bitsandbytes, gguf, gguf_codes, gguf_file, huggingface, llama2c, meta, peft
from llama_jax.convert.adapter import Adapter, native_adapter
from llama_jax.convert.detect import Format, detect
from llama_jax.convert.mapping import WEIGHTS, Leaf, Source, leaf_shape, native_source, weights_of
from llama_jax.errors import InputError, checked_names, refusals_of
from llama_jax.models.config import LlamaConfig
from llama_jax.models.llama import abstract_params, param_axes
from llama_jax.models.reward import model_of
from llama_jax.partitioning import Partitioner, as_mesh
from llama_jax.placement import BlockArray, GrownTable, place_all
from llama_jax.pretrained.adapters import check_fingerprint, fingerprint_of, trained_params, whole_leaves
from llama_jax.pretrained.beside import folder_of_tokenizer, has_tokenizer, run_of
from llama_jax.pretrained.beside import load_tokenizer as load_tokenizer
from llama_jax.pretrained.hub import check_there, resolve
from llama_jax.pretrained.loading_bar import show_loading
from llama_jax.quantize.base import base_leaves, base_target
from llama_jax.quantize.files import dequantized_leaves, open_codes
from llama_jax.quantize.forms import Form, name_of, parse_forms, represent_all
from llama_jax.runtime import refused_by_all
from llama_jax.tokenizer import tokenizer as tokenizers
from llama_jax.tokenizer.chat_template import template_beside
from llama_jax.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params, float_dtype

logger = logging.getLogger(__name__)

_TABLES = ('embed', 'head')  # a row for every id of the vocabulary


@checked_names()
def load(
    path: 'epath.PathLike | Checkpoint',
    *,
    mesh: Mesh | Mapping[str, int] | None = None,
    partitioner: Partitioner | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    tokenizer: epath.PathLike = '',
    keep_quantized: bool = False,
    progress: bool = True,
) -> tuple[LlamaConfig, Params, Tokenizer | None]:
    """Reads anything that is a Llama: the weights, the architecture and the tokenizer.

    Each process reads only what its devices hold, straight from the files of whatever format, and that once.

    Args:
      path: a run's workdir, or one step in it (`WORKDIR/checkpoints/STEP`); a folder of Meta or Hugging Face; a
        `.gguf`; a `.pt` or `.bin` of llama2.c; a folder of PEFT, whose adapter is merged into its base;
        `hf://ORGANISATION/MODEL` (with `@REVISION` if need be). Local or `gs://...`. Or what `open` returned.
      mesh: where the weights are placed, by `partitioning.DEFAULT_RULES`, or the sizes of its axes, as
        {'fsdp': 4, 'tensor': 2}; by default whole on the first device.
      partitioner: in the place of `mesh`, where other rules place them.
      dtype: that floating-point weights are cast to; a name will do, as 'bfloat16' or 'bf16'.
      tokenizer: file or folder to use instead of the checkpoint's own.
      keep_quantized: what a GGUF holds as Q8_0 or Q4_0 stays integers with their scales, else it is cast as all others.
        What our own checkpoints hold in integers stays so either way.
      progress: from 200 MB on a bar is shown to who looks on, in a notebook or a terminal.

    Returns:
      The architecture, the weights, and the tokenizer; None where the checkpoint has none and none is given. Weights in
      integers are `ops.quantized.QuantizedArray`.

    Raises:
      InputError: there is no Llama at the path, or it is damaged; or the tokenizer is another model's.
    """
    if mesh is not None and partitioner is not None:
        raise InputError('mesh and partitioner are both given; a partitioner has a mesh of its own')
    checkpoint = path if isinstance(path, Checkpoint) else open(path)
    dtype = float_dtype(dtype)
    partitioner = partitioner or Partitioner(as_mesh(mesh))
    model = model_of(checkpoint.config)
    shapes = abstract_params(model)
    shardings = partitioner.tree_shardings(shapes, param_axes(model))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)
    target = represent_all(target, checkpoint.kept_forms(keep_quantized))
    # The tokenizer first: it takes a moment, and where it is wrong nobody should wait for the weights.
    vocabulary = load_tokenizer(tokenizer) if tokenizer else checkpoint.tokenizer
    if vocabulary and vocabulary.vocab_size > (rows := checkpoint.config.vocab_size):
        logger.warning(
            'the tokenizer %s has %d ids, the model %d; texts that need the others are refused',
            vocabulary.path, vocabulary.vocab_size, rows,
        )  # fmt: skip
    with show_loading(target, progress) as count:
        return checkpoint.config, checkpoint.params(target, progress=count), vocabulary


def open(path: epath.PathLike, base: epath.PathLike = '') -> 'Checkpoint':
    """A checkpoint of any format, whose weights stay in their files.

    Args:
      path: see `load`.
      base: of an adapter, the checkpoint of any format to merge it into; by default the one that it names.

    Raises:
      InputError: there is nothing at the path, or nothing that is a Llama.
    """
    given = resolve(path)
    place = run_of(given)
    check_there(path, place)
    kind, place = detect(place)
    opened = Checkpoint(given, kind, place, str(base))
    if base and not opened.is_adapter:
        raise InputError(f'{path} is no adapter; a base, {base}, is of an adapter alone')
    return opened


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; each part of it is found when it is first asked for, and once.

    Attributes:
      path: where it was looked for.
      format: told from what is there.
      place: the folder or file that is it: of a step, the run's workdir.
      base_path: of an adapter, where its base is; '': where it says.
    """

    path: epath.Path
    format: Format
    place: epath.Path
    base_path: str = ''

    @functools.cached_property
    def config(self) -> LlamaConfig:
        """The architecture."""
        return read_config(self.place) if self.format == 'orbax' else self.source.config

    @functools.cached_property
    def adapters(self) -> dict[str, Any]:
        """Of a workdir that holds adapters alone: what `read_adapters` says of them; else {}."""
        return read_adapters(self.place) if self.format == 'orbax' else {}

    @property
    def is_adapter(self) -> bool:
        """Whether it holds what was trained beside a base, and becomes a model with that alone."""
        return self.format == 'peft' or bool(self.adapters)

    @functools.cached_property
    def base(self) -> 'Checkpoint':
        """What the adapters are of.

        Raises:
          InputError: it is not where it was, or is another.
        """
        is_peft = self.format == 'peft'
        given = self.base_path or (peft.base_of(self.place) if is_peft else self.adapters['base'])
        try:
            opened = open(given)
        except InputError as error:
            raise InputError(
                f'{self.path} holds adapters of {given}, which cannot be opened: {error}; put it back there, or write '
                f'its new place into {self.place / (peft.CONFIG_FILE if is_peft else MODEL_FILE)}'
            ) from error
        if is_peft and opened.format == 'peft':
            raise InputError(
                f'{self.path}: its base {given} is an adapter too; convert that to a model first'
            )
        if not is_peft and not self.base_path:
            check_fingerprint(opened.fingerprint, given, self.adapters['fingerprint'], self.path)
        elif not is_peft and opened.fingerprint != (wanted := self.adapters['fingerprint']):
            logger.warning(
                '%s is not the model that the adapters of %s were trained beside (fingerprint %s, that had %s); they '
                'are merged into it as it was given', given, self.path, opened.fingerprint[:12], wanted[:12],
            )  # fmt: skip
        return opened

    @functools.cached_property
    def adapter(self) -> Adapter:
        """What was trained beside `base`, as matrices, to be written as an adapter again."""
        if self.format == 'peft':
            return peft.open_adapter(self.place, self.base.config)
        return native_adapter(self.config, open_params(self._step), self.adapters, str(self.path))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of its values: a few rows of each weight. Those of another model differ, and those of a copy do not."""
        return fingerprint_of(self.source)

    @functools.cached_property
    def forms(self) -> dict[str, Form]:
        """Of the weights that it holds in integers, by path: all that ours has so, and Q8_0 and Q4_0 of GGUF."""
        if self.format == 'gguf':
            return {path: Form(*form) for path, form in gguf_codes.stored_forms(self.source).items()}
        if self.format != 'orbax' or not (description := read_quantization(self.place)):
            return {}
        with refusals_of(self.place / MODEL_FILE):
            weights = weights_of(self.config)
            return parse_forms(description, {w.path: leaf_shape(w, self.config) for w in weights})

    def kept_forms(self, keep_quantized: bool) -> dict[str, Form]:
        """Of the weights that `load` leaves in integers.

        Raises:
          InputError: they are to be kept, and there are none.
        """
        if keep_quantized and not self.forms:
            raise InputError(
                f'{self.path} holds no weights in integers to be kept, as Q8_0 and Q4_0 of GGUF are'
            )
        if keep_quantized and (others := [w.path for w in WEIGHTS if w.num_in and w.path not in self.forms]):
            logger.info('%s: cast, as they are not Q8_0 or Q4_0: %s', self.path, ', '.join(others))
        return self.forms if self.format == 'orbax' or keep_quantized else {}

    @functools.cached_property
    def source(self) -> Source:
        """The weights as matrices, to be converted; only headers are read."""
        match self.format:
            case 'orbax':
                return native_source(
                    self.config, dequantized_leaves(self._leaves, self.forms), str(self.path)
                )
            case 'meta':
                return meta.open_source(self.place)
            case 'huggingface':
                return huggingface.open_source(self.place)
            case 'gguf':
                return gguf.open_source(self.place, self._gguf_header)
            case 'llama2c':
                return llama2c.open_source(self.place)
            case 'peft':
                return peft.open_merged(self.place, self.base.source)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in or beside it; None where there is none.

        Raises:
          InputError: it is damaged, or there are several.
        """
        if self.format == 'gguf':
            metadata, _ = self._gguf_header
            if metadata.get('tokenizer.ggml.model') in (None, 'none', 'no_vocab'):
                return None
            return tokenizer_from_gguf(metadata, str(self.place))
        folder = folder_of_tokenizer(self.place if self.place.is_dir() else self.place.parent)
        if has_tokenizer(folder):
            return tokenizers.load_tokenizer(folder)
        return self.base.tokenizer if self.format == 'peft' else None

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        """What goes along into a folder of Hugging Face, as it stands in this one; empty for other formats."""
        if self.format == 'peft':
            return huggingface.carried_files(self.place) if has_tokenizer(self.place) else self.base.files
        return huggingface.carried_files(self.place) if self.format == 'huggingface' else {}

    @functools.cached_property
    def template(self) -> str:
        """The chat template, in Jinja; '' where it has none."""
        if self.format == 'gguf':
            template = self._gguf_header[0].get('tokenizer.chat_template')
            return template if isinstance(template, str) else ''
        if self.format == 'peft':
            return template_beside(self.place) or self.base.template
        return template_beside(self.place) if self.format in ('huggingface', 'orbax') else ''

    def params(
        self,
        target: Params,
        *,
        grow_vocabulary: bool = False,
        progress: Callable[[int], Any] = lambda _: None,
    ) -> Params:
        """The weights, cast and placed as `target` says; every process of its shardings calls this.

        Args:
          target: abstract params with shardings; some of the model's weights, or all.
          grow_vocabulary: tables may have more rows than the checkpoint's; these are the mean of those.
          progress: called with the bytes of each block placed.

        Raises:
          InputError: the checkpoint is damaged, or of another shape.
        """
        if self.format == 'orbax' and self.config.tie_embeddings and 'head' in self._leaves:
            raise InputError(
                f'{self.path}: model.json says that the head is the embedding (tie_embeddings), but the weights hold a '
                'head of their own; one of them is not what was trained'
            )
        return self._placed(target, lambda: self._find(target, grow_vocabulary), progress)

    def base_params(self, target: Params, dtype: str, *, grow_vocabulary: bool = False) -> Params:
        """The weights as a base of adapters is kept, quantised block by block as they are read.

        What is to be nf4, and what bitsandbytes wrote as that, stays the codes that it is.

        Args:
          target: abstract params with shardings, each weight as one array.
          dtype: one of `quantize.base.BASE_DTYPES`.
          grow_vocabulary: as for `params`.

        Raises:
          InputError: as `params`; or it has weights that no integers stand for.
        """

        def find() -> dict[str, BlockArray]:
            return base_leaves(self._find(target, grow_vocabulary), dtype, self._nf4_codes)

        stored = bitsandbytes.stored_blocks(self.source) if self._nf4_codes else {}
        return self._placed(base_target(target, dtype, stored), find)

    @functools.cached_property
    def _nf4_codes(self) -> dict[str, BlockArray]:
        """What it holds in nf4, as `bitsandbytes.stored_codes`."""
        return bitsandbytes.stored_codes(self.source) if self.format == 'huggingface' else {}

    def trained_params(self, target: Params) -> Params:
        """Of a workdir that holds adapters, what was trained, placed as `target` says.

        Raises:
          InputError: it has none of these, or of another shape.
        """
        return trained_params(self.place, target, self._step)

    def _placed(
        self,
        target: Params,
        find: Callable[[], dict[str, BlockArray]],
        progress: Callable[[int], Any] = lambda _: None,
    ) -> Params:
        wanted, structure = jax.tree_util.tree_flatten_with_path(target)
        alone = all(leaf.sharding.is_fully_addressable for _, leaf in wanted)
        together = contextlib.nullcontext if alone else refused_by_all
        with together():
            found = find()
        with together():
            arrays = [(name_of(keys), found[name_of(keys)], leaf) for keys, leaf in wanted]
            return jax.tree.unflatten(structure, place_all(arrays, progress))

    def _find(self, target: Params, grow_vocabulary: bool) -> dict[str, BlockArray]:
        """Every weight that is wanted, by its name."""
        found = {}
        for keys, leaf in jax.tree_util.tree_leaves_with_path(target):
            name, shape = name_of(keys), tuple(leaf.shape)
            array = self._leaves.get(name)
            if array is not None and grow_vocabulary and name in _TABLES and shape[0] > array.shape[0]:
                added = shape[0] - array.shape[0]
                logger.info(
                    '%s: %d rows added to %s, the mean of its %d', self.path, added, name, array.shape[0]
                )
                array = GrownTable(array, shape[0])
            if array is None and name in self.forms:
                raise InputError(
                    f'{self.path} holds {name} as {self.forms[name]}, from which there is no training; convert it to '
                    'orbax first, which writes what the integers stand for'
                )
            if array is None or tuple(array.shape) != shape:
                has = tuple(array.shape) if array is not None else None
                raise InputError(f'{self.path}: weight {name} has shape {has}, the model {shape}')
            found[name] = array
        return found

    @functools.cached_property
    def _leaves(self) -> Mapping[str, BlockArray]:
        """The leaves of our params by path."""
        if self.format == 'orbax':
            with refusals_of(self.path):
                stored = open_codes(open_params(self._step), self.forms)
            return self._beside_base(stored) if self.adapters else stored
        plain: dict[str, BlockArray] = {w.path: Leaf(self.source, w) for w in weights_of(self.source.config)}
        return plain | gguf_codes.stored_codes(self.source) if self.format == 'gguf' else plain

    def _beside_base(self, trained: Mapping[str, BlockArray]) -> dict[str, BlockArray]:
        """The whole model's leaves: the base as it was kept, with what was trained."""
        with refusals_of(self.path):
            # A base that is given is taken as it stands, whatever the one in training was kept as.
            kept = self.adapters | ({'weights': 'float32'} if self.base_path else {})
            return whole_leaves(self.config, self.base.source, trained, kept)

    @functools.cached_property
    def _step(self) -> epath.Path:
        """Of a workdir: the folder of the step that the path names, or else of the newest."""
        checkpoints = self.place / CHECKPOINTS
        return check_step(self.path) if self.path.parent == checkpoints else latest_step(checkpoints)

    @functools.cached_property
    def _gguf_header(self) -> gguf_file.Header:
        return gguf_file.read_header(self.place)
