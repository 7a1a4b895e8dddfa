"""Several servers of one checkpoint behind one address, by Ray Serve, which starts those anew that are gone.

    serve run experiments.serve_ray:app checkpoint=CKPT replicas=2

Each replica is what `experiments.serve` is; the extra `ray` brings the package.
"""

import functools
import os
import time
from collections.abc import Mapping
from typing import Any

from ray import serve

from experiments.prompting.checkpoint import DTYPES
from experiments.serve import load
from llama_jax.errors import InputError
from llama_jax.inference.scoring import check_candidates
from llama_jax.serve.app import make_app
from llama_jax.serve.service import Limits, Service

_NUMBERS = {
    'replicas': 1,
    'slots': 8,
    'context': 0,
    'steps': 4,
    'top_logprobs': 20,
    'prefix_mib': 256,
    'cpus': 1,
    'gpus': 0,
}
_TEXTS = {'checkpoint': '', 'name': '', 'tokenizer': '', 'dtype': 'auto'}


def app(args: Mapping[str, str]) -> serve.Application:
    """What `serve run` deploys.

    Args:
      args: of `experiments.serve` by the same names, `replicas`, and of each replica `cpus` and `gpus`.

    Raises:
      InputError: one is unknown, or no number.
    """
    if unknown := sorted(set(args) - set(_NUMBERS) - set(_TEXTS)):
        raise InputError(f'{unknown[0]} is no setting; there are {", ".join((*_TEXTS, *_NUMBERS))}')
    texts = _TEXTS | {name: str(args[name]) for name in _TEXTS.keys() & args.keys()}
    for name in _NUMBERS.keys() & args.keys():
        if not str(args[name]).isdecimal():
            raise InputError(f'{name} is {args[name]!r}; it must be a whole number')
    numbers = {name: int(args.get(name, default)) for name, default in _NUMBERS.items()}
    for name in ('replicas', 'slots', 'steps'):
        if numbers[name] < 1:
            raise InputError(f'{name} is {numbers[name]}; it must be at least 1')
    check_candidates(numbers['top_logprobs'])
    if texts['dtype'] not in ('auto', *DTYPES):
        raise InputError(f'dtype is {texts["dtype"]!r}; it is one of auto, {", ".join(DTYPES)}')
    if not texts['checkpoint']:
        raise InputError('checkpoint is missing; give checkpoint=CKPT')

    def build() -> Any:
        return _serve(texts, numbers)

    deployment = serve.deployment(serve.ingress(build)())
    return deployment.options(
        name='llama',
        num_replicas=numbers['replicas'],
        max_ongoing_requests=256 + numbers['slots'],
        ray_actor_options={'num_cpus': numbers['cpus'], 'num_gpus': numbers['gpus']},
    ).bind()


def _serve(texts: Mapping[str, str], numbers: Mapping[str, int]) -> Any:
    """The application of one replica, once its model is loaded; where that fails later the process ends."""
    rows = {
        'num_slots': numbers['slots'], 'budget_tokens': None, 'max_steps': numbers['steps'],
        'log_probabilities': numbers['top_logprobs'], 'prefix_bytes': (numbers['prefix_mib'] << 20, 0),
    }  # fmt: skip
    service = Service(Limits(texts['name'] or os.path.basename(texts['checkpoint'].rstrip('/'))))
    worker = service.worker
    given = {
        **{name: texts[name] for name in ('checkpoint', 'tokenizer', 'dtype')},
        'cache_dtype': 'auto',
        'keep_quantized': False,
    }
    loads = functools.partial(load, rows, 'native', numbers['context'], True, given, None)
    worker.start(loads, lambda: worker.served and os._exit(1))
    while worker.served is None:
        if worker.failure is not None:
            raise worker.failure
        time.sleep(0.1)
    return make_app(service)
