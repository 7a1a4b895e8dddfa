"""Answers the requests of `eval.task` with one model, tokenised as lm-evaluation-harness does."""

import functools
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from llama_jax.errors import InputError
from llama_jax.eval.task import Completion, Completions, Continuation, Likelihood, Request, Result, Rolling
from llama_jax.inference.completion import Row, Watch
from llama_jax.inference.decoding import LEAST_ROOM, power_of_two, rows_of
from llama_jax.inference.generate import CHECKED_STEPS, MAX_SLOTS
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.inference.sampling import Sampler
from llama_jax.inference.scoring import Pair, score
from llama_jax.models.llama import LlamaForCausalLM
from llama_jax.tokenizer.protocol import prompt_ids, required
from llama_jax.tokenizer.tokenizer import Tokenizer
from llama_jax.types import Params

_log = logging.getLogger(__name__)


class Engine:
    """A model that is asked; every process of a job asks the same and gets all answers."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        params: Params,
        tokenizer: Tokenizer | None,
        *,
        batch_tokens: int = 8192,
        seed: int = 0,
        decode_alone: bool = False,
    ):
        """Nothing is computed yet.

        Args:
          model: its partitioner, where it has one, places the batches.
          params: its weights.
          tokenizer: that they were trained with.
          batch_tokens: of a batch, padding included; what fits into memory.
          seed: of sampled completions.
          decode_alone: completions are decoded without their prompt, as lm-evaluation-harness does; sentencepiece then
            drops a space in front.
        """
        self.model, self.params, self.tokenizer = model, params, required(tokenizer)
        self.batch_tokens, self.seed, self.decode_alone = batch_tokens, seed, decode_alone

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells models apart: of architecture, dtypes, tokenizer and weights, wherever they are placed."""
        sums = [int(total) for total in jax.device_get(_sums(self.params))]
        known = [self.model.config.to_dict(), jnp.dtype(self.model.dtype).name, self.tokenizer.sha256, sums]
        known += [name for name in (self.model.cache_dtype,) if name != 'auto']
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def answer(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """Every distinct request with its result, in the order in which they are found (long ones first).

        Raises:
          InputError: a continuation is empty.
        """
        distinct = list(dict.fromkeys(requests))
        yield from self._likelihoods([r for r in distinct if not isinstance(r, Completion)])
        yield from self._completions([r for r in distinct if isinstance(r, Completion)])

    def _likelihoods(
        self, requests: Sequence[Continuation | Rolling]
    ) -> Iterator[tuple[Request, Likelihood]]:
        parts = self._tokenise(requests)
        pairs = [pair for pieces, _ in parts for pair in pieces]
        owner = [index for index, (pieces, _) in enumerate(parts) for _ in pieces]
        found = defaultdict(list)
        for index, (pieces, _) in enumerate(parts):
            if not pieces:  # an empty text
                yield requests[index], Likelihood(0.0, is_greedy=True)
        for place, scored in score(self.model, self.params, pairs, batch_tokens=self.batch_tokens):
            index = owner[place]
            pieces, truncated = parts[index]
            found[index].append(scored)
            if len(found[index]) == len(pieces):
                scores = found.pop(index)
                yield (
                    requests[index],
                    Likelihood(
                        sum(s.log_probability for s in scores),
                        all(s.is_greedy for s in scores),
                        sum(len(continuation) for _, continuation in pieces),
                        truncated,
                    ),
                )

    def _tokenise(self, requests: Sequence[Continuation | Rolling]) -> list[tuple[list[Pair], bool]]:
        """What each request has scored, and whether it lost its left end."""
        contexts, texts = [], []
        for request in requests:
            if isinstance(request, Rolling):
                contexts.append('')
                texts.append(request.text)
            else:
                # White space belongs to the word behind it.
                contexts.append(request.context.rstrip())
                texts.append(request.context + request.continuation)
        names = list(dict.fromkeys([*contexts, *texts]))
        encoded = {
            text: tuple(ids.tolist())
            for text, ids in zip(names, self.tokenizer.encode_batch(names), strict=True)
        }
        bos, length = (self.tokenizer.bos_id,), self.model.config.max_seq_len
        parts, merged = [], []
        for request, context_text, text in zip(requests, contexts, texts, strict=True):
            context, whole = encoded[context_text], encoded[text]
            if isinstance(request, Rolling):
                parts.append((rolling_windows(whole, bos[0], length), False))
                continue
            if not request.continuation:
                raise InputError(
                    f'the continuation of {request.context[-40:]!r} is empty, so it has no probability; a choice needs '
                    'text'
                )
            if not (continuation := whole[len(context) :]):
                merged.append(request)
                continuation = self._alone(request.continuation)
            # Without a BOS of its own a text begins by itself; what has nothing before it needs something to follow.
            begin = bos if getattr(self.tokenizer, 'add_bos', True) or not context else ()
            parts.append(left_truncated(begin + context, continuation, length))
        if merged:
            _log.warning(
                'continuations that are one token with the end of their context: %d, such as %r of %r; they are scored '
                'by tokens of their own', len(merged), merged[0].continuation[:40], merged[0].context[-40:],
            )  # fmt: skip
        return parts

    def _alone(self, text: str) -> tuple[int, ...]:
        """Ids of a text in the middle of a line: at its beginning, sentencepiece would put a space in front."""
        before, whole = self.tokenizer.encode('\n'), self.tokenizer.encode(f'\n{text}')
        return tuple(whole[len(before) :] if whole[: len(before)] == before else self.tokenizer.encode(text))

    def _completions(self, requests: Sequence[Completion]) -> Iterator[tuple[Request, Completions]]:
        """All of them through the same slots, which are as many as `batch_tokens` have room for; long ones first."""
        length = self.model.config.max_seq_len
        prompts = [prompt_ids(self.tokenizer, request.prompt) for request in requests]
        reach = max(
            (len(ids) + one.max_new_tokens for ids, one in zip(prompts, requests, strict=True)), default=1
        )
        least = rows_of(1, self.model.partitioner) * power_of_two(max(min(reach, length), LEAST_ROOM))
        generator = Generator(
            self.model, self.params, num_slots=min(max(len(requests), 1), MAX_SLOTS), max_steps=CHECKED_STEPS,
            budget_tokens=max(self.batch_tokens, least), is_watched=False,
        )  # fmt: skip
        owners: list[int] = []  # of each row
        watches: list[Watch] = []
        is_cut, counts = [False] * len(requests), [0] * len(requests)
        for index in sorted(range(len(requests)), key=lambda index: -len(prompts[index])):
            request, wanted = requests[index], requests[index].max_new_tokens
            kept = length - wanted if length > wanted else length // 2  # tokens of a prompt
            is_cut[index], prompt = len(prompts[index]) > kept, prompts[index][-kept:]
            counts[index] = request.num_samples if request.temperature else 1  # greedy samples are all alike
            first, further = len(owners), cast(dict[str, Any], dict(request.further))
            for sample in range(counts[index]):
                watch = Watch(self.tokenizer, [] if self.decode_alone else prompt, request.stop)
                asked = CompletionRequest(
                    prompt, wanted,
                    Sampler(
                        request.temperature, top_p=request.top_p, seed=_seed(self.seed, request.prompt, sample),
                        **further,
                    ),
                    self.tokenizer.stop_ids, is_complete=watch.look if request.stop else None,
                    like=first if sample else None,
                )  # fmt: skip
                generator.submit(asked)
                owners.append(index)
                watches.append(watch)
        rows, texts = [Row() for _ in owners], defaultdict(dict)
        for progress in generator.run():
            rows[progress.number].take(progress)
            if progress.ended is None:
                continue
            index = owners[progress.number]
            texts[index][progress.number] = watches[progress.number].completion(rows[progress.number]).text
            if len(texts[index]) == counts[index]:
                found = [text for _, text in sorted(texts.pop(index).items())]
                found *= requests[index].num_samples // counts[index]
                yield requests[index], Completions(tuple(found), is_cut[index])


def left_truncated(
    context: tuple[int, ...], continuation: tuple[int, ...], length: int
) -> tuple[list[Pair], bool]:
    """The pair as far as the model can read it: all but its last token fit into `length`; and whether it was cut."""
    path = (context + continuation)[-(length + 1) :]
    predicted = min(len(continuation), length)
    return [(path[:-predicted], path[-predicted:])], len(path) < len(context) + len(continuation)


def rolling_windows(tokens: tuple[int, ...], bos_id: int, length: int) -> list[Pair]:
    """Windows in which every token is predicted once, the last with as much context as fits (lm-evaluation-harness)."""
    windows: list[Pair] = [((bos_id,), tokens[:length])] if tokens else []
    for start in range(length, len(tokens), length):
        end = min(start + length, len(tokens))
        windows.append((tokens[end - length - 1 : start], tokens[start:end]))
    return windows


def _seed(seed: int, prompt: str, sample: int) -> int:
    """Of one draw: the same whatever else is generated, before or beside it."""
    digest = hashlib.sha256(json.dumps([seed, prompt, sample]).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


@jax.jit
def _sums(params: Params) -> list[jax.Array]:
    """Of the bits of each weight, modulo 2^32: exact in any order, so placement does not matter."""

    def total(x):
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        return jnp.sum(bits, dtype=jnp.uint32)

    return [total(leaf) for leaf in jax.tree.leaves(params)]
