"""A server in this process: around a toy model, or around one that says what a test wants."""

import base64
import contextlib
import dataclasses
import itertools
import time

import jax.numpy as jnp
from starlette.testclient import TestClient

import llama_jax
from llama_jax.inference.batcher import Ended, Request
from llama_jax.inference.generator import Generator
from llama_jax.inference.request import Progress
from llama_jax.inference.scoring import TokenScore
from llama_jax.serve.app import make_app
from llama_jax.serve.served import Served, chat_of
from llama_jax.serve.service import Limits, Service
from llama_jax.tokenizer.tokenizer import tokenizer_of_files
from tests import toy

# Every byte is a token, and Llama 3's special tokens follow.
RANKS = b'\n'.join(base64.b64encode(bytes([i])) + f' {i}'.encode() for i in range(256)) + b'\n'
EOT, BOS = 265, 256


def make_tokenizer():
    return tokenizer_of_files('bytes', {'tokenizer.model': RANKS})


def save_toy(path):
    """Writes a checkpoint of random weights; (model, params, tokenizer)."""
    config = dataclasses.replace(toy.CONFIG, vocab_size=512, max_seq_len=64, num_layers=2)
    model, tokenizer = llama_jax.LlamaForCausalLM(config, dtype=jnp.float32), make_tokenizer()
    params = toy.make_params(model)
    llama_jax.save(path, config, params, tokenizer)
    return model, params, tokenizer


class Script(Generator):
    """A generator that answers every request by a text of the test's, a few tokens a step.

    Attributes:
      answers: of the requests, by turns.
      asked: the requests so far.
      drafted: tokens that a draft would have proposed, four each step, and of them those taken, three.
      hold: called at each step.
    """

    def __init__(self, *answers, steps=3, slots=4, hold=lambda: None, ends=True):
        self.answers, self.steps, self.slots, self.hold, self.ends = answers, steps, slots, hold, ends
        self.asked, self.cancelled = [], []
        self.rows = {}
        self.numbers = itertools.count()
        self.num_steps = 0

    def warm_up(self, also=()):
        pass

    def anew(self):
        """Itself, without what ran: another generator where one has failed."""
        self.rows = {}
        return self

    @property
    def drafted(self):
        return 4 * self.num_steps, 3 * self.num_steps

    def submit(self, request):
        number = next(self.numbers)
        self.asked.append(request)
        self.rows[number] = request, list(self.answers[number % len(self.answers)].encode()), []
        return number

    def cancel(self, number):
        if self.rows.pop(number, None):
            self.cancelled.append(number)

    def advance(self):
        self.hold()
        self.num_steps += 1
        progress = []
        for number in list(self.rows)[: self.slots]:
            request, rest, made = self.rows[number]
            new, is_over, stop_id = [], False, None
            while len(new) < self.steps and not is_over:
                if not rest:
                    is_over, stop_id = True, (EOT if self.ends else None)
                    break
                new.append(rest.pop(0))
                made.append(new[-1])
                is_over = bool(request.is_complete and request.is_complete(list(made)))
                is_over = is_over or len(made) == request.max_new_tokens
            ended = None
            if is_over:
                reason = 'length' if len(made) == request.max_new_tokens and stop_id is None else 'stop'
                ended = Ended(Request(number, request.tokens, request.max_new_tokens), reason, len(made), 1)
                del self.rows[number]
            scored = [*new, *([stop_id] if stop_id is not None else [])]
            scores = [TokenScore(t, -0.5, -0.5, ((t, -0.5), (0, -2.0))) for t in scored]
            progress.append(Progress(number, new, stop_id, scores, ended))
        return progress


def scripted(script, tokenizer=None, template='', context=1000, rules='a script'):
    """What is served where the script answers."""
    tokenizer = tokenizer or make_tokenizer()

    def score(tokens):
        return [TokenScore(tokens[0]), *(TokenScore(t, -1.0, None, ((t, -1.0),)) for t in tokens[1:])]

    chat = chat_of(tokenizer, template)
    return Served(tokenizer, chat, context, 512, script.slots, 20, rules, script.anew, score)


@contextlib.contextmanager
def serving(load, **limits):
    """(client, service) of a server that is ready; `load` gives what is served."""
    service = Service(Limits(**({'name': 'toy'} | limits)))
    worker = service.worker
    worker.start(load)
    while worker.served is None and worker.failure is None:
        time.sleep(0.01)
    if worker.failure is not None:
        raise worker.failure
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        try:
            yield client, service
        finally:
            worker.close()


def events(text):
    """The data of a stream."""
    return [line.removeprefix('data: ') for line in text.splitlines() if line.startswith('data: ')]
