"""What Prometheus reads. Counters grow with answers; gauges are asked for when they are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from svcli.server.served import Served
from svcli_engines.answer import Stats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """Of one server."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("svcli_requests", "Requests by status.", ["path", "status"], registry=registry)
        self._first = Histogram(
            "svcli_time_to_first_token_seconds",
            "From the question, read and decoded, to the first token.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._rate = Histogram(
            "svcli_tokens_per_second", "Of one answer.", ["model"], buckets=_RATES, registry=registry
        )
        self._counters = {
            name: Counter(f"svcli_{name}", meaning, ["model"], registry=registry)
            for name, meaning in {
                "answers": "Answers that came to their end.",
                "prompt_tokens": "Rows of prompts in the KV cache.",
                "cached_tokens": "Of those, rows that were there before.",
                "completion_tokens": "Tokens of answers.",
                "visual_tokens": "Of pictures in prompts, as a model that skips nothing would keep them.",
                "visual_tokens_kept": "Of those, rows in the KV cache.",
                "rows_skipped": "The difference: rows that skipping kept out of the KV cache.",
            }.items()
        }
        registry.register(_Loads(models))

    def count_request(self, path: str, status: int) -> None:
        """`path` is one of few."""
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, model: str, stats: Stats) -> None:
        self._first.labels(model).observe(stats.first_token_seconds)
        if stats.decode_tokens_per_second:
            self._rate.labels(model).observe(stats.decode_tokens_per_second)
        for name, number in {
            "answers": 1,
            "prompt_tokens": stats.num_rows_of_prompt,
            "cached_tokens": stats.num_shared_rows,
            "completion_tokens": stats.num_tokens,
            "visual_tokens": stats.visual_tokens_full,
            "visual_tokens_kept": stats.visual_tokens_kept,
            "rows_skipped": stats.visual_tokens_full - stats.visual_tokens_kept,
        }.items():
            self._counters[name].labels(model).inc(number)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Loads(Collector):
    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        gauges = {
            name: GaugeMetricFamily(f"svcli_{name}", meaning, labels=["model"])
            for name, meaning in {
                "alive": "1 while answers are being made at all.",
                "queue_length": "Questions that wait.",
                "running": "Answers that are being made.",
                "slots": "Answers that can be made at a time.",
                "kv_bytes_used": "KV cache of answers that are being made.",
                "kv_bytes_reserved": "KV cache of all slots.",
                "picture_cache_bytes": "Visual rows of pictures that may come again.",
            }.items()
        }
        counters = {
            name: CounterMetricFamily(f"svcli_{name}", meaning, labels=["model"])
            for name, meaning in {
                "picture_cache_hits": "Pictures that were not encoded again.",
                "picture_cache_misses": "Pictures that were encoded.",
            }.items()
        }
        for model in self._models.values():
            load = model.scheduler.load()
            for name, number in {
                "alive": int(load.alive),
                "queue_length": load.num_waiting,
                "running": load.num_running,
                "slots": load.num_slots,
                "kv_bytes_used": load.kv_bytes,
                "kv_bytes_reserved": load.kv_bytes_reserved,
                "picture_cache_bytes": load.visual_bytes,
            }.items():
                gauges[name].add_metric([model.name], number)
            counters["picture_cache_hits"].add_metric([model.name], model.visuals.num_hits)
            counters["picture_cache_misses"].add_metric([model.name], model.visuals.num_misses)
        yield from gauges.values()
        yield from counters.values()
