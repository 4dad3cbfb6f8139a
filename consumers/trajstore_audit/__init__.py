"""Audits of recorded routing: how far it drifted between recordings of the same rows."""

from trajstore_audit.drift import DriftByLayer, differing_sets, drift_by_layer, order_changes

__all__ = ["DriftByLayer", "differing_sets", "drift_by_layer", "order_changes"]
