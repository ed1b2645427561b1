"""What is going on, beside Triton's own metrics, under the names that `svcli serve` has for it."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from svcli_engines.answer import Stats
from svcli_engines.schedule import Load

_GAUGES = {
    "svcli_queue_length": "Questions that wait.",
    "svcli_running": "Answers that are being made.",
    "svcli_slots": "Answers that can be made at a time.",
    "svcli_kv_bytes_used": "Of the KV caches, by answers that are being made.",
    "svcli_kv_bytes_reserved": "Of the KV caches.",
    "svcli_alive": "0 where the thread that makes answers has died.",
}
_COUNTERS = {
    "svcli_prompt_tokens_total": "Rows of prompts.",
    "svcli_cached_tokens_total": "Of those, what was in the KV cache already.",
    "svcli_completion_tokens_total": "Tokens of answers.",
    "svcli_visual_tokens_total": "Of pictures, as a model that skips nothing would keep them.",
    "svcli_visual_tokens_kept_total": "Of those, what is kept.",
    "svcli_rows_skipped_total": "The difference.",
}


class Metrics:
    """Of one model."""

    def __init__(self, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        kinds = pb_utils.MetricFamily
        gauges = {name: kinds(name=name, description=text, kind=kinds.GAUGE) for name, text in _GAUGES.items()}
        counters = {name: kinds(name=name, description=text, kind=kinds.COUNTER) for name, text in _COUNTERS.items()}
        self._families = gauges | counters  # a metric does not outlive its family
        self._metrics: dict[str, Any] = {name: each.Metric(labels=labels) for name, each in self._families.items()}

    def show(self, load: Load) -> None:
        """What is going on now."""
        values = (load.num_waiting, load.num_running, load.num_slots, load.kv_bytes, load.kv_bytes_reserved, load.alive)
        for name, value in zip(_GAUGES, values, strict=True):
            self._metrics[name].set(float(value))

    def count(self, stats: Stats) -> None:
        """An answer that was made."""
        full, kept = stats.visual_tokens_full, stats.visual_tokens_kept
        values = (stats.num_rows_of_prompt, stats.num_shared_rows, stats.num_tokens, full, kept, full - kept)
        for name, value in zip(_COUNTERS, values, strict=True):
            self._metrics[name].increment(float(value))
