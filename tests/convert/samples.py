"""A small sound file of every kind that is read, and how it is read."""

import base64
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import pickle
import struct
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import numpy as safetensors_numpy

from llama_jax import pretrained
from llama_jax.checkpoint.model_file import save_config
from llama_jax.checkpoint.training import Checkpointer
from llama_jax.convert import huggingface, torch_pickle
from llama_jax.convert.mapping import Leaf, weights_of
from llama_jax.data.sources import read_documents
from llama_jax.errors import InputError
from llama_jax.export import save
from llama_jax.item_log import ItemLog
from llama_jax.models.config import LlamaConfig, RopeScaling
from llama_jax.tokenizer.conversion import model_file, own_files, vocabulary_of
from llama_jax.tokenizer.gguf_vocabulary import gguf_vocabulary
from llama_jax.tokenizer.huggingface_files import huggingface_files
from llama_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.vocabulary import BYTES
from tests.convert.bitsandbytes_test import stored
from tests.convert.damage import damaged_json, damaged_proto, zipped
from tests.convert.in_memory import matrices, random_source
from tests.convert.llama2c_test import bin_file, random_tensors
from tests.convert.peft_test import ours as written_by_hand
from tests.convert.sound_files import (
    Found,
    Spans,
    any_values,
    bin_values,
    gguf_values,
    is_object,
    safetensors_values,
    says_lines,
    says_llama2c_pieces,
    says_pieces,
    says_ranks,
    zip_values,
)
from tests.tokenizer import kinds

CONFIG = LlamaConfig(
    vocab_size=24, embed_dim=16, mlp_dim=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, max_seq_len=64
)  # fmt: skip
TEXTS = ('Hello world é 12', ' two  spaces', '99 green bottles <s> <|eot_id|>', '', 'a\n\n日本 ' + 'x' * 300)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sound file.

    Attributes:
      reader: what the table calls it.
      files: of a folder, by path.
      target: which of them is damaged.
      read: everything that the folder gives, by name.
      values: spans of the target that are values; where its structure is damaged as well, the values alone may differ.
      says: of a text: what it says, which what was read is compared with; ValueError where it is none.
      damage: what is done to what it says, in half of the cases.
      made: the file out of what is damaged, such as an archive with its checksums.
    """

    reader: str
    files: dict[str, bytes]
    target: str
    read: Callable[[epath.Path], Found]
    values: Spans = dataclasses.field(default_factory=list)
    says: Callable[[bytes, Found], bool] | None = None
    damage: Callable[[bytes, np.random.Generator], bytes] | None = None
    made: Callable[[bytes], bytes] = bytes


# Reading.


def read_checkpoint(path: epath.Path, name: str = '') -> Found:
    """Architecture, every weight, tokenizer and template."""
    checkpoint = pretrained.open(path / name if name else path)
    source = checkpoint.source
    found: Found = {'config': source.config.to_dict()}
    for place, tensors in source.tensors.items():
        for layer, tensor in enumerate(tensors):
            values = np.ascontiguousarray(tensor.read())
            digest = hashlib.sha1(values.tobytes()).hexdigest()
            found[f'{place} {layer}'] = (str(values.dtype), values.shape, digest)
    if checkpoint.tokenizer is not None:
        found |= said_by(checkpoint.tokenizer)
    return found | {'template': checkpoint.template}


def read_tokenizer(path: epath.Path, name: str = '') -> Found:
    return said_by(load_tokenizer(path / name if name else path))


def said_by(tokenizer: Tokenizer) -> Found:
    """Ids of texts and back, ends, and the pieces; it is also written in every format that takes it."""
    found: Found = {
        name: getattr(tokenizer, name)
        for name in ('vocab_size', 'bos_id', 'eos_id', 'stop_ids', 'add_bos', 'special_tokens')
    }
    found['ids'] = [tokenizer.encode(text, special=special) for text in TEXTS for special in (False, True)]
    found['batch'] = [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)]
    found['texts'] = tokenizer.decode(range(min(tokenizer.vocab_size, 300)))
    writers = (
        lambda: vocabulary_of(tokenizer),
        lambda: huggingface_files(tokenizer, max_seq_len=8),
        lambda: gguf_vocabulary(tokenizer, vocab_size=tokenizer.vocab_size + 8),
        lambda: model_file(tokenizer),
        lambda: own_files(tokenizer),
    )
    for write in writers:
        try:
            written = write()
        except InputError as error:
            if '\n' in str(error):
                raise RuntimeError(f'not one line: {error}') from error
            continue
        if 'pieces' not in found and not isinstance(written, bytes | dict):
            scores = written.scores or [0.0] * len(written.tokens)
            found['pieces'] = [
                (token, struct.pack('<f', score), kind)
                for token, score, kind in zip(written.tokens, scores, written.types, strict=True)
            ]
    return found


def read_texts(path: epath.Path) -> Found:
    return {'texts': list(read_documents(str(path / 'a.jsonl')))}


def read_log(path: epath.Path) -> Found:
    log = ItemLog(path / 'log.jsonl', {'a': 1})
    log.close()
    return {'items': sorted(log.items)}


# The samples.


def samples(folder: pathlib.Path) -> Iterator[Sample]:
    """All of them, made in an empty folder."""
    yield from weights(epath.Path(folder))
    yield from _adapters(epath.Path(folder))
    yield from _ours(epath.Path(folder))
    yield from _tokenizers(epath.Path(folder))
    yield from _beside()
    lines = b'{"text": "h\\u00e9", "n": [1, 2.5, null]}\n' * 9
    yield Sample('documents, JSON lines', {'a.jsonl': lines}, 'a.jsonl', read_texts, says=says_lines)
    log = b'{"header": {"a": 1}}\n' + b''.join(b'{"index": %d, "x": [1.5]}\n' % i for i in range(9))
    yield Sample('log of items', {'log.jsonl': log}, 'log.jsonl', read_log, says=any_values)


def _files(folder: epath.Path) -> dict[str, bytes]:
    root = pathlib.Path(folder)
    return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob('*')) if f.is_file()}


def weights(folder: epath.Path) -> Iterator[Sample]:
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling(8.0))
    source = random_source(config)
    save(folder / 'hf', source, None, to='huggingface')
    one = _files(folder / 'hf')
    safe, index = 'model.safetensors', 'model.safetensors.index.json'
    yield Sample('safetensors', one, safe, read_checkpoint, safetensors_values(one[safe]))
    yield Sample('config.json', one, 'config.json', read_checkpoint, says=is_object, damage=damaged_json)
    (folder / 'shards').mkdir()
    huggingface.write(source, folder / 'shards', shard_bytes=6000)
    several = _files(folder / 'shards')
    shard = sorted(name for name in several if name.endswith('.safetensors'))[1]
    yield Sample('safetensors', several, shard, read_checkpoint, safetensors_values(several[shard]))
    yield Sample('index of safetensors', several, index, read_checkpoint, says=is_object, damage=damaged_json)

    save(folder / 'meta', source, None, to='meta', model_parallel=2)
    meta = _files(folder / 'meta')
    pth = 'consolidated.00.pth'
    yield Sample('.pth of Meta', meta, pth, read_checkpoint, zip_values(meta[pth]))
    yield Sample('params.json', meta, 'params.json', read_checkpoint, says=is_object, damage=damaged_json)

    state = torch_files(matrices(source, 'huggingface'))
    archive = zipped('archive', state)
    torch = {name: one[name] for name in ('config.json', 'generation_config.json')}
    torch['pytorch_model.bin'] = archive
    yield Sample('.bin of PyTorch', torch, 'pytorch_model.bin', read_checkpoint, zip_values(archive))
    pickled = Sample(
        'pickle, checksum made anew', torch, 'pytorch_model.bin', read_checkpoint, says=any_values
    )
    remade = functools.partial(_with_pickle, state)
    yield dataclasses.replace(pickled, files=torch | {'pytorch_model.bin': state['data.pkl']}, made=remade)

    sizes = dict(
        dim=16, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=32, vocab_size=24, multiple_of=32,
        max_seq_len=64,
    )  # fmt: skip
    state = torch_files(matrices(source, 'meta'))
    model, args = state['data.pkl'], pickle.dumps(sizes | {'dropout': 0.0}, protocol=2)
    text = lambda name: b'X' + struct.pack('<I', len(name)) + name  # noqa: E731
    whole = b'\x80\x02}(' + text(b'model') + model[2:-1] + text(b'model_args') + args[2:-1] + b'u.'
    archive = zipped('archive', state | {'data.pkl': whole})
    read = functools.partial(read_checkpoint, name='model.pt')
    yield Sample('llama2.c .pt', {'model.pt': archive}, 'model.pt', read, zip_values(archive))

    read = functools.partial(read_checkpoint, name='stories.bin')
    for version in (0, 1, 2):
        data = bin_file(version, random_tensors(), tied=False)
        yield Sample('llama2.c .bin', {'stories.bin': data}, 'stories.bin', read, bin_values(version, data))


def _adapters(folder: epath.Path) -> Iterator[Sample]:
    """A folder of PEFT beside its base, and matrices of 4 bits as bitsandbytes writes them."""
    source = random_source(CONFIG)
    save(folder / 'beside/base', source, None, to='huggingface')
    written_by_hand(pathlib.Path(folder / 'beside/adapter'), {}, config=CONFIG, base='../base')
    files = _files(folder / 'beside')
    safe, config = 'adapter/adapter_model.safetensors', 'adapter/adapter_config.json'
    read = functools.partial(read_checkpoint, name='adapter')
    yield Sample('safetensors of PEFT', files, safe, read, safetensors_values(files[safe]))
    yield Sample('adapter_config.json', files, config, read, says=is_object, damage=damaged_json)

    save(folder / 'nf4', source, None, to='huggingface')
    files = _files(folder / 'nf4')
    tensors = safetensors_numpy.load(files['model.safetensors'])
    for seed, name in enumerate(n for n in list(tensors) if n.endswith('proj.weight')):
        tensors |= stored(name, tensors[name].shape, nested=256 * (seed % 2), seed=seed)[0]
    described = {'quantization_config': {'quant_method': 'bitsandbytes', 'load_in_4bit': True}}
    files['config.json'] = json.dumps(json.loads(files['config.json']) | described).encode()
    files['model.safetensors'] = data = safetensors_numpy.save(tensors)
    yield Sample(
        'safetensors in 4 bits', files, 'model.safetensors', read_checkpoint, safetensors_values(data)
    )


def torch_files(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The entries of an archive that `torch.save` makes."""
    keys = {name: str(i) for i, name in enumerate(tensors)}
    content = torch_pickle.dump({n: (v.shape, v.dtype) for n, v in tensors.items()}, keys)
    return {
        'data.pkl': content,
        **{f'data/{keys[n]}': np.ascontiguousarray(v).tobytes() for n, v in tensors.items()},
    }


def _with_pickle(state: dict[str, bytes], content: bytes) -> bytes:
    return zipped('archive', state | {'data.pkl': content})


def _ours(folder: epath.Path) -> Iterator[Sample]:
    source = random_source(CONFIG)
    save(folder / 'ours', source, None, to='orbax')
    leaves = {}
    for weight in weights_of(CONFIG):
        leaf = Leaf(source, weight)
        leaves[weight.path] = np.asarray(leaf.read(tuple(slice(None) for _ in leaf.shape)))
    checkpointer = Checkpointer(folder / 'run/checkpoints')
    checkpointer.save(1, {'params': traverse_util.unflatten_dict(leaves, sep='/')}, {'a': 1})
    checkpointer.close()
    save_config(folder / 'run', CONFIG)
    for files in (_files(folder / 'ours'), _files(folder / 'run')):
        yield Sample('model.json', files, 'model.json', read_checkpoint, says=is_object, damage=damaged_json)
        for name in files:
            if name != 'model.json':
                yield Sample('our checkpoint', files, name, read_checkpoint)


def _tokenizers(folder: epath.Path) -> Iterator[Sample]:
    model, unigram = kinds.sentencepiece_file(), normalizing_unigram()
    proto = dict(says=says_pieces, damage=damaged_proto)
    yield Sample(
        'tokenizer.model, BPE', {'tokenizer.model': model}, 'tokenizer.model', read_tokenizer, **proto
    )
    files = {'tokenizer.model': unigram}
    yield Sample('tokenizer.model, Unigram', files, 'tokenizer.model', read_tokenizer, **proto)
    vocab = json.loads(kinds._trained_merges())['model']['vocab']
    ranks = b''.join(
        base64.b64encode(token.translate(BYTES).encode('latin1')) + b' %d\n' % id
        for token, id in sorted(vocab.items(), key=lambda item: item[1])
    )
    yield Sample('tiktoken', {'tokenizer.model': ranks}, 'tokenizer.model', read_tokenizer, says=says_ranks)
    yield Sample(
        'tokenizer.bin', {'tokenizer.bin': llama2c_file(model)}, 'tokenizer.bin', read_tokenizer,
        says=says_llama2c_pieces,
    )  # fmt: skip
    named = kinds.kinds()
    unigram_json = huggingface_files(load_in(folder / 'u', files), max_seq_len=8)
    folders = {
        'BPE': named['llama2'][0], 'BPE, byte-level': named['hermes'][0],
        'BPE of transformers 5': named['chatml on llama2, transformers 5'][0], 'Unigram': unigram_json,
    }  # fmt: skip
    for name, found in folders.items():
        files = {n: data for n, data in found.items() if n != 'tokenizer.model'}
        reader = f'tokenizer.json, {name.split(" of ")[0]}'
        yield Sample(reader, files, 'tokenizer.json', read_tokenizer, says=is_object, damage=damaged_json)

    rows = len(kinds.pieces_of(model))
    config = dataclasses.replace(CONFIG, embed_dim=32, head_dim=8, vocab_size=rows)
    tokenizer = load_in(folder / 's', {'tokenizer.model': model})
    save(folder / 's.gguf', random_source(config), tokenizer, to='gguf', chat_template=kinds.CHATML)
    tokenizer = load_in(folder / 'b', named['hermes'][0])
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size, rope_scaling=RopeScaling(8.0))
    save(folder / 'b.gguf', random_source(config), tokenizer, to='gguf', dtype='q8_0')
    for name, family in (('s', 'sentencepiece'), ('b', 'byte-level')):
        data = (folder / f'{name}.gguf').read_bytes()
        read = functools.partial(read_checkpoint, name='a.gguf')
        yield Sample(f'GGUF, {family}', {'a.gguf': data}, 'a.gguf', read, gguf_values(data))


def load_in(folder: epath.Path, files: dict[str, bytes]) -> Tokenizer:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)


def normalizing_unigram() -> bytes:
    """A Unigram with sentencepiece's usual normalizer of characters."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(kinds.TEXT), model_writer=out, model_type='unigram', vocab_size=300, minloglevel=4,
        hard_vocab_limit=False, normalization_rule_name='nmt_nfkc',
    )  # fmt: skip
    return out.getvalue()


def llama2c_file(model: bytes) -> bytes:
    """As llama2.c's tokenizer.py writes it."""
    pieces = [(text.replace('▁', ' '), score) for text, score, _ in kinds.pieces_of(model)]
    names = {'<s>': '\n<s>\n', '</s>': '\n</s>\n'}
    encoded = [(names.get(text, text).encode(), score) for text, score in pieces]
    parts = [struct.pack('<fi', score, len(text)) + text for text, score in encoded]
    return struct.pack('<i', max(len(text) for text, _ in encoded)) + b''.join(parts)


def _beside() -> Iterator[Sample]:
    """Files that say more of a tokenizer."""
    found = kinds.kinds()['tokenizer.model and added tokens'][0]
    found |= {'special_tokens_map.json': b'{"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}'}
    config = json.loads(found['tokenizer_config.json']) | {
        'chat_template': kinds.CHATML,
        'add_bos_token': True,
    }
    config |= {'added_tokens_decoder': {'2': {'content': '</s>', 'special': True}}, 'pad_token': None}
    found['tokenizer_config.json'] = json.dumps(config).encode()
    for name in (
        'generation_config.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    ):  # fmt: skip
        yield Sample(name, found, name, read_tokenizer, says=is_object, damage=damaged_json)
