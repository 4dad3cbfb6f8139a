"""Audits of recorded routing: how far it drifted between recordings of the same rows, and what is wrong with it."""

from trajstore_audit.audit import audit
from trajstore_audit.compare import differing_sets, order_changes
from trajstore_audit.document import audit_document
from trajstore_audit.drift import DriftByLayer, drift_by_layer
from trajstore_audit.pairs import successive
from trajstore_audit.result import Audit, Counts, Drift, Finding, PairDrift
from trajstore_audit.running import Progress
from trajstore_audit.tables import tables
from trajstore_audit.thresholds import Threshold, check_thresholds, parse_threshold

__all__ = [
    "Audit",
    "Counts",
    "Drift",
    "DriftByLayer",
    "Finding",
    "PairDrift",
    "Progress",
    "Threshold",
    "audit",
    "audit_document",
    "check_thresholds",
    "differing_sets",
    "drift_by_layer",
    "order_changes",
    "parse_threshold",
    "successive",
    "tables",
]
