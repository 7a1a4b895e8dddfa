"""A model card: what stands as `README.md` beside weights that others shall use."""

from collections.abc import Mapping
from types import MappingProxyType

from llama_jax.models.config import LlamaConfig


def model_card(
    name: str,
    config: LlamaConfig,
    *,
    license: str,
    made_from: str = '',
    measured: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The page in Markdown, with the header that the Hugging Face hub reads.

    Args:
      name: of the model, as `ORGANISATION/MODEL`.
      config: its architecture.
      license: as the hub names it: 'llama2', 'llama3.1', 'apache-2.0', ...
      made_from: the model on the hub that it was trained or converted from; '' for none.
      measured: what was found, by the name of the measure.
    """
    header = [f'license: {license}', 'pipeline_tag: text-generation', 'tags: [llama, llama_jax]']
    header += [f'base_model: {made_from}'] if made_from else []
    facts = {
        'parameters': f'{config.num_params:,}',
        'layers': config.num_layers,
        'width': config.embed_dim,
        'heads': f'{config.num_heads}, of keys and values {config.num_kv_heads}',
        'vocabulary': f'{config.vocab_size:,}',
        'context': f'{config.max_seq_len:,} tokens',
    }
    parts = ['\n'.join(['---', *header, '---']), f'# {name.rpartition("/")[2]}']
    parts += [_table({key: str(value) for key, value in facts.items()}, 'architecture')]
    parts += ['## Measured', _table(measured, 'measure')] if measured else []
    parts += [
        '## Use',
        f"```python\nimport llama_jax\n\nconfig, params, tokenizer = llama_jax.load('hf://{name}')\n```",
    ]
    return '\n\n'.join(parts) + '\n'


def _table(rows: Mapping[str, str], title: str) -> str:
    return '\n'.join(
        [f'| {title} | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items())]
    )
