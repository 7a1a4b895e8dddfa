"""Completes prompts with a checkpoint of any format.

    python -m experiments.generate --checkpoint=DIR --prompt='Once upon a time' --max_new_tokens=100 --temperature=0

Standard output is the completion alone, which a terminal shows while it is made, or with --format=jsonl one object
{"prompt", "completion"} a prompt. With --chat a prompt is what a user says; --messages gives a whole conversation,
whose last message may be the beginning of the assistant's own. With --suffix the gap between prompt and suffix is
filled. --prompts reads many from a file (see `prompt_file`); with --output the command goes on where it was killed.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any, cast

import jax
from absl import flags
from etils import epath

from experiments import launch
from experiments.prompting.constraint import read_constraint
from experiments.prompting.loading import define_shared_model, load_model, shared_partitioner
from experiments.prompting.prompt_file import (
    Item,
    answer_lines,
    check_output,
    complete_items,
    open_output,
    parse_shard,
    read_items,
    write_answers,
)
from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine
from llama_jax.inference.chat import Chat, check_messages
from llama_jax.inference.generate import complete, complete_each, stream
from llama_jax.inference.request import check_number
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.scoring import check_candidates
from llama_jax.json_file import parse_json, read_bytes
from llama_jax.models.unstacked import unstack
from llama_jax.tokenizer.infill_format import InfillFormat
from llama_jax.tokenizer.protocol import Tokenizer, prompt_ids, required

_MODEL = define_shared_model()
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'text to complete; give it several times for several')
_SUFFIX = flags.DEFINE_multi_string(
    'suffix',
    None,
    'text behind the gap that follows --prompt, to be filled; one for each (Code Llama 7B, 13B)',
)
_SUFFIX_FIRST = flags.DEFINE_bool(
    'suffix_first', False, 'with --suffix: the model reads it before the prompt'
)
_PROMPTS = launch.define_path(
    'prompts', '', 'JSON Lines of {"prompt": TEXT} or {"messages": [...]}, instead of --prompt'
)
_OUTPUT = launch.define_path('output', '', 'with --prompts: file for the answers, local or gs://...')
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 16, 'with --prompts: rows that are decoded together', 1, 1 << 16
)
_SHARD = flags.DEFINE_string('shard', '0/1', 'with --prompts: which part of the file, as in 0/4')
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
_SCHEMA = launch.define_path('schema', '', 'JSON file of a schema that completions keep to')
_REGEX = flags.DEFINE_string('regex', '', 'regular expression that completions match, whole')
_GRAMMAR = launch.define_path('grammar', '', 'file of a grammar of Lark that completions keep to')
_FORMAT = flags.DEFINE_enum('format', 'text', ['text', 'jsonl'], 'of standard output')
_N = flags.DEFINE_integer('n', 1, 'with --format=jsonl: so many completions of each prompt', lower_bound=1)
_LOGPROBS = flags.DEFINE_integer(
    'logprobs',
    None,
    'with --format=jsonl: log-probabilities of tokens, and of so many of the likeliest in their place',
)
_ECHO = flags.DEFINE_bool('echo', False, 'with --format=jsonl: those of the tokens of the prompt too')

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
        check_number('max_new_tokens', _MAX_NEW_TOKENS.value)
        if _MIN_NEW_TOKENS.value > _MAX_NEW_TOKENS.value:
            raise InputError(
                f'min_new_tokens is {_MIN_NEW_TOKENS.value}; it must be at most max_new_tokens, {_MAX_NEW_TOKENS.value}'
            )
        settings['logit_bias'] = _read_logit_bias(_LOGIT_BIAS.value)
        sampler = Sampler(**settings)
    asked = _Asked(
        _PROMPT.value or [], _MESSAGES.value, _PROMPTS.value, _SYSTEM.value, _CHAT.value or bool(_MESSAGES.value),
        _SPECIAL_TOKENS.value, _STOP.value, _SUFFIX.value or [], _SUFFIX_FIRST.value,
    )  # fmt: skip
    asked.check()
    if not _PROMPTS.value and (idle := [f for f in (_OUTPUT, _BATCH_SIZE, _SHARD) if f.present]):
        raise InputError(f'--{idle[0].name} is of --prompts, which is not given')
    told = [flag for flag in (_N, _LOGPROBS, _ECHO) if flag.present]
    if told and (_PROMPTS.value or _FORMAT.value != 'jsonl'):
        raise InputError(f'--{told[0].name} is of --format=jsonl, and not of --prompts')
    with launch.flags_named('--logprobs'):
        check_candidates(_LOGPROBS.value or 0)
    _MODEL.check_owners(draft_tokens='draft', axis_rules='mesh')
    given = _MODEL.value
    constraint = {'schema': _SCHEMA.value, 'regex': _REGEX.value, 'grammar': _GRAMMAR.value}
    if any(constraint.values()) and (given['draft'] or _IGNORE_EOS.value or _MIN_NEW_TOKENS.value):
        raise InputError(
            '--schema, --regex and --grammar go without --draft, --ignore_eos and --min_new_tokens'
        )
    if _OUTPUT.value and _FORMAT.present:
        raise InputError('--format is of standard output; what --output holds is JSON Lines')
    with runtime.refused_by_all(), launch.flags_named('--prompts', '--shard', '--output'):
        if _OUTPUT.value and runtime.is_main_process():
            check_output(_OUTPUT.value)
        items, sha256 = asked.read_file(sampler, parse_shard(_SHARD.value)) if _PROMPTS.value else ([], '')
    if _TEMPERATURE.value == 0 and (idle := [f for f in (_TOP_K, _TOP_P, _MIN_P, _SEED) if f.present]):
        names = ', '.join(f'--{flag.name}' for flag in idle)
        logger.warning('%s: without effect at --temperature=0, which takes the most likely token', names)
    if _MIN_NEW_TOKENS.value and _IGNORE_EOS.value:
        logger.warning('--min_new_tokens: without effect with --ignore_eos, as no token ends a text')
    with runtime.refused_by_all():
        partitioner = shared_partitioner(given)
    model, params, tokenizer, template, draft = load_model(given, partitioner)
    tokenizer = required(tokenizer)
    fingerprint = Engine(model, params, tokenizer).fingerprint if _OUTPUT.value else ''
    params = unstack(params, model.dtype, delete=True)
    prompts, stop_ids = asked.prompts_for(tokenizer, template, items)
    with launch.flags_named('--schema', '--regex', '--grammar'):
        processor, rule = read_constraint(constraint, tokenizer, model.config.vocab_size)
    limits: dict[str, Any] = {
        'max_new_tokens': _MAX_NEW_TOKENS.value, 'stop': _STOP.value, 'stop_ids': stop_ids,
        'ignore_eos': _IGNORE_EOS.value, 'special_tokens': _SPECIAL_TOKENS.value,
    }  # fmt: skip
    if _PROMPTS.value:  # of which a shard may hold none
        ids = [prompt_ids(tokenizer, p, _SPECIAL_TOKENS.value) if isinstance(p, str) else p for p in prompts]

        def texts_of(ids, samplers):
            found = complete_each(
                model, params, tokenizer, ids, num_slots=_BATCH_SIZE.value, samplers=samplers, draft=draft,
                logits_processor=processor, **limits,
            )  # fmt: skip
            # What is cut has no end to be learnt (`data.records`).
            return (
                (place, {'completion': one.text, 'stopped': one.finish_reason == 'stop'})
                for place, one in found
            )

        header = {
            'prompts': sha256, 'shard': _SHARD.value, 'batch_size': _BATCH_SIZE.value, 'chat': _CHAT.value,
            'system': _SYSTEM.value, **settings, 'logit_bias': sorted(map(list, settings['logit_bias'].items())),
            **limits, 'stop_ids': list(stop_ids), 'model': fingerprint, 'draft': given['draft'],
            'draft_tokens': given['draft_tokens'], **({'rule': rule} if rule else {}),
        }  # fmt: skip
        with contextlib.ExitStack() as at_exit:
            with launch.flags_named('--output'):
                log = at_exit.enter_context(open_output(_OUTPUT.value, header)) if _OUTPUT.value else None
            completions = complete_items(items, ids, log, texts_of)
            if runtime.is_main_process():
                lines = answer_lines(items, completions)
                if log:
                    write_answers(_OUTPUT.value, lines)
                else:
                    as_text = _FORMAT.value == 'text'
                    for line in (
                        [completions[item.index]['completion'] for item in items] if as_text else lines
                    ):
                        print(line)
        return
    if len(prompts) == 1 and _FORMAT.value == 'text' and sys.stdout.isatty() and jax.process_count() == 1:
        for piece in stream(
            model,
            params,
            tokenizer,
            prompts[0],
            draft=draft,
            logits_processor=processor,
            **settings,
            **limits,
        ):
            print(piece, end='', flush=True)
        print()
        return
    found = complete(
        model, params, tokenizer, prompts, n=_N.value, log_probabilities=_LOGPROBS.value, echo=_ECHO.value, **settings,
        draft=draft, logits_processor=processor, **limits,
    )  # fmt: skip
    if runtime.is_main_process():
        for line, completions in zip(asked.lines(), found, strict=True):
            for choice, completion in enumerate(completions):
                shown = (
                    {'choice': choice, **completion.to_json()} if told else {'completion': completion.text}
                )
                answer = json.dumps({**line, **shown}, allow_nan=False)
                print(answer if _FORMAT.value == 'jsonl' else completion.text)


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
    prompts: str
    system: str
    chat: bool
    special_tokens: bool
    stop: list[str]
    suffixes: list[str]
    suffix_first: bool

    def check(self) -> None:
        """There is one thing to answer, and nothing beside it that would be without effect."""
        given = {'--prompt': self.texts, '--messages': self.messages, '--prompts': self.prompts}
        if not any(given.values()):
            raise InputError('--prompt is required: what is to be completed; or --messages, a conversation')
        if len(named := [name for name, value in given.items() if value]) > 1:
            raise InputError(f'{" and ".join(named[:2])} are both given; one thing is answered')
        if self.system and not (self.chat and (self.texts or self.prompts)):
            raise InputError(
                '--system says something before a --prompt with --chat; --messages has it in its file'
            )
        if self.special_tokens and self.chat:
            raise InputError('--special_tokens reads the tags of a --prompt; in a chat the format puts them')
        if '' in self.stop:
            raise InputError("--stop is '', which every text begins with; give at least one character")
        if self.suffix_first and not self.suffixes:
            raise InputError('--suffix_first is of --suffix, which is not given')
        if self.suffixes and (self.chat or self.special_tokens):
            name = '--special_tokens' if self.special_tokens else '--chat'
            raise InputError(f'--suffix and {name} are both given; a gap is between two plain texts')
        if self.suffixes and len(self.suffixes) != len(self.texts):
            raise InputError(
                f'--suffix is given {len(self.suffixes)} times, --prompt {len(self.texts)}; a gap needs one of each'
            )

    def lines(self) -> list[dict[str, str]]:
        """What each answer of standard output is an answer to."""
        if self.suffixes:
            return [{'prompt': p, 'suffix': s} for p, s in zip(self.texts, self.suffixes, strict=True)]
        return [{'prompt': prompt} for prompt in self.texts or [self.messages]]

    def read_file(self, sampler: Sampler, shard: tuple[int, int]) -> tuple[list[Item], str]:
        """The items of --prompts, all of one kind, and the file's hash."""
        items, sha256 = read_items(self.prompts, sampler, shard)
        if talk := next((item for item in items if 'messages' in item.line), None):
            if self.chat:
                raise InputError(f'{self.prompts} line {talk.index + 1} has messages; --chat is for prompts')
            if text := next((item for item in items if 'prompt' in item.line), None):
                raise InputError(
                    f'{self.prompts} line {talk.index + 1} has messages, line {text.index + 1} a prompt; give a '
                    'file of each'
                )
        return items, sha256

    def prompts_for(
        self, tokenizer: Tokenizer, template: str, items: Sequence[Item]
    ) -> tuple[Sequence[str | list[int]], tuple[int, ...]]:
        """Texts or ids to complete, and the ids that end an answer besides the tokenizer's own."""
        if self.suffixes:
            with launch.flags_named('--suffix'):
                gap = InfillFormat(tokenizer)
            texts = zip(self.texts, self.suffixes, strict=True)
            return [gap.encode_prompt(*both, self.suffix_first) for both in texts], gap.stop_ids
        if not self.chat and not any('messages' in item.line for item in items):
            return self.texts or [cast(str, item.prompt) for item in items], ()
        chat = Chat(tokenizer, template)
        if items:
            return [self._turns(chat, item) for item in items], chat.stop_ids
        if self.messages:
            with launch.flags_named('--messages'):
                given = parse_json(read_bytes(epath.Path(self.messages)), self.messages)
                if isinstance(given, dict):
                    if 'messages' not in given:
                        raise InputError(
                            f'{self.messages} has {list(given)[:8]}; it must have messages, or be a list of them'
                        )
                    given = given['messages']
                return [chat.encode_prompt(check_messages(given))], chat.stop_ids
        with launch.flags_named('--prompt', '--system'):
            return [chat.encode_prompt(self._said(text)) for text in self.texts], chat.stop_ids

    def _said(self, text: str) -> list[dict[str, Any]]:
        before = [{'role': 'system', 'content': self.system}] if self.system else []
        return [*before, {'role': 'user', 'content': text}]

    def _turns(self, chat: Chat, item: Item) -> list[int]:
        with launch.flags_named('--prompts', '--system'):
            try:
                return chat.encode_prompt(
                    self._said(item.prompt) if isinstance(item.prompt, str) else item.prompt
                )
            except InputError as error:
                raise InputError(f'{self.prompts} line {item.index + 1}: {error}') from None


if __name__ == '__main__':
    launch.run(main)
