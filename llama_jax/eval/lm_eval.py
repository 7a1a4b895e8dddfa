"""A model for lm-evaluation-harness: its tasks, prompts and metrics, our mesh and batches; needs no torch.

    lm_eval --model llama_jax --model_args pretrained=CKPT --tasks hellaswag

`python -m llama_jax.eval.lm_eval` is the same command for releases of the harness that look for no models in other
packages (0.4.13 is one). From Python:

    import lm_eval
    from llama_jax.eval.engine import Engine
    from llama_jax.eval.lm_eval import language_model

    config, params, tokenizer = llama_jax.load(CKPT)
    model = language_model(Engine(llama_jax.LlamaForCausalLM(config), params, tokenizer))
    lm_eval.simple_evaluate(model, tasks=['hellaswag'])

It answers as the harness's own model of transformers does, so that numbers compare: text that spells a special token
means that token, texts are decoded without their prompt, and the text of a rolling perplexity begins with a BOS of its
own. What cannot be answered is logged and ends no run. On several hosts run the same on each.
"""

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from llama_jax import pretrained as checkpoints
from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.eval.engine import Engine, rolling_windows
from llama_jax.eval.lm_eval_requests import completion, continuation, plain_text, read, whole_text
from llama_jax.eval.task import Completion, Completions, Continuation, Likelihood, Request, Result
from llama_jax.inference.scoring import score
from llama_jax.models.llama import LlamaForCausalLM, compute_dtype
from llama_jax.partitioning import Partitioner, make_mesh
from llama_jax.tokenizer.chat_format import chat_format_for
from llama_jax.tokenizer.chat_template import ChatTemplate, Messages, template_beside
from llama_jax.tokenizer.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def language_model(engine: Engine, chat_template: str = '') -> Any:
    """An `lm_eval.api.model.LM` whose requests the engine answers.

    Args:
      engine: whose model is evaluated.
      chat_template: Jinja, used where the harness is told to apply one; '': the one beside the tokenizer, else the one
        of its family.

    Raises:
      InputError: lm_eval is not installed.
    """
    return _model_class()(engine=engine, chat_template=chat_template)


def __getattr__(name: str) -> Any:
    """`LlamaJax`, the class that the harness makes its model of; made when asked for, as lm_eval may be missing."""
    if name == 'LlamaJax':
        return _model_class()
    raise AttributeError(name)


@functools.cache
def _model_class() -> Any:
    try:
        from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("lm-evaluation-harness is not installed: pip install 'llama_jax[eval]'") from error
    return type('LlamaJax', (_Answers, LM), {'__module__': __name__})


def _load_engine(
    path: str, tokenizer: str, dtype: str, batch_tokens: int, seed: int, axes: Mapping[str, int]
) -> Engine:
    """The checkpoint on a mesh of all devices."""
    runtime.enable_compilation_cache()
    names = {name: jnp.dtype(name) for name in ('float32', 'bfloat16', 'float16')}
    names['auto'] = jnp.dtype(compute_dtype())
    if dtype not in names:
        raise InputError(f'dtype is {dtype!r}; choose from {", ".join(sorted(names))}')
    partitioner = Partitioner(make_mesh(dict(axes)))
    config, params, found = checkpoints.load(
        path, partitioner=partitioner, dtype=names[dtype], tokenizer=tokenizer
    )
    model = LlamaForCausalLM(config, dtype=names[dtype], partitioner=partitioner)
    return Engine(model, params, found, batch_tokens=batch_tokens, seed=seed)


class _Answers:
    """What lm-evaluation-harness asks of a model."""

    def __init__(
        self,
        pretrained: str = '',
        *,
        engine: Engine | None = None,
        tokenizer: str = '',
        chat_template: str = '',
        dtype: str = 'auto',
        batch_tokens: int = 8192,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **axes: int,
    ):
        """All but `engine` may stand in the harness's `--model_args`.

        Args:
          pretrained: anything that is a Llama.
          engine: what answers, in the place of `pretrained`.
          tokenizer: file or folder, instead of the checkpoint's own.
          chat_template: Jinja, or a file of it.
          dtype: of the computation: float32, bfloat16, float16, or auto: float32 on a CPU.
          batch_tokens: of a batch, padding included; what fits into memory.
          seed: of sampled completions.
          batch_size: the harness's, as the next two; not used: batches are of tokens, and the mesh is of all devices.
          max_batch_size: not used.
          device: not used.
          **axes: sizes of the mesh's axes, such as tensor=2; the rest of the devices split weights and batch.
        """
        super().__init__()
        if unused := [
            name
            for name, value in (('batch_size', batch_size), ('device', device))
            if value not in (None, 1, '1')
        ]:
            _log.warning(
                '%s of the harness is not used: batch_tokens and mesh axes are model arguments',
                ', '.join(unused),
            )
        if engine is None:
            engine = _load_engine(
                pretrained, tokenizer, dtype, int(batch_tokens), int(seed), {'fsdp': -1} | axes
            )
        self._tokenizer = engine.tokenizer
        templated: Any = _TemplatedTokenizer(engine.tokenizer)
        self._engine = Engine(
            engine.model, engine.params, templated,
            batch_tokens=engine.batch_tokens, seed=engine.seed, decode_alone=True,
        )  # fmt: skip
        if chat_template and '{' not in chat_template:
            chat_template = epath.Path(chat_template).read_text()
        self._given_template = chat_template

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of continuations; (-inf, False) for what is none, (0, True) for an empty one."""

        def answer(result: Result | None) -> tuple[float, bool]:
            if isinstance(result, Likelihood):
                return result.log_probability, result.is_greedy
            return -math.inf, False

        return [answer(result) for result in self._answer(requests, continuation)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; -inf for what is none."""
        model, tokenizer = self._engine.model, self._engine.tokenizer
        texts = read(requests, whole_text)
        pairs, owners = [], []
        for index, text in enumerate(texts):
            tokens = () if text is None else tuple(tokenizer.encode(text, bos=True))
            windows = rolling_windows(tokens, tokenizer.bos_id, model.config.max_seq_len)
            pairs += windows
            owners += [index] * len(windows)
        totals = [-math.inf if text is None else 0.0 for text in texts]
        scored = score(model, self._engine.params, pairs, batch_tokens=self._engine.batch_tokens)
        for index, found in scored:
            totals[owners[index]] += found.log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated texts, each up to the first of its stop strings; '' where the arguments cannot be followed."""
        results = self._answer(requests, completion)
        return [result.texts[0] if isinstance(result, Completions) else '' for result in results]

    def _answer(self, requests: Sequence[Any], make: Callable[..., Request | Result]) -> list[Result | None]:
        """The answers that can be given; `make` may know one at once."""
        asked = read(requests, make)
        answers = dict(self._engine.answer([r for r in asked if isinstance(r, Continuation | Completion)]))
        return [answers.get(one, one) for one in asked]  # pyright: ignore[reportReturnType]

    @property
    def tokenizer_name(self) -> str:
        """Tells cached prompts apart."""
        return self._tokenizer.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template in use, '' where none is."""
        return self._chat.text if chat_template else ''

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """A conversation as text; where the template takes no system message, as by transformers' model, without it."""
        messages = [{**message, 'content': plain_text(message['content'])} for message in chat_history]
        names = {id: name for name, id in special_tokens(self._tokenizer).items()}
        tokens = {
            'bos_token': names.get(self._tokenizer.bos_id, ''),
            'eos_token': names.get(self._tokenizer.eos_id, ''),
        }
        render = functools.partial(
            self._chat.render,
            add_generation_prompt=add_generation_prompt,
            continue_last=not add_generation_prompt,
            **tokens,
        )
        try:
            return render(messages)
        except InputError as error:
            others = [message for message in messages if message['role'] != 'system']
            if not others or len(others) == len(messages):
                raise
            _log.warning('%s; rendered without the system message', error)
            return render(others)

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        folder = epath.Path(self._tokenizer.path).parent
        return ChatTemplate(
            self._given_template or template_beside(folder) or chat_format_for(self._tokenizer).template
        )


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

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[np.ndarray]:
        """Ids of many texts."""
        plain = [text for text in texts if not self._split.search(text)]
        found = dict(zip(plain, self._tokenizer.encode_batch(plain), strict=True)) if plain else {}
        return [found[text] if text in found else np.array(self.encode(text), np.int32) for text in texts]


def _main() -> None:
    """The harness's own command line, to which this model is known."""
    import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import model_registry  # pyright: ignore[reportMissingImports]

    if 'llama_jax' not in model_registry:
        model_registry.register('llama_jax', target='llama_jax.eval.lm_eval:LlamaJax')
    cli_evaluate()


if __name__ == '__main__':
    _main()
