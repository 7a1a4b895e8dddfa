"""How far a preparation has come, as people read it while it goes on."""

import logging
import time

import tqdm

from llama_jax.data.preparation import Advance

_SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger('llama_jax.prepare_data')


class Progress:
    """A bar on a terminal; without one it would be one endless line: there it is a line of the log now and then."""

    def __init__(self):
        self._bar = tqdm.tqdm(unit='B', unit_scale=True, disable=None)
        self._said = self._begun = time.monotonic()
        self._stage = ''

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def advance(self, state: Advance) -> None:
        """Says how far it is: bytes of text, documents, tokens, tasks, and when it will be done."""
        now = time.monotonic()
        if state.stage != self._stage:
            self._stage, self._begun = state.stage, now
            self._bar.reset(state.all_bytes or None)
        if state.stage == 'reading':
            done = f'{state.documents:,} documents, {state.done} of {state.tasks} files'
        else:
            done = (
                f'{state.documents:,} documents, {state.tokens:,} tokens, {state.done} of {state.tasks} units'
            )
        if not self._bar.disable:
            self._bar.set_postfix_str(f'{state.stage}: {done}')
            self._bar.update(state.num_bytes - self._bar.n)
        elif now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            left = ''
            if state.all_bytes and state.num_bytes:
                left = f', {(now - self._begun) * (state.all_bytes / state.num_bytes - 1):.0f} s left'
            logger.info('%s: %s, %.1f MB%s', state.stage, done, state.num_bytes / 1e6, left)
