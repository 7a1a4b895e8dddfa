"""Serves a checkpoint of any format to clients of OpenAI's API, on this machine alone unless clients have keys.

    python -m experiments.serve --checkpoint=DIR --port=8000

It listens at once, on process 0 of several, and loads meanwhile; docs/serving.md tells what it offers.
"""

import dataclasses
import functools
import os
from typing import Any

import jax
from absl import flags
from etils import epath

from experiments import launch
from experiments.prompting.loading import define_shared_model, load_model, shared_partitioner
from llama_jax import runtime
from llama_jax.errors import InputError
from llama_jax.inference.chat import Chat
from llama_jax.inference.scoring import check_candidates
from llama_jax.models.unstacked import unstack
from llama_jax.partitioning import Partitioner
from llama_jax.tokenizer.chat_template import read_template
from llama_jax.tokenizer.protocol import required

try:
    from llama_jax.serve.access import read_keys
    from llama_jax.serve.documents import Documents
    from llama_jax.serve.job import follow
    from llama_jax.serve.served import Served, chat_of, rules_of
    from llama_jax.serve.server import Limits, hosts_of, is_loopback, listen, serve
except ModuleNotFoundError as missing:
    launch.refuse_missing(missing, 'serve')

_MODEL = define_shared_model()
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'to listen on; others than this machine need --api_keys')
_PORT = flags.DEFINE_integer('port', 8000, 'to listen on', 0, 65535)
_API_KEYS = launch.define_path('api_keys', '', 'file of keys, one a line, any of which opens')
_CORS_ORIGINS = flags.DEFINE_list('cors_origins', [], 'pages that may ask from browsers, as in https://a.org')
_NAME = flags.DEFINE_string('name', '', "of the model, for clients; '': the checkpoint's")
_CHAT_TEMPLATE = launch.define_path('chat_template', 'native', 'native, checkpoint, or a FILE of Jinja')
_DOCUMENTS = launch.define_path('documents', '', 'folder of texts in which the page finds passages')
_SLOTS = flags.DEFINE_integer('slots', 8, 'answers that are made together', 1, 1 << 16)
_CONTEXT = flags.DEFINE_integer('context', 0, 'tokens of prompt and answer; 0: as many as the model has', 0)
_BUDGET_TOKENS = flags.DEFINE_integer('budget_tokens', 0, 'of all rows together; 0: what all could need', 0)
_PREFIX_MIB = flags.DEFINE_integer('prefix_mib', 256, 'of beginnings of prompts that are read once', 0)
_STEPS = flags.DEFINE_integer('steps', 4, 'tokens that are made before a stream is told of them', 1, 64)
_TOP_LOGPROBS = flags.DEFINE_integer('top_logprobs', 20, 'likely tokens that clients may ask for')
_CONSTRAINTS = flags.DEFINE_bool('constraints', True, 'answers may be held to a schema, regex or grammar')
_MAX_QUEUE = flags.DEFINE_integer('max_queue', 256, 'answers that may wait for a slot', 0)
_MAX_BODY = flags.DEFINE_integer('max_body', 1 << 20, 'bytes of a request', 1)
_DRAIN_SECONDS = flags.DEFINE_float('drain_seconds', 30.0, 'that running answers have to end', 0.0)


def main() -> None:
    """Listens, loads, serves."""
    with launch.flags_named('--top_logprobs'):
        check_candidates(_TOP_LOGPROBS.value)
    _MODEL.check_owners(draft_tokens='draft', axis_rules='mesh')
    given = _MODEL.value
    with launch.flags_named('--api_keys'):
        keys = read_keys(_API_KEYS.value) if _API_KEYS.value else ()
    if not keys and not is_loopback(_HOST.value):
        raise InputError(
            f'--host={_HOST.value} is reached by others than this machine; give --api_keys=FILE, whose keys open it'
        )
    partitioner = shared_partitioner(given)
    listener = documents = None
    with runtime.refused_by_all():
        if runtime.is_main_process():
            with launch.flags_named('--documents'):
                documents = Documents(_DOCUMENTS.value) if _DOCUMENTS.value else None
            with launch.flags_named('--port', '--host'):
                listener = listen(_HOST.value, _PORT.value)
    limits = Limits(
        _NAME.value or os.path.basename(given['checkpoint'].rstrip('/')), _MAX_QUEUE.value, _MAX_BODY.value, keys,
        tuple(_CORS_ORIGINS.value), hosts_of(_HOST.value, keys), documents,
    )  # fmt: skip
    rows = {
        'num_slots': _SLOTS.value, 'budget_tokens': _BUDGET_TOKENS.value or None, 'max_steps': _STEPS.value,
        'log_probabilities': _TOP_LOGPROBS.value, 'prefix_bytes': (_PREFIX_MIB.value << 20, 0),
    }  # fmt: skip
    loads = functools.partial(
        load, rows, _CHAT_TEMPLATE.value, _CONTEXT.value, _CONSTRAINTS.value, given, partitioner
    )
    if listener is None:
        return follow(loads)
    print(f'listening on http://{_HOST.value}:{listener.getsockname()[1]}', flush=True)
    if failure := serve(loads, limits, listener, _DRAIN_SECONDS.value):
        raise failure


def load(
    rows: Any,
    template_name: str,
    context: int,
    constrains: bool,
    given: dict[str, Any],
    partitioner: Partitioner | None,
) -> Served:
    """The model that the flags ask for, in the thread in which it will run."""
    model, params, tokenizer, template, draft = load_model(given, partitioner)
    if context > (most := model.config.max_seq_len):
        raise InputError(f'--context is {context}; the model has {most}')
    model = model.clone(config=dataclasses.replace(model.config, max_seq_len=context or most))
    params, tokenizer = unstack(params, jax.numpy.dtype(model.dtype), delete=True), required(tokenizer)
    if template_name == 'native':
        chat = chat_of(tokenizer, '')
    else:
        with launch.flags_named('--chat_template'):
            if template_name != 'checkpoint':
                template = read_template(epath.Path(template_name))
            elif not template:
                raise InputError('the checkpoint has no template; give native, or a FILE of Jinja')
            chat = Chat(tokenizer, template)
            chat.encode_prompt([{'role': 'user', 'content': 'Hi'}])
    rules = rules_of(tokenizer, model, draft is not None) if constrains else 'the server was started without'
    return Served.create(model, params, tokenizer, chat, rules, draft=draft, **rows)


if __name__ == '__main__':
    launch.run(main)
