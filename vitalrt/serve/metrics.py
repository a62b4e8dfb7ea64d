"""What /metrics tells. A name that vLLM has too means the same as vLLM's `vllm:` one; the others are ours."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily

from vitalrt.engine.scheduler import Engine
from vitalrt.serve.worker import Finished, Worker

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
STEP_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
FINISH_REASONS = ("stop", "length", "abort", "error")


class HttpMetrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = Counter("vitalrt:http_responses", "HTTP responses.", ("code",), registry=self.registry)

    def count_response(self, status: int) -> None:
        self._responses.labels(str(status)).inc()

    def render(self) -> bytes:
        """Prometheus text format 0.0.4."""
        return generate_latest(self.registry)


class _EngineCounters:
    """What the engine itself has counted since it was built."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[CounterMetricFamily]:
        statistics = self._engine.statistics()
        for name, text, value in (
            ("num_preemptions", "Sequences that gave up their pages and waited again.", statistics.num_preemptions),
            ("images_encoded", "Images that the vision tower saw.", statistics.images_encoded),
            ("images_found", "Images whose features were in the cache.", statistics.images_found),
        ):
            family = CounterMetricFamily(f"vitalrt:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family


class Metrics(HttpMetrics):
    """Counts what the engine did, answers that nobody waited for included."""

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self._model_name = model_name
        self._num_queries = self._num_hits = 0  # of the prefix cache, in tokens
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, images and cached ones included.")
        self._generation_tokens = self._counter("generation_tokens", "Answer tokens, end tokens included.")
        self._latent_steps = self._counter("latent_steps", "Latent steps.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._success = Counter(
            "vitalrt:request_success",
            "Finished choices: stop, length, abort (client gone or deadline passed) or error (a step failed).",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first answer token.")
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean per answer token after the first.", STEP_SECONDS
        )
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for the engine.")
        self._prefill = self._histogram("request_prefill_time_seconds", "Prefill.")
        self._latent = self._histogram("request_latent_time_seconds", "All latent steps of a choice that has some.")
        self._latent_step = self._histogram("latent_step_seconds", "Mean of one choice's latent steps.", STEP_SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "Answer tokens.")
        for reason in FINISH_REASONS:
            self._success.labels(model_name, reason)

    def watch(self, worker: Worker) -> None:
        """Gauges, read from the worker whenever somebody asks."""
        self._gauge("num_requests_running", "Choices in the running batch.").set_function(lambda: worker.num_running)
        self._gauge("num_requests_waiting", "Choices waiting.").set_function(lambda: worker.num_waiting)
        rate = self._gauge("prefix_cache_hit_rate", "Hits over queries since the server started.")
        rate.set_function(lambda: self._num_hits / max(1, self._num_queries))
        if isinstance(worker.engine, Engine):
            engine = worker.engine
            self.registry.register(_EngineCounters(engine, self._model_name))
            features = self._gauge("image_cache_bytes", "Memory that the features of past images take.")
            features.set_function(lambda: engine.encoder.cache.statistics().num_bytes)
            usage = self._gauge("kv_cache_usage_perc", "Part of the cache's pages that requests hold; 1 is all.")
            usage.set_function(lambda: engine.statistics().pages_used / engine.cache.pool.num_blocks)

    def count_finished(self, finished: Finished) -> None:
        usage, timings = finished.usage, finished.timings
        self._success.labels(self._model_name, "abort" if finished.reason == "timeout" else finished.reason).inc()
        self._generation_tokens.inc(usage.completion_tokens)
        self._latent_steps.inc(usage.latent_steps)
        if finished.has_started:
            self._prompt_tokens.inc(usage.prompt_tokens)
            self._cache_queries.inc(usage.prompt_tokens)
            self._cache_hits.inc(usage.cached_tokens)
            self._num_queries += usage.prompt_tokens
            self._num_hits += usage.cached_tokens
        if finished.time_to_first_token_s is not None:
            self._first_token.observe(finished.time_to_first_token_s)
        if finished.reason not in ("stop", "length"):
            return
        self._total.observe(finished.total_s)
        phases = timings.preprocess + timings.prefill + timings.latent + timings.decode
        self._queue.observe(max(0.0, timings.total - phases) / 1000)
        self._prefill.observe(timings.prefill / 1000)
        self._decode.observe(timings.decode / 1000)
        if usage.latent_steps:
            self._latent.observe(timings.latent / 1000)
            self._latent_step.observe(timings.latent / 1000 / usage.latent_steps)
        if usage.completion_tokens > 1:
            self._per_token.observe(timings.decode / 1000 / (usage.completion_tokens - 1))

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"vitalrt:{name}", text, ("model_name",), registry=self.registry)
        return counter.labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vitalrt:{name}", text, ("model_name",), registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        histogram = Histogram(f"vitalrt:{name}", text, ("model_name",), buckets=buckets, registry=self.registry)
        return histogram.labels(self._model_name)
