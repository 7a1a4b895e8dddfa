import dataclasses
import fnmatch
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from llama_jax import export, pretrained
from llama_jax.checkpoint.model_file import save_config
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.errors import InputError, SystemFailure, SystemRefusal
from llama_jax.eval.engine import Engine
from llama_jax.inference.generate import generate
from llama_jax.inference.scoring import score
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.presets import PRESETS
from llama_jax.partitioning import make_mesh
from llama_jax.pretrained import load
from llama_jax.tokenizer.conversion import own_files
from llama_jax.tokenizer.tokenizer import tokenizer_of_files
from llama_jax.tokenizer.training import train_sentencepiece
from tests import toy
from tests.convert.in_memory import random_source
from tests.tokenizer import kinds

CONFIG = dataclasses.replace(
    toy.CONFIG, vocab_size=300, head_dim=4
)  # Meta knows heads of embed_dim / num_heads only


def make_workdir(folder, params):
    """What `experiments.pretrain` leaves, without training."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(folder, CONFIG, base_checkpoint='')
    (folder / 'tokenizer.model').write_bytes(TOKENIZER.read_bytes())
    checkpointer = Checkpointer(folder / 'checkpoints')
    checkpointer.save(3, {'params': params, 'opt_state': {'moments': jnp.ones(3)}}, {'rows_consumed': 12})
    checkpointer.close()
    return folder


@pytest.fixture(scope='module', autouse=True)
def tokenizer_file(tmp_path_factory):
    global TOKENIZER
    TOKENIZER = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.model'
    train_sentencepiece([f'{i} green bottles hanging on the wall' for i in range(200)], 300, TOKENIZER)


@pytest.fixture(scope='module')
def params():
    return toy.make_params(LlamaForCausalLM(CONFIG, dtype=jnp.float32))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, params, tokenizer_file):
    return make_workdir(tmp_path_factory.mktemp('run') / 'workdir', params)


def test_a_workdir_comes_back_whole(workdir, params):
    config, loaded, tokenizer = load(workdir)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(loaded)} == {1}
    assert tokenizer.decode(tokenizer.encode('green bottles')) == 'green bottles'


def test_weights_are_cast_and_placed_on_a_mesh(workdir, params):
    mesh = make_mesh({'fsdp': 2, 'tensor': 4})
    _, loaded, _ = load(str(workdir), mesh=mesh, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype('bfloat16')}
    gate = loaded['blocks']['mlp']['gate']
    assert {shard.data.shape for shard in gate.addressable_shards} == {(3, 16, 16)}  # of (3, 32, 64)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), loaded, params)


def test_another_tokenizer_may_be_given(workdir, tmp_path):
    other = tmp_path / 'other.model'
    train_sentencepiece([f'{i} green bottles' for i in range(200)], 280, other)
    assert load(workdir, tokenizer=str(other))[2].vocab_size == 280


def refused(path) -> str:
    with pytest.raises(InputError) as error:
        load(path)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    assert f'{tmp_path} is not a checkpoint: it holds nothing' in refused(tmp_path)
    (tmp_path / 'several').mkdir()
    for name in ('a.gguf', 'b.pt', 'tokenizer.bin'):
        (tmp_path / 'several' / name).touch()
    assert f'holds 2; give one by its path: {tmp_path}/several/a.gguf, {tmp_path}' in refused(
        tmp_path / 'several'
    )
    assert f'no checkpoint at {tmp_path}/nowhere' in refused(tmp_path / 'nowhere')
    (tmp_path / 'notes.txt').write_text('shopping')
    message = refused(tmp_path)
    assert 'it holds notes.txt' in message and 'model.json' in message and 'params.json' in message
    assert "notes.txt is not a checkpoint: it begins with b'shop'" in refused(tmp_path / 'notes.txt')


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('{', 'does not describe a model'),
        ('[]', 'does not describe a model'),
        ('[' * 100_000, 'does not describe a model'),
        ('{}', 'does not describe a model: the configuration is a NoneType, it must be an object'),
        ('{"config": {"vocab_size": 5}}', 'does not describe a model'),
        (json.dumps({'config': CONFIG.to_dict() | {'num_layers': 0}}), 'num_layers is 0'),
        (json.dumps({'config': CONFIG.to_dict() | {'colour': 1}}), 'colour'),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / 'model.json').write_text(text)
    message = refused(tmp_path)
    assert 'model.json' in message and words in message


def test_a_tied_flag_that_the_weights_contradict_is_refused(tmp_path, params):
    run = make_workdir(tmp_path / 'run', params)
    save_config(run, dataclasses.replace(CONFIG, tie_embeddings=True), base_checkpoint='')
    assert 'says that the head is the embedding (tie_embeddings), but the weights hold a head' in refused(run)


def test_what_is_missing_is_named(tmp_path, params):
    save_config(epath.Path(tmp_path), CONFIG)
    (tmp_path / 'tokenizer.model').write_bytes(TOKENIZER.read_bytes())
    assert 'no checkpoint under' in refused(tmp_path)


def test_a_checkpoint_without_a_tokenizer_loads_and_what_needs_one_says_so(tmp_path, params):
    workdir = make_workdir(tmp_path / 'run', params)
    (workdir / 'tokenizer.model').unlink()
    config, loaded, tokenizer = load(workdir)
    assert tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    model = LlamaForCausalLM(config)
    for use in (
        lambda: generate(model, loaded, tokenizer, ['green']),
        lambda: Engine(model, loaded, tokenizer),
        lambda: export.save(tmp_path / 'x.gguf', pretrained.open(workdir).source, tokenizer, to='gguf'),
    ):
        with pytest.raises(InputError, match='text needs a tokenizer, and the checkpoint has none'):
            use()
    for to in ('orbax', 'meta', 'huggingface'):  # which do not need it
        export.save(tmp_path / to, pretrained.open(workdir).source, tokenizer, to=to)
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / to)[1], params)
        assert load(tmp_path / to, tokenizer=str(TOKENIZER))[2].vocab_size == 300


def test_weights_of_another_architecture_are_refused(tmp_path, params):
    workdir = make_workdir(tmp_path, params)
    save_config(workdir, dataclasses.replace(PRESETS['tiny'], tie_embeddings=False))
    assert ': weight blocks/attention/k has shape (3, 32, 4, 4), the model (4, 192, 4, 48)' in refused(
        workdir
    )


def test_the_description_keeps_every_number(tmp_path):
    for config in PRESETS.values():
        save_config(epath.Path(tmp_path), config, base_checkpoint='somewhere')
        assert pretrained.open(tmp_path).config == config


def test_a_step_may_be_named(tmp_path, workdir, params):
    run = make_workdir(tmp_path / 'run', params)
    checkpointer = Checkpointer(run / 'checkpoints')
    checkpointer.save(5, {'params': jax.tree.map(jnp.zeros_like, params)}, {})
    checkpointer.close()
    newest = load(run)[1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(newest))
    jax.tree.map(np.testing.assert_array_equal, load(run / 'checkpoints')[1], newest)
    jax.tree.map(np.testing.assert_array_equal, load(run / 'checkpoints/3')[1], params)
    assert pretrained.open(run / 'checkpoints/3').source.tensors['embed'][0].read().any()
    assert pretrained.open(run / 'checkpoints/3').place == pretrained.open(run).place == run
    assert 'no checkpoint ' in (message := refused(run / 'checkpoints/4')) and '[3, 5]' in message


class Hub:
    """What `huggingface_hub` does, from folders by the names of repositories, to a cache beside them."""

    def __init__(self, root, monkeypatch):
        self.root, self.asked, self.error = root, [], None
        monkeypatch.setattr('huggingface_hub.snapshot_download', self.download)
        monkeypatch.setattr('huggingface_hub.HfApi.list_repo_files', self.list)

    def files(self, repo_id):
        folder = self.root / repo_id.split('/')[1]
        if not folder.exists():
            raise OSError(f'404 Client Error: {repo_id}\nmore about it')
        return sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())

    def list(self, _, repo_id=None, *, revision=None):
        if self.error:
            raise self.error
        return self.files(repo_id or _)

    def download(self, repo_id, *, revision=None, allow_patterns=('*',), local_files_only=False):
        cache = self.root / 'cache' / repo_id.split('/')[1]
        if local_files_only and not cache.exists():
            raise OSError('it is not in the cache')
        names = [n for n in self.files(repo_id) if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        for name in names if not local_files_only else ():
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / repo_id.split('/')[1] / name, cache / name)
        self.asked.append((repo_id, revision, names))
        return str(cache)


@pytest.fixture
def hub(tmp_path, workdir, monkeypatch):
    """One repository of each format, and one of all."""
    source, tokenizer = pretrained.open(workdir).source, load(workdir)[2]
    root = tmp_path / 'repositories'
    export.save(root / 'llama', source, tokenizer, to='huggingface')
    export.save(root / 'original_only/original', source, tokenizer, to='meta')
    export.save(root / 'meta', source, tokenizer, to='meta')
    export.save(root / 'one/model-f32.gguf', source, tokenizer, to='gguf')
    export.save(root / 'several/a.gguf', source, tokenizer, to='gguf')
    export.save(root / 'several/b.gguf', source, tokenizer, to='gguf')
    (root / 'adapter').mkdir()
    (root / 'adapter/adapter_config.json').write_text('{}')
    shutil.copytree(root / 'llama', root / 'all')
    shutil.copytree(root / 'original_only/original', root / 'all/original')
    (root / 'all/pytorch_model.bin').write_bytes(b'twice')
    return Hub(root, monkeypatch)


def test_a_model_of_the_hub_is_downloaded_and_read(hub, params):
    config, loaded, tokenizer = load('hf://someone/llama@v2')
    assert config == CONFIG and hub.asked[0][:2] == ('someone/llama', 'v2')
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert tokenizer.decode(tokenizer.encode('green bottles')) == 'green bottles'
    assert 'hf://someone/else cannot be downloaded: 404 Client Error' in refused('hf://someone/else')
    assert 'is not hf://ORGANISATION/MODEL' in refused('hf://llama')


def test_the_format_that_a_repository_has_is_taken(hub, params):
    for name in ('original_only', 'meta', 'one', 'several/b.gguf', 'all/original', 'all'):
        _, loaded, tokenizer = load(f'hf://someone/{name}')
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert tokenizer.encode('green bottles')
    assert not any(
        'original' in file or file.endswith('.bin') for file in hub.asked[-1][2]
    )  # each weight once
    assert 'give one of them: hf://someone/several/a.gguf, b.gguf' in refused('hf://someone/several')
    assert 'the repository has no c.gguf; it holds a.gguf, b.gguf' in refused('hf://someone/several/c.gguf')
    assert 'adapter_config.json: peft_type is None; only LORA' in refused('hf://someone/adapter')


def test_without_a_network_the_cache_will_do_and_a_gate_says_what_to_do(hub, params):
    from huggingface_hub import errors

    load('hf://someone/llama')
    hub.error = Exception('no network')  # HTTP clients' errors derive from nothing else
    jax.tree.map(np.testing.assert_array_equal, load('hf://someone/llama')[1], params)
    assert 'hf://someone/meta cannot be downloaded: no network' in refused('hf://someone/meta')
    response = types.SimpleNamespace(headers={}, request=None)
    hub.error = errors.GatedRepoError('gated', response=response)
    message = refused('hf://someone/llama')
    assert 'accept its licence at https://huggingface.co/someone/llama' in message and 'HF_TOKEN' in message


def test_folders_of_many_shapes_are_found_or_the_line_says_which_path_to_give(tmp_path, workdir, params):
    source, tokenizer = pretrained.open(workdir).source, load(workdir)[2]
    cached = tmp_path / 'models--someone--llama'
    export.save(cached / 'snapshots/abc', source, tokenizer, to='huggingface')
    (cached / 'refs').mkdir()
    (cached / 'refs/main').write_text('abc')
    (cached / 'snapshots/old').mkdir()
    export.save(tmp_path / 'above/original', source, tokenizer, to='meta')
    export.save(tmp_path / 'above/ours', source, tokenizer, to='orbax')
    for place in (
        cached, cached / 'snapshots/abc/model.safetensors', cached / 'snapshots/abc/config.json',
        tmp_path / 'above/original/consolidated.00.pth', tmp_path / 'above/original/params.json',
        tmp_path / 'above/ours/model.json',
    ):  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, load(place)[1], params)
    message = refused(tmp_path / 'above')
    assert f'holds 2; give one by its path: {tmp_path}/above/original, {tmp_path}/above/ours' in message
    (tmp_path / 'alone').mkdir()
    shutil.copy(cached / 'snapshots/abc/model.safetensors', tmp_path / 'alone')
    assert 'holds weights alone; put the config.json' in refused(tmp_path / 'alone/model.safetensors')
    for name in ('adapter_model.safetensors', 'adapter_model.bin'):
        (tmp_path / name).write_bytes(b'PK\3\4' + bytes(40))
        assert 'is a part of a LoRA adapter' in refused(tmp_path / name)


def test_llama_1_and_2_find_the_tokenizer_above_their_folder(tmp_path, workdir, params):
    export.save(tmp_path / '7B', pretrained.open(workdir).source, load(workdir)[2], to='meta')
    (tmp_path / '7B/tokenizer.model').rename(tmp_path / 'tokenizer.model')
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / '7B')[1], params)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'q8_0', 'q4_0'])
def test_other_types_are_written_and_verified(tmp_path, workdir, dtype):
    source, tokenizer = pretrained.open(workdir).source, load(workdir)[2]
    is_float = dtype in export.FLOAT_DTYPES
    formats = ['orbax', 'meta', 'huggingface', 'gguf'] if is_float else ['gguf']
    for to in formats:
        export.save(tmp_path / to, source, tokenizer, to=to, dtype=dtype)
        export.verify(pretrained.open(tmp_path / to).source, source, dtype=dtype)


def test_verification_finds_a_changed_value(tmp_path, workdir):
    source = pretrained.open(workdir).source
    export.save(tmp_path / 'model.gguf', source, load(workdir)[2], to='gguf')
    data = bytearray((tmp_path / 'model.gguf').read_bytes())
    data[-100] ^= 1
    (tmp_path / 'model.gguf').write_bytes(data)
    with pytest.raises(InputError, match='was written wrong: weight .* differ from'):
        export.verify(pretrained.open(tmp_path / 'model.gguf').source, source)


def test_a_conversion_that_fails_leaves_nothing_and_one_that_would_overwrite_is_refused(tmp_path, workdir):
    source, tokenizer = pretrained.open(workdir).source, load(workdir)[2]
    broken = dataclasses.replace(source, tensors={**source.tensors, 'final_norm': [Unreadable()]})
    for to in ('orbax', 'meta', 'huggingface', 'gguf'):
        with pytest.raises(SystemFailure, match='out cannot be written: disk on fire'):
            export.save(tmp_path / 'out', broken, tokenizer, to=to)
        assert not any(tmp_path.iterdir())
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/precious').write_text('x')
    for to in ('orbax', 'meta', 'huggingface', 'gguf'):
        with pytest.raises(InputError, match='out exists; give a new'):
            export.save(tmp_path / 'out', source, tokenizer, to=to)
    assert [path.name for path in tmp_path.rglob('*')] == ['out', 'precious']
    for wrong, message in (
        (dict(to='meta', dtype='q8_0'), 'dtype q8_0 is not one that meta holds: float32, bfloat16, float16'),
        (dict(to='gguf', model_parallel=2), 'only files of meta are split'),
    ):
        with pytest.raises(InputError, match=message):
            export.save(tmp_path / 'new', source, tokenizer, **wrong)


@pytest.mark.parametrize('to', ['orbax', 'meta', 'huggingface', 'gguf'])
def test_weights_in_float64_are_written_or_refused(tmp_path, workdir, to):
    """Nothing is written that could not be read back."""
    source, tokenizer = random_source(CONFIG, np.float64), load(workdir)[2]
    if to in ('meta', 'gguf'):
        with pytest.raises(
            InputError, match=f'memory holds float64, which {to} does not; give dtype float32'
        ):
            export.save(tmp_path / 'out', source, tokenizer, to=to)
    dtype = 'float32' if to in ('meta', 'gguf') else ''
    export.save(tmp_path / 'out', source, tokenizer, to=to, dtype=dtype)
    export.verify(pretrained.open(tmp_path / 'out').source, source, dtype=dtype)
    if dtype:
        with pytest.raises(InputError, match='weight embed, layer 0 is float32, in memory it is float64'):
            export.verify(pretrained.open(tmp_path / 'out').source, source)


class Typed:
    """A tensor in a type of its own, whose values every type holds."""

    def __init__(self, tensor, dtype):
        self.values = np.sign(tensor.read()).astype(dtype)
        self.shape, self.dtype = self.values.shape, self.values.dtype

    def read(self, rows=slice(None), columns=slice(None)):
        return self.values[(rows, columns)[: self.values.ndim]]


@pytest.mark.parametrize('to', ['orbax', 'meta', 'huggingface', 'gguf'])
def test_every_tensor_keeps_its_type(tmp_path, workdir, to):
    source, tokenizer = random_source(CONFIG, np.float32), load(workdir)[2]
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    count = iter(range(1000))
    tensors = {
        path: [Typed(tensor, kinds[next(count) % 3]) for tensor in layers]
        for path, layers in source.tensors.items()
    }
    mixed = dataclasses.replace(source, tensors=tensors)
    export.save(tmp_path / 'out', mixed, tokenizer, to=to)
    written = pretrained.open(tmp_path / 'out').source
    export.verify(written, mixed)
    if to != 'orbax':  # which has all layers of a weight in one array
        for path, layers in tensors.items():
            for layer, tensor in enumerate(layers):
                is_vector = to == 'gguf' and len(tensor.shape) == 1
                expected = np.dtype(np.float32) if is_vector else tensor.dtype
                assert written.tensors[path][layer].dtype == expected, (path, layer)
    export.save(tmp_path / 'narrow', mixed, tokenizer, to=to, dtype='bfloat16')
    with pytest.raises(InputError, match='is bfloat16, in memory it is float'):
        export.verify(pretrained.open(tmp_path / 'narrow').source, mixed)


def test_a_tokenizer_that_was_written_wrong_is_found():
    found = kinds.kinds()
    tokenizers = {name: tokenizer_of_files(name, found[name][0]) for name in ('dolphin', 'hermes', 'no BOS')}
    for tokenizer in tokenizers.values():
        back = tokenizer_of_files('back', own_files(tokenizer))
        export.verify_tokenizer(back, tokenizer, 'x')
    dolphin = tokenizers['dolphin']
    for written, words in (
        (None, 'it has no tokenizer'),
        (tokenizer_of_files('a', found['dolphin'][0] | {'generation_config.json': b'{"eos_token_id": 401}',
                            'tokenizer_config.json': b'{"eos_token": "<|end_of_text|>"}'}), 'its stop_ids is'),
        (tokenizers['no BOS'], 'x was written wrong: its add_bos is False'),
        (tokenizer_of_files('a', found['llama2'][0]), "has the ids .*, in the source"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            export.verify_tokenizer(written, dolphin, 'x')


class Unreadable:
    shape, dtype = (CONFIG.embed_dim,), np.dtype(np.float32)

    def read(self, rows=slice(None), columns=slice(None)):
        raise OSError('disk on fire')


def test_ids_without_a_row_are_refused_where_they_are_used(tmp_path, workdir, caplog):
    other = tmp_path / 'other.model'
    train_sentencepiece([f'{i} green bottles hanging on the wall' for i in range(200)], 301, other)
    config, params, tokenizer = load(workdir, tokenizer=str(other))
    assert 'has 301 ids, the model 300' in caplog.text
    model = LlamaForCausalLM(config)
    assert generate(model, params, tokenizer, ['green'], max_new_tokens=1)
    with pytest.raises(InputError, match='token 300, for which the model has no row'):
        generate(model, params, tokenizer, [[1, 300]], max_new_tokens=1)
    with pytest.raises(InputError, match='token 300, for which the model has no row'):
        list(score(model, params, [((1,), (300,))]))


@pytest.mark.parametrize('to', ['orbax', 'meta', 'huggingface', 'gguf'])
def test_what_the_system_refuses_is_one_line_and_leaves_nothing(tmp_path, workdir, to):
    source, tokenizer = pretrained.open(workdir).source, load(workdir)[2]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, limits[1])
    )  # as a full disk, at 20,000 bytes of a file
    try:
        with pytest.raises(
            SystemRefusal, match='out cannot be written: .*File too large; allow larger files'
        ):
            export.save(tmp_path / 'out', source, tokenizer, to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(InputError, match='out cannot be written: '):
        export.save(tmp_path / 'file/out', source, tokenizer, to=to)


_STUCK = """
import dataclasses, sys, threading, numpy as np
from etils import epath
from llama_jax import export, pretrained

class Stuck:
    shape, dtype = (32,), np.dtype(np.float32)
    def read(self, rows=slice(None), columns=slice(None)):
        arrived.release()
        threading.Event().wait()

arrived, folder = threading.Semaphore(0), epath.Path(sys.argv[1])
source = pretrained.open(folder / 'run').source
tokenizer = pretrained.load_tokenizer(folder / 'run')
source = dataclasses.replace(source, tensors={**source.tensors, 'final_norm': [Stuck()]})
for to in ('orbax', 'meta', 'huggingface', 'gguf'):
    arguments = dict(to=to, source=source, tokenizer=tokenizer)
    threading.Thread(target=export.save, args=(folder / 'out' / to,), kwargs=arguments, daemon=True).start()
    arrived.acquire()
print('stuck', flush=True)
threading.Event().wait()
"""


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path, params):
    make_workdir(tmp_path / 'run', params)
    environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, '-c', _STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout and process.stdout.readline() == 'stuck\n'
    process.kill()
    process.wait()
    process.stdout.close()
    left = list((tmp_path / 'out').iterdir())
    assert len(left) == 4 and all('.partial' in path.name for path in left)
    for path in left:
        with pytest.raises(InputError):
            assert pretrained.open(path).source
