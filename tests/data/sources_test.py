import gzip
import io
import json
import sysconfig
import tracemalloc

import numpy as np
import pytest

from llama_jax.data import containers, sources
from llama_jax.data.sources import read_documents
from llama_jax.errors import InputError


def read(source, **kwargs):
    return list(read_documents(str(source), **kwargs))


def error(source, **kwargs):
    with pytest.raises(InputError) as caught:
        read(source, **kwargs)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def write_records(path, records):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()


def test_text_files_by_glob_are_sorted_and_split(tmp_path):
    (tmp_path / 'deep/er').mkdir(parents=True)
    (tmp_path / 'b.txt').write_text('\ufeffwhole\nfile\n', encoding='utf-8')
    (tmp_path / 'deep/er/a.txt.gz').write_bytes(gzip.compress('één'.encode()))
    (tmp_path / 'empty.txt').write_text('')
    assert read(tmp_path / '**/*.txt*') == ['whole\nfile\n', 'één']
    (tmp_path / 'part[1].txt').write_text('called so')
    (tmp_path / 'part1.txt').write_text('another')
    assert read(tmp_path / 'part[1].txt') == ['called so']
    (tmp_path / 'stories.md').write_text('one\n<|endoftext|>\ntwo<|endoftext|>\n<|endoftext|>three\n')
    assert read(tmp_path / 'stories.md', separator='<|endoftext|>') == ['one', 'two', 'three']


def test_the_stories_sample_splits_into_its_documents(shared_data):
    path = shared_data / 'text/tinystories_2MiB_sample.txt'
    stories = read(path, separator='<|endoftext|>')
    pieces = path.read_text().split('<|endoftext|>')
    assert stories == [piece.strip('\n') for piece in pieces if piece.strip('\n')]


def test_json_lines_and_array_records(tmp_path):
    lines = [json.dumps({'text': 'é', 'n': 1}), '', json.dumps({'text': ''}), '{"text": "\\ud800"}']
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'b.json.gz').write_bytes(gzip.compress(b'{"text": "b"}\n'))
    assert read(tmp_path / '*.js*') == ['é', '\ud800', 'b']
    write_records(tmp_path / 'c.array_record', ['één'.encode(), b'two'])
    assert read(tmp_path / 'c.array_record') == ['één', 'two']


def test_bad_files_are_named_with_the_place(tmp_path):
    path = tmp_path / 'a.jsonl'
    for line in ('{"text": ', '[' * 100_000, f'{{"text": "a", "n": {"9" * 5000}}}'):
        path.write_text(f'{{"text": "a"}}\n{line}\n')
        assert f'{path} line 2 is not JSON' in error(path)
    path.write_text('{"title": "a", "body": "b"}\n')
    assert "line 1 has no field 'text': its fields are title, body" in error(path)
    path.write_text('{"text": 3}\n')
    assert "line 1: field 'text' is int, not text" in error(path)
    path.write_text('["a"]\n')
    assert 'line 1 holds a JSON list' in error(path)
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f'{path} line 2 is not UTF-8: byte 0xff at offset 24' in error(path)
    text = tmp_path / 'a.txt'
    text.write_bytes(b'good\n--\nbad \xe9\n')
    assert f'{text} is not UTF-8: byte 0xe9 at offset 12' in error(text)
    assert 'byte 0xe9 at offset 12' in error(text, separator='--')
    packed = tmp_path / 'a.txt.gz'
    packed.write_bytes(gzip.compress(b'hello' * 1000)[:-12])
    assert f'{packed} is cut short or not gzip' in error(packed)
    packed.write_bytes(b'hello')
    assert f'{packed} is cut short or not gzip' in error(packed)


def bomb(size):
    """`size` letters in a thousandth of it."""
    block = gzip.compress(b'a' * (1 << 20), mtime=0)
    return block * (size >> 20)


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.txt.gz'])
def test_a_line_that_does_not_end_is_refused_before_it_is_read(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' if 'js' in name else b'') + bomb(96 << 20))
    for module in (sources, containers):
        monkeypatch.setattr(module, 'MAX_BYTES', 1 << 20)
    tracemalloc.start()
    try:
        message = error(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in message and '1 MiB' in message and ('line 2' in message or '.txt' in name)


def test_documents_between_marks_are_found_wherever_a_block_ends(tmp_path, monkeypatch):
    text = 'één<|x|>two<|x|><|x|>three<|x|'
    for size in range(1, 12):
        file = io.BytesIO(text.encode())
        monkeypatch.setattr(file, 'read', lambda _, read=file.read, size=size: read(size), raising=False)
        texts = [record.content for record in sources._read_text(file, '', '<|x|>')]
        assert texts == ['één', 'two', '', 'three<|x|']


def test_missing_and_empty_sources_are_named(tmp_path):
    assert 'no file matches' in error(tmp_path / '*.txt')
    assert 'no file ' in error(tmp_path / 'none.txt')
    assert f'{tmp_path} is a directory' in error(tmp_path)
    assert 'a data source is empty' in error('')
    (tmp_path / 'a.txt').write_text('')
    (tmp_path / 'b.txt').write_text('\n')
    assert 'every document is empty' in error(tmp_path / '*.txt', separator='|')


@pytest.mark.parametrize('keep', [0, 100, 0.5, -1])
def test_an_array_record_cut_short_is_refused(tmp_path, keep):
    path = tmp_path / 'a.array_record'
    write_records(path, [bytes([65 + i % 26]) * 5000 for i in range(200)])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert f'{path} is cut short or not an ArrayRecord file' in error(path)


def test_a_damaged_array_record_is_refused(tmp_path):
    path = tmp_path / 'a.array_record'
    letters = np.random.default_rng(0).integers(32, 127, (200, 5000), np.uint8)  # do not compress away
    write_records(path, [row.tobytes() for row in letters])
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    assert 'is damaged' in error(path)


def test_the_standard_library_splits_by_file():
    train, validation = read('python_stdlib:train'), read('python_stdlib:validation')
    everything = read('python_stdlib')
    assert len(train) + len(validation) == len(everything) > 300
    assert sorted(train + validation) == sorted(everything)
    assert 0.02 < len(validation) / len(everything) < 0.1
    assert train == read('python_stdlib:train')
    assert any('class JSONDecoder' in text for text in everything)
    assert "no split 'test'" in error('python_stdlib:test')


def test_python_files_decode_by_their_own_declaration(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
    (tmp_path / 'latin.py').write_bytes('# -*- coding: latin-1 -*-\nname = "é"\n'.encode('latin-1'))
    (tmp_path / 'broken.py').write_bytes(b'name = "\xe9"\n')
    for name in ('site-packages', 'test', 'lib/tests'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'other.py').write_text('other')
    (tmp_path / 'lib/inner.py').write_text('inner')
    assert read('python_stdlib') == ['# -*- coding: latin-1 -*-\nname = "é"\n', 'inner']
    assert 'left out 1 files' in caplog.text


@pytest.mark.filterwarnings('ignore')  # TFDS warns of what it uses itself
def test_tfds_through_array_records(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class TinyText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version('1.0.0')
            code_path = None  # TFDS would look beside this file for what describes the data set

            def _info(self):
                features = {'text': tfds.features.Text(), 'title': tfds.features.Text()}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {'train': self._generate_examples(10), 'validation': self._generate_examples(2)}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {'text': f'document {i} é', 'title': f'{i}'}

        TinyText(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    assert sorted(read(f'tfds:tiny_text@{tmp_path}')) == [f'document {i} é' for i in range(10)]
    assert read(f'tfds:tiny_text:train@{tmp_path}') == read(f'tfds:tiny_text:train@{tmp_path}')
    assert len(read(f'tfds:tiny_text:train[:50%]@{tmp_path}', text_key='title')) == 5
    assert len(read(f'tfds:tiny_text:validation@{tmp_path}')) == 2
    assert 'of train, validation' in error(f'tfds:tiny_text:test@{tmp_path}')
    assert 'its fields are text, title' in error(f'tfds:tiny_text@{tmp_path}', text_key='body')
    assert "finds no dataset 'no_such'" in error(f'tfds:no_such@{tmp_path}')
    assert 'is not prepared in' in error(f'tfds:lm1b@{tmp_path}')
    assert 'not of the form' in error('tfds:')
