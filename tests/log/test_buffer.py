"""The bounded buffer, deadlines, and errors of the background writer: sticky, told once, and never in another's way."""

import threading
from collections import deque

import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.log.looking import NoArchive, until
from trajstore.events import Rewarded
from trajstore.log.batch import Turn
from trajstore.log.flusher import Flusher

LARGE = 300


def write(segment, *, times):
    """Append chunks until something stops it."""
    for _ in range(times):
        segment.tokens([1] * LARGE)


def fence(store, other, id):
    """Take a trajectory over by another store."""
    other.get(id).reward(0.0, takeover=True)
    other.flush(id)


def test_append_does_not_wait_until_the_buffer_is_full_and_goes_on_when_there_is_room(own_server, open_at):
    store = open_at(own_server, buffer_bytes=100_000, timeout=20.0)
    trajectory = store.create()
    segment = trajectory.segment()
    store.flush()
    own_server.pause()
    for _ in range(20):  # 20 * (256 + 1200) bytes: well within the buffer
        segment.tokens([1] * LARGE)
    written = threading.Event()

    def overfill():
        for _ in range(60):
            segment.tokens([2] * LARGE)
        written.set()

    writer = threading.Thread(target=overfill)
    writer.start()
    until(lambda: store._flusher._buffered > 98_000, what="the buffer is full")
    assert not written.wait(0.2)
    own_server.resume()
    assert written.wait(10)
    writer.join()
    segment.close("stop")
    store.flush()
    assert store.load(trajectory.id).token_ids.tolist() == [1] * 20 * LARGE + [2] * 60 * LARGE


class _Interrupted(deque):
    """A queue of events at which Ctrl-C is pressed, once the first has been put there."""

    def append(self, item):
        super().append(item)
        if len(self) == 1:
            raise KeyboardInterrupt


def test_interrupted_call_takes_no_later_event_with_it(own_server, open_at):
    store = open_at(own_server)
    trajectory = store.create()
    segment = trajectory.segment(context=[1])
    store.flush()
    trajectory._lane.queue = _Interrupted()
    with pytest.raises(KeyboardInterrupt):
        segment.no_routing("none")
    trajectory._lane.queue = deque(trajectory._lane.queue)
    trajectory._telling.interrupted = False  # the handle takes no more; the buffer must still be whole
    segment.close("stop")
    store.flush()
    trajectory.close("completed")
    store.flush()
    assert not trajectory._lane.queue
    assert store.load(trajectory.id).status == "completed"
    assert store._flusher._buffered == 0


def test_append_raises_at_the_deadline_when_the_buffer_stays_full(own_server, open_at):
    """TransferQueue: reads of a dead unit block for ever; here every call has a deadline."""
    store = open_at(own_server, buffer_bytes=20_000, timeout=1.0)
    segment = store.create().segment()
    store.flush()
    own_server.pause()
    with pytest.raises(trajstore.Unavailable, match="stayed full"):
        write(segment, times=1000)
    assert store._flusher._buffered <= 21_500
    own_server.resume()


def test_event_larger_than_the_buffer_goes_through_alone(store, open_store):
    small = open_store(buffer_bytes=100)
    trajectory = small.create()
    with trajectory.segment(context=[1] * LARGE) as segment:
        segment.tokens([2] * LARGE)
    small.flush()
    assert len(small.load(trajectory.id).token_ids) == 2 * LARGE


def test_failure_is_sticky_on_its_segment(store, open_store):
    other = open_store()
    trajectory = store.create(routing=SPEC)
    segment = trajectory.segment(context=[1, 2])
    store.flush()
    fence(store, other, trajectory.id)
    segment.tokens([3])
    for _ in range(2):
        with pytest.raises(trajstore.Fenced):
            store.flush(trajectory.id)
    for call in (
        lambda: segment.tokens([4]),
        lambda: segment.routing([[[0, 1]] * 3], start=0),
        lambda: segment.no_routing("off"),
        lambda: segment.close("stop"),
        lambda: trajectory.reward(1.0),
        lambda: trajectory.close(),
        lambda: trajectory.segment(),
    ):
        with pytest.raises(trajstore.Fenced):
            call()


def test_each_failure_is_raised_once_by_store_flush(store, open_store):
    other = open_store()
    segments = [store.create().segment() for _ in range(3)]
    fine = store.create()
    store.flush()
    for segment in segments[:2]:
        fence(store, other, segment._trajectory.id)
    for segment in segments:
        segment.tokens([1])
    fine.reward(1.0)
    with pytest.raises(ExceptionGroup) as caught:
        store.flush()
    assert caught.group_contains(trajstore.Fenced)
    assert len(caught.value.exceptions) == 2
    store.flush()
    fence(store, other, segments[2]._trajectory.id)
    segments[2].tokens([2])
    with pytest.raises(trajstore.Fenced):
        store.flush()
    store.flush()
    assert store.load(fine.id).reward == 1.0


def test_failure_that_flush_of_one_has_told_is_not_told_again(store, open_store):
    other = open_store()
    segment = store.create().segment()
    store.flush()
    fence(store, other, segment._trajectory.id)
    segment.tokens([1])
    with pytest.raises(trajstore.Fenced):
        store.flush(segment._trajectory.id)
    store.flush()
    store.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda segment: segment.tokens([2]),
        lambda segment: segment.no_routing("off"),
        lambda segment: segment.close("stop"),
        lambda segment: segment._trajectory.segment(),
        lambda segment: segment._trajectory.reward(1.0),
        lambda segment: segment._trajectory.close(),
        lambda segment: segment._trajectory.late_routing(rows(1), segment=0, start=0),
    ],
    ids=["tokens", "no_routing", "close segment", "segment", "reward", "close", "late_routing"],
)
def test_failure_that_the_handle_has_raised_is_not_raised_again_for_all(store, open_store, call):
    """Whoever writes knows; who flushes or closes the store may have nothing to do with that trajectory."""
    other = open_store()
    trajectory, second = store.create(routing=SPEC), store.create()
    with trajectory.segment(context=[1]) as finished:
        finished.close("stop")
    segment, untold = trajectory.segment(), second.segment()
    store.flush()
    for lost in (segment, untold):
        fence(store, other, lost._trajectory.id)
        lost.tokens([1])
        store._flusher.drain(lost._trajectory.id)
    with pytest.raises(trajstore.Fenced):
        call(segment)
    with pytest.raises(trajstore.Fenced, match=second.id):
        store.flush()
    with pytest.raises(trajstore.Fenced, match=trajectory.id):
        store.flush(trajectory.id)  # for one it is sticky
    store.close()


def test_failed_observation_that_its_call_has_raised_is_not_raised_again_for_all(store, client):
    trajectory = record_seed_case(store)
    store.flush()
    client.set(store.keys.notes(trajectory.id), "not a stream")
    trajectory.observe(rows(1), start=0, source="trainer")
    store._flusher.drain(trajectory.id)
    with pytest.raises(trajstore.TrajstoreError):
        trajectory.observe(rows(1), start=0, source="trainer")
    store.flush()
    store.close()


def test_failure_that_a_with_block_kept_back_is_still_raised_for_all(store, open_store):
    """The exception that leaves the block tells more, but not this."""
    other = open_store()
    trajectory = store.create()

    def block():
        with trajectory.segment() as segment:
            store.flush()
            fence(store, other, trajectory.id)
            segment.tokens([1])
            store._flusher.drain(trajectory.id)
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        block()
    with pytest.raises(trajstore.Fenced):
        store.flush()
    store.close()


@pytest.mark.parametrize("count", [1, 2])
def test_close_raises_what_could_not_be_written(store, open_store, count):
    other = open_store()
    segments = [store.create().segment() for _ in range(count)]
    store.flush()
    for segment in segments:
        fence(store, other, segment._trajectory.id)
        segment.tokens([1])
    with pytest.raises(trajstore.Fenced if count == 1 else ExceptionGroup):
        store.close()
    store.close()  # and is done with it


def test_exception_leaving_a_with_block_is_not_replaced(store, open_store):
    other = open_store()
    trajectory = store.create()

    def block():
        with trajectory.segment() as segment:
            segment.tokens([1])
            store.flush()
            fence(store, other, trajectory.id)
            segment.tokens([2])
            with pytest.raises(trajstore.Fenced):
                store.flush(trajectory.id)
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        block()


def test_failed_note_does_not_hide_that_the_trajectory_failed(store, open_store):
    """A handle's notes have a lane of their own; opening it must not forget what `flush(id)` has to raise."""
    other = open_store()
    trajectory = record_seed_case(store)
    segment = trajectory.segment()
    store.flush()
    fence(store, other, trajectory.id)
    segment.tokens([3])
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    trajectory.observe([[[0, 1]] * 3], start=0, source="trainer")
    with pytest.raises(trajstore.Fenced):
        store.flush(trajectory.id)
    store.get(trajectory.id)  # a new handle begins without it
    store.flush(trajectory.id)
    assert len(store.notes(trajectory.id)) == 1


def test_other_trajectories_are_not_held_up_by_one_that_cannot_be_written(store, client):
    broken, fine = store.create(), store.create()
    store.flush()
    client.delete(store.keys.entries(broken.id))
    client.set(store.keys.entries(broken.id), "not a stream")
    broken.reward(1.0)
    for value in range(20):
        fine.reward(float(value))
        store.flush(fine.id)
    with pytest.raises(trajstore.TrajstoreError):
        store.flush(broken.id)
    assert store.load(fine.id).reward == 19.0


def test_stream_that_others_wrote_into_fails_its_trajectory_only(store, client):
    spoilt, fine = store.create(), store.create()
    store.flush()
    client.xadd(store.keys.entries(spoilt.id), {"somebody": "else"}, id="2-0")
    spoilt.reward(1.0)
    fine.reward(1.0)
    with pytest.raises(trajstore.TrajstoreError):
        store.flush(spoilt.id)
    store.flush(fine.id)
    assert store.load(fine.id).reward == 1.0


def test_hanging_server_fails_what_was_written_at_the_deadline_and_later_trajectories_succeed(own_server, open_at):
    store = open_at(own_server, timeout=1.0)
    trajectory = store.create()
    store.flush()
    own_server.pause()
    trajectory.reward(1.0)
    with pytest.raises(trajstore.Unavailable, match="not written within 1 s"):
        store.flush(trajectory.id)
    own_server.resume()
    store.get(trajectory.id).reward(2.0)
    store.flush(trajectory.id)
    assert store.load(trajectory.id).reward == 2.0


def test_every_call_has_a_deadline_on_a_hanging_server(own_server, open_at, run_name):
    """TransferQueue: a dead storage unit blocked its readers for ever."""
    store = open_at(own_server, timeout=1.0)
    trajectory = record_seed_case(store)
    store.flush()
    own_server.pause()
    for call in (
        lambda: store.load(trajectory.id),
        lambda: store.events(trajectory.id),
        lambda: store.list(),
        lambda: store.get(trajectory.id),
        lambda: store.wait(trajectory.id, timeout=0.1),
        lambda: store.create(id="with-an-id-of-its-own"),
        lambda: trajstore.open(own_server.url(run_name), timeout=1.0),
        lambda: trajstore.open(own_server.url(run_name + "-2"), timeout=1.0),
    ):
        with pytest.raises(trajstore.Unavailable):
            call()
    trajectory.reward(1.0)
    with pytest.raises(trajstore.Unavailable):
        store.flush()
    store.close()  # on a server that still hangs
    own_server.resume()


def test_close_on_a_hanging_server_says_what_was_not_written(own_server, open_at):
    store = open_at(own_server, timeout=1.0)
    trajectory = store.create()
    store.flush()
    own_server.pause()
    trajectory.reward(1.0)
    with pytest.raises(trajstore.Unavailable):
        store.close()
    assert not store._flusher._thread.is_alive()
    own_server.resume()


def test_server_that_is_not_there_is_unavailable_at_once(own_server, run_name):
    own_server.stop()
    with pytest.raises(trajstore.Unavailable):
        trajstore.open(own_server.url(run_name))


def test_wait_ends_at_its_deadline(store):
    trajectory = store.create()
    for id, seen in ((trajectory.id, "is open"), ("nobody", "is not there yet")):
        with pytest.raises(trajstore.Unavailable, match=seen):
            store.wait(id, timeout=0.05)


def test_wait_sees_a_close_by_another_store(store, open_store):
    other = open_store()
    trajectory = store.create()
    store.flush()
    closer = threading.Thread(target=lambda: (other.get(trajectory.id).close("truncated"), other.flush()))
    closer.start()
    assert store.wait(trajectory.id).status == "truncated"
    closer.join()


def test_closed_store_refuses_writes_of_its_handles(store):
    trajectory = store.create()
    store.close()
    with pytest.raises(trajstore.TrajstoreError, match="closed"):
        trajectory.reward(1.0)
    with pytest.raises(trajstore.Conflict, match="closed"):
        store.flush()


@pytest.fixture
def broken_flusher(store):
    """A flusher whose thread ends by an error that nobody expected, at its first connection."""
    wire = store.wire

    def fail():
        raise ZeroDivisionError

    def ignore(trajectory):
        """No summary to repair."""

    flusher = Flusher(
        wire,
        store.keys,
        timeout=60.0,
        buffer_bytes=1000,
        kept_bytes=1000,
        horizon=0.0,
        archive=NoArchive(),
        on_connect=fail,
        on_refused=ignore,
    )
    yield flusher
    flusher.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_dead_flusher_thread_is_told_at_once(broken_flusher):
    """Neither those who wait nor those who come later wait for the deadline, here a minute."""
    lane, idle = broken_flusher.lane("one"), broken_flusher.lane("two")
    turn = Turn(1, creates=True)
    broken_flusher.append(lane, turn, Rewarded(reward=1.0))
    with pytest.raises(trajstore.Unavailable, match="ended, by a bug"):
        broken_flusher.flush("one")
    with pytest.raises(trajstore.Unavailable, match="ended, by a bug"):
        broken_flusher.append(idle, Turn(1), Rewarded(reward=1.0))
