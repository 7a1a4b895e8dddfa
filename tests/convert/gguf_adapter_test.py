"""Adapters in GGUF, as llama.cpp reads them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from llama_jax import export, pretrained
from llama_jax.convert import gguf_file, peft
from llama_jax.convert.adapter import merged
from llama_jax.convert.tensors import to_half_split
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.tokenizer import load_tokenizer
from llama_jax.tokenizer.training import train_sentencepiece
from tests import toy
from tests.convert.in_memory import random_source
from tests.convert.peft_test import ours

CONFIG = dataclasses.replace(
    toy.CONFIG, vocab_size=300, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, num_layers=2, max_seq_len=128
)  # fmt: skip
KINDS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
SETTINGS = {
    'target_modules': [*KINDS, 'lm_head', 'embed_tokens'],
    'use_rslora': True,
    'alpha_pattern': {r'layers.1.*q_proj': 3, 'down_proj': 1.25},
}


def adapter_in(folder):
    places = [
        f'model.layers.{layer}.{"self_attn" if kind[0] in "qkvo" else "mlp"}.{kind}.weight'
        for layer in range(2)
        for kind in KINDS
    ]
    tensors = ours(folder, SETTINGS, config=CONFIG, places=[*places, 'lm_head.weight'])
    rng, place = np.random.default_rng(7), 'base_model.model.model.embed_tokens.lora_embedding'
    tensors |= {f'{place}_A': rng.normal(size=(3, 300)), f'{place}_B': 0.3 * rng.normal(size=(64, 3))}
    save_file(
        {name: values.astype(np.float32) for name, values in tensors.items()},
        folder / 'adapter_model.safetensors',
    )
    return peft.open_adapter(epath.Path(folder), CONFIG)


def test_scales_are_a_part_of_b_whose_rows_are_as_the_weights(tmp_path):
    pytest.importorskip('gguf', reason='needs gguf: the extra `gguf`')
    adapter = adapter_in(tmp_path / 'a')
    export.save_adapter(tmp_path / 'x.gguf', adapter, CONFIG, to='gguf_adapter', base='')
    path = epath.Path(tmp_path / 'x.gguf')
    keys, infos = gguf_file.read_header(path)
    assert (keys['general.type'], keys['adapter.type'], keys['general.architecture']) == (
        'adapter',
        'lora',
        'llama',
    )
    assert len(infos) == 2 * len(adapter.low_rank)
    for (place, layer), name in (
        (('blocks/attention/q', 1), 'blk.1.attn_q'), (('head', 0), 'output'), (('embed', 0), 'token_embd'),
    ):  # fmt: skip
        a, b = (gguf_file.open_tensor(path, infos[f'{name}.weight.lora_{part}']).read() for part in 'ab')
        added = adapter.low_rank[place, layer]
        if place == 'embed':  # llama.cpp looks up rows of a
            assert (a.shape, b.shape) == ((300, 3), (64, 3))
            a, b = b.T, a
        b = to_half_split(b, CONFIG.head_dim) if 'attn' in name else b
        np.testing.assert_allclose(
            keys['adapter.lora.alpha'] / len(a) * b @ a,
            added.scale * added.b.read() @ added.a.read(),
            rtol=1e-5,
            atol=1e-5,
        )
    for name in ('y.gguf', 'z.gguf'):
        export.save_adapter(tmp_path / name, adapter, CONFIG, to='gguf_adapter', base='', dtype='float16')
    assert (tmp_path / 'y.gguf').stat().st_size < (tmp_path / 'x.gguf').stat().st_size


@pytest.mark.slow
def test_llama_cpp_says_with_it_what_we_say(tmp_path):
    """64 greedy tokens of a random model, whose first logits lie apart by some hundred times what sums differ by."""
    llama_cpp = pytest.importorskip('llama_cpp', reason='needs llama-cpp-python: the extra `parity`')
    train_sentencepiece(
        [f'{i} green bottles hanging on the wall' for i in range(200)], 300, tmp_path / 't.model'
    )
    base, adapter = random_source(CONFIG), adapter_in(tmp_path / 'a')
    tokenizer = load_tokenizer(tmp_path / 't.model')
    export.save(tmp_path / 'base.gguf', base, tokenizer, to='gguf')
    export.save_adapter(tmp_path / 'lora.gguf', adapter, CONFIG, to='gguf_adapter', base='')

    export.save(tmp_path / 'whole', merged(base, adapter), None, to='orbax')
    _, params, _ = pretrained.load(tmp_path / 'whole')
    model = LlamaForCausalLM(CONFIG, dtype=jnp.float32)
    apply = jax.jit(lambda row: model.apply({'params': params}, row)[0])
    ids, wanted, row = [1, 5, 17], [], np.zeros((1, 80), np.int32)
    for _ in range(64):  # what stands behind the last token is not seen
        row[0, : len(ids)] = ids
        ids.append(int(apply(row)[0, len(ids) - 1].argmax()))
        wanted.append(ids[-1])

    def said(**options):
        model = llama_cpp.Llama(
            str(tmp_path / 'base.gguf'), n_ctx=128, n_threads=1, verbose=False, seed=0, **options
        )
        found = []
        for token in model.generate([1, 5, 17], temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == 64:
                return found
        return found

    assert said(lora_path=str(tmp_path / 'lora.gguf')) == wanted
    assert said() != wanted
