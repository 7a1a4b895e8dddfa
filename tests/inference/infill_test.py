import dataclasses
import json
from typing import Any

import pytest

import llama_jax
from llama_jax import export
from llama_jax.errors import InputError
from llama_jax.inference import infill as infilling
from llama_jax.inference.detokenizer import Detokenizer
from llama_jax.inference.infill import infill
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.infill_format import InfillFormat
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from tests import toy
from tests.api_test import example_of
from tests.quantize.files_test import source_of
from tests.tokenizer import kinds
from tests.tokenizer.infill_format_test import with_infilling

GAPS = [('def f(x):\n    ret', ' x\n'), ('green bottles', 'wall')]


@pytest.fixture(scope='module')
def tokenizer():
    return SentencePieceTokenizer('tokenizer.model', with_infilling(kinds.sentencepiece_file()))


def test_gaps_are_what_is_generated_from(tokenizer, monkeypatch):
    given = []
    monkeypatch.setattr(infilling, 'generate', lambda *args, **settings: given.append((args, settings)) or [])
    gap_format, model = InfillFormat(tokenizer), toy.make_model()
    infill(model, {}, tokenizer, GAPS, suffix_first=True, stop_ids=[7], seed=3)
    ids = [gap_format.encode_prompt(*gap, suffix_first=True) for gap in GAPS]
    assert given == [((model, {}, tokenizer, ids), {'stop_ids': (*gap_format.stop_ids, 7), 'seed': 3})]
    # Its example runs.
    given.clear()
    known: dict[str, Any] = {'llama_jax': llama_jax, 'model': model, 'params': {}, 'tokenizer': tokenizer}
    monkeypatch.setattr(infilling, 'generate', lambda *args, **settings: ['a + b'])
    exec(example_of(infill), known)
    assert known['body'] == 'a + b'
    with pytest.raises(InputError, match='text needs a tokenizer'):
        infill(model, {}, None, GAPS)


def test_what_fills_a_gap_keeps_the_space_that_it_begins_with(tokenizer):
    gap_format, row = InfillFormat(tokenizer), tokenizer.encode('green bottles')
    for suffix_first in (False, True):
        filled = Detokenizer(tokenizer, gap_format.encode_prompt(*GAPS[0], suffix_first))
        assert filled.push(row) + filled.flush() == ' green bottles'


@pytest.mark.slow
def test_the_command_fills_gaps(commands, tokenizer, tmp_path):
    config = dataclasses.replace(toy.CONFIG, vocab_size=tokenizer.vocab_size)
    model, checkpoint = LlamaForCausalLM(config, dtype='float32'), tmp_path / 'checkpoint'
    export.save(checkpoint, source_of(toy.make_params(model), config), tokenizer, to='orbax')
    _, params, _ = llama_jax.load(checkpoint)
    (end,) = InfillFormat(tokenizer).stop_ids
    for flags, settings in ((['--suffix_first'], {'suffix_first': True}), ([f'--logit_bias={end}:100'], {})):
        gaps = [flag for prefix, suffix in GAPS for flag in (f'--prompt={prefix}', f'--suffix={suffix}')]
        found = commands.run(
            'generate', f'--checkpoint={checkpoint}', '--max_new_tokens=6', '--format=jsonl', *flags, *gaps
        ).succeeded()
        texts = infill(model, params, tokenizer, GAPS, max_new_tokens=6, **settings) if settings else ['', '']
        assert [json.loads(line) for line in found.stdout.splitlines()] == [
            {'prompt': prefix, 'suffix': suffix, 'completion': text}
            for (prefix, suffix), text in zip(GAPS, texts, strict=True)
        ]
