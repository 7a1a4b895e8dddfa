"""Many clients of one server, who come, go, and stop reading; and what the server says of itself meanwhile."""

import asyncio
import collections
import dataclasses
import itertools
import json
import random
import re
import threading
import time
from collections.abc import Callable

import httpx2
import openai

import llama_jax

_KINDS = 5  # of answers
SCHEMA = {
    'type': 'object', 'required': ['name', 'age'], 'additionalProperties': False,
    'properties': {'name': {'enum': ['Tim', 'Lily']}, 'age': {'type': 'integer', 'minimum': 0, 'maximum': 9}},
}  # fmt: skip
FORMAT = {'type': 'json_schema', 'json_schema': {'name': 'child', 'schema': SCHEMA}}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is asked for.

    Attributes:
      prompts: of the last a block is kept, by default.
      lengths: of answers, in tokens.
      left: tokens of an answer whose client goes away.
      large: tokens of an answer whose client stops reading; by default more than what may wait for one.
      child: tokens of an answer to a schema.
      logprobs: that the server tells.
    """

    prompts: tuple[str, ...] = (
        '',
        'Once upon a time',
        'Lily had a',
        'The big dog was',
        'One day, a boy named Tim went to the park. ' * 16,
    )
    lengths: tuple[int, ...] = (5, 40, 120)
    left: int = 200
    large: int = 500
    child: int = 60
    logprobs: int = 20

    def expected(self, weights) -> dict[tuple[str, int], str]:
        """{(prompt, tokens): greedy text}, made without a server."""
        config, params, tokenizer = llama_jax.load(weights)
        model = llama_jax.LlamaForCausalLM(config)
        found = {}
        for length in self.lengths:
            texts = llama_jax.generate(
                model, params, tokenizer, self.prompts, max_new_tokens=length, temperature=0.0
            )
            found |= {(prompt, length): text for prompt, text in zip(self.prompts, texts, strict=True)}
        return found


@dataclasses.dataclass
class Soak:
    """Clients of a server at an address, until a time.

    Attributes:
      expected: see `Sizes.expected`.
      counts: of what clients did.
      wrong: what should not have been.
    """

    address: str
    expected: dict[tuple[str, int], str]
    sizes: Sizes = Sizes()
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    async def run(self, number: int, seconds: float) -> None:
        """So many clients, each of which asks again and again."""
        end = time.monotonic() + seconds
        async with openai.AsyncOpenAI(
            base_url=f'{self.address}/v1', api_key='any', max_retries=0, timeout=600
        ) as client:
            await asyncio.gather(*(self._client(client, random.Random(seed), end) for seed in range(number)))

    def leaves_no_trace(
        self,
        http: httpx2.Client,
        number: int,
        seconds: float,
        settled: float,
        ends_in: float = 1,
    ) -> None:
        """Runs, and checks what the server says of itself: before, after so many seconds, and after all.

        Args:
          http: asks it.
          number: of clients.
          seconds: that they come for.
          settled: seconds after which memory grows no more.
          ends_in: seconds in which a step ends, and with it what nobody waits for.
        """
        before, sizes = read_metrics(http, self.address), []
        timer = threading.Timer(
            settled, lambda: sizes.append(read_metrics(http, self.address)['process_resident_memory_bytes'])
        )
        timer.start()
        asyncio.run(self.run(number, seconds))
        time.sleep(ends_in)
        after = read_metrics(http, self.address)
        print(dict(self.counts), sizes, {name: (before[name], after[name]) for name in before})
        assert not self.wrong, self.wrong[:5]
        assert after['llama_requests_running'] == after['llama_requests_waiting'] == 0
        assert after['llama_programs_compiled_total'] == 0
        for name in ('process_open_fds', 'llama_arrays'):
            assert after[name] <= before[name], (name, before, after)
        assert after['process_resident_memory_bytes'] < 1.03 * sizes[0], (sizes, after)

    async def each_once(self) -> None:
        """One client, who does all that clients do."""
        async with openai.AsyncOpenAI(base_url=f'{self.address}/v1', api_key='any', max_retries=0) as client:
            await self._goes(client, random.Random(0))
            for asked in itertools.product((self.sizes.prompts[0], self.sizes.prompts[-1]), range(_KINDS)):
                await self._asks(client, random.Random(0), *asked)

    async def stop_reading(self, is_over: Callable[[], bool]) -> None:
        """One client who stays, though it reads no further, until something is so."""
        async with openai.AsyncOpenAI(base_url=f'{self.address}/v1', api_key='any', max_retries=0) as client:
            stream = await self._large(client)
            for _ in range(100):
                if await asyncio.to_thread(is_over):
                    break
                await asyncio.sleep(0.3)
            else:
                self.wrong.append('who reads nothing keeps its slots')
            await stream.close()

    async def _client(self, client, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            kind = draw.random()
            do = self._goes if kind < 0.2 else self._stops_reading if kind < 0.3 else self._asks
            try:
                await do(client, draw)
            except Exception as error:
                self.wrong.append(f'{do.__name__}: {type(error).__name__} {error}')
            self.counts[do.__name__] += 1

    async def _goes(self, client, draw: random.Random) -> None:
        """In the middle of an answer, or before it."""
        asked = {
            'model': 'stories', 'prompt': draw.choice(self.sizes.prompts), 'max_tokens': self.sizes.left,
            'n': draw.choice((1, 1, 2)),
        }  # fmt: skip
        if draw.random() < 0.3:
            task = asyncio.create_task(client.completions.create(**asked))
            await asyncio.wait({task}, timeout=draw.random())
            task.cancel()
            await asyncio.wait({task})
            return
        stream = await client.completions.create(**asked, stream=True)
        left = draw.randrange(9)
        async for _ in stream:
            left -= 1
            if left < 0:
                break
        await stream.close()

    async def _stops_reading(self, client, draw: random.Random) -> None:
        """And leaves some time later."""
        stream = await self._large(client)
        await asyncio.sleep(draw.uniform(1, 4))
        await stream.close()

    async def _large(self, client):
        """An answer that is larger than what may wait, and has begun."""
        stream = await client.completions.create(
            model='stories', prompt='', max_tokens=self.sizes.large, logprobs=self.sizes.logprobs, n=4, stream=True,
            extra_body={'ignore_eos': True},
        )  # fmt: skip
        await anext(stream)
        return stream

    async def _asks(self, client, draw: random.Random, *asked) -> None:
        """And reads the answer."""
        prompt, kind = asked or (draw.choice(self.sizes.prompts), draw.randrange(_KINDS))
        length = draw.choice(self.sizes.lengths)
        asked = {'model': 'stories', 'prompt': prompt, 'max_tokens': length}
        if kind == 0:  # to a schema
            answer = await client.chat.completions.create(
                model='stories', messages=[{'role': 'user', 'content': prompt}], max_tokens=self.sizes.child,
                temperature=1.5, response_format=FORMAT,
            )  # fmt: skip
            (choice,) = answer.choices
            child = json.loads(choice.message.content) if choice.finish_reason == 'stop' else None
            right = child and child['name'] in ('Tim', 'Lily') and 0 <= child['age'] <= 9
            self._check(right, f'a schema was answered by {choice.message.content!r}')
            return
        if kind == 1:  # by chance
            answer = await client.completions.create(
                **asked,
                temperature=1.2,
                top_p=0.9,
                n=2,
                logprobs=min(3, self.sizes.logprobs),
                presence_penalty=0.5,
            )
            self._check(len(answer.choices) == 2 and answer.usage.completion_tokens > 0, 'not two choices')
            return
        asked |= {'temperature': 0, 'n': draw.choice((1, 1, 3))}
        texts = collections.defaultdict(str)
        if kind == 2:
            answer = await client.completions.create(**asked)
            texts.update({choice.index: choice.text for choice in answer.choices})
        else:
            async for chunk in await client.completions.create(**asked, stream=True):
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
        for text in texts.values():
            self._check(text == self.expected[prompt, length], f'{prompt[:20]!r}, {length} tokens: {text!r}')
        self._check(len(texts) == asked['n'], f'{len(texts)} texts')

    def _check(self, is_right, otherwise: str) -> None:
        if not is_right:
            self.wrong.append(otherwise)


def read_metrics(http, address: str) -> dict[str, float]:
    """What the server tells of itself, without its histograms."""
    lines = re.findall(r'^(\w+) ([\d.e+-]+)$', http.get(f'{address}/metrics').text, re.MULTILINE)
    return {name: float(value) for name, value in lines}
