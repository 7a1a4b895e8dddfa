"""What monitoring shows of the server, for Prometheus."""

import jax
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.utils import INF

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, INF)
_EACH_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, INF)


class Metrics:
    """Of one server; `render` gives all as Prometheus reads them."""

    def __init__(self):
        disable_created_metrics()
        registry = self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f'llama_{name}', help, labels, registry=registry)

        self._running = Gauge('llama_requests_running', 'Rows that have a slot.', registry=registry)
        self._waiting = Gauge('llama_requests_waiting', 'Rows that wait for a slot.', registry=registry)
        self.prompt_tokens = counter('prompt_tokens', 'Tokens of prompts.')
        self._cached_tokens = counter('prompt_cached_tokens', 'Tokens of prompts that were not read again.')
        self._generated_tokens = counter('generated_tokens', 'Tokens of answers.')
        self._drafted = counter('draft_tokens', 'Tokens that a draft proposed.')
        self._accepted = counter('draft_tokens_accepted', 'Tokens that a draft proposed and the model took.')
        self.first_token_seconds = Histogram(
            'llama_first_token_seconds', 'From a request to its first token.', buckets=_FIRST_TOKEN, registry=registry
        )  # fmt: skip
        self._token_seconds = Histogram(
            'llama_token_seconds', 'Of each further token of an answer, on average.', buckets=_EACH_TOKEN,
            registry=registry,
        )  # fmt: skip
        self._ended = counter('requests_completed', 'Rows that were answered.')
        self.cancelled = counter('requests_cancelled', 'Rows whose client went away.')
        self.refused = counter('requests_refused', 'Requests that were not answered.', 'reason')
        arrays = Gauge('llama_arrays', 'Arrays on the devices.', registry=registry)
        arrays.set_function(lambda: len(jax.live_arrays()))
        ProcessCollector(registry=registry)
        self.programs = counter('programs_compiled', 'Programs compiled since the server was ready.')

    def set_rows(self, number: int, num_slots: int) -> None:
        """How many rows there are that have not ended."""
        self._running.set(min(number, num_slots))
        self._waiting.set(max(0, number - num_slots))

    def tell_end(self, num_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A row was answered, in so many seconds from its first token on."""
        self._ended.inc()
        self._generated_tokens.inc(num_tokens)
        self._cached_tokens.inc(cached_tokens)
        if num_tokens > 1:
            self._token_seconds.observe(seconds / (num_tokens - 1))

    def tell_drafts(self, proposed: int, accepted: int) -> None:
        """A draft proposed so many tokens more, of which so many were taken."""
        self._drafted.inc(proposed)
        self._accepted.inc(accepted)

    def render(self) -> bytes:
        """All as text."""
        return generate_latest(self._registry)
