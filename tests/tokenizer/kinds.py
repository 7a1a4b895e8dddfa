"""Tokenizers as people have them, made on the spot: each a folder's files as transformers or a hand wrote them.

None is made by the library under test: sentencepiece trains pieces, `tokenizers` merges, the rest is spelled out.
"""

import copy
import functools
import io
import json
import random

TEXT = [
    *(f'{i} green bottles, hanging on the wall; ünder {i * 7} дом 日本\n' for i in range(60)),
    "def f(x):\n    return x  # it's what WE'LL do",
]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PROBES = [
    *('', 'Hello world', ' leading', '  two  spaces', 'trailing  ', '\n', '\t\r\n', ' ' * 50 + 'x', '1234567', '\x00'),
    *("I'll don'T", '日本語', '😀', 'naïve café', 'a\u0301\u00a0b', '<0x41>', 'def f(x):\n    return x\n', '[INST] a'),
    *('green bottles on the wall', 'дом', 'ſ\u2028ǅ½Ⅷ', '<unk>', 'a<', '|>', '\u200d', '99 green', '...', '\r', 'ｆ'),
]  # fmt: skip


@functools.cache
def sentencepiece_file(model_type='bpe', special_first=(), **settings) -> bytes:
    """A model trained with Llama's settings."""
    import sentencepiece

    out = io.BytesIO()
    settings = {'unk_id': 0, 'bos_id': 1, 'eos_id': 2, 'pad_id': -1} | settings
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT), model_writer=out, model_type=model_type, vocab_size=400, byte_fallback=True,
        split_digits=True, character_coverage=1.0, normalization_rule_name='identity', remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, control_symbols=list(special_first), minloglevel=4, hard_vocab_limit=False,
        **settings,
    )  # fmt: skip
    return out.getvalue()


def pieces_of(model: bytes):
    """Text, score and type of every piece."""
    import sentencepiece

    p = sentencepiece.SentencePieceProcessor(model_proto=model)
    kind = lambda i: 2 if p.IsUnknown(i) else 3 if p.IsControl(i) else 6 if p.IsByte(i) else 1  # noqa: E731
    return [(p.IdToPiece(i), p.GetScore(i), kind(i)) for i in range(p.GetPieceSize())]


def added(id, content, special=True):
    """An entry of a tokenizer.json."""
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': id, 'content': content, **flags, 'special': special}


def template(name, id):
    """What puts BOS."""
    begin = {'SpecialToken': {'id': name, 'type_id': 0}}
    sequence = [begin, {'Sequence': {'id': 'A', 'type_id': 0}}]
    pair = [*sequence, {'Sequence': {'id': 'B', 'type_id': 1}}]
    named = {name: {'id': name, 'ids': [id], 'tokens': [name]}}
    return {'type': 'TemplateProcessing', 'single': sequence, 'pair': pair, 'special_tokens': named}


def spm_json(extra=(), special=True, metaspace=False, model=None):
    """As transformers 4 wrote it, or (metaspace) 5."""
    pieces = pieces_of(model or sentencepiece_file())
    ids = {t: i for i, (t, _, k) in enumerate(pieces) if k == 1}
    merges = []
    for text, _, _ in sorted((p for p in pieces if p[2] == 1), key=lambda p: -p[1]):
        cuts = [(text[:c], text[c:]) for c in range(1, len(text)) if text[:c] in ids and text[c:] in ids]
        merges += sorted(cuts, key=lambda p: (ids[p[0]], ids[p[1]]))
    listed = [added(i, t) for i, (t, _, k) in enumerate(pieces) if k in (2, 3)]
    listed += [added(len(pieces) + i, t, special) for i, t in enumerate(extra)]
    space = {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}
    steps = [
        {'type': 'Prepend', 'prepend': '▁'},
        {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
    ]
    strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
    meta = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}
    return {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': listed,
        'normalizer': None if metaspace else {'type': 'Sequence', 'normalizers': steps},
        'pre_tokenizer': meta if metaspace else None, 'post_processor': template('<s>', 1),
        'decoder': {'type': 'Sequence', 'decoders': [space, {'type': 'ByteFallback'}, {'type': 'Fuse'}, strip]},
        'model': {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'fuse_unk': True, 'byte_fallback': True,
                  'continuing_subword_prefix': None, 'end_of_word_suffix': None, 'ignore_merges': False,
                  'vocab': {t: i for i, (t, _, _) in enumerate(pieces)}, 'merges': [f'{a} {b}' for a, b in merges]},
    }  # fmt: skip


@functools.cache
def _trained_merges():
    import tokenizers

    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), 'isolated'),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator(TEXT, trainer)
    return t.to_str()


def byte_json(names, plain=(), bos='<|begin_of_text|>', whole_words=False):
    """Byte-level, with added tokens behind the trained ones; without `bos` nothing puts one."""
    definition = json.loads(_trained_merges())
    count = len(definition['model']['vocab'])
    definition['added_tokens'] = [added(count + i, n, n not in plain) for i, n in enumerate(names)]
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    put = [template(bos, count + names.index(bos))] if bos else []
    definition['post_processor'] = {'type': 'Sequence', 'processors': [level, *put]}
    definition['decoder'] = level
    definition['model']['ignore_merges'] = whole_words
    return definition


def byte_json_with_names_first(names):
    """Byte-level, trained with its special tokens, which then have the first ids and stand in the vocabulary too."""
    definition = json.loads(_trained_merges())
    vocab = {name: i for i, name in enumerate(names)}
    definition['model']['vocab'] = vocab | {
        t: i + len(names) for t, i in definition['model']['vocab'].items()
    }
    definition['added_tokens'] = [added(i, name) for name, i in vocab.items()]
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    return definition | {'post_processor': level, 'decoder': level}


def llama3_names(**changes):
    """The 256 of Llama 3.1, some by other names."""
    known = {0: 'begin_of_text', 1: 'end_of_text', 4: 'finetune_right_pad_id', 6: 'start_header_id',
             7: 'end_header_id', 8: 'eom_id', 9: 'eot_id', 10: 'python_tag'}  # fmt: skip
    rest = iter(range(256))
    names = [f'<|{known.get(i) or f"reserved_special_token_{next(rest)}"}|>' for i in range(256)]
    for place, name in changes.items():
        names[int(place.removeprefix('at'))] = name
    return names


def files(definition=None, *, bos=None, eos, config=None, generation=None, **more):
    """A folder, by name."""
    ends = {'eos_token': eos} | ({'bos_token': bos} if bos else {})
    found = {'tokenizer_config.json': ends | {'tokenizer_class': 'PreTrainedTokenizerFast'} | (config or {})}
    if definition:
        found['tokenizer.json'] = definition
    if generation:
        found['generation_config.json'] = generation
    found |= more
    return {
        n: c if isinstance(c, bytes) else json.dumps(c, ensure_ascii=False).encode() for n, c in found.items()
    }


def kinds():
    """Name: (files, ids that end an answer, whether BOS is put)."""
    model = sentencepiece_file()
    spm = len(pieces_of(model))
    byte = len(json.loads(_trained_merges())['model']['vocab'])
    chat = ['<|im_start|>', '<|im_end|>']
    chatml = {'chat_template': CHATML, 'clean_up_tokenization_spaces': False}
    ends2, ends3 = {'bos': '<s>', 'eos': '</s>'}, {'bos': '<|begin_of_text|>', 'eos': '<|end_of_text|>'}
    chat2, chat3 = {'bos': '<s>', 'eos': '<|im_end|>'}, {'bos': '<|begin_of_text|>', 'eos': '<|im_end|>'}
    added_model = {'tokenizer.model': model, 'added_tokens.json': {t: spm + i for i, t in enumerate(chat)}}
    decoder = {str(spm + i): {k: v for k, v in added(0, t).items() if k != 'id'} for i, t in enumerate(chat)}
    unlisted = spm_json()
    unlisted['added_tokens'] = []
    first = sentencepiece_file(special_first=('<bot>', '<eot>'), unk_id=4, bos_id=0, eos_id=1)
    first_names = {t: i for i, (t, _, _) in enumerate(pieces_of(first))}
    hermes = byte_json(llama3_names(at2='<|im_start|>', at3='<|im_end|>'))
    dolphin = byte_json([*llama3_names(), '<|im_end|>', '<|im_start|>'])
    plain = byte_json([*llama3_names(), '<think>', '</think>'], ('<think>', '</think>'))
    more, fewer = byte_json([*llama3_names(), '[PAD]']), byte_json(llama3_names()[:-1])
    bare = byte_json(['<|endoftext|>'], bos=None)
    return {
        'llama2': (files(spm_json(), **ends2, **{'tokenizer.model': model}), {2}, True),
        'llama3': (files(byte_json(llama3_names()), **ends3, generation={'eos_token_id': [byte + 1, byte + 9]}),
                   {byte + 1, byte + 9}, True),
        'chatml on llama2, transformers 4': (
            files(spm_json(chat), **chat2, config=chatml | {'added_tokens_decoder': decoder},
                  generation={'eos_token_id': [2, spm + 1]}, **added_model),
            {2, spm + 1}, True),
        'chatml on llama2, transformers 5': (
            files(spm_json(chat, metaspace=True), **chat2, config=chatml), {spm + 1}, True),
        'hermes': (files(hermes, **chat3, config=chatml, generation={'eos_token_id': byte + 3}), {byte + 3}, True),
        'dolphin': (files(dolphin, **chat3, config=chatml, generation={'eos_token_id': byte + 256}),
                    {byte + 256}, True),
        'added plain tokens': (files(plain, **ends3, generation={'eos_token_id': byte + 1}), {byte + 1}, True),
        'one token more': (files(more, **ends3, generation={'eos_token_id': byte + 1}, config={'pad_token': '[PAD]'}),
                           {byte + 1}, True),
        'one fewer': (files(fewer, **ends3, generation={'eos_token_id': byte + 1}), {byte + 1}, True),
        'unigram': (files(eos='</s>', bos='<s>', **{'tokenizer.model': sentencepiece_file('unigram')}), {2}, True),
        'special tokens first': (
            files(eos='</s>', bos='<s>', **{'tokenizer.model': first}), {first_names['</s>']}, True),
        'bytes, special tokens first': (
            files(byte_json_with_names_first(['<|endoftext|>', '<|im_start|>', '<|im_end|>']), bos='<|im_start|>',
                  eos='<|im_end|>'), {2}, False),
        'no BOS': (files(bare, eos='<|endoftext|>'), {byte}, False),
        'hand-made': (files(unlisted, **ends2), {2}, True),
        'llama2 with a plain token': (files(spm_json(['<think>'], special=False), **ends2), {2}, True),
        'tokenizer.model and added tokens': (
            files(**chat2, config={'additional_special_tokens': chat}, generation={'eos_token_id': [2, spm + 1]},
                  **added_model), {2, spm + 1}, True),
    }  # fmt: skip


def without(found, name):
    """A folder's files but one."""
    return {key: value for key, value in copy.copy(found).items() if key != name}


def random_texts(count):
    """Letters of many scripts, runs of spaces, control characters, tags, anything in Unicode; seeded."""
    draw = random.Random(0)
    anything = [*range(0xD800), *range(0xE000, 0x110000)]
    words = [
        *('the', ' Hello', 'ing', "'s", "'LL", '2024', '▁', '<0x41>', '<s>', '</s>', '<unk>', '[INST]'),
        *('\n', '\n\n', '\t', '\r\n', '<|eot_id|>', '<|begin_of_text|>', 'ſ', '\u2028', '\u00a0'),
    ]
    alphabets = [
        range(32, 127),
        range(0x300),
        range(0x400, 0x500),
        range(0x4E00, 0x5000),
        range(0x3040, 0x3100),
    ]
    alphabets += [range(0x600, 0x700), range(0x900, 0x980), range(0x1F300, 0x1F600), anything]
    kinds = [lambda a=a: chr(draw.choice(a)) for a in alphabets]
    kinds += [lambda: draw.choice(words), lambda: ' ' * draw.randrange(1, 40)]
    return [
        ''.join(draw.choice(chosen)() for _ in range(draw.randrange(40)))
        for chosen in (draw.sample(kinds, draw.randrange(1, 4)) for _ in range(count))
    ]


def write_vocabulary(path, keys):
    """A GGUF without tensors, by the library gguf: what llama.cpp opens for its tokenizer alone."""
    import gguf

    writer = gguf.GGUFWriter(str(path), 'llama')
    for add in ('block_count', 'context_length', 'embedding_length', 'feed_forward_length', 'head_count'):
        getattr(writer, f'add_{add}')(64)
    writer.add_layer_norm_rms_eps(1e-5)
    add_keys(writer, keys)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_keys(writer, keys):
    """Keys of a vocabulary, each with the type of its value."""
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
