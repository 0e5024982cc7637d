"""The metrics of a server for Prometheus."""

from collections.abc import Iterator
from typing import Any

from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import Generation

PREFIX = "palm_rlhf_"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)
TOKENS = tuple(4**power for power in range(1, 12))
COUNTERS: dict[str, tuple[str, str, dict[str, str]]] = {  # name, description and labels of what the engine counts
    "prompt_tokens": (
        "tokens",
        "Tokens of prompts, tokens of prompts that were cached, and sampled tokens.",
        {"kind": "prompt"},
    ),
    "prompt_tokens_reused": ("tokens", "", {"kind": "prompt_reused"}),
    "tokens": ("tokens", "", {"kind": "sampled"}),
    "steps": ("steps", "Forward passes over all running replies.", {}),
    "refused": ("refused", "Requests refused because the queue, or a client's share of it, was full.", {}),
    "preempted": ("preempted", "Times that a reply had to wait again, for memory or for other clients.", {}),
    "paused": ("paused", "Times that a reply had to wait for its reader.", {}),
    **{
        f"finished_{reason}": ("replies", "Replies by the reason why they ended.", {"finish_reason": reason})
        for reason in ("stop", "length", "cancelled", "timeout", "error")
    },
}


class Metrics:
    """A registry for one server: the engine's counts, and times as clients see them."""

    def __init__(self, engine: Engine):
        from prometheus_client import CollectorRegistry, Counter, GCCollector, PlatformCollector, ProcessCollector

        self.engine, self.registry = engine, CollectorRegistry()
        self.registry.register(self)
        self._requests = Counter(
            f"{PREFIX}requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        GCCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        ProcessCollector(registry=self.registry)
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
        """Return a histogram whose buckets end where its values do."""
        from prometheus_client import Histogram

        bounds = [*(bucket for bucket in buckets if bucket < most), most]
        return Histogram(PREFIX + name, description, buckets=bounds, registry=self.registry)

    def collect(self) -> Iterator[Any]:
        """Yield the engine's numbers, as Prometheus asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        families: dict[str, Any] = {}
        for key, (name, description, labels) in COUNTERS.items():
            if name not in families:
                families[name] = CounterMetricFamily(PREFIX + name, description, labels=list(labels))
            families[name].add_metric(list(labels.values()), self.engine.counts[key])
        yield from families.values()
        for name, description, value in (
            ("running", "Replies that have a row in the cache.", self.engine.num_running),
            ("waiting", "Replies that wait for a row.", self.engine.num_waiting),
            ("max_running", "The most replies that have a row at once.", self.engine.capacity.max_batch),
            ("cache_bytes", "Memory of the cache of running replies.", self.engine.cache_bytes),
            ("max_cache_bytes", "The most memory of this cache.", self.engine.capacity.cache_memory),
            ("prefix_bytes", "Memory of cached prefixes.", self.engine.prefix_bytes),
        ):
            yield GaugeMetricFamily(PREFIX + name, description, value=value)

    def observe_request(self, path: str, status: int) -> None:
        """Count a request that has been answered; `path` is the path of a route, of which there are few."""
        self._requests.labels(path, str(status)).inc()

    def observe_reply(self, generation: Generation, ended: float) -> None:
        """Record the times of a reply that ended at `ended`, on the clock of `time.monotonic`.

        A reply that never had a row has waited in the queue all the time.
        """
        self._queue.observe((generation.started or ended) - generation.submitted)
        self._whole.observe(ended - generation.submitted)
        if generation.request.index == 0:  # a prompt with several replies counts once
            self._prompt.observe(len(generation.request.prompt))
        if generation.first_token is not None:
            self._first_token.observe(generation.first_token - generation.submitted)
            if len(generation.tokens) > 1:
                self._each_token.observe((ended - generation.first_token) / (len(generation.tokens) - 1))

    def page(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
