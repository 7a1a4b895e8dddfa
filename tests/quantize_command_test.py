"""The command `quantize`, run as a user runs it."""

import json

import pytest

from llama_jax import export, pretrained


@pytest.fixture(scope='module')
def given(shared_data):
    return shared_data / 'weights/stories260K/stories260K.gguf'


@pytest.mark.slow
def test_what_is_written_is_generated_with_and_told(commands, given, tmp_path):
    text = tmp_path / 'text.txt'
    text.write_text(
        'Once upon a time, there was a little girl named Lily.\n<|endoftext|>\nThe dog ran to the park.'
    )
    output = tmp_path / 'out'
    done = commands.run(
        'quantize', f'--input={given}', f'--output={output}', '--dtype=int4', f'--eval={text}'
    ).succeeded()
    report = json.loads((output / 'quantization.json').read_text())
    before, after = (report['perplexity'][when]['token_perplexity'] for when in ('before', 'after'))
    assert 1 < before != after < 2 * before
    assert (
        f'{report["bytes"]:,} bytes of weights as int4' in done.stdout and f'{after:.4f} after' in done.stdout
    )
    assert 'blocks/mlp/down is int8 by output channel, for a product sums over 172' in done.stdout
    prompt = ['--prompt=Once upon a time', '--max_new_tokens=12']
    texts = [
        commands.run('generate', f'--checkpoint={place}', *prompt).succeeded().stdout
        for place in (given, output)
    ]
    assert texts[1].startswith(', there was')
    again = ['quantize', f'--input={output}', f'--output={tmp_path}/again', '--dtype=int8']
    assert 'is quantised already; give the checkpoint that it was made of' in commands.run(*again).error()
    assert not (tmp_path / 'again').exists()


@pytest.mark.slow
def test_the_integers_of_a_gguf_are_kept_where_that_is_asked_for(commands, given, tmp_path):
    file = tmp_path / 'q8_0.gguf'
    checkpoint = pretrained.open(given)
    export.save(file, checkpoint.source, checkpoint.tokenizer, to='gguf', dtype='q8_0')
    prompt = ['--prompt=Once upon a time', '--max_new_tokens=32']
    texts = [
        commands.run('generate', f'--checkpoint={file}', *prompt, *flag).succeeded()
        for flag in ([], ['--keep_quantized'], ['--keep_quantized', '--cache_dtype=int8'])
    ]
    assert texts[0].stdout == texts[1].stdout == texts[2].stdout
    assert 'cast, as they are not Q8_0 or Q4_0: blocks/mlp/down' in texts[1].stderr
    line = commands.run('generate', f'--checkpoint={given}', *prompt, '--keep_quantized').error()
    assert 'holds no weights in integers to be kept' in line
    line = commands.run('generate', f'--checkpoint={given}', *prompt, '--cache_dtype=int4').error()
    assert '--cache_dtype=int4: value should be one of <auto|int8>' in line


@pytest.mark.slow
def test_what_is_wrong_is_one_line_and_leaves_nothing(commands, given, tmp_path):
    for arguments, message in {
        (
            '--dtype=int4',
            '--group=32',
        ): 'group 32 does not divide weight blocks/mlp/down: a product sums over 172',
        ('--dtype=int8', '--group=-4'): 'group is -4',
        ('--dtype=int3',): '--dtype',
        ('--dtype=int8', f'--eval={tmp_path}/none.txt'): 'none.txt',
        ('--dtype=int8', f'--tokenizer={tmp_path}/none'): 'no tokenizer at',
    }.items():
        line = commands.run('quantize', f'--input={given}', f'--output={tmp_path}/a/out', *arguments).error()
        assert message in line
        assert not any(tmp_path.iterdir())
    # What is there already is told before an hour's measuring.
    there = commands.run(
        'quantize',
        f'--input={given}',
        '--dtype=int8',
        f'--output={tmp_path.parent}',
        f'--tokenizer={tmp_path}/none',
    )
    assert 'exists; give a new one, or remove it first (set by --output)' in there.error()
