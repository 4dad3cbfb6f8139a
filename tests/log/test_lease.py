"""The archiver's lease on a partition: one holder, taken over from a silent one, given back."""

import threading

import pytest

from tests.log.looking import until
from trajstore.log.lease import LEASE_GROUP, Lease


def lease(store, holder, seconds=60.0):
    """Leases of a holder."""
    return Lease(store.wire, store.keys, holder, seconds=seconds)


def test_lease_has_one_holder(store):
    one, two = lease(store, "one"), lease(store, "two")
    assert one.acquire(0)
    assert not two.acquire(0)
    assert two.acquire(1)
    assert one.renew(0)
    assert one.acquire(0)
    assert not two.renew(0)


def test_of_many_that_come_at_once_one_gets_it(store):
    start = threading.Barrier(8)
    got: list[int] = []

    def try_it(number):
        mine = lease(store, f"holder-{number}")
        start.wait(10)
        if mine.acquire(0):
            got.append(number)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) == 1


def test_lease_is_taken_over_from_a_silent_holder_who_then_knows(store):
    silent, heir = lease(store, "silent", seconds=0.05), lease(store, "heir", seconds=0.05)
    assert silent.acquire(0)
    until(lambda: heir.acquire(0), what="the lease has run out")
    assert not silent.renew(0)


@pytest.mark.parametrize("renewed", [True, False])
def test_renewing_keeps_others_out(own_server, own_client, open_at, renewed):
    """Not on fakeredis 2.40, where reading a pending entry again does not end its being idle."""
    store = open_at(own_server)
    holder, other = lease(store, "holder"), lease(store, "other")
    assert holder.acquire(0)
    own_client.xclaim(store.keys.lease(0), LEASE_GROUP, "holder", 0, ["1-0"], idle=100_000)  # silent for 100 s
    if renewed:
        assert holder.renew(0)
    assert other.acquire(0) is not renewed


def test_released_lease_is_free_at_once(store):
    one, two = lease(store, "one"), lease(store, "two")
    assert one.acquire(0)
    one.release(0)
    assert two.acquire(0)
    assert not one.renew(0)


def test_releasing_what_another_holds_does_nothing(store):
    one, two = lease(store, "one"), lease(store, "two")
    assert one.acquire(0)
    two.release(0)
    assert one.renew(0)
    assert not two.acquire(0)
