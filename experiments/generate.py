"""Completes prompts with a checkpoint of any format.

    python -m experiments.generate --checkpoint=DIR --prompt='Once upon a time' --max_new_tokens=100 --temperature=0

Standard output is the completion alone, or with --format=jsonl one object {"prompt", "completion"} a prompt. With
--chat a prompt is what a user says; --messages gives a whole conversation, whose last message may be the beginning of
the assistant's own.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from absl import flags
from etils import epath

from experiments import launch
from experiments.checkpoint import DTYPES, dtype_name, open_with_tokenizer
from llama_jax import pretrained, runtime
from llama_jax.inference.chat import Chat, check_messages
from llama_jax.inference.generate import generate
from llama_jax.inference.sampling import Sampler
from llama_jax.json_file import parse_json, read_bytes
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.unstacked import unstack
from llama_jax.tokenizer.protocol import Tokenizer, required
from llama_jax.types import InputError

_CHECKPOINT = launch.define_path(
    'checkpoint',
    None,
    'anything that is a Llama: a workdir, a folder of Meta or Hugging Face, a .gguf, hf://...',
    required=True,
)
_TOKENIZER = launch.define_path('tokenizer', '', "tokenizer file, instead of the checkpoint's own")
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'text to complete; give it several times for several')
_CHAT = flags.DEFINE_bool(
    'chat', False, "each prompt is what a user says: by the checkpoint's own chat format"
)
_SYSTEM = flags.DEFINE_string('system', '', 'with --chat: what the system says before it')
_MESSAGES = launch.define_path(
    'messages',
    '',
    'JSON file of a conversation: [{"role": "user", "content": "..."}, ...], instead of --prompt',
)
_STOP = flags.DEFINE_multi_string(
    'stop', [], 'text that ends a completion, and is left out; may be given several times'
)
_IGNORE_EOS = flags.DEFINE_bool('ignore_eos', False, 'go on behind the tokens that end a text')
_SPECIAL_TOKENS = flags.DEFINE_bool(
    'special_tokens', False, 'names of special tokens in --prompt are those tokens, not plain text'
)
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 256, 'at most this many tokens a prompt')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 0.0, '0 takes the most likely token; LLaMA samples at 0.6 to 0.8'
)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'draw from this many of the most likely tokens; 0: from all')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'draw from the fewest tokens whose probabilities reach this')
_MIN_P = flags.DEFINE_float('min_p', 0.0, 'draw from tokens at least this times as likely as the likeliest')
_REPETITION_PENALTY = flags.DEFINE_float(
    'repetition_penalty', 1.0, 'divides the logits of tokens of prompt and completion; 1: none'
)
_PRESENCE_PENALTY = flags.DEFINE_float(
    'presence_penalty', 0.0, 'subtracted from the logits of tokens of the completion'
)
_FREQUENCY_PENALTY = flags.DEFINE_float(
    'frequency_penalty', 0.0, 'subtracted from the logits of tokens of the completion, each time they came'
)
_LOGIT_BIAS = flags.DEFINE_list(
    'logit_bias', [], 'added to logits: ID:BIAS, several by commas, as in 13:-100'
)
_MIN_NEW_TOKENS = flags.DEFINE_integer(
    'min_new_tokens', 0, 'none of the tokens that end a text comes before so many'
)
_SEED = flags.DEFINE_integer('seed', 0, 'of the draws')
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU')
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'jsonl'], 'of standard output')

logger = logging.getLogger('llama_jax.generate')


def main() -> None:
    """Loads, generates, prints."""
    settings: dict[str, Any] = {
        flag.name: flag.value for flag in (
            _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _REPETITION_PENALTY, _PRESENCE_PENALTY, _FREQUENCY_PENALTY,
            _MIN_NEW_TOKENS, _SEED,
        )
    }  # fmt: skip
    with launch.flags_named('--max_new_tokens', '--logit_bias', *(f'--{name}' for name in settings)):
        if _MAX_NEW_TOKENS.value < 1:
            raise InputError(f'max_new_tokens is {_MAX_NEW_TOKENS.value}; it must be at least 1')
        if _MIN_NEW_TOKENS.value > _MAX_NEW_TOKENS.value:
            raise InputError(
                f'min_new_tokens is {_MIN_NEW_TOKENS.value}; it must be at most max_new_tokens, {_MAX_NEW_TOKENS.value}'
            )
        settings['logit_bias'] = _read_logit_bias(_LOGIT_BIAS.value)
        Sampler(**settings)
    asked = _Asked(
        _PROMPT.value or [], _MESSAGES.value, _SYSTEM.value, _CHAT.value or bool(_MESSAGES.value),
        _SPECIAL_TOKENS.value, _STOP.value,
    )  # fmt: skip
    asked.check()
    if _TEMPERATURE.value == 0 and (idle := [f for f in (_TOP_K, _TOP_P, _MIN_P, _SEED) if f.present]):
        names = ', '.join(f'--{flag.name}' for flag in idle)
        logger.warning('%s: without effect at --temperature=0, which takes the most likely token', names)
    if _MIN_NEW_TOKENS.value and _IGNORE_EOS.value:
        logger.warning('--min_new_tokens: without effect with --ignore_eos, as no token ends a text')
    runtime.enable_compilation_cache()
    dtype = DTYPES[dtype_name(_DTYPE.value)]
    with launch.flags_named('--checkpoint', '--tokenizer'):
        checkpoint = open_with_tokenizer(_CHECKPOINT.value, _TOKENIZER.value)
        config, params, tokenizer = pretrained.load(
            checkpoint, dtype=jnp.dtype(dtype), tokenizer=_TOKENIZER.value
        )
    prompts, stop_ids = asked.prompts_for(required(tokenizer), checkpoint.template)
    completions = generate(
        LlamaForCausalLM(config, dtype=dtype), unstack(params, dtype, delete=True), tokenizer, prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value, **settings, stop=_STOP.value, stop_ids=stop_ids,
        ignore_eos=_IGNORE_EOS.value, special_tokens=_SPECIAL_TOKENS.value,
    )  # fmt: skip
    for prompt, completion in zip(asked.texts or [asked.messages], completions, strict=True):
        text = (
            json.dumps({'prompt': prompt, 'completion': completion})
            if _FORMAT.value == 'jsonl'
            else completion
        )
        print(text)


def _read_logit_bias(items: Sequence[str]) -> dict[int, float]:
    """{token id: bias} of items such as '13:-100'."""
    found = {}
    for item in items:
        token, _, bias = item.partition(':')
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise InputError(f'logit_bias is {item!r}; it must be ID:BIAS, as in 13:-100') from None
    if len(found) < len(items):
        raise InputError(f'logit_bias is {",".join(items)!r}; give each token once')
    return found


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What is to be answered: texts to complete or what users say, or the file of a conversation."""

    texts: list[str]
    messages: str
    system: str
    chat: bool
    special_tokens: bool
    stop: list[str]

    def check(self) -> None:
        """There is one thing to answer, and nothing beside it that would be without effect."""
        if not (self.texts or self.messages):
            raise InputError('--prompt is required: what is to be completed; or --messages, a conversation')
        if self.texts and self.messages:
            raise InputError('--prompt and --messages are both given; one thing is answered')
        if self.system and not (self.chat and self.texts):
            raise InputError(
                '--system says something before a --prompt with --chat; --messages has it in its file'
            )
        if self.special_tokens and self.chat:
            raise InputError('--special_tokens reads the tags of a --prompt; in a chat the format puts them')
        if '' in self.stop:
            raise InputError("--stop is '', which every text begins with; give at least one character")

    def prompts_for(
        self, tokenizer: Tokenizer, template: str
    ) -> tuple[Sequence[str | list[int]], tuple[int, ...]]:
        """Texts or ids to complete, and the ids that end an answer besides the tokenizer's own."""
        if not self.chat:
            return self.texts, ()
        chat = Chat(tokenizer, template)
        if self.messages:
            with launch.flags_named('--messages'):
                given = parse_json(read_bytes(epath.Path(self.messages)), self.messages)
                given = given.get('messages') if isinstance(given, dict) else given
                return [chat.encode_prompt(check_messages(given))], chat.stop_ids
        before = [{'role': 'system', 'content': self.system}] if self.system else []
        with launch.flags_named('--prompt', '--system'):
            turns = [[*before, {'role': 'user', 'content': text}] for text in self.texts]
            return [chat.encode_prompt(messages) for messages in turns], chat.stop_ids


if __name__ == '__main__':
    launch.run(main)
