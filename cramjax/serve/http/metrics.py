"""What the server counts, under vLLM's names with the prefix `cramjax:`, for Prometheus."""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cramjax.serve.http.worker import Worker

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one served model."""

    def __init__(self, worker: Worker, name: str):
        """Count for a model of a name."""
        self.registry = CollectorRegistry()
        self._name = name
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._drawn = self._counter("generation_tokens", "Tokens drawn.")
        self._first = self._seconds("time_to_first_token_seconds", "From the request to its first token.")
        self._between = self._seconds("inter_token_latency_seconds", "From one token to the next.")
        self._whole = self._seconds("e2e_request_latency_seconds", "From the request to its last token.")
        self._ended = Counter(
            "cramjax:request_success",
            "Choices that ended, by their reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._refused = Counter(
            "cramjax:request_refused", "Requests refused, by status.", ["model_name", "status"], registry=self.registry
        )
        self.registry.register(_Loads(worker, name))

    def prompts(self, lengths: Sequence[int]) -> None:
        """Count prompts."""
        self._prompt.inc(sum(lengths))

    def refused(self, status: int) -> None:
        """Count a request that got an error."""
        self._refused.labels(self._name, str(status)).inc()

    def stopwatch(self) -> "Stopwatch":
        """Times one choice from now on."""
        return Stopwatch(self)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"cramjax:{name}", about, ["model_name"], registry=self.registry).labels(self._name)

    def _seconds(self, name: str, about: str) -> Histogram:
        histogram = Histogram(f"cramjax:{name}", about, ["model_name"], registry=self.registry, buckets=_SECONDS)
        return histogram.labels(self._name)


class Stopwatch:
    """Times of one choice."""

    def __init__(self, metrics: Metrics):
        """Begin now."""
        self._metrics, self._began, self._last = metrics, time.monotonic(), 0.0

    def tokens(self, count: int) -> None:
        """So many came just now."""
        now, metrics = time.monotonic(), self._metrics
        metrics._drawn.inc(count)
        if count and not self._last:
            metrics._first.observe(now - self._began)
        elif count:
            for _ in range(count):
                metrics._between.observe((now - self._last) / count)
        self._last = now if count else self._last

    def ended(self, reason: str) -> None:
        """It ended for a reason."""
        self._metrics._whole.observe(time.monotonic() - self._began)
        self._metrics._ended.labels(self._metrics._name, reason).inc()


class _Loads(Collector):
    """What is in progress, read when it is asked for."""

    def __init__(self, worker: Worker, name: str):
        self._worker, self._name = worker, name

    def collect(self) -> Iterator[Metric]:
        """Values as of now."""
        worker, load = self._worker, self._worker.load
        gauges = {
            "num_requests_running": ("Choices in progress.", worker.running),
            "num_requests_waiting": ("Choices that wait.", worker.waiting),
            "kv_cache_usage_perc": ("Share of the pages of keys and values in use.", load.pages_used / load.pages),
        }
        counters = {
            "prefix_cache_queries": ("Pages of prompts looked for in the cache.", load.prefix_queries),
            "prefix_cache_hits": ("Those that were there.", load.prefix_hits),
            "num_preemptions": ("Requests that gave their pages up.", load.preemptions),
            "spec_decode_num_draft_tokens": ("Tokens guessed, by look-up or by a draft model.", load.guessed_tokens),
            "spec_decode_num_accepted_tokens": ("Those that the model drew too.", load.right_guesses),
            "compilations": ("Programs compiled after the start: a fault.", load.compilations),
        }
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (about, value) in values.items():
                metric = family(f"cramjax:{name}", about, labels=["model_name"])
                metric.add_metric([self._name], value)
                yield metric
