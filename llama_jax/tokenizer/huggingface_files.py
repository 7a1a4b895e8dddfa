"""A vocabulary as the files that transformers opens: `tokenizer.json` and what stands beside it."""

import json
from typing import Any

from llama_jax.tokenizer.sentencepiece_model import BYTE, CONTROL, UNKNOWN, USER_DEFINED
from llama_jax.tokenizer.tokenizer import LLAMA3_PATTERN, HuggingFaceTokenizer, Tokenizer
from llama_jax.tokenizer.vocabulary import Vocabulary, end_of_turn, model_file, vocabulary_of
from llama_jax.types import InputError


def huggingface_files(tokenizer: Tokenizer, *, chat_template: str = '', max_seq_len: int) -> dict[str, bytes]:
    """The files by name that transformers.AutoTokenizer opens, with the same ids and BOS before each text.

    Args:
      tokenizer: any; a Hugging Face one keeps its `tokenizer.json`.
      chat_template: Jinja, as in `chat_format`; with it a turn's end counts as EOS, as in Llama 3's own folders.
      max_seq_len: the model's context.

    Raises:
      InputError: as `vocabulary_of`, or it has user-defined pieces.
    """
    files = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        name_of = {id: name for name, id in tokenizer.special_tokens.items()}  # both are among them
        names = {'bos_token': name_of[tokenizer.bos_id], 'eos_token': name_of[tokenizer.eos_id]}
        files['tokenizer.json'] = tokenizer.file_bytes
    else:
        vocabulary = vocabulary_of(tokenizer)
        eos_id = end_of_turn(vocabulary) if chat_template else vocabulary.eos_id
        names = {
            'bos_token': vocabulary.tokens[vocabulary.bos_id],
            'eos_token': vocabulary.tokens[eos_id],
        }
        if vocabulary.scores:
            names['unk_token'] = vocabulary.tokens[vocabulary.types.index(UNKNOWN)]
            files['tokenizer.model'] = model_file(tokenizer)
        files['tokenizer.json'] = _json(_tokenizer_json(vocabulary, tokenizer.path))
    config: dict[str, Any] = names | {
        # Not LlamaTokenizer: transformers 5 would then ignore how tokenizer.json puts the space before a text.
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_input_names': ['input_ids', 'attention_mask'],
        'model_max_length': max_seq_len,
        'clean_up_tokenization_spaces': False,
    }
    if chat_template:
        config['chat_template'] = chat_template
    files['tokenizer_config.json'] = _json(config)
    files['special_tokens_map.json'] = _json(names)
    return files


def _tokenizer_json(vocabulary: Vocabulary, path: str) -> dict[str, Any]:
    """A `tokenizer.json`, as transformers' own converters build it."""
    bos = vocabulary.tokens[vocabulary.bos_id]
    begin = lambda type_id: {'SpecialToken': {'id': bos, 'type_id': type_id}}  # noqa: E731
    text = lambda name, type_id: {'Sequence': {'id': name, 'type_id': type_id}}  # noqa: E731
    template = {
        'type': 'TemplateProcessing',
        'single': [begin(0), text('A', 0)],
        'pair': [begin(0), text('A', 0), begin(1), text('B', 1)],
        'special_tokens': {bos: {'id': bos, 'ids': [vocabulary.bos_id], 'tokens': [bos]}},
    }
    model = {
        'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
        'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
    }  # fmt: skip
    special = [i for i, kind in enumerate(vocabulary.types) if kind in (UNKNOWN, CONTROL)]
    if vocabulary.scores:
        if USER_DEFINED in vocabulary.types:
            piece = vocabulary.tokens[vocabulary.types.index(USER_DEFINED)]
            raise InputError(
                f'{path} has user-defined pieces ({piece!r}); no tokenizer.json gives the same ids, so keep '
                'its tokenizer.model'
            )
        prefix, replace = {'type': 'Prepend', 'prepend': '▁'}, _replace({'String': ' '}, '▁')
        squeeze = [_replace({'Regex': r'\A +|[ ▁]+\z'}, ''), _replace({'Regex': ' {2,}'}, ' ')]
        normalizers = squeeze * vocabulary.remove_extra_whitespaces + [prefix] * vocabulary.add_dummy_prefix
        strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
        decoders = [_replace({'String': '▁'}, ' '), {'type': 'ByteFallback'}, {'type': 'Fuse'}]
        normalizer = {'type': 'Sequence', 'normalizers': [*normalizers, replace]}
        decoder = {'type': 'Sequence', 'decoders': decoders + [strip] * vocabulary.add_dummy_prefix}
        splitter, processor, kept = None, template, len(vocabulary.tokens)
        unknown = vocabulary.tokens[vocabulary.types.index(UNKNOWN)]
        model |= {'unk_token': unknown, 'fuse_unk': True, 'byte_fallback': BYTE in vocabulary.types}
    else:
        level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
        split = {
            'type': 'Split',
            'pattern': {'Regex': LLAMA3_PATTERN},
            'behavior': 'Isolated',
            'invert': False,
        }
        normalizer, decoder = None, level
        splitter = {'type': 'Sequence', 'pretokenizers': [split, level]}
        processor = {'type': 'Sequence', 'processors': [level, template]}
        kept = vocabulary.types.index(CONTROL)
        model['ignore_merges'] = True  # as tiktoken looks a word up before it merges
    model['vocab'] = {token: i for i, token in enumerate(vocabulary.tokens[:kept])}
    model['merges'] = vocabulary.merges()
    as_written = {
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': True,
    }
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [{'id': i, 'content': vocabulary.tokens[i]} | as_written for i in special],
        'normalizer': normalizer,
        'pre_tokenizer': splitter,
        'post_processor': processor,
        'decoder': decoder,
        'model': model,
    }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {'type': 'Replace', 'pattern': pattern, 'content': content}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=None if 'model' in value else 2).encode() + b'\n'
