"""What a store does by itself: creating, listing, waiting, closing, and saying what it is."""

import asyncio
import contextlib
import os
import re
import signal
import threading
import time

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case
from tests.store.children import servers_of, until
from trajstore.archiver import Archiver
from trajstore.blob import to_blob

# Creating


@pytest.mark.parametrize(
    "id",
    ["", ".", "..", "../up", "a/b", "a\\b", "a b", "a\n", "{a}", "a}b", "-a", "a\0", "é", "x" * 201, 7, b"a"],
)
def test_an_id_that_could_lead_astray_is_refused(embedded, id):
    with pytest.raises(trajstore.SchemaError, match="cannot be an id"):
        embedded.create(id=id)


@pytest.mark.parametrize("id", ["a", "A.b_c:d@e+f=g~h-9", "x" * 200])
def test_an_id_of_plain_letters_serves(store, id):
    store.create(id=id)
    store.flush()
    assert [found.id for found in store.list()] == [id]
    assert store.load(id).status == "open"


def test_an_id_is_never_used_again(store):
    """verl RFC #7579: recycled ids "silently train on mislabeled data"."""
    kept = store.create(id="a")
    with pytest.raises(trajstore.Conflict, match="ids are never reused"):  # not written yet, perhaps
        store.create(id="a")
    kept.close("completed")
    del kept
    store.flush()
    with pytest.raises(trajstore.Conflict, match=re.escape("store.get('a')")):
        store.create(id="a")


def test_without_an_id_each_trajectory_gets_a_fresh_one(store):
    ids = [store.create().id for _ in range(100)]
    store.flush()
    assert len(set(ids)) == 100
    assert len(store.list()) == 100


@pytest.mark.parametrize(
    "options", [{"group_size": 2}, {"group": "g", "group_size": 0}, {"group": "g", "group_size": -1}]
)
def test_a_group_size_wants_a_group_and_at_least_one_member(embedded, options):
    with pytest.raises(trajstore.SchemaError, match="group_size"):
        embedded.create(**options)


@pytest.mark.parametrize("size", [True, 2.0, "2"])
def test_a_group_size_is_an_integer(embedded, size):
    with pytest.raises(trajstore.SchemaError, match="group_size must be a non-negative integer"):
        embedded.create(group="g", group_size=size)


def test_a_group_size_may_be_numpys(embedded):
    embedded.create(id="a", group="g", group_size=np.int64(4))
    embedded.flush()
    assert embedded.get("a").group_size == 4


@pytest.mark.parametrize(
    "options",
    [{"group": ""}, {"group": "a\nb"}, {"group": 7}, {"routing": {"top_k": 2}}, {"metadata": {"a": object()}}],
)
def test_what_no_event_can_hold_is_refused(embedded, options):
    with pytest.raises(trajstore.SchemaError):
        embedded.create(**options)
    embedded.flush()
    assert embedded.list() == []


@pytest.mark.parametrize("id", ["nobody", "../up", "", "{a}", "a\nb"])
def test_an_unknown_id_is_not_found_whatever_it_looks_like(embedded, id):
    for call in (embedded.load, embedded.events, embedded.notes, embedded.get, embedded.overlaps, embedded.plan):
        with pytest.raises(trajstore.NotFound, match="there is no trajectory"):
            call(id)


@pytest.mark.parametrize("id", [None, 7, b"t", ["t"]])
def test_what_is_no_string_names_no_trajectory(embedded, folder, id):
    reading = ("load", "load_routing", "events", "notes", "overlaps", "plan", "tombstone")
    for call in (embedded.get, embedded.wait, *(getattr(embedded, name) for name in reading)):
        with pytest.raises(trajstore.SchemaError, match="named by its id, a string"):
            call(id)
    bare = trajstore.open_archive(folder)
    for name in reading:
        with pytest.raises(trajstore.SchemaError, match="named by its id, a string"):
            getattr(bare, name)(id)


# Listing


def test_list_filters_by_status_and_group_oldest_id_first(store):
    for number, status in enumerate(("completed", "truncated", "failed", "aborted", None)):
        for group in ("g", None):
            made = store.create(id=f"{number}-{group}", group=group)
            if status is not None:
                made.close(status)
    store.flush()
    assert [found.id for found in store.list()] == sorted(f"{n}-{g}" for n in range(5) for g in ("g", None))
    assert [found.id for found in store.list(group="g")] == [f"{n}-g" for n in range(5)]
    assert [found.id for found in store.list(status="open")] == ["4-None", "4-g"]
    assert [found.id for found in store.list(status=["failed", "aborted"], group="g")] == ["2-g", "3-g"]
    assert store.list(group="nobody's") == []
    assert store.list(status=[]) == []


def test_list_of_an_unknown_status_names_the_known_ones(embedded):
    with pytest.raises(trajstore.SchemaError, match="no status finished; statuses are open, completed"):
        embedded.list(status="finished")


# Waiting


def test_wait_returns_when_somebody_else_closes(user, folder):
    with trajstore.open(folder, partitions=1) as store:
        closer = user()
        store.create(id="a", group="g")
        store.flush()
        closer.do("import threading")
        closer.do("threading.Timer(0.2, lambda: (store.get('a').close('failed'), store.flush())).start()")
        found = store.wait("a", timeout=30)
        assert (found.id, found.group, found.status) == ("a", "g", "failed")


def test_wait_sees_what_is_closed_in_its_own_process(store):
    store.create(id="a").close("aborted")
    assert store.wait("a", timeout=10).status == "aborted"
    assert store.wait("a", status=["aborted", "failed"], timeout=10).status == "aborted"


def test_wait_for_a_trajectory_that_is_yet_to_be_created(store, open_store):
    other = open_store()
    threading.Timer(0.1, lambda: (other.create(id="a").close(), other.flush())).start()
    assert store.wait("a", timeout=30).status == "completed"


@pytest.mark.parametrize("status", ["completed", "open"])
def test_wait_ends_at_its_deadline_and_says_what_it_saw(store, status):
    """TransferQueue: a read for ever blocked on what will not come; every blocking call has a deadline."""
    if status == "completed":
        store.create(id="a")
    seen = "a is open, not completed" if status == "completed" else "a is not there yet, not open"
    began = time.monotonic()
    with pytest.raises(trajstore.Unavailable, match=f"{seen}, at the deadline") as late:
        store.wait("a", status=status, timeout=0.3)
    assert isinstance(late.value, TimeoutError)
    assert time.monotonic() - began >= 0.3


def test_wait_for_an_unknown_status_is_refused_at_once(embedded):
    with pytest.raises(trajstore.SchemaError, match="no status done"):
        embedded.wait("a", status="done")


# Closing


def test_a_with_block_flushes_and_closes(folder):
    with trajstore.open(folder, partitions=1) as store:
        store.create(id="a")
    with pytest.raises(trajstore.Conflict, match="this store is closed; open it again"):
        store.list()
    assert servers_of(folder) == []


def test_an_async_with_block_flushes_and_closes(folder):
    async def use() -> list[str]:
        async with trajstore.open(folder, partitions=1) as store:
            store.create(id="a")
            await store.aflush()
            return [found.id for found in store.list()]

    assert asyncio.run(use()) == ["a"]
    assert servers_of(folder) == []


def test_aflush_leaves_the_event_loop_free(store):
    async def use() -> int:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        with store.create(id="a").segment(context=[1]) as segment:
            for _ in range(200):
                segment.tokens([7] * 1000)
            segment.close("stop")
        await store.aflush()
        turning.cancel()
        return turns

    assert asyncio.run(use()) > 0
    assert len(store.load("a").token_ids) == 200_001


def unwritable(own_server, run_name) -> trajstore.Store:
    """A store with something to write, and no server to take it."""
    store = trajstore.open(own_server.url(run_name), partitions=1, timeout=1.0)
    own_server.kill()
    store.create()
    return store


def test_close_raises_what_could_not_be_written(own_server, run_name):
    store = unwritable(own_server, run_name)
    with pytest.raises(trajstore.Unavailable, match="not written within"):
        store.close()
    store.close()  # nothing is left to close


def test_an_exception_that_leaves_the_block_is_not_replaced_by_a_failing_close(own_server, run_name):
    with pytest.raises(ZeroDivisionError) as error, unwritable(own_server, run_name):
        1 / 0  # noqa: B018
    assert "closing the store failed" in error.value.__notes__[0]
    assert "not written within" in error.value.__notes__[0]


def test_an_exception_that_leaves_an_async_block_is_not_replaced_either(own_server, run_name):
    async def use() -> None:
        async with unwritable(own_server, run_name):
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        asyncio.run(use())


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.create(),
        lambda store: store.get("a"),
        lambda store: store.load("a"),
        lambda store: store.plan("a"),
        lambda store: store.events("a"),
        lambda store: store.notes("a"),
        lambda store: store.overlaps("a"),
        lambda store: store.list(),
        lambda store: store.wait("a", timeout=0.1),
        lambda store: store.flush(),
        lambda store: asyncio.run(store.aflush()),
        lambda store: store.rebuild_summaries(),
    ],
)
def test_a_closed_store_is_refused_with_the_remedy(embedded, call):
    embedded.create(id="a")
    embedded.close()
    embedded.close()
    with pytest.raises(trajstore.Conflict, match="this store is closed; open it again"):
        call(embedded)


def test_a_handle_of_a_closed_store_cannot_write(embedded):
    trajectory = embedded.create(id="a", routing=SPEC)
    segment = trajectory.segment(context=[1])
    embedded.close()
    for write in (lambda: segment.tokens([1]), lambda: trajectory.reward(1.0), lambda: segment.close("stop")):
        with pytest.raises(trajstore.TrajstoreError, match="closed"):
            write()


def test_a_closed_store_does_not_start_its_server_again(folder):
    """Not by a late retry in a background thread either."""
    store = trajstore.open(folder, partitions=1)
    store.close()
    with pytest.raises(trajstore.Unavailable, match="is closed in this process"):
        store.wire.call("PING")
    assert servers_of(folder) == []


def test_the_reason_why_a_server_cannot_be_restarted_reaches_the_caller(folder, monkeypatch):
    with trajstore.open(folder, partitions=1) as store:
        (server,) = servers_of(folder)
        monkeypatch.setenv("TRAJSTORE_SERVER", "/nowhere/redis-server")
        os.kill(server, signal.SIGKILL)
        until(lambda: not servers_of(folder), what="the server's end")
        with pytest.raises(trajstore.Unavailable, match="/nowhere/redis-server is no Redis or Valkey server"):
            store.list()
        monkeypatch.delenv("TRAJSTORE_SERVER")
        assert store.list() == []


def test_rebuild_summaries_brings_lost_ones_back(store):
    for id in ("a", "b"):
        store.create(id=id, group="g").close()
    store.flush()
    for partition in range(store.partitions):
        store.wire.call("DEL", store.keys.summaries(partition))
    assert store.list() == []
    assert store.rebuild_summaries() == 2
    assert [(found.id, found.status) for found in store.list(group="g")] == [("a", "completed"), ("b", "completed")]


# Showing


def test_a_store_shows_where_it_is(folder):
    with trajstore.open(folder, partitions=1) as store:
        assert repr(store) == f"<Store {folder} run 'main'>"


# An archive that comes later, a server that comes back empty


def test_store_opened_before_the_run_had_an_archive_finds_it(open_store, tmp_path):
    """A writer's store, an archiver started later elsewhere: what was trimmed is still read, resumed and not reused."""
    early = open_store()
    trajectory = record_seed_case(early, id="mine")
    trajectory.close("aborted")
    early.flush()
    before = to_blob(early.load("mine"))
    Archiver(open_store(archive=tmp_path / "archive")).run(once=True)
    assert early.hot.read("mine")[0] == []
    assert to_blob(early.load("mine")) == before
    assert early.archive is not None
    with early.get("mine").segment() as segment:
        segment.tokens([15])
    early.flush()
    assert len(early.load("mine")) == 11
    with pytest.raises(trajstore.Conflict, match="never reused"):
        open_store().create(id="mine")


def test_archive_that_cannot_be_reached_from_here_is_named(open_store, tmp_path):
    early = open_store()
    trajectory = record_seed_case(early)
    early.flush()
    open_store(archive=tmp_path / "archive")
    (tmp_path / "archive").rename(tmp_path / "unmounted")
    with pytest.raises(trajstore.Conflict, match=str(tmp_path / "archive")):
        early.load(trajectory.id)


def test_nothing_is_written_to_a_server_that_came_back_empty(own_server, run_name):
    store = trajstore.open(own_server.url(run_name), timeout=2.0)
    trajectory = record_seed_case(store)
    store.flush()
    own_server.client().flushall()
    own_server.client().client_kill_filter(_type="normal", skipme=True)
    trajectory.reward(1.0)
    with pytest.raises(trajstore.Conflict, match="open the run again"):
        store.flush(trajectory.id)
    assert own_server.client().dbsize() == 0
    with contextlib.suppress(trajstore.TrajstoreError):
        store.close()
