"""Talks to a checkpoint of any format, in the terminal.

    python -m experiments.chat --checkpoint=DIR

Answers are shown while they are made; /help tells what else may be typed. With --documents=DIR the model reads passages
of the folder's texts that have to do with each question, and their places are shown.
"""

import contextlib
import signal
import sys
from typing import Any

from absl import flags

from experiments import launch
from experiments.prompting.conversation import HELP, Conversation
from experiments.prompting.loading import define_model, load_model
from llama_jax.inference.chat_session import ChatSession
from llama_jax.inference.sampling import Sampler
from llama_jax.models.unstacked import unstack
from llama_jax.serve.documents import Documents

_MODEL = define_model()
_SYSTEM = flags.DEFINE_string('system', '', 'what the system says at the beginning')
_DOCUMENTS = launch.define_path('documents', '', 'folder of texts that answers are to be found in')
_MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 512, 'of an answer, at most', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.6, '0 takes the most likely token')
_TOP_P = flags.DEFINE_float('top_p', 0.9, 'draw from the fewest tokens whose probabilities reach this')
_SEED = flags.DEFINE_integer('seed', 0, 'of the draws')


def main() -> None:
    """Loads, then answers line by line."""
    settings: dict[str, Any] = {
        'temperature': _TEMPERATURE.value,
        'top_p': _TOP_P.value,
        'seed': _SEED.value,
    }
    with launch.flags_named('--temperature', '--top_p', '--seed'):
        Sampler(**settings)
    with launch.flags_named('--documents'):
        documents = Documents(_DOCUMENTS.value) if _DOCUMENTS.value else None
    model, params, tokenizer, template, _ = load_model(_MODEL.value)
    params = unstack(params, model.dtype, delete=True)

    def make_session(messages: list[dict[str, Any]]) -> ChatSession:
        return ChatSession(model, params, tokenizer, template, messages)

    def show(text: str) -> None:
        print(text, end='', flush=True)

    settings['max_new_tokens'] = _MAX_NEW_TOKENS.value
    conversation = Conversation(make_session, settings, documents, show)
    if _SYSTEM.value:
        conversation.take(f'/system {_SYSTEM.value}')
    if sys.stdin.isatty():
        print(HELP)
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Until the lines end; Ctrl-C forgets the line that is being typed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(errors='replace')  # pyright: ignore[reportAttributeAccessIssue]  what is typed may be no text
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets lines be edited
    while True:
        try:
            line = input('> ' if sys.stdin.isatty() else '')
        except EOFError:
            return
        except KeyboardInterrupt:
            print('\n/quit or Ctrl-D ends')
            continue
        if not conversation.take(line):
            return


if __name__ == '__main__':
    launch.run(main)
