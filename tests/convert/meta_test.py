"""Meta's folders, made here as Meta's own code would save them, read and written back bit by bit."""

import dataclasses
import hashlib
import json
import tracemalloc

import numpy as np
import pytest
from etils import epath

from llama_jax.convert import meta
from llama_jax.convert.mapping import Source, layers_of, weights_of
from llama_jax.convert.tensors import BFLOAT16
from llama_jax.errors import InputError
from llama_jax.models.config import LlamaConfig, RopeScaling


@dataclasses.dataclass(frozen=True)
class Release:
    """How a family's files differ: what `params.json` says, and what is in the tensors' files."""

    params: dict
    config: LlamaConfig
    dtype: str = 'bfloat16'
    buffers: str = ''  # names of RoPE's frequencies, which are no weights
    split_rows: bool = False  # of the embedding
    nested: bool = False
    shared: bool = False  # all tensors of a file are views of one storage, as in Meta's larger models
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)


# 16 heads, so that 16 ranks have one each; the FFN sizes are Meta's rule worked out by hand.
OLD = dict(dim=64, n_layers=2, n_heads=16, multiple_of=32, norm_eps=1e-5, vocab_size=-1)
NEW = dict(
    dim=64, n_layers=2, n_heads=16, n_kv_heads=16, multiple_of=64, ffn_dim_multiplier=1.3, norm_eps=1e-5,
    vocab_size=128_000, rope_theta=500_000.0,
)  # fmt: skip
CONFIG = LlamaConfig(
    vocab_size=96, embed_dim=64, mlp_dim=192, num_layers=2, num_heads=16, num_kv_heads=16, head_dim=4, max_seq_len=4096
)  # fmt: skip
LLAMA3 = dataclasses.replace(CONFIG, vocab_size=128_000, mlp_dim=256, max_seq_len=8192, rope_theta=500_000.0)
SCALED = dataclasses.replace(LLAMA3, max_seq_len=131_072, rope_scaling=RopeScaling(8.0))
RELEASES = {
    'llama': Release(
        OLD | {'norm_eps': 1e-6}, dataclasses.replace(CONFIG, norm_eps=1e-6, max_seq_len=2048), dtype='float16',
        buffers='layers.{}.attention.inner_attention.rope.freqs',
    ),
    'llama2': Release(OLD, CONFIG, buffers='rope.freqs', shared=True),
    'llama2 gqa': Release(
        OLD | dict(n_kv_heads=8, ffn_dim_multiplier=1.3, multiple_of=256),
        dataclasses.replace(CONFIG, num_kv_heads=8, mlp_dim=256), buffers='rope.freqs', ranks=(1, 2, 4, 8),
    ),
    'llama3': Release(NEW, LLAMA3, split_rows=True),
    'llama3.1': Release(NEW | {'use_scaled_rope': True}, SCALED, split_rows=True, nested=True),
    'llama3.2': Release(
        NEW | {'use_scaled_rope': True}, dataclasses.replace(SCALED, tie_embeddings=True), split_rows=True,
        ranks=(1, 2),
    ),
    '405b, 16 files': Release(  # n_kv_heads is that of the files, which repeat 8 heads
        NEW | {'use_scaled_rope': True}, dataclasses.replace(SCALED, num_kv_heads=8), split_rows=True, ranks=(16,)
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    """Llama 3's layout with a vocabulary of 128 where the code says 128,000."""
    monkeypatch.setattr(meta, '_LARGE_VOCABULARY', 128)


def small(value):
    """Of params or of a config: the same with a vocabulary of 128."""
    if isinstance(value, LlamaConfig):
        return dataclasses.replace(value, vocab_size=128) if value.vocab_size == 128_000 else value
    return value | {'vocab_size': 128} if value['vocab_size'] == 128_000 else value


def full_tensors(release: Release, seed=0) -> dict[str, np.ndarray]:
    """Matrices by Meta's names and in Meta's order, of random bits that are all finite."""
    config, rng = small(release.config), np.random.default_rng(seed)
    key_values = config.num_kv_heads * config.head_dim
    layer = {
        'attention.wq': (64, 64), 'attention.wk': (key_values, 64), 'attention.wv': (key_values, 64),
        'attention.wo': (64, 64), 'feed_forward.w1': (config.mlp_dim, 64), 'feed_forward.w2': (64, config.mlp_dim),
        'feed_forward.w3': (config.mlp_dim, 64), 'attention_norm': (64,), 'ffn_norm': (64,),
    }  # fmt: skip
    shapes = {'tok_embeddings': (config.vocab_size, 64), 'norm': (64,), 'output': (config.vocab_size, 64)}
    shapes |= {f'layers.{i}.{name}': shape for i in range(2) for name, shape in layer.items()}
    bits = {name: rng.integers(0, 0x7000, size=shape, dtype=np.uint16) for name, shape in shapes.items()}
    if config.tie_embeddings:
        bits['output'] = bits['tok_embeddings']
    dtype = {'float16': np.dtype(np.float16), 'bfloat16': BFLOAT16}[release.dtype]
    return {f'{name}.weight': value.view(dtype) for name, value in bits.items()}


def rank_tensors(release: Release, full: dict[str, np.ndarray], ranks: int) -> list[dict[str, np.ndarray]]:
    """Each rank's slices, by the table of Meta's model.py: column-parallel, row-parallel, or repeated."""
    result = [{} for _ in range(ranks)]
    for name, value in full.items():
        if value.ndim == 1:
            parts = [value] * ranks
        elif '.wk.' in name or '.wv.' in name:
            copies = max(ranks // (len(value) // 4), 1)
            parts = np.repeat(value.reshape(-1, 4, 64), copies, axis=0).reshape(ranks, -1, 64)
        else:
            by_column = '.wo.' in name or '.w2.' in name
            by_column |= name == 'tok_embeddings.weight' and not release.split_rows
            parts = np.split(value, ranks, axis=1 if by_column else 0)
        for rank, part in zip(result, parts, strict=True):
            rank[name] = part
    return result


def save(folder, release: Release, full: dict[str, np.ndarray], ranks: int) -> epath.Path:
    torch = pytest.importorskip('torch')
    folder = epath.Path(folder)
    folder.mkdir(parents=True)
    dtype = getattr(torch, release.dtype)
    for index, rank in enumerate(rank_tensors(release, full, ranks)):
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(part).view(np.int16)).view(dtype)
            for name, part in rank.items()
        }
        if release.shared:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
            pieces = flat.split([tensor.numel() for tensor in tensors.values()])
            tensors = {
                name: piece.view(tensors[name].shape) for name, piece in zip(tensors, pieces, strict=True)
            }
        for layer in range(2):
            if release.buffers:
                tensors[release.buffers.format(layer)] = torch.ones(2)
        torch.save(tensors, folder / f'consolidated.{index:02d}.pth')
    params = small(release.params)
    (folder / 'params.json').write_text(json.dumps({'model': params} if release.nested else params))
    return folder


def write(source: Source, folder, **kwargs) -> epath.Path:
    folder = epath.Path(folder)
    folder.mkdir(parents=True)
    meta.write(source, folder, **kwargs)
    return folder


def assert_holds(folder: epath.Path, ranks: list[dict[str, np.ndarray]]) -> None:
    """PyTorch reads these very tensors, and no others, from the folder's files."""
    torch = pytest.importorskip('torch')
    assert sorted(path.name for path in folder.glob('*.pth')) == [
        f'consolidated.{i:02d}.pth' for i in range(len(ranks))
    ]
    for index, expected in enumerate(ranks):
        loaded = torch.load(folder / f'consolidated.{index:02d}.pth', weights_only=True, mmap=True)
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            assert str(loaded[name].dtype).removeprefix('torch.') == str(value.dtype), name
            np.testing.assert_array_equal(loaded[name].view(torch.int16).numpy(), value.view(np.int16), name)


CASES = [(name, ranks) for name, release in RELEASES.items() for ranks in release.ranks]


@pytest.mark.parametrize(('name', 'ranks'), CASES)
def test_folder_is_read_and_written_back_bit_by_bit(tmp_path, name, ranks):
    release = RELEASES[name]
    full = full_tensors(release)
    source = meta.open_source(save(tmp_path / 'original', release, full, ranks))
    assert source.config == small(release.config)
    for weight in weights_of(source.config):
        for layer in layers_of(weight, source.config):
            expected = full[weight.name('meta', layer)]
            if weight.rotary:  # row 2j + p of a head, of 4, is row 2p + j
                expected = expected.reshape(-1, 4, 64)[:, [0, 2, 1, 3]].reshape(expected.shape)
            np.testing.assert_array_equal(
                source.tensors[weight.path][layer].read().view(np.int16), expected.view(np.int16), weight.path
            )

    copy = write(source, tmp_path / 'copy', model_parallel=ranks)
    assert_holds(copy, rank_tensors(release, full, ranks))
    assert meta.open_source(copy).config == source.config
    written = json.loads((copy / 'params.json').read_text())
    expected = small(release.params) | {'vocab_size': source.config.vocab_size}
    assert {
        key: written[key] for key in ('dim', 'n_layers', 'n_heads', 'vocab_size', 'norm_eps')
    }.items() <= expected.items()
    assert written.get('n_kv_heads', 16) == expected.get('n_kv_heads', 16)


@pytest.mark.parametrize('name', ['llama2', 'llama3.1', 'llama3.2'])
def test_other_number_of_files(tmp_path, name):
    release = RELEASES[name]
    full = full_tensors(release)
    folder, ranks = save(tmp_path / 'original', release, full, 8), 8
    for ranks in (1, 4, 16, 2):
        folder = write(meta.open_source(folder), tmp_path / f'{ranks}', model_parallel=ranks)
        assert_holds(folder, rank_tensors(release, full, ranks))


def test_more_files_than_key_value_heads_repeats_them(tmp_path):
    release = RELEASES['405b, 16 files']
    full = full_tensors(release)
    folder = save(tmp_path / 'original', release, full, 8)
    (folder / 'params.json').write_text(json.dumps(small(release.params) | {'n_kv_heads': 8}))
    source = meta.open_source(folder)
    assert source.config.num_kv_heads == 8
    repeated = write(source, tmp_path / '16', model_parallel=16)
    assert json.loads((repeated / 'params.json').read_text())['n_kv_heads'] == 16
    assert_holds(repeated, rank_tensors(release, full, 16))
    assert_holds(
        write(meta.open_source(repeated), tmp_path / '8', model_parallel=8), rank_tensors(release, full, 8)
    )


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Values that are made when they are read; a negative one is too large for float16."""

    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype(np.float32)
    value: float = 1.5

    def read(self, rows=slice(None), columns=slice(None)):
        spans = (rows, columns)[: len(self.shape)]
        return np.full(
            [len(range(*s.indices(n))) for s, n in zip(spans, self.shape, strict=True)],
            self.value,
            self.dtype,
        )


def made_source(config=CONFIG, **kwargs) -> Source:
    return Source(
        config,
        {
            w.path: [Pattern(w.matrix_shape(config), **kwargs)] * len(layers_of(w, config))
            for w in weights_of(config)
        },
        'memory',
    )


def test_any_source_in_any_type_with_checksums_and_progress(tmp_path):
    (tmp_path / 'tokenizer.model').write_bytes(b'pieces')
    written = []
    meta.write(made_source(), epath.Path(tmp_path), model_parallel=2, dtype=BFLOAT16, progress=written.append)
    lines = (tmp_path / 'checklist.chk').read_text().splitlines()
    names = ['consolidated.00.pth', 'consolidated.01.pth', 'params.json', 'tokenizer.model']
    assert lines == [f'{hashlib.md5((tmp_path / name).read_bytes()).hexdigest()}  {name}' for name in names]
    norms = 5 * 64
    assert sum(written) == 2 * (CONFIG.num_params + norms)
    source = meta.open_source(epath.Path(tmp_path))
    assert source.dtype == BFLOAT16
    assert source.config == dataclasses.replace(CONFIG, tie_embeddings=True)  # its head is its embedding
    with pytest.raises(InputError, match=r'tok_embeddings.weight holds 100000.0, which float16 cannot'):
        meta.write(made_source(value=1e5), epath.Path(tmp_path), dtype=np.dtype(np.float16))


def test_half_split_rows_are_interleaved(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Rows(Pattern):
        def read(self, rows=slice(None), columns=slice(None)):
            numbers = np.arange(self.shape[0], dtype=np.float32)[rows, None]
            return np.broadcast_to(numbers, (len(numbers), 64))[:, columns]

    source = made_source()
    source.tensors['blocks/attention/q'][:] = [Rows((64, 64)), Rows((64, 64))]
    folder = write(source, tmp_path / 'x', model_parallel=4)
    torch = pytest.importorskip('torch')
    name = 'layers.0.attention.wq.weight'
    rows = torch.cat([torch.load(path)[name][:, 0] for path in sorted(folder.glob('*.pth'))]).numpy()
    expected = [4 * head + 2 * p + j for head in range(16) for j in range(2) for p in range(2)]
    np.testing.assert_array_equal(rows, expected)


def test_writing_holds_a_few_blocks_only(tmp_path):
    config = dataclasses.replace(
        CONFIG, embed_dim=2048, mlp_dim=16384, num_heads=32, num_kv_heads=32, head_dim=64, num_layers=1, vocab_size=128
    )  # fmt: skip
    source = made_source(config)
    tracemalloc.start()
    write(source, tmp_path / 'x', model_parallel=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = 4 * config.num_params
    assert size > 450e6
    assert peak < 8 * 32 * 2**20, f'{peak} of {size} bytes'


@pytest.mark.parametrize(
    ('config', 'ranks', 'message'),
    [
        (CONFIG, 3, 'tok_embeddings.weight has 64 columns, which do not split over model_parallel=3'),
        (CONFIG, 32, r'layers.0.attention.wq.weight has 16 heads, which do not split over model_parallel=32'),
        (dataclasses.replace(CONFIG, vocab_size=97), 2, r'output.weight has 97 rows, which do not split'),
        (dataclasses.replace(CONFIG, mlp_dim=100), 8, r'feed_forward.w1.weight has 100 rows'),
        (CONFIG, 0, 'model_parallel is 0'),
        (CONFIG, 2**40, 'model_parallel is 1099511627776'),
        (dataclasses.replace(CONFIG, head_dim=8), 1, 'this model has head_dim 8'),
    ],
)
def test_what_does_not_split_is_refused(tmp_path, config, ranks, message):
    with pytest.raises(InputError, match=message):
        meta.write(made_source(config), epath.Path(tmp_path), model_parallel=ranks)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return write(made_source(), tmp_path / 'folder', model_parallel=2, dtype=BFLOAT16)


def edit_params(folder, **changes):
    path = folder / 'params.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, ranks, **kwargs):
    write(made_source(kwargs.pop('config', CONFIG)), folder / 'other', model_parallel=ranks, **kwargs)
    return folder / 'other' / 'consolidated.01.pth'


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda f: (f / 'consolidated.00.pth').unlink(), 'has no consolidated.00.pth, but consolidated.01.pth'),
        (lambda f: (f / 'consolidated.01.pth').unlink(), 'has 1 files consolidated.*, but .* is split for 2'),
        (lambda f: (f / 'consolidated.01.pth').rename(f / 'consolidated.07.pth'), 'has no consolidated.01.pth, but'),
        (lambda f: [path.unlink() for path in f.glob('*.pth')], 'has no consolidated.00.pth; a Meta checkpoint'),
        (lambda f: (f / 'params.json').unlink(), 'params.json is missing'),
        (lambda f: edit_params(f, n_layers=1), '9 tensors without a place .* of 1 layers, the first one layers.1'),
        (lambda f: edit_params(f, n_layers=3), 'has no tensor layers.2.attention_norm.weight'),
        (lambda f: edit_params(f, n_layers=2**14), 'has no tensor layers.2.attention_norm.weight'),
        (lambda f: edit_params(f, n_layers=2**31 - 1), 'num_layers is 2147483647; it must be above 0, at most'),
        (lambda f: edit_params(f, multiple_of=512), r'feed_forward.w1.weight has shape \(192, 64\), the model \(512'),
        (lambda f: edit_params(f, vocab_size=95), r'tok_embeddings.weight has shape \(96, 64\), the model \(95'),
        (lambda f: edit_params(f, dim=128), 'has 2 files consolidated.*, but .* is split for 4'),
        (lambda f: (f / 'fp8_scales_0.pt').write_bytes(b''), 'has fp8_scales_0.pt: these are FP8 weights'),
        (
            lambda f: rewrite(f, 2, dtype=np.dtype(np.float16)).replace(f / 'consolidated.01.pth'),
            r'01.pth: tensor tok_embeddings.weight is \(96, 32\) float16, in consolidated.00.pth it is .* bfloat16',
        ),
        (
            lambda f: rewrite(f, 4, dtype=BFLOAT16).replace(f / 'consolidated.01.pth'),
            r'consolidated.01.pth: tensor tok_embeddings.weight is \(96, 16\)',
        ),
        (
            lambda f: rewrite(f, 2, dtype=BFLOAT16, config=dataclasses.replace(CONFIG, num_layers=1)).replace(
                f / 'consolidated.01.pth'
            ),
            r'consolidated.00.pth has tensor layers.1.attention.wk.weight, .*consolidated.01.pth has not',
        ),
        (lambda f: (f / 'consolidated.01.pth').write_bytes(b'PK\3\4'), 'consolidated.01.pth is not a complete zip'),
    ],
)  # fmt: skip
def test_folder_that_does_not_fit_together_is_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        meta.open_source(folder)
    assert '\n' not in str(error.value)
