"""A unit of work: some trajectories, audited by whoever gets them. Bytes in, bytes out, so that any process can."""

import msgspec
import numpy as np

from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.reading import Archive
from trajstore_audit.places import OpenPlaces
from trajstore_audit.result import Finding, Parameters
from trajstore_audit.tally import Part, add_to, encode_part, merge
from trajstore_audit.trajectory import audit_trajectory

__all__ = ["Unit", "audit_unit", "close_places", "encode_unit", "run_unit"]


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be audited together.

    Attributes:
        place, options: to be opened where the unit is audited; with the store's secrets, so not for files.
        parameters: of the audit.
        ids: of the trajectories.
        logprobs: another party's, by id, as float32 bytes.
        key: a digest of what the unit is about: equal keys give equal parts.
        audit: a name that no other audit has: a place is opened anew for each.
    """

    place: str
    parameters: Parameters
    ids: tuple[str, ...]
    key: str
    audit: str = ""
    options: dict[str, str] | None = None
    logprobs: dict[str, bytes] = {}


def audit_unit(archive: Archive, unit: Unit) -> Part:
    """Audit the trajectories of a unit. One that is damaged becomes a finding.

    Raises:
        SchemaError: logprobs were given that are more or fewer than a trajectory's tokens.
    """
    top = unit.parameters.top
    whole = Part()
    for id in unit.ids:
        given = unit.logprobs.get(id)
        logprobs = None if given is None else np.frombuffer(given, "<f4")
        try:
            recorded = archive.recordings(id)
            fits = logprobs is None or len(logprobs) == recorded.history.length
            one = audit_trajectory(recorded, unit.parameters, logprobs if fits else None)
        except NotFound as error:
            if archive.tombstone(id) is not None or archive.was_dropped(id):
                add_to(whole.skipped, {"deleted": 1})
            else:
                what_to_do = "it was listed: see whether the place was moved or made anew meanwhile, and audit again"
                _skip(whole, "not found", _unreadable(id, error, what_to_do), top)
        except SequenceGap as gap:
            what_to_do = "load it until= the last good event; `trajstore verify` says more"
            _skip(whole, "events missing", _unreadable(id, gap, what_to_do), top)
        except (Corrupt, RoutingError) as error:
            what_to_do = "run `trajstore verify`; restore what is damaged from a copy"
            _skip(whole, "damaged", _unreadable(id, error, what_to_do), top)
        except SchemaError as error:
            _skip(whole, "not understood", _unreadable(id, error, "upgrade trajstore"), top)
        else:
            if not fits:
                count = len(given or b"") // 4
                raise SchemaError(f"{id} has {recorded.history.length} tokens, but {count} logprobs were given for it")
            pairs = one.pairs
            merge(whole, one, top=top)
            whole.pairs += pairs
    return whole


def encode_unit(unit: Unit) -> bytes:
    """Msgpack."""
    return msgspec.msgpack.encode(unit)


def run_unit(data: bytes) -> bytes:
    """Audit a unit in a process of its own: bytes of a `Unit` to those of a `Part`."""
    unit = msgspec.msgpack.decode(data, type=Unit)
    with _places.reading(unit.audit, unit.place, unit.options) as archive:
        return encode_part(audit_unit(archive, unit))


def close_places() -> None:
    """Close what this process has open for units, before it ends."""
    _places.close()


_places = OpenPlaces()


def _skip(part: Part, reason: str, finding: Finding, top: int) -> None:
    merge(part, Part(skipped={reason: 1}, findings=[finding], findings_by_kind={finding.kind: 1}), top=top)


def _unreadable(id: str, error: Exception, what_to_do: str) -> Finding:
    return Finding(kind="unreadable", id=id, what=str(error), what_to_do=what_to_do)
