"""What a server tells Prometheus."""

from collections.abc import Iterator
from typing import Any

from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import Generation

PREFIX = "palm_rlhf_"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
TOKENS = tuple(4**power for power in range(1, 12))
COUNTERS = {  # what the engine counts, by the name and label it is told with
    "prompt_tokens": ("tokens", "Tokens by what was done with them.", {"kind": "prompt"}),
    "prompt_tokens_reused": ("tokens", "", {"kind": "prompt_reused"}),
    "tokens": ("tokens", "", {"kind": "sampled"}),
    "steps": ("steps", "Forward passes over all running replies.", {}),
    "refused": ("refused", "Requests refused because the queue, or a client's share of it, was full.", {}),
    "preempted": ("preempted", "Times that a reply had to wait again, for memory or for other clients.", {}),
    "paused": ("paused", "Times that a reply had to wait for its reader.", {}),
    **{
        f"finished_{reason}": ("replies", "Replies by why they ended.", {"finish_reason": reason})
        for reason in ("stop", "length", "cancelled", "timeout", "error")
    },
}


class Metrics:
    """A registry of its own for each server: the engine's counts, and times as clients feel them."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, GCCollector, PlatformCollector, ProcessCollector

        self.engine, self.registry = engine, CollectorRegistry()
        self.registry.register(self)
        own = {"registry": self.registry}
        self._requests = Counter(f"{PREFIX}requests", "Requests by path and status.", ["path", "status"], **own)
        for collector in (GCCollector, PlatformCollector, ProcessCollector):
            collector(**own)
        timeout, context = engine.config.timeout, engine.context
        self._queue = self._histogram("queue_seconds", "From a request to its row.", SECONDS, timeout)
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token.", SECONDS, timeout
        )
        self._each_token = self._histogram(
            "time_per_token_seconds", "Mean between the tokens of a reply.", SECONDS, timeout
        )
        self._whole = self._histogram("end_to_end_seconds", "From a request to its last token.", SECONDS, timeout)
        self._prompt = self._histogram("prompt_length_tokens", "Tokens of a prompt.", TOKENS, context)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...], most: float) -> Any:
        """A histogram whose buckets end where its values do."""
        from prometheus_client import Histogram

        buckets = [*(bucket for bucket in buckets if bucket < most), most]
        return Histogram(PREFIX + name, description, buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Any]:
        """The engine's numbers, as Prometheus asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for key, (name, description, labels) in COUNTERS.items():
            if name not in families:
                families[name] = CounterMetricFamily(PREFIX + name, description, labels=list(labels))
            families[name].add_metric(list(labels.values()), self.engine.counts[key])
        yield from families.values()
        for name, description, value in (
            ("running", "Replies that have a row in the cache.", self.engine.num_running),
            ("waiting", "Replies that wait for one.", self.engine.num_waiting),
            ("cache_bytes", "Memory of the cache of running replies.", self.engine.cache_bytes),
            ("prefix_bytes", "Memory of what prompts may begin with.", self.engine.prefix_bytes),
        ):
            yield GaugeMetricFamily(PREFIX + name, description, value=value)

    def observe_request(self, path: str, status: int) -> None:
        """Counts a request that has been answered; `path` is a route's, of which there are few."""
        self._requests.labels(path, str(status)).inc()

    def observe_reply(self, generation: Generation, ended: float) -> None:
        """Takes the times of a reply; `ended` on the clock of `time.monotonic`.

        A reply that never had a row has waited in the queue all the time.
        """
        self._queue.observe((generation.started or ended) - generation.submitted)
        self._whole.observe(ended - generation.submitted)
        if generation.request.index == 0:  # of several replies to one prompt
            self._prompt.observe(len(generation.request.prompt))
        if generation.first_token is not None:
            self._first_token.observe(generation.first_token - generation.submitted)
            if len(generation.tokens) > 1:
                self._each_token.observe((ended - generation.first_token) / (len(generation.tokens) - 1))

    def page(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
