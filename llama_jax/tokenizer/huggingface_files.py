"""A vocabulary as the files that transformers opens: `tokenizer.json` and what stands beside it."""

import json
from typing import Any

from llama_jax.errors import InputError
from llama_jax.tokenizer.conversion import probes_of, vocabulary_of
from llama_jax.tokenizer.gguf_vocabulary import end_of_turn
from llama_jax.tokenizer.huggingface_tokenizer import HuggingFaceTokenizer
from llama_jax.tokenizer.protocol import Tokenizer
from llama_jax.tokenizer.sentencepiece_model import USER_DEFINED
from llama_jax.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llama_jax.tokenizer.tokenizer_json import definition_of


def huggingface_files(tokenizer: Tokenizer, *, chat_template: str = '', max_seq_len: int) -> dict[str, bytes]:
    """The files by name that transformers.AutoTokenizer opens, with the same ids and the same BOS before each text.

    Args:
      tokenizer: any; a Hugging Face one keeps its `tokenizer.json`.
      chat_template: Jinja, as in `chat_format`; with it a turn's end counts as EOS, as in Llama 3's own folders.
      max_seq_len: the model's context.

    Raises:
      InputError: as `vocabulary_of`; or no tokenizer.json gives the same ids.
    """
    files = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        ends = tokenizer.ends
        name_of, eos_id, unknown = tokenizer.token, ends.eos_id, tokenizer.unk_id
        files['tokenizer.json'] = tokenizer.file_bytes
    else:
        vocabulary = vocabulary_of(tokenizer)
        ends = vocabulary.ends
        name_of, unknown = vocabulary.tokens.__getitem__, vocabulary.unk_id
        eos_id = end_of_turn(vocabulary) if chat_template else ends.eos_id
        definition = definition_of(vocabulary)
        files['tokenizer.json'] = _json(definition)
        if isinstance(tokenizer, SentencePieceTokenizer):
            files['tokenizer.model'] = tokenizer.file_bytes
            if USER_DEFINED in vocabulary.types:
                _check_same_ids(tokenizer, files)
    named = {'bos_token': ends.bos_id, 'eos_token': eos_id, 'pad_token': ends.pad_id, 'unk_token': unknown}
    names = {key: name_of(id) for key, id in named.items() if id is not None and name_of(id) is not None}
    config: dict[str, Any] = names | {
        # Not LlamaTokenizer: transformers 5 would then ignore how tokenizer.json puts the space before a text.
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_input_names': ['input_ids', 'attention_mask'],
        'model_max_length': max_seq_len,
        'clean_up_tokenization_spaces': False,
    }
    if not ends.add_bos:
        config['add_bos_token'] = False
    if chat_template:
        config['chat_template'] = chat_template
    files['tokenizer_config.json'] = _json(config)
    files['special_tokens_map.json'] = _json(names)
    return files


def _check_same_ids(tokenizer: SentencePieceTokenizer, files: dict[str, bytes]) -> None:
    """Sentencepiece cuts a text at user-defined pieces after it has put the space before it, not so tokenizer.json."""
    other = HuggingFaceTokenizer(f'{tokenizer.path}/tokenizer.json', files['tokenizer.json'], {})
    vocabulary = vocabulary_of(tokenizer)
    names = [vocabulary.tokens[i] for i, kind in enumerate(vocabulary.types) if kind == USER_DEFINED]
    texts = [*probes_of(tokenizer), *(text for name in names for text in (f'a{name}b', f'{name} c', name))]
    if any(other.encode(text) != tokenizer.encode(text) for text in texts):
        raise InputError(
            f'{tokenizer.path} has user-defined pieces ({names[0]!r}); no tokenizer.json gives the same ids, so keep '
            'its tokenizer.model'
        )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=None if 'model' in value else 2).encode() + b'\n'
