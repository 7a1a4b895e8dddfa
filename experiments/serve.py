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
from experiments.prompting.checkpoint import DTYPES
from experiments.prompting.loading import load_model
from experiments.run.settings import partitioner_of_flags
from llama_jax import runtime
from llama_jax.inference.scoring import check_candidates
from llama_jax.inference.speculative import MAX_PROPOSED
from llama_jax.json_file import read_bytes
from llama_jax.models.kv_cache import CACHE_DTYPES
from llama_jax.models.unstacked import unstack
from llama_jax.serve.documents import Documents
from llama_jax.serve.job import follow
from llama_jax.serve.keys import read_keys
from llama_jax.serve.served import Served, chat_of, rules_of
from llama_jax.serve.server import Limits, hosts_of, is_loopback, listen, serve
from llama_jax.tokenizer.protocol import required
from llama_jax.types import InputError

_CHECKPOINT = launch.define_path('checkpoint', None, 'anything that is a Llama', required=True)
_TOKENIZER = launch.define_path('tokenizer', '', "tokenizer file, instead of the checkpoint's own")
_DTYPE = flags.DEFINE_enum('dtype', 'auto', ['auto', *DTYPES], 'of the computation; auto: float32 on a CPU')
_CACHE_DTYPE = flags.DEFINE_enum('cache_dtype', 'auto', CACHE_DTYPES, 'of keys and values')
_KEEP_QUANTIZED = flags.DEFINE_bool('keep_quantized', False, 'compute with the integers of a .gguf')
_MESH = flags.DEFINE_list('mesh', [], 'sizes of the axes data, fsdp, tensor; none: one device')
_AXIS_RULES = flags.DEFINE_string('axis_rules', '', "with --mesh: overrides such as 'kv_heads=' (replicate)")
_DRAFT = launch.define_path('draft', '', 'who proposes several tokens a step: lookup, int4 or a checkpoint')
_DRAFT_TOKENS = flags.DEFINE_integer('draft_tokens', 4, 'with --draft: tokens a step', 1, MAX_PROPOSED)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'to listen on; others than this machine need --api_keys')
_PORT = flags.DEFINE_integer('port', 8000, 'to listen on', 0, 65535)
_API_KEYS = launch.define_path('api_keys', '', 'file of keys, one a line, any of which opens')
_CORS_ORIGINS = flags.DEFINE_list('cors_origins', [], 'pages that may ask from browsers, as in https://a.org')
_NAME = flags.DEFINE_string('name', '', "of the model, for clients; '': the checkpoint's")
_CHAT_TEMPLATE = launch.define_path('chat_template', 'native', 'native, checkpoint, or a FILE of Jinja')
_DOCUMENTS = launch.define_path('documents', '', 'folder of texts in which the page finds passages')
_SLOTS = flags.DEFINE_integer('slots', 8, 'answers that are made together', lower_bound=1)
_CONTEXT = flags.DEFINE_integer('context', 0, 'tokens of prompt and answer; 0: as many as the model has', 0)
_BUDGET_TOKENS = flags.DEFINE_integer('budget_tokens', 0, 'of all rows together; 0: what all could need', 0)
_PREFIX_MIB = flags.DEFINE_integer('prefix_mib', 256, 'of beginnings of prompts that are read once', 0)
_STEPS = flags.DEFINE_integer('steps', 4, 'tokens that are made before a stream is told of them', 1, 64)
_TOP_LOGPROBS = flags.DEFINE_integer('top_logprobs', 20, 'likely tokens that clients may ask for')
_CONSTRAINTS = flags.DEFINE_bool('constraints', True, 'answers may be held to a schema, regex or grammar')
_MAX_QUEUE = flags.DEFINE_integer('max_queue', 256, 'answers that may wait for a slot', 0)
_MAX_BODY = flags.DEFINE_integer('max_body', 1 << 20, 'bytes of a request', 1)
_DRAIN_SECONDS = flags.DEFINE_float('drain_seconds', 30.0, 'that running answers have to end', 0.0)
launch.define_processes()


def main() -> None:
    """Listens, loads, serves."""
    with launch.flags_named('--top_logprobs'):
        check_candidates(_TOP_LOGPROBS.value)
    for flag, of in ((_DRAFT_TOKENS, _DRAFT), (_AXIS_RULES, _MESH)):
        if flag.present and not of.value:
            raise InputError(f'--{flag.name} is of --{of.name}, which is not given')
    keys = read_keys(_API_KEYS.value) if _API_KEYS.value else ()
    if not keys and not is_loopback(_HOST.value):
        raise InputError(
            f'--host={_HOST.value} is reached by others than this machine; give --api_keys=FILE, whose keys open it'
        )
    if jax.process_count() > 1 and not _MESH.value:
        raise InputError('--mesh is required where several processes serve together, as in --mesh=tensor=-1')
    partitioner = partitioner_of_flags(_MESH.value, _AXIS_RULES.value) if _MESH.value else None
    listener = documents = None
    with runtime.refused_by_all(), launch.flags_named('--documents', '--host', '--port'):
        if runtime.is_main_process():
            listener = listen(_HOST.value, _PORT.value)
            documents = Documents(_DOCUMENTS.value) if _DOCUMENTS.value else None
    limits = Limits(
        _NAME.value or os.path.basename(_CHECKPOINT.value.rstrip('/')), _MAX_QUEUE.value, _MAX_BODY.value, keys,
        tuple(_CORS_ORIGINS.value), hosts_of(_HOST.value, keys), documents,
    )  # fmt: skip
    rows = {
        'num_slots': _SLOTS.value, 'budget_tokens': _BUDGET_TOKENS.value or None, 'max_steps': _STEPS.value,
        'log_probabilities': _TOP_LOGPROBS.value, 'prefix_bytes': (_PREFIX_MIB.value << 20, 0),
    }  # fmt: skip
    loads = functools.partial(
        load, rows, _CHAT_TEMPLATE.value, _CONTEXT.value, _CACHE_DTYPE.value, _CONSTRAINTS.value, _CHECKPOINT.value,
        _TOKENIZER.value, _DTYPE.value, partitioner, _KEEP_QUANTIZED.value, _DRAFT.value, _DRAFT_TOKENS.value,
    )  # fmt: skip
    if listener is None:
        return follow(loads)
    print(f'listening on http://{_HOST.value}:{listener.getsockname()[1]}', flush=True)
    if failure := serve(loads, limits, listener, _DRAIN_SECONDS.value):
        raise failure


def load(
    rows: Any, template_name: str, context: int, cache_dtype: str, constrains: bool, *checkpoint: Any
) -> Served:
    """The model that the flags ask for, in the thread in which it will run."""
    model, params, tokenizer, template, draft = load_model(*checkpoint)
    if context > (most := model.config.max_seq_len):
        raise InputError(f'--context is {context}; the model has {most}')
    config = dataclasses.replace(model.config, max_seq_len=context or most)
    model = model.clone(config=config, cache_dtype=cache_dtype)
    params, tokenizer = unstack(params, jax.numpy.dtype(model.dtype), delete=True), required(tokenizer)
    if template_name == 'native':
        template = ''
    elif template_name != 'checkpoint':
        with launch.flags_named('--chat_template'):
            template = read_bytes(epath.Path(template_name)).decode(errors='replace')
    rules = rules_of(tokenizer, model, draft is not None) if constrains else 'the server was started without'
    return Served.create(model, params, tokenizer, chat_of(tokenizer, template), rules, draft=draft, **rows)


if __name__ == '__main__':
    launch.run(main)
