"""What a server adds to the model: clients that stream from one, beside the generator alone, and llama.cpp's server.

All complete one prompt by the same random weights, in bf16 on an accelerator, greedily, in turns. Servers are processes
of their own, clients threads of this one; on a GPU, whose memory they share, none may take most of it at its start
(`XLA_PYTHON_CLIENT_PREALLOCATE=false`). A time to the first token is that of a client who has the server to itself.
"""

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.benchmark.decode_peers import write_gguf
from experiments.benchmark.turns import has_peer
from experiments.run.settings import find_preset
from llama_jax.errors import InputError
from llama_jax.inference.constraint import Constrained, Rule, Rules
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import CompletionRequest
from llama_jax.models.llama import LlamaForCausalLM, init_params
from llama_jax.models.unstacked import unstack
from llama_jax.pretrained import load_tokenizer
from llama_jax.tokenizer.protocol import Tokenizer, prompt_ids

_MODEL = flags.DEFINE_string('serve_model', 'stories_110m', 'a preset')
_CLIENTS = flags.DEFINE_list('serve_clients', '1,4,8', 'at a time, several by commas')
_PROMPT = flags.DEFINE_integer('serve_prompt', 32, 'tokens of a prompt', lower_bound=8)
_TOKENS = flags.DEFINE_integer('serve_tokens', 32, 'new tokens', lower_bound=2)
_ROUNDS = flags.DEFINE_integer('serve_rounds', 3, 'turns', lower_bound=1)
_SCHEMA = flags.DEFINE_string(
    'serve_schema', '', "of JSON: what answers that keep to it take beside others; '': none"
)
_PEER = flags.DEFINE_boolean('serve_peer', True, "measure llama.cpp's server beside, where it is installed")

# Without an answer for so long a server is not ready, or stuck.
_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Turn:
    """Some clients at a time.

    Attributes:
      tokens_per_second: of all together.
      first_seconds: to the first token, median.
    """

    tokens_per_second: float
    first_seconds: float


def main() -> dict[str, Any]:
    """Tokens/s and time to the first token of each, and ratios, in a table."""
    if not all(number.isdecimal() and int(number) for number in _CLIENTS.value):
        raise InputError(f'--serve_clients={",".join(_CLIENTS.value)} must be whole numbers, as in 1,4,8')
    numbers, tokens = [int(number) for number in _CLIENTS.value], _TOKENS.value
    context = max(64, 1 << (_PROMPT.value + tokens).bit_length())
    config = dataclasses.replace(find_preset(_MODEL.value), max_seq_len=context)
    dtype = jnp.dtype('float32' if jax.default_backend() == 'cpu' else 'bfloat16')
    model = LlamaForCausalLM(config, dtype=dtype)
    cast = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), init_params(model, key)))
    params = cast(jax.random.key(0))
    ready: dict[str, float] = {}
    with contextlib.ExitStack() as at_exit:
        folder = at_exit.enter_context(tempfile.TemporaryDirectory())
        path = write_gguf(config, params, folder, dtype.name)
        tokenizer = load_tokenizer(path)
        prompt, ids = _prompt(tokenizer, _PROMPT.value)
        servers = {'server': _ours(path, max(numbers), dtype.name)}
        if _PEER.value and has_peer("llama.cpp's server", 'llama_cpp', 'fastapi', 'starlette_context'):
            servers['llama_cpp'] = _theirs(path, context)
        params = unstack(params, dtype, delete=True)  # as the server has them
        contenders: dict[str, Callable[[int], Turn]] = {
            'generator': _alone(model, params, max(numbers), ids, tokens)
        }
        for name, command in servers.items():
            start = time.perf_counter()
            port = at_exit.enter_context(_running(command, folder))
            ready[f'{name}_ready_seconds'] = time.perf_counter() - start
            print(f'{name}: answers {ready[f"{name}_ready_seconds"]:.1f} s after its command', flush=True)
            # Which else would repel repetitions, and take its time for it.
            more = {'repeat_penalty': 1.0} if name == 'llama_cpp' else {}
            contenders[name] = _asked_by_clients(port, {'prompt': prompt, 'max_tokens': tokens} | more)
        turns = _take_turns(contenders, numbers, _ROUNDS.value)
        if _SCHEMA.value:
            masks = _Timed(rules := Rules(tokenizer, config.vocab_size))
            rule = rules.of_schema(json.loads(_SCHEMA.value))
            pair = contenders['generator'], _alone(model, params, max(numbers), ids, tokens, masks, rule)
            ready |= _tell_rules(*pair, masks, numbers, tokens, _ROUNDS.value)
    figures = {'model': _MODEL.value, 'prompt_tokens': _PROMPT.value, 'tokens': tokens, 'dtype': dtype.name}
    return figures | ready | _tell(turns, min(numbers))


def _tell(turns: Mapping[tuple[str, int], list[Turn]], least: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    print(f'{"clients":>8}{"tokens/s":>10}{"first ms":>10}{"ratio":>7}')
    for (name, number), own in turns.items():
        rate = statistics.median(turn.tokens_per_second for turn in own)
        first = statistics.median(turn.first_seconds for turn in own)
        figures |= {f'{name}_{number}_tokens_per_second': rate, f'{name}_{number}_first_seconds': first}
        ratios = [
            ours.tokens_per_second / turn.tokens_per_second
            for ours, turn in zip(turns['server', number], own, strict=True)
        ]
        told = f'{number:8}{rate:10,.1f}{1e3 * first:10,.1f}'
        if name == 'server':
            print(f'{told}{"":7}  server', flush=True)
            continue
        ratio = figures[f'{number}_ratio_to_{name}'] = statistics.median(ratios)
        print(f'{told}{ratio:7.2f}  {name} ({min(ratios):.2f} to {max(ratios):.2f})', flush=True)
    late = [
        ours.first_seconds - own.first_seconds
        for ours, own in zip(turns['server', least], turns['generator', least], strict=True)
    ]
    figures['first_ms_beyond_prefill'] = 1e3 * statistics.median(late)
    print(
        f'first token with {least} clients: {figures["first_ms_beyond_prefill"]:.1f} ms after the generator alone'
    )
    return figures


def _take_turns(
    contenders: Mapping[str, Callable[[int], Turn]], numbers: list[int], rounds: int
) -> dict[tuple[str, int], list[Turn]]:
    """After a turn that warms up; {(who, clients): turns}."""
    turns: dict[tuple[str, int], list[Turn]] = {(name, n): [] for n in numbers for name in contenders}
    for contender in contenders.values():
        contender(1)
    for _ in range(rounds):
        for (name, number), own in turns.items():
            own.append(contenders[name](number))
    return turns


def _prompt(tokenizer: Tokenizer, number: int) -> tuple[str, list[int]]:
    """A text of so many tokens, and these: a few more would be read by another program.

    Each letter is a token, behind that of the beginning and those of a space.
    """
    before = len(prompt_ids(tokenizer, 'PROMPT')) - len('PROMPT')
    text = ('PROMPT' * number)[: number - before]
    ids = list(prompt_ids(tokenizer, text))
    assert len(ids) == number
    return text, ids


def _alone(
    model: LlamaForCausalLM,
    params: Any,
    slots: int,
    ids: list[int],
    tokens: int,
    masks: Constrained | None = None,
    rule: Rule | None = None,
) -> Callable[[int], Turn]:
    """The generator with the settings of the server, in this process; answers keep to the rule."""
    generator = Generator(model, params, num_slots=slots, max_steps=4, log_probabilities=0, processor=masks)
    generator.warm_up()

    def complete(number: int) -> Turn:
        start, firsts, made = time.perf_counter(), {}, 0
        for _ in range(number):
            generator.submit(CompletionRequest(ids, tokens, stop_ids=(), rule=rule))
        for progress in generator.run():
            firsts.setdefault(progress.number, time.perf_counter() - start)
            made += len(progress.tokens)
        assert made == number * tokens
        return Turn(made / (time.perf_counter() - start), statistics.median(firsts.values()))

    return complete


class _Timed(Constrained):
    """What makes the masks of answers, and how long that takes.

    Attributes:
      seconds: so far, of all.
    """

    seconds = 0.0

    def follow(self, rule: Any) -> Any:
        """Counts what the one who follows takes."""
        follower = super().follow(rule)
        if follower is not None:
            follower.hear = self._timed(follower.hear)
        return follower

    def states(self, rows: Sequence[Any]) -> Any:
        """Counts what it takes to put the masks together."""
        return self._timed(super().states)(rows)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _tell_rules(
    free: Callable[[int], Turn],
    ruled: Callable[[int], Turn],
    masks: _Timed,
    numbers: list[int],
    tokens: int,
    rounds: int,
) -> dict[str, float]:
    """What a rule for each answer takes: the masks, on the host, and a dispatch for each token."""
    figures: dict[str, float] = {}
    for number in numbers:
        ratios, steps, made = [], [], []
        for _ in range(rounds + 1):  # the first warms up
            before, start = masks.seconds, time.perf_counter()
            rate = ruled(number).tokens_per_second
            steps.append(1e3 * (time.perf_counter() - start) / tokens)
            made.append(1e3 * (masks.seconds - before) / tokens)
            ratios.append(rate / free(number).tokens_per_second)
        ratio, step, mask = (statistics.median(values[1:]) for values in (ratios, steps, made))
        figures |= {f'{number}_ruled_ratio_to_generator': ratio, f'{number}_ruled_step_ms': step}
        figures[f'{number}_mask_ms'] = mask
        print(
            f'a schema for each of {number}: {ratio:.2f} of the tokens/s; of a step of {step:.1f} ms '
            f'the masks take {mask:.2f}',
            flush=True,
        )
    return figures


def _ours(path: str, slots: int, dtype: str) -> list[str]:
    return [
        '-m', 'experiments.serve', f'--checkpoint={path}', '--port=PORT', f'--slots={slots}', '--name=model',
        f'--dtype={dtype}', '--top_logprobs=0', '--constraints=false', '--prefix_mib=0',
    ]  # fmt: skip


def _theirs(path: str, context: int) -> list[str]:
    # A new client would end the answer of the one before.
    return [
        '-m', 'llama_cpp.server', '--model', path, '--model_alias', 'model', '--port', 'PORT', '--n_ctx', str(context),
        '--n_threads', '2', '--n_threads_batch', '2', '--interrupt_requests', 'false',
    ]  # fmt: skip


@contextlib.contextmanager
def _running(command: list[str], folder: str) -> Iterator[int]:
    """The port of a server, once it answers."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, *(part.replace('PORT', str(port)) for part in command)]
    log = f'{folder}/{port}.log'
    with open(log, 'w') as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            end = time.monotonic() + _SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > end:
                    with open(log) as told:
                        raise InputError(f'{" ".join(command[1:3])} does not start: {told.read()[-300:]}')
                time.sleep(0.2)
            yield port
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        return _stream(port, {'prompt': 'PROMPT', 'max_tokens': 1})[0] == 1
    except (OSError, http.client.HTTPException, InputError):
        return False


def _asked_by_clients(port: int, asked: dict[str, Any]) -> Callable[[int], Turn]:
    def complete(number: int) -> Turn:
        start = time.perf_counter()
        with ThreadPoolExecutor(number) as pool:
            answers = list(pool.map(lambda _: _stream(port, asked), range(number)))
        made = sum(count for count, _ in answers)
        return Turn(made / (time.perf_counter() - start), statistics.median(first for _, first in answers))

    return complete


def _stream(port: int, asked: dict[str, Any]) -> tuple[int, float]:
    """Tokens of an answer, and seconds to the first.

    Raises:
      InputError: it is shorter than asked for, so the rates would not compare.
    """
    asked = {'model': 'model', 'temperature': 0, 'stream': True} | asked
    start, first, finish = time.perf_counter(), 0.0, None
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, timeout=_SECONDS)) as connection:
        headers = {'content-type': 'application/json'}
        connection.request('POST', '/v1/completions', json.dumps(asked), headers)
        for line in connection.getresponse():
            found = re.match(rb'data: ({.*})', line)
            if found is None:
                continue
            first = first or time.perf_counter() - start
            finish = json.loads(found[1])['choices'][0]['finish_reason'] or finish
    if finish != 'length':
        raise InputError(f'an answer of {asked["max_tokens"]} tokens ended by {finish}; give fewer')
    return asked['max_tokens'], first
