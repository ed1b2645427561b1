"""What Prometheus reads of a replica, where Ray exports it from."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from ray.serve import metrics as ray_metrics

from svcli.server.metrics import Metrics


class Mirror:
    """Copies metrics to Ray's, each sample to a gauge: Ray has no other kind whose value can be set.

    Names and labels stay, so that queries do, but for Ray's own in front; it adds the replica.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gauges: dict[str, ray_metrics.Gauge] = {}

    def update(self) -> None:
        """From now on these are exported."""
        for family in text_string_to_metric_families(self._metrics.text().decode()):
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                if sample.name not in self._gauges:
                    tags = tuple(sample.labels)
                    self._gauges[sample.name] = ray_metrics.Gauge(sample.name, family.documentation, tag_keys=tags)
                self._gauges[sample.name].set(sample.value, tags=sample.labels)
