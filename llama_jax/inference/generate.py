"""Completing prompts: texts and their tokens around the compiled programs of `inference.decoding`."""

import collections
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError, checked_names
from llama_jax.inference import decoding
from llama_jax.inference.completion import Completion, Row, Watch
from llama_jax.inference.generator import Generator
from llama_jax.inference.logits_processor import LogitsProcessor, OfTokens, as_processor
from llama_jax.inference.prompts import Prompt, Prompts, check_prompts, ids_of
from llama_jax.inference.proposers import Proposer
from llama_jax.inference.request import CompletionRequest, check_number, ends_of
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.scoring import check_candidates, score_tokens
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.models.model_check import check_model
from llama_jax.tokenizer.protocol import required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params

_log = logging.getLogger(__name__)

# Prompts that are completed at a time; others follow as these end.
MAX_SLOTS = 64
# Steps between two looks at what the rows hold, where something but a stop token may end them.
CHECKED_STEPS = 16
# The same where text is shown as it is made.
_STREAMED_STEPS = 4


@checked_names()
def generate(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float | int] | None = None,
    min_new_tokens: int = 0,
    seed: int = 0,
    samplers: Sequence[Sampler] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    special_tokens: bool = False,
    logits_processor: LogitsProcessor | OfTokens | None = None,
    draft: Proposer | None = None,
) -> list[str]:
    """Completions of the prompts, without the prompts themselves; `complete` tells more of each.

        texts = llama_jax.generate(model, params, tokenizer, ['Once upon a time'], max_new_tokens=64, temperature=0.8)

    Args:
      model: the architecture and its compute dtype; its partitioner, where it has one, places the rows.
      params: its weights, as `load` gives them: for as long as they live, a copy that decodes at the memory's speed is
        kept beside them. To have one copy alone, give `unstack(params, model.dtype, delete=True)`.
      tokenizer: that the weights were trained with.
      prompts: any number of texts, or of token ids; a string is one prompt. '' starts a document.
      max_new_tokens: at most this many each; a row ends earlier at a stop id of the tokenizer, or at the context.
      temperature: 0 is greedy.
      top_k: see `Sampler`, also for those up to `logit_bias`.
      top_p: keeps the most likely tokens.
      min_p: keeps likely tokens.
      repetition_penalty: of tokens of prompt and completion.
      presence_penalty: of tokens of the completion.
      frequency_penalty: of tokens of the completion, each time.
      logit_bias: {token id: what is added to its logit}.
      min_new_tokens: no token that ends a completion comes before so many; a text of `stop` may.
      seed: of the draws; rows are drawn apart by their number.
      samplers: all of these settings for each prompt, instead; each row is then drawn by its own seed alone.
      stop: texts that end a completion where they begin; they are left out.
      stop_ids: of tokens that end a completion, besides those of the tokenizer.
      ignore_eos: go on behind what ends a text.
      special_tokens: names of special tokens in a prompt are those tokens, else plain text.
      logits_processor: (logits [B, V], tokens so far [B, S], their numbers [B]) -> logits, traced into the program,
        which is compiled for each function anew; or one with a state of its own, see `LogitsProcessor`.
      draft: proposes tokens, of which the model verifies several at once; all are drawn as likely as without it.

    Raises:
      InputError: a prompt leaves no room in the model's context, a setting is out of range, or the draft does not fit.
    """
    found = complete(
        model, params, required(tokenizer), prompts, max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias or {},
        min_new_tokens=min_new_tokens, seed=seed, samplers=samplers, stop=stop, stop_ids=stop_ids,
        ignore_eos=ignore_eos, special_tokens=special_tokens, logits_processor=logits_processor, draft=draft,
    )  # fmt: skip
    return [completion.text for (completion,) in found]


@checked_names(generate)
def complete(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    *,
    n: int = 1,
    log_probabilities: int | None = None,
    echo: bool = False,
    is_complete: Callable[[int, list[int]], bool] | None = None,
    **settings: Any,
) -> list[list[Completion]]:
    """`n` completions of each prompt, with their tokens, what ended them, and log-probabilities where asked for.

        ((first, second),) = llama_jax.complete(
            model, params, tokenizer, ['Once upon a time'], n=2, temperature=0.8, log_probabilities=5, echo=True
        )
        first.text, first.finish_reason, first.scores[0].log_probability, first.prompt_scores[1].candidates

    Args:
      model: see `generate`.
      params: its weights.
      tokenizer: that the weights were trained with; None where prompts are ids and no text is wanted.
      prompts: texts, or token ids.
      n: completions of each prompt, which is read once. They are drawn apart: with one prompt, or settings of each
        prompt, choice i by the seed and i alone.
      log_probabilities: each token's are told, and those of so many of the most likely ones at its place; None: none.
      echo: each token of the prompt is scored too.
      is_complete: (number of a completion, its tokens so far) -> whether these are enough; asked after every token.
        Completions are numbered through all prompts.
      settings: of `generate`.

    Raises:
      InputError: see `generate`.
    """
    check_number('n', n)
    check_candidates(log_probabilities or 0)
    ids, watches, rows, rounds = _asked(
        model, params, tokenizer, prompts, n=n, log_probabilities=log_probabilities, is_complete=is_complete, **settings
    )  # fmt: skip
    collections.deque(rounds, maxlen=0)
    scores = (
        score_tokens(model, params, ids, num_candidates=log_probabilities or 0) if echo else [[] for _ in ids]
    )
    found = [
        watch.completion(row, scores[i // n])
        for i, (watch, row) in enumerate(zip(watches, rows, strict=True))
    ]
    return [found[start : start + n] for start in range(0, len(found), n)]


def complete_each(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    *,
    num_slots: int = 16,
    log_probabilities: int | None = None,
    **settings: Any,
) -> Iterator[tuple[int, Completion]]:
    """The completion of each prompt as soon as it has ended, with the prompt's number.

    With `samplers`, what a prompt gets depends on itself and on `num_slots` alone, to the last bit: not on what is
    completed beside it.

    Args:
      model: see `generate`.
      params: its weights.
      tokenizer: that the weights were trained with.
      prompts: texts, or token ids; begun in this order.
      num_slots: rows that are decoded together; a prompt takes the next one that is free.
      log_probabilities: see `complete`.
      settings: of `generate`.

    Raises:
      InputError: see `generate`; before the first.
    """
    _, watches, rows, rounds = _asked(
        model, params, tokenizer, prompts, num_slots=num_slots, log_probabilities=log_probabilities,
        reads_together=False, **settings,
    )  # fmt: skip
    numbers = (number for round in rounds for number in round if rows[number].ended)
    return ((number, watches[number].completion(rows[number])) for number in numbers)


@checked_names(generate)
def stream(
    model: LlamaForCausalLM, params: Params, tokenizer: Tokenizer | None, prompt: Prompt, **settings: Any
) -> Iterator[str]:
    """The completion of one prompt while it is made: pieces that join to what `generate` returns for it.

        for piece in llama_jax.stream(model, params, tokenizer, 'Once upon a time', max_new_tokens=64):
            print(piece, end='', flush=True)

    Args:
      model: see `generate`.
      params: its weights.
      tokenizer: that the weights were trained with.
      prompt: a text, or token ids.
      settings: of `generate`; no piece shows the beginning of a text of `stop`.

    Raises:
      InputError: see `generate`; before the first piece.
    """
    _, (watch,), (row,), rounds = _asked(
        model, params, required(tokenizer), [prompt], is_streamed=True, **settings
    )

    def pieces() -> Iterator[str]:
        for _ in rounds:
            watch.look(row.tokens)
            if piece := watch.new_text():
                yield piece
        if piece := watch.new_text(at_end=True):
            yield piece

    return pieces()


def generate_tokens(
    model: LlamaForCausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler | Sequence[Sampler],
    stop_ids: Sequence[int],
    is_complete: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """As `generate`, on token ids; a stop token ends its row and is left out.

    Every process of a job makes the same call and gets all rows.

    Args:
      model: see `generate`.
      params: its weights.
      prompts: token ids, each at least one.
      max_new_tokens: at most this many each.
      sampler: chooses the tokens. Rows of one are drawn by its seed and their number, rows of their own by their seeds
        alone, whatever they are generated with.
      stop_ids: tokens that end a row.
      is_complete: see `complete`.

    Raises:
      InputError: see `generate`.
    """
    settings: dict[str, Any] = vars(sampler) if isinstance(sampler, Sampler) else {'samplers': sampler}
    _, _, rows, rounds = _asked(
        model, params, None, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, is_complete=is_complete,
        **settings,
    )  # fmt: skip
    collections.deque(rounds, maxlen=0)
    return [row.tokens for row in rows]


def _asked(
    model: LlamaForCausalLM,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Prompts,
    *,
    n: int = 1,
    log_probabilities: int | None = None,
    is_complete: Callable[[int, list[int]], bool] | None = None,
    is_streamed: bool = False,
    num_slots: int | None = None,
    reads_together: bool = True,
    max_new_tokens: int = 256,
    samplers: Sequence[Sampler] | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] = (),
    ignore_eos: bool = False,
    special_tokens: bool = False,
    logits_processor: LogitsProcessor | OfTokens | None = None,
    draft: Proposer | None = None,
    **settings: Any,
) -> tuple[list[list[int]], list[Watch], list[Row], Iterator[list[int]]]:
    """The prompts' ids; of each completion who looks at it, and its row; and of each round the rows that it filled.

    What is asked is refused by the call; the rows are filled while somebody goes through the rounds. `num_slots` are
    decoded together, by default all up to `MAX_SLOTS`; for the others see `generate`, `complete` and `Generator`.
    """
    check_model(model, params)
    sampler = Sampler(**settings)
    if samplers is not None and sampler != Sampler():
        raise InputError('samplers hold the settings of each prompt; give none beside them')
    ids = ids_of(tokenizer, prompts, special_tokens)
    check_prompts(ids, model.config)
    of_prompts = [sampler] * len(ids) if samplers is None else samplers
    if len(of_prompts) != len(ids):
        raise InputError(f'samplers are {len(of_prompts)} for {len(ids)} prompts; there must be one for each')
    stop, stop_ids = ends_of(stop, stop_ids)
    if not isinstance(draft, Proposer | None):
        raise InputError(
            f'draft is {repr(draft)[:60]}; give a Proposer, such as Lookup(4) or Draft(model, params, 4)'
        )
    tokenizer = required(tokenizer) if stop else tokenizer
    own = tokenizer.stop_ids if tokenizer else ()
    ends = () if ignore_eos else tuple(sorted({*own, *stop_ids}))
    is_looked_at = bool(stop or is_complete or is_streamed)
    generator = Generator(
        model, params, num_slots=num_slots or min(max(n * len(ids), 1), MAX_SLOTS),
        max_steps=_STREAMED_STEPS if is_streamed else CHECKED_STEPS if is_looked_at else decoding.COLUMNS,
        is_watched=is_streamed, reads_together=reads_together, log_probabilities=log_probabilities,
        processor=as_processor(logits_processor), draft=draft,
    )  # fmt: skip
    watches, rows = [], []
    for prompt, of_prompt in zip(ids, of_prompts, strict=True):
        first = len(rows)
        for choice in range(n):
            number = first + choice
            watch = Watch(tokenizer, prompt, stop, is_complete and functools.partial(is_complete, number))
            # Rows of one sampler draw by their number, rows of their own by the seed and which of a prompt's they are.
            stream = number if samplers is None else choice
            generator.submit(
                CompletionRequest(
                    prompt,
                    max_new_tokens,
                    of_prompt,
                    ends,
                    stream,
                    watch.look if is_looked_at else None,
                    like=first if choice else None,
                )  # fmt: skip
            )
            watches.append(watch)
            rows.append(Row())
    return ids, watches, rows, _made(generator, rows, model.config.max_seq_len, max_new_tokens)


def _made(generator: Generator, rows: list[Row], context: int, most: int) -> Iterator[list[int]]:
    """Numbers of the rows that were given something; at the end it is told how many the context has cut."""
    num_open = len(rows)
    while num_open:
        given = generator.advance()
        for progress in given:
            rows[progress.number].take(progress)
            num_open -= progress.ended is not None
        yield sorted({progress.number for progress in given})
    by_length = [row for row in rows if row.ended and row.ended.reason == 'length']
    if cut := sum(len(row.tokens) < most for row in by_length):
        _log.warning(
            '%d of %d completions ended where the context of %d tokens does, before max_new_tokens, %d: shorten their '
            'prompts, or ask for less', cut, len(rows), context, most,
        )  # fmt: skip
