"""A model for lm-evaluation-harness: its tasks, prompts and metrics, our mesh and batches; needs no torch.

    import lm_eval
    from llama_jax.eval.engine import Engine
    from llama_jax.eval.lm_eval import language_model

    config, params, tokenizer = llama_jax.load(CKPT)
    model = language_model(Engine(llama_jax.LlamaForCausalLM(config), params, tokenizer))
    lm_eval.simple_evaluate(model, tasks=['hellaswag'])

It answers as the harness's own model of transformers does, so that numbers compare: texts are decoded without their
prompt, and the text of a rolling perplexity begins with a BOS of its own. On several hosts run the same on each.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.eval.engine import Engine, rolling_windows
from llama_jax.eval.task import Completion, Completions, Continuation, Likelihood, Request, Result
from llama_jax.inference.scoring import score
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.tokenizer import Tokenizer, parse_json
from llama_jax.types import InputError

Messages = Sequence[Mapping[str, str]]


def language_model(engine: Engine, chat_template: str = '') -> Any:
    """An `lm_eval.api.model.LM` whose requests the engine answers.

    Args:
      engine: whose model is evaluated.
      chat_template: Jinja, used where the harness is told to apply one; '': the one beside the tokenizer, else the one
        of its family.

    Raises:
      InputError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("lm-evaluation-harness is not installed: pip install 'llama_jax[eval]'") from error
    return type('LlamaJax', (_Answers, LM), {})(engine, chat_template)


class _Answers:
    """What lm-evaluation-harness asks of a model."""

    def __init__(self, engine: Engine, chat_template: str):
        super().__init__()
        self._engine = Engine(
            engine.model, engine.params, engine.tokenizer,
            batch_tokens=engine.batch_tokens, seed=engine.seed, decode_alone=True,
        )  # fmt: skip
        self._tokenizer = engine.tokenizer
        self._given_template = chat_template

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of continuations."""
        results = self._answer([Continuation(*request.args) for request in requests])
        return [
            (result.log_probability, result.is_greedy) for result in results if isinstance(result, Likelihood)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts."""
        model, tokenizer = self._engine.model, self._engine.tokenizer
        pairs, owners = [], []
        for index, request in enumerate(requests):
            tokens = tuple(tokenizer.encode(request.args[0], bos=True))
            windows = rolling_windows(tokens, tokenizer.bos_id, model.config.max_seq_len)
            pairs += windows
            owners += [index] * len(windows)
        totals = [0.0] * len(requests)
        scored = score(model, self._engine.params, pairs, batch_tokens=self._engine.batch_tokens)
        for index, found in scored:
            totals[owners[index]] += found.log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, each up to the first of its stop strings."""
        results = self._answer([_completion(*request.args) for request in requests])
        return [result.texts[0] for result in results if isinstance(result, Completions)]

    def _answer(self, requests: Sequence[Request]) -> list[Result]:
        answers = dict(self._engine.answer(requests))
        return [answers[request] for request in requests]

    @property
    def tokenizer_name(self) -> str:
        """Tells cached prompts apart."""
        return self._tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template in use, '' where none is."""
        return self._template() if chat_template else ''

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """A conversation as text. From now on, text that spells a special token means that token."""
        templated: Any = _TemplatedTokenizer(self._tokenizer)
        self._engine.tokenizer = templated
        names = {id: name for name, id in special_tokens(self._tokenizer).items()}
        return render_chat(
            self._template(),
            chat_history,
            add_generation_prompt,
            bos_token=names[self._tokenizer.bos_id],
            eos_token=names[self._tokenizer.eos_id],
        )

    def _template(self) -> str:
        return (
            self._given_template
            or _template_beside(self._tokenizer)
            or chat_format_for(self._tokenizer).template
        )


def _completion(context: str, arguments: Mapping[str, Any]) -> Completion:
    """The harness's generation arguments as ours; InputError for those that we do not have."""
    rest = dict(arguments)
    until = rest.pop('until', None) or ()
    lengths = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
    given = [value for name in lengths if (value := rest.pop(name, None)) is not None]
    temperature, top_p = float(rest.pop('temperature', 0.0)), float(rest.pop('top_p', 1.0))
    if rest.pop('do_sample', None) is False:
        temperature = 0.0
    if unknown := sorted(rest):
        raise InputError(
            f'generation arguments {unknown} are not supported; there are until, max_gen_toks, do_sample, '
            'temperature, top_p'
        )
    stop = (until,) if isinstance(until, str) else tuple(until)
    return Completion(context, tuple(filter(None, stop)), int(given[0]) if given else 256, temperature, top_p)


def render_chat(
    template: str, messages: Messages, add_generation_prompt: bool = True, **variables: str
) -> str:
    """A conversation through a Jinja template, as transformers renders it.

    Args:
      template: run in a sandbox.
      messages: with `role` and `content`.
      add_generation_prompt: end with what an answer begins with; False: end with the last message, to be continued.
      **variables: further names of the template, such as bos_token.

    Raises:
      InputError: the template is wrong or refuses the messages.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters['tojson'] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals['raise_exception'] = refuse
    try:
        text = environment.from_string(template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except jinja2.TemplateError as error:
        raise InputError(f'the chat template cannot render {len(messages)} messages: {error}') from error
    if add_generation_prompt:
        return text
    last = messages[-1]['content'].strip()
    return text[: text.rindex(last) + len(last)]


def _template_beside(tokenizer: Tokenizer) -> str:
    """The template that a Hugging Face folder holds, '' where there is none."""
    folder = epath.Path(tokenizer.path).parent
    if (file := folder / 'chat_template.jinja').exists():
        return file.read_text()
    if (file := folder / 'tokenizer_config.json').exists():
        template = parse_json(file.read_bytes(), str(file)).get('chat_template')
        return template if isinstance(template, str) else ''
    return ''


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Name to id; of a sentencepiece model, BOS and EOS by their usual names."""
    named = {'<s>': tokenizer.bos_id, '</s>': tokenizer.eos_id}
    return getattr(tokenizer, 'special_tokens', None) or named


class _TemplatedTokenizer:
    """A tokenizer for the text of templates, in which special tokens are spelled out.

    A BOS in front is left out: the engine puts one there.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        names = sorted(self._special, key=len, reverse=True)
        self._split = re.compile('(' + '|'.join(map(re.escape, names)) + ')')

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, with BOS before and EOS after where asked for."""
        ids: list[int] = []
        for part in filter(None, self._split.split(text)):
            ids += [self._special[part]] if part in self._special else self._tokenizer.encode(part)
        if ids[:1] == [self._tokenizer.bos_id]:
            ids = ids[1:]
        return [self._tokenizer.bos_id] * bos + ids + [self._tokenizer.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts."""
        return [np.array(self.encode(text), np.int32) for text in texts]
