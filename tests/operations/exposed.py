"""What a registry or a page shows, as Prometheus would read it."""

from collections.abc import Iterable
from typing import Any

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from trajstore import metrics

__all__ = ["parsed", "shown"]


def shown(*sources: metrics.Watched) -> dict[str, float]:
    """Values of these sources by name and labels, `name{a=1,b=2}`; labels in alphabetical order."""
    registry = prometheus_client.CollectorRegistry()
    metrics.watch(*sources, registry=registry)
    return parsed(metrics.exposition(registry)[0].decode())


def parsed(page: str) -> dict[str, float]:
    """Likewise of a page."""
    return {
        f"{sample.name}{{{_joined(sample.labels.items())}}}": sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def _joined(labels: Iterable[tuple[str, Any]]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(labels))
