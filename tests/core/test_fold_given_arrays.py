"""What a fold keeps of the payloads it is given: an array that is given away is not copied, all else is."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.builders import rows
from tests.core.logs import Log
from trajstore.entries import Event


def recorded(data: np.ndarray, *more: np.ndarray) -> Log:
    log = Log()
    log.segment(context=range(len(data) + sum(map(len, more))))
    start = 0
    for part in (data, *more):
        log.routing(part, start)
        start += len(part)
    log.finish()
    return log


def loaded(log: Log, *arrays: np.ndarray) -> np.ndarray:
    """The folded routing, where these arrays are the recordings' payloads."""

    def fetch(events: Sequence[Event]):
        left = list(arrays)
        for event in events:
            yield left.pop(0).data.cast("B") if event.type == "Routing" else log.payloads[event.id]

    routed = log.plan().apply(fetch, id="t").routed_experts
    assert routed is not None
    return routed


def test_array_that_is_all_of_the_routing_is_kept_as_it_is():
    data = rows(20)
    assert loaded(recorded(data), data) is data


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda data: np.concatenate([data, data])[: len(data)], id="a part of a larger array"),
        pytest.param(lambda data: np.frombuffer(data.tobytes(), data.dtype).reshape(data.shape), id="read-only bytes"),
        pytest.param(lambda data: data.copy().reshape(-1), id="another shape"),
    ],
)
def test_array_that_others_hold_or_that_has_another_form_is_copied(part):
    data = rows(20)
    given = part(data)
    found = loaded(recorded(data), given)
    assert not np.shares_memory(found, given)
    assert found.flags.owndata
    assert found.flags.writeable
    np.testing.assert_array_equal(found, data)


def test_arrays_that_are_a_part_of_the_routing_are_copied():
    first, second = rows(12), rows(8, seed=1)
    found = loaded(recorded(first, second), first, second)
    assert not np.shares_memory(found, first)
    np.testing.assert_array_equal(found, np.concatenate([first, second]))


def test_array_of_all_rows_some_of_which_another_recording_wins_is_copied():
    whole, newer = rows(20), rows(8, seed=1)
    log = recorded(whole)
    log.events.pop()  # the segment's end
    log.routing(newer, 0)
    log.finish()
    kept = whole.copy()
    found = loaded(log, newer, whole)
    np.testing.assert_array_equal(found, np.concatenate([newer, whole[8:]]))
    np.testing.assert_array_equal(whole, kept)
