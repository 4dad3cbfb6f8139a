"""Who has an entry: the server decides, of two that want it one gets it, and the living keep what they have."""

import threading
import time

import pytest

from tests.consumers.rollouts import finish, materialize, wait_until
from trajstore.ready import EntryPlace
from trajstore.ready_follower import ReadyFollower
from trajstore_trainer.claims import Claims, Slot, consumer_name, slot_of

pytestmark = pytest.mark.torch


@pytest.fixture
def claims(embedded):
    """Makes claims, `claims(rank=0)`. Every server that is real tells how long an entry has been idle."""
    return lambda rank=0, lease=0.25: Claims(
        embedded.wire, embedded.keys, group="trainer", consumer=consumer_name(Slot(rank, 0)), lease=lease
    )


def give(store, claims, count):
    """So many new entries for a consumer."""
    for i in range(count):
        finish(store, seed=i)
    materialize(store)
    taken = ReadyFollower(store.wire, store.keys, "trainer", claims._consumer).poll(count=count)
    return {one.place for one in taken}


def places(deliveries):
    return {one.place for one in deliveries}


def test_place_of_a_consumer_is_read_from_its_name():
    assert slot_of(consumer_name(Slot(12, 3))) == (12, 3)
    assert slot_of("host-1234-01ARZ3NDEKTSV4RRFFQ69G5FAV") is None
    assert EntryPlace.parse(str(EntryPlace(3, "17-0"))) == (3, "17-0")


def test_keeping_tells_what_one_has_page_by_page(embedded, claims, monkeypatch):
    monkeypatch.setattr("trajstore_trainer.claims._PAGE", 3)
    one = claims()
    assert one.keep() == set()
    had = give(embedded, one, 10)
    assert len(had) == 10
    assert one.keep() == had


def test_silent_consumer_is_inherited_by_one_of_those_that_try(embedded, claims):
    had = give(embedded, claims(), 12)
    heirs, found = [claims(rank) for rank in (1, 2, 3)], [[], [], []]

    def inherit(i):
        wait_until(lambda: found[i].extend(heirs[i].take_over(12, may=lambda _: True)) or sum(map(len, found)) >= 12)

    threads = [threading.Thread(target=inherit, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    everything = [place for some in found for place in places(some)]
    assert sorted(everything) == sorted(had)


def test_consumer_that_gives_a_sign_of_life_keeps_what_it_has(embedded, claims):
    one, heir = claims(), claims(1)
    had = give(embedded, one, 3)
    for _ in range(8):
        assert one.keep() == had
        assert heir.take_over(3, may=lambda _: True) == []
        threading.Event().wait(0.05)


def test_predecessor_is_followed_at_once_by_those_of_its_place_only(embedded, claims):
    old, new, other = claims(rank=5, lease=60.0), claims(rank=1, lease=60.0), claims(rank=0, lease=60.0)
    had = give(embedded, old, 4)
    assert other.adopt(lambda slot: slot.rank % 2 == 0) == []
    assert places(new.adopt(lambda slot: slot.rank % 2 == 1)) == had
    assert old.keep() == set()
    assert set(new.owners(sorted(had))) == {new._consumer}


def test_predecessor_that_keeps_what_it_has_meanwhile_is_followed_all_the_same(embedded, claims):
    old, new = claims(lease=60.0), claims(lease=60.0)
    had = give(embedded, old, 4)
    pending, kept = new._pending, []

    def touched_after_the_look(*args, **options):
        for page in pending(*args, **options):
            if not kept:
                kept.append(old.keep())
            yield page

    threading.Event().wait(0.01)
    new._pending = touched_after_the_look
    assert places(new.adopt(lambda _: True)) == had
    assert kept == [had]


def test_entry_that_another_took_after_the_look_stays_with_it(embedded, claims):
    """XCLAIM with the idle time that was seen: who has it now has only just got it."""
    old, heir, late = claims(), claims(1), claims()
    had = give(embedded, old, 3)
    partition = min(had).partition
    idle = wait_until(
        lambda: late._wire.call("XPENDING", embedded.keys.ready(partition), "trainer", "IDLE", 250, "-", "+", 9)
    )
    seen = [(at.decode(), milliseconds) for at, _, milliseconds, _ in idle]
    taken = set()
    wait_until(lambda: taken.update(places(heir.take_over(9, may=lambda _: True))) or taken == had)
    assert late._claim_as_seen(partition, seen, time.monotonic()) == []
    assert heir.keep() == had


def test_consumer_is_asked_for_by_name_before_anything_is_taken_over(embedded, claims):
    old, heir, asked = claims(), claims(1), []
    had = give(embedded, old, 2)
    wait_until(lambda: heir.take_over(9, may=lambda name: asked.append(name) or False) or asked)
    assert set(asked) == {old._consumer}
    assert old.keep() == had


def test_leaving_removes_the_name_where_nothing_is_in_hand(embedded, claims):
    one = claims()
    had = give(embedded, one, 1)
    one.keep()
    one.leave()
    left = {
        partition: [dict(zip(flat[::2], flat[1::2], strict=True))[b"name"].decode() for flat in reply]
        for partition in range(embedded.partitions)
        for reply in [embedded.wire.call("XINFO", "CONSUMERS", embedded.keys.ready(partition), "trainer")]
    }
    (place,) = had
    assert [partition for partition, names in left.items() if one._consumer in names] == [place.partition]
