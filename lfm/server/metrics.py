"""GET /metrics: Prometheus text, every common metric under our name (`lfm_`) and under vLLM's (`vllm:`).

One registry per app. Engine numbers are read from the newest `EngineStats` at scrape time; request timings are
observed by the routes. With several API workers the timings are those of the worker that answers (label `worker`).
"""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.types import Receive, Scope, Send

from lfm.engine.client import EngineBackend
from lfm.server.asgi import send_bytes

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4.encode()

# vLLM's buckets for the first token and the whole request. Its inter-token buckets start at 10 ms, too coarse for a
# model that decodes a token in 3 to 5 ms: SGLang's finer ones, with 1 and 3 ms added.
# fmt: off
FIRST_TOKEN_S = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)
INTER_TOKEN_S = (
    .001, .002, .003, .004, .006, .008, .01, .015, .02, .025, .03, .035, .04, .06, .08, .1, .2, .4, .8, 1.6, 4, 8,
)
REQUEST_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# fmt: on
TOKEN_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
CHOICE_COUNTS = (1, 2, 5, 10, 20, 50, 128)


# Our name: the field of EngineStats, and what it counts.
ENGINE_GAUGES = {
    "num_requests_running": ("num_running", "Sequences in the running batch."),
    "num_requests_waiting": ("num_waiting", "Sequences that wait for a place."),
    "waiting_prompt_tokens": ("waiting_prompt_tokens", "Prompt tokens not computed yet."),
    "blocks": ("num_blocks", "Cache blocks of the pool."),
    "blocks_used": ("num_blocks_used", "Cache blocks that sequences hold."),
    "blocks_cached": ("num_blocks_cached", "Unused cache blocks that still hold a reusable prefix."),
    "step_tokens": ("step_tokens", "Tokens computed by the last step."),
    "prefill_tokens_per_second": ("prefill_tokens_per_s", "Recent prefill speed."),
    "decode_tokens_per_second": ("decode_tokens_per_s", "Recent decode speed."),
}
ENGINE_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of admitted sequences."),
    "prompt_tokens_cached": ("cached_prompt_tokens", "Prompt tokens found in the prefix cache."),
    "prefix_cache_queries": ("prompt_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("cached_prompt_tokens", "Prompt tokens found in the prefix cache."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "num_preemptions": ("preemptions", "Sequences that gave their blocks back and wait again."),
    "corrupted_requests": ("corrupted_requests", "Sequences ended because their logits were not finite."),
    "steps": ("steps", "Engine steps."),
}
# The names that vLLM's dashboards, autoscalers and routers query; the label names are vLLM's, too.
VLLM_NAMES = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens",
        "prompt_tokens_cached",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "generation_tokens",
        "num_preemptions",
        "corrupted_requests",
        "admission_rejections",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
    }
)


class Metrics:
    """The request timings and counters of one API worker, and the exposition of everything."""

    def __init__(
        self,
        backend: EngineBackend,
        *,
        model_name: str,
        worker: int = 0,
        searches: Mapping[tuple[str, str], int] | None = None,
    ) -> None:
        """`searches` counts, by provider and outcome, what was searched; it is read when somebody scrapes."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._labels = {"model_name": model_name, "engine": "0", "worker": str(worker)}
        self._registry.register(_EngineCollector(backend, {"model_name": model_name, "engine": "0"}))
        self._registry.register(_SearchCollector({} if searches is None else searches, self._labels))
        self._success = self._counter("request_success", "Sequences that ended well.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests refused with a 503.", "reason")
        self._aborts = self._counter("aborts", "Requests cut short.", "cause")
        self._http = self._counter("http_requests", "HTTP requests.", "route", "status")
        self.first_token_s = self._histogram("time_to_first_token_seconds", "Request to first token.", FIRST_TOKEN_S)
        self.inter_token_s = self._histogram("inter_token_latency_seconds", "Between two tokens.", INTER_TOKEN_S)
        self.per_token_s = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between the tokens of a sequence.", INTER_TOKEN_S
        )
        self.request_s = self._histogram("e2e_request_latency_seconds", "Request to last byte.", REQUEST_S)
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_COUNTS)
        self.output_tokens = self._histogram("request_generation_tokens", "Tokens of a sequence.", TOKEN_COUNTS)
        self.num_choices = self._histogram("request_params_n", "Choices asked for.", CHOICE_COUNTS)
        self.max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", TOKEN_COUNTS)

    def count_success(self, finish_reason: str) -> None:
        self._success.labels(**self._labels, finished_reason=finish_reason).inc()

    def count_rejection(self, reason: str) -> None:
        self._rejections.labels(**self._labels, reason=reason).inc()

    def count_abort(self, cause: str) -> None:
        self._aborts.labels(**self._labels, cause=cause).inc()

    def count_http(self, route: str, status: int) -> None:
        self._http.labels(**self._labels, route=route, status=str(status)).inc()

    def text(self) -> bytes:
        public = CollectorRegistry(auto_describe=False)
        public.register(_TwoNames(self._registry))
        return generate_latest(public)

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"lfm_{name}", help_text, (*self._labels, *labels), registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"lfm_{name}", help_text, tuple(self._labels), buckets=buckets, registry=self._registry)
        return family.labels(**self._labels)


class _EngineCollector(Collector):
    """Reads the engine's counters when somebody scrapes; no counter is kept twice."""

    def __init__(self, backend: EngineBackend, labels: dict[str, str]) -> None:
        self._backend = backend
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        stats = self._backend.stats()
        for name, (field, text) in ENGINE_GAUGES.items():
            yield self._gauge(name, text, getattr(stats, field))
        for name, (field, text) in ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(f"lfm_{name}", text, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), getattr(stats, field))
            yield counter
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("kv_cache_usage_perc", "Cache blocks in use, 0 to 1.", usage)
        is_ready = self._backend.not_ready_reason is None
        yield self._gauge("ready", "1 while the model is loaded and steps make progress.", float(is_ready))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"lfm_{name}", text, labels=list(self._labels))
        gauge.add_metric(list(self._labels.values()), value)
        return gauge


class _SearchCollector(Collector):
    """The searches of this worker."""

    def __init__(self, searches: Mapping[tuple[str, str], int], labels: dict[str, str]) -> None:
        self._searches = searches
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        text = "Searches that a provider was asked or passed over for; outcome: found, empty, cached, or why it failed."
        counter = CounterMetricFamily("lfm_searches", text, labels=[*self._labels, "provider", "outcome"])
        for (provider, outcome), count in sorted(self._searches.items()):
            counter.add_metric([*self._labels.values(), provider, outcome], count)
        yield counter


class _TwoNames(Collector):
    """Repeats the metrics that vLLM has under vLLM's name, and leaves the `_created` series out."""

    def __init__(self, inner: CollectorRegistry) -> None:
        self._inner = inner

    def collect(self) -> Iterator[Metric]:
        for metric in self._inner.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
            short_name = metric.name.removeprefix("lfm_")
            if short_name in VLLM_NAMES:
                alias = Metric(f"vllm:{short_name}", metric.documentation, metric.type)
                alias.samples = [s._replace(name=f"vllm:{s.name.removeprefix('lfm_')}") for s in metric.samples]
                yield alias


class MetricsPage:
    """GET /metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_bytes(send, self._metrics.text(), content_type=CONTENT_TYPE)
