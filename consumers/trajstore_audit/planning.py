"""Which trajectories are audited, and how they are cut into units of work: partition by partition."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from trajstore.errors import Corrupt, NotFound, RoutingError, SchemaError, SequenceGap
from trajstore.reading import Archive
from trajstore_audit.result import Parameters
from trajstore_audit.sampling import is_sampled
from trajstore_audit.tally import FORMAT
from trajstore_audit.unit import Unit

__all__ = ["Selected", "plan_units"]

_BYTES = 256 << 20
_IDS = 256
"""A unit is so large that handing it out costs nothing, and so small that not much is lost when it is."""


class _Candidate(NamedTuple):
    """A trajectory, and what tells one state of its events from another. Of its notes see `Selected.note`."""

    id: str
    state: str
    nbytes: int


class Selected:
    """The trajectories that the parameters name. One partition's summaries are held at a time.

    Attributes:
        population: how many they are, as far as they were gone through; before sampling.
        unlisted: what could not be listed, as damage says.
    """

    def __init__(self, archive: Archive, parameters: Parameters) -> None:
        self._archive = archive
        self._parameters = parameters
        self.population = 0
        self.unlisted: list[str] = []

    def partitions(self) -> Iterator[list[_Candidate]]:
        """Candidates by partition, by id; of the sample only.

        Raises:
            NotFound: one of `ids` is not there.
        """
        self.population = 0
        self.unlisted = []
        if self._parameters.ids is not None:
            yield self._sampled([one for id in self._parameters.ids for one in self._named(id)])
            return
        for partition in range(self._archive.partitions):
            summaries = self._archive.list(
                status=self._parameters.status,
                group=self._parameters.group,
                partition=partition,
                on_corrupt=lambda error: self.unlisted.append(str(error)),
            )
            yield self._sampled([_Candidate(one.id, f"{one.last} {one.version}", one.nbytes) for one in summaries])

    def count(self) -> tuple[int, int]:
        """How many trajectories will be audited, and their payload bytes: a pass over the listing."""
        number = nbytes = 0
        for candidates in self.partitions():
            number += len(candidates)
            nbytes += sum(one.nbytes for one in candidates)
        return number, nbytes

    def note(self, id: str) -> str:
        """Id of a trajectory's newest note, "" where there is none: a listing does not tell it."""
        try:
            notes = self._archive.notes(id)
        except (Corrupt, NotFound, RoutingError, SchemaError, SequenceGap):
            return ""
        return notes[-1].id if notes else ""

    def _sampled(self, candidates: list[_Candidate]) -> list[_Candidate]:
        self.population += len(candidates)
        share, seed = self._parameters.sample, self._parameters.seed
        if share >= 1:
            return candidates
        return [one for one in candidates if is_sampled(one.id, share=share, seed=seed)]

    def _named(self, id: str) -> Iterator[_Candidate]:
        """A trajectory that was asked for, unless group or status leave it out."""
        try:
            history = self._archive.plan(id).history
        except NotFound:
            if self._archive.tombstone(id) is None:
                raise
            yield _Candidate(id, "deleted", 0)
            return
        except (Corrupt, RoutingError, SchemaError, SequenceGap):
            yield _Candidate(id, "damaged", 0)
            return
        if self._parameters.group not in (None, history.opened.group):
            return
        if self._parameters.status is not None and history.status not in self._parameters.status:
            return
        nbytes = sum(event.payload.nbytes for event in history.carriers.values() if event.payload is not None)
        yield _Candidate(id, f"{history.last} {history.closes}", nbytes)


def plan_units(
    selected: Selected,
    parameters: Parameters,
    *,
    place: str,
    options: Mapping[str, str] | None,
    logprobs: Mapping[str, npt.NDArray[np.float32]] | None,
    keyed: bool = True,
    audit: str = "",
) -> Iterator[Unit]:
    """Units of work in order; as they are asked for.

    Args:
        place: to be opened where a unit is audited.
        keyed: parts are kept by the units' keys, which takes a look at each trajectory's notes; else keys are empty.
        audit: see `Unit.audit`.

    Raises:
        SchemaError: logprobs that are no array of floats `[T]`.
    """
    parameters = msgspec.structs.replace(parameters, ids=None)  # they may be many, and a unit has its own
    for candidates in selected.partitions():
        for batch in _batches(candidates):
            ids = tuple(one.id for one in batch)
            given = {} if logprobs is None else {id: _bytes(id, logprobs[id]) for id in ids if id in logprobs}
            yield Unit(
                place=place,
                options=None if options is None else dict(options),
                parameters=parameters,
                ids=ids,
                logprobs=given,
                key=_key(selected, batch, given) if keyed else "",
                audit=audit,
            )


def _batches(candidates: Sequence[_Candidate]) -> Iterator[list[_Candidate]]:
    batch: list[_Candidate] = []
    held = 0
    for one in candidates:
        if batch and (len(batch) >= _IDS or held + one.nbytes > _BYTES):
            yield batch
            batch, held = [], 0
        batch.append(one)
        held += one.nbytes
    if batch:
        yield batch


def _key(selected: Selected, batch: Iterable[_Candidate], given: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(f"{FORMAT}\n".encode(), digest_size=16)
    for one in batch:
        digest.update(f"{one.id} {one.state} {selected.note(one.id)}\n".encode())
        if one.id in given:
            digest.update(hashlib.blake2b(given[one.id], digest_size=16).digest())
    return digest.hexdigest()


def _bytes(id: str, logprobs: npt.NDArray[np.float32]) -> bytes:
    given = np.asarray(logprobs)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.floating):
        raise SchemaError(
            f"the logprobs given for {id} are {given.dtype} {list(given.shape)}; give one float for each token, [T]"
        )
    with np.errstate(over="ignore"):  # a double below float32's range becomes -inf, and is left out as such
        return given.astype("<f4").tobytes()
