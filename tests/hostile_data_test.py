"""What people give `prepare_data` that is not as it should be: one line, or counted and left out, never by halves."""

import bz2
import gzip
import json
import os
import re

import pytest
import zstandard

from experiments.preparation.inspection import inspect
from llama_jax.data.preparation import Preparation, TextSource
from llama_jax.data.prepare import WORK, prepare
from llama_jax.data.prepared import PreparedRows
from llama_jax.data.provenance import read_stream
from llama_jax.data.sources import Reading
from llama_jax.errors import InputError
from tests.command_line import SMALL_FILES
from tests.data.packing_test import Letters

GOOD = [f'good text {number}' for number in range(20)]


def lines(*bad):
    """JSON lines with the bad ones behind the third."""
    good = [json.dumps({'text': text}).encode() for text in GOOD]
    return b'\n'.join([*good[:3], *bad, *good[3:]])


# What is in a line: (the line, what is said of it where it stops). Six of each are given, and left out by skip.
BAD_LINES = {
    'bad JSON': (b'{"text": "a', 'is not JSON'),
    'a list': (b'["a"]', 'holds a JSON list, not an object'),
    'a string': (b'"a"', 'holds a JSON str, not an object'),
    'a number': (b'17', 'holds a JSON int, not an object'),
    'bad UTF-8': (b'{"text": "\xc3("}', 'is not UTF-8: byte 0xc3 at offset'),
    'Latin-1': ('{"text": "\xe9t\xe9"}'.encode('latin-1'), 'is not UTF-8: byte 0xe9'),
    'UTF-16': ('{"text": "a"}'.encode('utf-16-le') + b'\xff', 'is not UTF-8'),
    'a NUL byte': (b'{"text": "a\x00"}', 'is not JSON'),
    'only NUL bytes': (b'\x00' * 40, 'is not JSON'),
    'null for a text': (b'{"text": null}', "field 'text' is NoneType, not text"),
    'a number for a text': (b'{"text": 1.5}', "field 'text' is float, not text"),
    'a list for a text': (b'{"text": ["a"]}', "field 'text' is list, not text"),
    'no text': (
        b'{"body": "a", "url": "b"}',
        "has no field 'text': its fields are body, url; name another by text_key",
    ),
    'no field at all': (b'{}', "has no field 'text': its fields are none"),
    'nested a million deep': (b'[' * 1_000_000, 'is not JSON'),
    'two on a line': (b'{"text": "a"}{"text": "b"}', 'is not JSON'),
    'Python, not JSON': (b"{'text': 'a'}", 'is not JSON'),
    'a number of 5,000 digits': (b'{"text": "a", "n": %s}' % (b'9' * 5000), 'is not JSON'),
}


def preparation(folder, pattern, **changed):
    reading = changed.pop('reading', Reading())
    return Preparation(
        str(folder / 'out'), (TextSource('s', (f'{folder}/{pattern}',), reading),), 16, **changed
    )


def texts_in(folder):
    rows = PreparedRows(folder)
    ids = [
        token for shard in range(len(rows.manifest['shards'])) for token in read_stream(rows, shard).tolist()
    ]
    return Letters().decode([36 if token == 1 else token for token in ids]).split('"')[:-1]


def refused(asked):
    with pytest.raises(InputError) as caught:
        prepare(asked, Letters())
    line = str(caught.value)
    assert '\n' not in line and len(line) < 1000 and line.isprintable()
    assert not os.path.exists(asked.output)
    return line


@pytest.mark.parametrize('case', BAD_LINES)
def test_a_bad_line_stops_or_is_left_out_and_counted(tmp_path, case):
    line, message = BAD_LINES[case]
    file = tmp_path / 'a.jsonl'
    file.write_bytes(lines(*[line] * 6))
    said = refused(preparation(tmp_path, '*.jsonl'))
    assert re.match(re.escape(f'{file} line 4') + '[: ]', said) and message in said
    assert said.endswith('mend it, or leave such records out (on_error skip)')
    report = prepare(preparation(tmp_path, '*.jsonl', on_error='skip', max_errors=6), Letters())
    row = report['sources']['s']
    assert (row['bad'], row['records'], row['train']['documents']) == (6, 26, 20)
    assert [re.search(r'line (\d+)', place)[1] for place in row['bad_first']] == list('45678')
    assert texts_in(tmp_path / 'out') == GOOD


# Lines that are as good as any.
FINE = {
    'blank lines': (lines(b'', b'   ', b'\t'), GOOD),
    'CRLF': (lines().replace(b'\n', b'\r\n'), GOOD),
    'a byte order mark': (b'\xef\xbb\xbf' + lines(), GOOD),
    'no end of the last line': (lines(), GOOD),
    'empty texts': (lines(b'{"text": ""}'), GOOD),
    'a lone surrogate': (
        lines(rb'{"text": "a\ud800b"}'),
        [*GOOD[:3], 'a\N{REPLACEMENT CHARACTER}b', *GOOD[3:]],
    ),
    'an escaped NUL': (lines(rb'{"text": "a\u0000b"}'), [*GOOD[:3], 'a\x00b', *GOOD[3:]]),
}


class Strict(Letters):
    """As the real tokenizers: what UTF-8 has not is the sign for that."""

    def encode(self, text, bos=False, eos=False):
        text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        return super().encode(text, bos, eos)


@pytest.mark.parametrize('case', FINE)
def test_what_only_looks_odd_is_read(tmp_path, case):
    content, wanted = FINE[case]
    (tmp_path / 'a.jsonl').write_bytes(content)
    report = prepare(preparation(tmp_path, '*.jsonl'), Strict())
    assert report['sources']['s']['bad'] == 0 and texts_in(tmp_path / 'out') == wanted


CUT = {
    'a.jsonl.gz': gzip.compress(lines())[:-9],
    'a.jsonl.zst': zstandard.compress(lines())[:-9],
    'a.jsonl.bz2': bz2.compress(lines())[:-9],
    'a.parquet': b'PAR1' + bytes(100),
    'a.arrow': b'ARROW1\0\0' + bytes(40),
    'a.array_record': bytes(1000),
    'a.json': b'[{"text": "a"}, {"text": ',
    'not.jsonl.gz': lines(),
}


@pytest.mark.parametrize('name', CUT)
@pytest.mark.parametrize('on_error', ['stop', 'skip'])
def test_a_file_that_is_cut_short_is_always_refused(tmp_path, name, on_error):
    (tmp_path / name).write_bytes(CUT[name])
    said = refused(preparation(tmp_path, name, on_error=on_error))
    assert f'{tmp_path}/{name}' in said and ('copy' in said or 'write it again' in said)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(lines())
    (tmp_path / 'b.jsonl').symlink_to('a.jsonl')
    assert 'b.jsonl is named twice, by' in refused(preparation(tmp_path, '*.jsonl'))


def test_where_every_record_is_bad_the_first_is_named(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(lines())
    asked = preparation(tmp_path, 'a.jsonl', on_error='skip', reading=Reading('body'))
    with pytest.raises(InputError, match="line 1 has no field 'body': its fields are text; name another by"):
        prepare(asked, Letters())
    # The records of what was read stay; a source that is mended by another file is told how to begin anew.
    (tmp_path / 'b.jsonl').write_bytes(lines())
    with pytest.raises(
        InputError, match=f'was begun with another sources: .* delete {tmp_path}/out, or write'
    ):
        prepare(preparation(tmp_path, 'b.jsonl'), Letters())


def test_what_cannot_be_inspected_says_what_it_is(tmp_path):
    (tmp_path / 'a.jsonl').write_bytes(lines())
    sources = tuple(TextSource(name, (f'{tmp_path}/{name}.jsonl',)) for name in 'ab')
    (tmp_path / 'b.jsonl').write_bytes(lines())
    prepare(Preparation(f'{tmp_path}/two', sources, 16), Letters())
    (tmp_path / 'begun' / WORK).mkdir(parents=True)
    for folder, line in (
        ('', "no folder ''; give one of prepared rows"),
        (f'{tmp_path}/none', f"no folder '{tmp_path}/none'"),
        (f'{tmp_path}/a.jsonl', 'has no manifest of prepared rows; of a workdir give a step'),
        (f'{tmp_path}/begun', 'is not finished'),
        (f'{tmp_path}/two', 'each in a folder of its own: a, b; give one of these'),
    ):
        with pytest.raises(InputError, match=line):
            inspect(folder, None, None, None, None)
    with pytest.raises(InputError, match=r'b\.jsonl is there already; remove it, or write to another place'):
        inspect(f'{tmp_path}/two/a', None, None, None, f'{tmp_path}/b.jsonl')
    assert (tmp_path / 'b.jsonl').read_bytes() == lines()


@pytest.mark.slow
def test_by_the_command_each_is_one_line_with_status_2(commands, corpus, folder, tmp_path):
    from llama_jax.data.datasets import train_tokenizer

    train_tokenizer([str(corpus)], 320, folder / 'tokenizer.model')
    (tmp_path / 'a.jsonl').write_bytes(lines())
    (tmp_path / 'a.csv').write_bytes(b'text\na\n')
    (tmp_path / 'bad.jsonl').write_bytes(lines(*[b'{'] * 7))
    (tmp_path / 'dir.jsonl').mkdir()
    output = tmp_path / 'out'
    given = [f'--tokenizer={folder}/tokenizer.model', '--seq_len=16', f'--output={output}', '--num_workers=1']
    for arguments, line in (
        (['--input='], '--input=: it is empty'),
        ([], '--input is required, or --config'),
        ([f'--input={tmp_path}/none*.jsonl'], 'no file matches'),
        ([f'--input={tmp_path}/none.jsonl'], 'no file'),
        ([f'--input={tmp_path}/a.csv'], 'a.csv is of no known kind; they are .jsonl'),
        ([f'--input={tmp_path}/a.jsonl,{tmp_path}/*.jsonl'], 'is named twice, by'),
        ([f'--input={tmp_path}/dir.jsonl'], 'is a directory without a manifest'),
        ([f'--input={tmp_path}/a.jsonl', '--text_key=body'], "has no field 'body': its fields are text"),
        ([f'--input={tmp_path}/bad.jsonl'], '(set by --input, --tokenizer, --seq_len, --output)'),
        ([f'--input={tmp_path}/bad.jsonl'], 'bad.jsonl line 4 is not JSON'),
        ([f'--input={tmp_path}/bad.jsonl', '--on_error=skip', '--max_errors=6'], '7 records have no text'),
        ([f'--input={tmp_path}/a.jsonl', '--on_error=go'], "'go'"),
        (
            [f'--input={tmp_path}/a.jsonl', '--seq_len=99999999999'],
            'seq_len is 99999999999; it must be from 1 to',
        ),
        (
            [f'--input={tmp_path}/a.jsonl', '--max_errors=6'],
            '--max_errors counts what --on_error=skip leaves',
        ),
        (['--config=configs/prepare_data.py:none'], "unknown recipe 'none'; there are llama and plain"),
        (['--config=configs/prepare_data.py:plain', '--config.sources.documents.inputs=a'], 'inputs'),
        (
            ['--config=configs/prepare_data.py:plain'],
            'no source has an input; set --config.sources.NAME.input',
        ),
    ):
        said = commands.run('prepare_data', *given, *arguments).error()
        assert line in said, said
        left = set(os.listdir(output)) if output.exists() else set()
        assert left <= {WORK}, arguments  # what it has read may stay, to go on with
        if left:
            for file in (output / WORK).iterdir():
                file.unlink()
            (output / WORK).rmdir()
            output.rmdir()
    done = commands.run(
        'prepare_data', *given, f'--input={tmp_path}/bad.jsonl', '--on_error=skip'
    ).succeeded()
    assert '7 bad records left out' in done.stdout
    report = json.loads((output / 'report.json').read_text())['sources']['documents']
    assert report['bad'] == 7 and len(report['bad_first']) == 5 and report['train']['documents'] == 20


FULL = """
import errno, itertools, os
calls = itertools.count()
def fsync(descriptor):
    if next(calls) >= 4:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.fsync = fsync
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(commands, corpus, folder, tmp_path):
    documents = corpus.read_text().split('\n<|endoftext|>\n') * 40
    (tmp_path / 'a.jsonl').write_text(
        '\n'.join(json.dumps({'text': f'{i} {t}'}) for i, t in enumerate(documents))
    )
    from llama_jax.data.datasets import train_tokenizer

    train_tokenizer([str(corpus)], 320, tmp_path / 'tokenizer.model')
    given = [
        f'--input={tmp_path}/a.jsonl', f'--tokenizer={tmp_path}/tokenizer.model', '--seq_len=64',
        '--unit_bytes=200000', '--num_workers=1',
    ]  # fmt: skip
    commands.run('prepare_data', *given, f'--output={tmp_path}/whole').succeeded()
    output = tmp_path / 'out'
    line = commands.run('prepare_data', *given, f'--output={output}', before=SMALL_FILES).error()
    assert str(output) in line and 'cannot be written' in line
    assert 'File too large' in line and line.endswith('; allow larger files (ulimit -f), then start again')
    assert not list(output.rglob('manifest.json')) and not list(output.rglob('rows-*'))
    line = commands.run('prepare_data', *given, f'--output={output}', before=FULL).error()
    assert line.endswith(' cannot be written: No space left on device; make room there, then start again')
    assert list(output.rglob('rows-*')) and not list(output.rglob('manifest.json'))
    assert 'going on with what was begun' in commands.run(
        'prepare_data', *given, f'--output={output}'
    ).succeeded().stderr  # fmt: skip
    for file in (tmp_path / 'whole').rglob('*.array_record'):
        assert (output / file.name).read_bytes() == file.read_bytes()
    assert (output / 'manifest.json').read_bytes() == (tmp_path / 'whole/manifest.json').read_bytes()
