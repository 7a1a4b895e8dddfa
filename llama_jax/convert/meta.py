"""Meta's own format: `consolidated.NN.pth`, one file a model-parallel rank, beside `params.json` and `checklist.chk`.

Ranks hold slices of the matrices, LLaMA 1 and 2 of the embedding's columns, Llama 3 of its rows; norms are repeated.
Where there are more ranks than key/value heads, as in the 405B's 16 files, heads are repeated too.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from llama_jax.convert.mapping import WEIGHTS, Source, Weight, assemble, in_file_order
from llama_jax.convert.meta_params import Params, from_config, read_params, to_config
from llama_jax.convert.tensors import (
    Concatenated,
    HalfSplit,
    Tensor,
    existing,
    row_blocks,
    same_values,
    tie,
    to_interleaved,
)
from llama_jax.convert.torch_file import open_torch_file, weights
from llama_jax.convert.torch_writer import TorchWriter
from llama_jax.errors import InputError, refusals_of
from llama_jax.models.config import LlamaConfig
from llama_jax.placement import cast
from llama_jax.storage import prefetch

# Made anew from `rope_theta`.
_BUFFERS = (r'rope\.freqs', r'layers\.\d+\.attention\.inner_attention\.rope\.freqs')
_EMBEDDING, _HEAD = 'tok_embeddings.weight', 'output.weight'
_BY_NAME = [(re.compile(re.escape(w.meta).replace(r'\{\}', r'\d+')), w) for w in WEIGHTS]
_MAX_FILES = 64
# From here on, Llama 3's, ranks split the embedding's rows; the older ones its columns.
_LARGE_VOCABULARY = 128_000


def open_source(folder: epath.PathLike) -> Source:
    """A folder as Meta releases it, of any number of model-parallel ranks.

    Raises:
      InputError: a file or tensor is missing, damaged, left over or of a wrong shape; it is named.
    """
    folder = existing(folder)
    paths = _shards(folder)
    params = read_params(folder / 'params.json')
    ranks = [weights(open_torch_file(path), str(path), _BUFFERS) for path in paths]
    _check_alike(ranks, paths)
    _check_count(ranks[0], len(ranks), params.dim, folder)
    found = _join(ranks, params.dim)
    if params.n_kv_heads == len(ranks) and (copies := _copies(ranks)) > 1:
        params = dataclasses.replace(params, n_kv_heads=params.n_kv_heads // copies)
        found |= _join([_key_values(rank) for rank in ranks[::copies]], params.dim)
    return assemble_meta(found, params, str(folder))


def assemble_meta(found: Mapping[str, Tensor], params: Params, origin: str) -> Source:
    """The model of whole tensors by Meta's names; it is tied where the head's values are the embedding's.

    Raises:
      InputError: as `assemble`.
    """
    if _EMBEDDING not in found:
        raise InputError(f'{origin} has no tensor {_EMBEDDING}')
    embedding, head = found[_EMBEDDING], found.get(_HEAD)
    refusal = (
        f'{origin}: {_HEAD} is {_EMBEDDING} in some rows and differs in others; copy or download it again'
    )
    tied = head and tie(embedding, head, refusal)
    if tied:
        found = {name: tensor for name, tensor in found.items() if name != _HEAD} | {_EMBEDDING: tied}
    vocab_size = params.vocab_size or embedding.shape[0]
    with refusals_of(origin):
        config = to_config(params, vocab_size=vocab_size, tied=bool(tied), dtype=embedding.dtype)
    return assemble(found, 'meta', config, origin=origin)


def _shards(folder: epath.Path) -> list[epath.Path]:
    names = sorted(path.name for path in folder.iterdir())
    if scales := [name for name in names if re.fullmatch(r'fp8_scales_\d+\.pt', name)]:
        raise InputError(f'{folder} has {scales[0]}: these are FP8 weights; take the bf16 release')
    numbers = sorted(int(m[1]) for name in names if (m := re.fullmatch(r'consolidated\.(\d\d+)\.pth', name)))
    if not numbers:
        raise InputError(f'{folder} has no consolidated.00.pth; a Meta checkpoint has one file a rank')
    if missing := sorted(set(range(min(numbers[-1], _MAX_FILES) + 1)) - set(numbers)):
        raise InputError(
            f'{folder} has no consolidated.{missing[0]:02d}.pth, but consolidated.{numbers[-1]:02d}.pth'
        )
    return [folder / f'consolidated.{number:02d}.pth' for number in numbers]


def _check_alike(ranks: Sequence[Mapping[str, Tensor]], paths: Sequence[epath.Path]) -> None:
    """Every file has the same tensors, of the same shapes and types."""
    for path, rank in zip(paths[1:], ranks[1:], strict=True):
        if odd := sorted(rank.keys() ^ ranks[0].keys()):
            here, there = (path, paths[0]) if odd[0] in rank else (paths[0], path)
            raise InputError(
                f'{here} has tensor {odd[0]}, {there} has not; they are of different checkpoints'
            )
        for name, tensor in rank.items():
            first = ranks[0][name]
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f'{path}: tensor {name} is {tensor.shape} {tensor.dtype}, '
                    f'in {paths[0].name} it is {first.shape} {first.dtype}; they are of different checkpoints'
                )


def _check_count(rank: Mapping[str, Tensor], count: int, query_rows: int, folder: epath.Path) -> None:
    """As many files as the matrices were split for."""
    name = 'layers.0.attention.wq.weight'
    rows = rank[name].shape[0] if name in rank else 0
    if rows and query_rows % rows == 0 and query_rows // rows != count:
        raise InputError(
            f'{folder} has {count} files consolidated.*.pth, but {name} is split for {query_rows // rows}'
        )


def _weight_of(name: str) -> Weight | None:
    return next((weight for pattern, weight in _BY_NAME if pattern.fullmatch(name)), None)


def _join(ranks: Sequence[Mapping[str, Tensor]], embed_dim: int) -> dict[str, Tensor]:
    """The ranks' slices as whole tensors; of what is repeated, or unknown, the first."""
    found: dict[str, Tensor] = {}
    for name, first in ranks[0].items():
        weight = _weight_of(name)
        axis = weight.meta_axis if weight else None
        if name == _EMBEDDING and first.shape[-1] * len(ranks) == embed_dim:
            axis = 1
        found[name] = first
        if axis is not None and len(first.shape) == 2 and len(ranks) > 1:
            found[name] = Concatenated([rank[name] for rank in ranks], axis)
    return found


def _key_values(rank: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in rank.items() if re.search(r'\.w[kv]\.weight$', name)}


def _copies(ranks: Sequence[Mapping[str, Tensor]]) -> int:
    """How many neighbouring ranks hold the same key/value head: 2 for the 405B's 16 ranks.

    All values of the first layer are compared, of the others one row.
    """
    copies = 1
    while len(ranks) % (2 * copies) == 0 and all(
        same_values(
            ranks[begin][name], ranks[begin + copies][name], None if name.startswith('layers.0.') else 1
        )
        for name in _key_values(ranks[0])
        for begin in range(0, len(ranks), 2 * copies)
    ):
        copies *= 2
    return copies


def write(
    source: Source,
    folder: epath.Path,
    *,
    model_parallel: int = 1,
    dtype: np.dtype | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes the files of a folder as Meta releases it, each weight read once.

    Args:
      source: any checkpoint.
      folder: an existing local folder; `checklist.chk` lists what is in it too, such as the tokenizer.
      model_parallel: how many files to split the model into; a multiple of the key/value heads repeats them.
      dtype: float16, bfloat16 or float32; None for each weight's own.
      progress: called with the bytes of each block once they are written.

    Raises:
      InputError: the architecture has no place in Meta's format, or does not split so.
    """
    tensors = list(_plan(source, model_parallel, dtype))
    embedding = tensors[0]
    kv_heads = max(source.config.num_kv_heads, model_parallel)
    params = from_config(source.config, embedding.dtype, kv_heads)
    # A tied head is a name for the embedding's values where the ranks hold the same slices of both.
    shared = {_HEAD: _EMBEDDING} if source.config.tie_embeddings and embedding.axis != 1 else {}
    entries = {t.name: (t.rank_shape, t.dtype) for t in tensors}
    with contextlib.ExitStack() as stack:
        names = [f'consolidated.{rank:02d}.pth' for rank in range(model_parallel)]
        writers = [stack.enter_context(TorchWriter(folder / name, entries, shared)) for name in names]
        jobs = (job for t in tensors if t.name not in shared for job in t.blocks(model_parallel))
        for pieces in prefetch(jobs):
            for ranks, block in pieces:
                for rank in ranks:
                    writers[rank].append(block)
            progress(sum(block.nbytes * len(ranks) for ranks, block in pieces))
        digests = {name: writer.finish() for name, writer in zip(names, writers, strict=True)}
    (folder / 'params.json').write_text(json.dumps(params, indent=2) + '\n')
    for path in folder.iterdir():
        if path.name not in digests and path.name != 'checklist.chk' and path.is_file():
            with open(path, 'rb') as file:
                digests[path.name] = hashlib.file_digest(file, 'md5').hexdigest()
    (folder / 'checklist.chk').write_text(''.join(f'{digests[name]}  {name}\n' for name in sorted(digests)))


Pieces = list[tuple[Sequence[int], np.ndarray]]  # each block with the ranks that hold it


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A tensor to write: where its values come from, and how ranks share it.

    Attributes:
      axis: along which it is split; None: all ranks hold all of it.
      slices: how many there are; fewer than ranks where neighbours hold the same.
      multiple: rows that belong together.
    """

    name: str
    tensor: Tensor
    dtype: np.dtype
    axis: int | None
    slices: int
    multiple: int

    @property
    def rank_shape(self) -> tuple[int, ...]:
        """Of one rank's slice."""
        return tuple(
            size // self.slices if axis == self.axis else size for axis, size in enumerate(self.tensor.shape)
        )

    def blocks(self, ranks: int) -> Iterator[Callable[[], Pieces]]:
        """Reads of some 32 MiB, in an order that gives each rank its rows one after the other."""
        copies = ranks // self.slices
        holders = [range(i * copies, (i + 1) * copies) for i in range(self.slices)]
        if self.axis == 1:
            yield from (
                lambda rows=rows: self._columns(rows, holders)
                for rows in row_blocks(self.tensor.shape, self.dtype)
            )
            return
        shape = self.rank_shape
        for index, held in enumerate(holders):
            for rows in row_blocks(shape, self.dtype, self.multiple):
                begin = index * shape[0]
                block = slice(begin + rows.start, begin + rows.stop)
                yield lambda block=block, held=held: [(held, self._read(block))]

    def _read(self, rows: slice) -> np.ndarray:
        if self.multiple == 1:
            block = self.tensor.read(rows)
        elif isinstance(self.tensor, HalfSplit):
            block = self.tensor.interleaved.read(rows)
        else:
            block = to_interleaved(self.tensor.read(rows), self.multiple)
        return np.ascontiguousarray(cast(block, self.dtype, self.name))

    def _columns(self, rows: slice, holders: Sequence[range]) -> Pieces:
        block = self._read(rows)
        width = block.shape[1] // self.slices
        return [
            (held, np.ascontiguousarray(block[:, i * width : (i + 1) * width]))
            for i, held in enumerate(holders)
        ]


def _plan(source: Source, model_parallel: int, dtype: np.dtype | None) -> Iterator[_Planned]:
    """All tensors of the files in their order: the embedding, layer by layer, the final norm, the head."""
    config = source.config
    if not 1 <= model_parallel <= _MAX_FILES:
        raise InputError(f'model_parallel is {model_parallel}; it must be from 1 to {_MAX_FILES}')
    rows = in_file_order(config)
    if config.tie_embeddings:  # Meta's files hold the head of a tied model too: it is the embedding
        rows.append((next(weight for weight in WEIGHTS if weight.path == 'head'), 0))
    for weight, layer in rows:
        tied = weight.path == 'head' and config.tie_embeddings
        tensor = source.tensors['embed' if tied else weight.path][layer]
        axis, slices = _split(weight, config, model_parallel)
        name = weight.name('meta', layer)
        multiple = config.head_dim if weight.rotary else 1
        yield _Planned(name, tensor, dtype or tensor.dtype, axis, slices, multiple)


def _split(weight: Weight, config: LlamaConfig, ranks: int) -> tuple[int | None, int]:
    """Along which axis and into how many different slices ranks split a weight.

    Raises:
      InputError: it does not split so.
    """
    if ranks == 1 or weight.meta_axis is None:
        return None, 1
    axis = weight.meta_axis
    if weight.path == 'embed' and config.vocab_size < _LARGE_VOCABULARY:
        axis = 1
    word = weight.shape[axis]
    heads = {'heads': config.num_heads, 'kv_heads': config.num_kv_heads}
    size = heads.get(word, weight.matrix_shape(config)[axis])
    slices = min(ranks, size) if word == 'kv_heads' else ranks
    if size % slices or ranks % slices:
        unit = {'heads': 'heads', 'kv_heads': 'key/value heads'}.get(word, ('rows', 'columns')[axis])
        raise InputError(
            f'{weight.name("meta", 0)} has {size} {unit}, which do not split over model_parallel={ranks}; '
            'take a number that divides them'
        )
    return axis, slices
