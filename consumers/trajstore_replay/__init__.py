"""Replay and debug a rollout: step through its events, say why a row is what it is, compare, run again, go on."""

from trajstore_replay.agreement import Agreement, LogprobAgreement, RoutingAgreement
from trajstore_replay.comparing import Side, compare, segment_side, trajectory_side
from trajstore_replay.diagnosis import check_files, diagnose
from trajstore_replay.differences import Difference
from trajstore_replay.provenance import Provenance, RowCandidate, TokenOrigin, why
from trajstore_replay.rerunning import Rerun, rerun, write_rerun
from trajstore_replay.resuming import Resumed, resume
from trajstore_replay.steps import Changes, Replay, RowChange, Step

__all__ = [
    "Agreement",
    "Changes",
    "Difference",
    "LogprobAgreement",
    "Provenance",
    "Replay",
    "Rerun",
    "Resumed",
    "RoutingAgreement",
    "RowCandidate",
    "RowChange",
    "Side",
    "Step",
    "TokenOrigin",
    "check_files",
    "compare",
    "diagnose",
    "rerun",
    "resume",
    "segment_side",
    "trajectory_side",
    "why",
    "write_rerun",
]
