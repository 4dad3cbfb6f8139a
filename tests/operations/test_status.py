"""How a run stands: what is measured is what is there, and the screen shows it in any width."""

import json
import re
import signal
import threading

import msgspec
import pytest
from rich.console import Console

import trajstore
from tests.cli.running import ended, invoke, started, until
from tests.consumers.rollouts import finish, materialize
from tests.operations.exposed import shown
from tests.operations.http import get, said_address
from tests.operations.terminal import terminal
from trajstore.archiver import Archiver
from trajstore.cli.status_screen import screen
from trajstore.errors import Unavailable
from trajstore.log.feed import ARCHIVER, MATERIALIZER, FeedFollower
from trajstore.log.lease import Lease
from trajstore.ready_follower import ReadyFollower
from trajstore.status import (
    ArchiveStanding,
    ConsumerStanding,
    GroupStanding,
    LeaseStanding,
    Rates,
    RunLook,
    RunStatus,
    ServerStanding,
    by_slot,
    measure_status,
)


def group(standings: tuple[GroupStanding, ...], name: str) -> GroupStanding:
    return next(one for one in standings if one.name == name)


def test_what_nobody_follows_waits_and_ages(store):
    finish(store)
    found = measure_status(store)
    hints = sum(store.wire.call("XLEN", store.keys.feed(partition)) for partition in range(store.partitions))
    for name in (ARCHIVER, MATERIALIZER):
        one = group(found.feed, name)
        assert (one.waiting, one.held, one.consumers) == (hints, 0, {})
        assert 0 < one.seconds < 60
        assert sum(waiting for waiting, _, _ in one.by_partition.values()) == hints
    assert found.hints in (hints, None)
    assert all(lease.holder == "" for lease in found.leases)
    assert (found.archive.packs, found.archive.problem, found.archive.seconds) == (0, "", None)


def test_what_was_given_out_is_held_until_it_is_acknowledged(store):
    finish(store)
    follower = FeedFollower(store.wire, store.keys, MATERIALIZER, "somebody")
    hints = follower.poll(range(store.partitions), count=100)
    one = group(measure_status(store).feed, MATERIALIZER)
    assert (one.waiting, one.held, one.consumers["somebody"].held) == (0, len(hints), len(hints))
    assert one.seconds > 0
    assert one.consumers["somebody"].silent < 60
    follower.acknowledge(hints)
    one = group(measure_status(store).feed, MATERIALIZER)
    assert (one.waiting, one.held, one.seconds) == (0, 0, 0.0)


def test_ready_backlog_and_claims_are_told_by_consumer(store):
    for name in ("a", "b", "c"):
        finish(store, group=name, group_size=1)
    materialize(store)
    trainer = ReadyFollower(store.wire, store.keys, group="trainer", consumer="rank-3.0:X")
    taken = trainer.poll(count=1, block=0.0)
    one = group(measure_status(store).ready, "trainer")
    assert (one.waiting, one.held) == (3 - len(taken), len(taken))
    assert one.consumers["rank-3.0:X"].held == len(taken) > 0
    trainer.acknowledge(taken)
    assert group(measure_status(store).ready, "trainer").held == 0


def test_a_lease_is_its_holders_until_it_is_given_back(store):
    lease = Lease(store.wire, store.keys, "archiver-1", seconds=15.0)
    lease.acquire(1)
    free, held = measure_status(store).leases
    assert (free.holder, held.holder) == ("", "archiver-1")
    assert held.silent < 15
    lease.release(1)
    assert measure_status(store).leases[1].holder == ""


def test_packs_are_counted_as_they_are_published(durable):
    finish(durable)
    done = Archiver(durable, grace_seconds=0.0).run(once=True)
    found = RunLook(durable).look()
    assert (found.archive.packs, done.packs) == (1, 1)
    assert 0 <= found.archive.seconds < 60
    assert found.backlog.trajectories == 0


def test_an_archive_that_cannot_be_looked_at_hides_nothing_else(store, tmp_path):
    finish(store)
    for partition in ("00", "01"):
        folder = tmp_path / "archive" / "manifest" / partition
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "00000001.json").write_text("{}")
    found = RunLook(store).look()
    assert "00000001.json" in found.archive.problem
    assert "00000001.json" in found.backlog_problem
    assert group(found.feed, ARCHIVER).waiting
    assert "00000001.json" in drawn(found, 120)


def test_an_archive_that_is_gone_is_no_archive_without_packs(durable, folder):
    finish(durable)
    Archiver(durable, grace_seconds=0.0).run(once=True)
    (folder / "archive").rename(folder / "elsewhere")
    found = measure_status(durable)
    assert (found.archive.packs, "no archive in" in found.archive.problem) == (0, True)
    assert shown(RunLook(durable))["trajstore_run_archive_up{run=main}"] == 0


def test_a_lost_partition_hides_nothing_else(store):
    for _ in range(8):
        finish(store)
    store.wire.call("UNLINK", store.keys.lease(1))
    store.wire.call("UNLINK", store.keys.feed(1))
    found = measure_status(store)
    assert [lease.lost for lease in found.leases] == [False, True]
    assert list(group(found.feed, ARCHIVER).by_partition) == [0]
    assert shown(RunLook(store))[f"trajstore_run_partitions_lost{{run={store.run}}}"] == 1
    text = drawn(found, 120)
    assert re.search(r"^ +1 .* lost +-$", text, re.MULTILINE)
    assert "1 lost: stop what works on the run" in text


def test_looks_at_a_server_that_hangs_end_in_time_and_hold_one_thread(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1, timeout=20.0) as store:
        look = RunLook(store)
        assert look.look(seconds=20.0).backlog is not None
        own_server.pause()
        before = threading.active_count()
        for _ in range(5):
            with pytest.raises(Unavailable, match=r"did not answer a look at the run within 0\.05 s"):
                look.look(seconds=0.05)
        assert threading.active_count() == before + 1
        own_server.resume()
        assert look.look().run == run_name


def test_a_backlog_that_takes_long_is_told_when_it_is_there(store, monkeypatch):
    finish(store)
    gate, measure = threading.Event(), store.backlog
    monkeypatch.setattr(store, "backlog", lambda: gate.wait(20) and measure())
    look = RunLook(store)
    assert look.look(seconds=0.5).backlog is None
    gate.set()
    assert look.look().backlog.trajectories == 1


def test_rates_are_what_came_between_two_looks():
    before = made(time=100.0, hints=10, published=None)
    now = made(time=104.0, hints=30, published=5)
    assert Rates.between(before, now) == Rates(hints=5.0, published=None, commands=0.0, received=0.0, sent=0.0)
    assert Rates.between(now, now) == Rates()


def test_a_server_that_was_started_anew_gives_no_rates():
    before, now = made(time=100.0, hints=10), made(time=104.0, hints=30)
    restarted = msgspec.structs.replace(now, server=msgspec.structs.replace(now.server, uptime=1))
    assert Rates.between(before, restarted) == Rates()


def test_figures_of_another_server_give_no_rates_but_those_of_the_run():
    before, now = made(time=100.0, hints=10), made(time=104.0, hints=30)
    other = msgspec.structs.replace(now, server=msgspec.structs.replace(now.server, run_id="b", commands=400))
    assert Rates.between(before, other) == Rates(hints=5.0, published=0.0)


def test_consumers_of_one_place_are_one():
    held = [
        ConsumerStanding(name="rank-0.0:A", held=2, silent=90.0),
        ConsumerStanding(name="rank-0.0:B", held=3, silent=1.0),
        ConsumerStanding(name="host-1-C", held=1, silent=2.0),
    ]
    found = by_slot(held)
    assert (found["rank-0.0"].held, found["rank-0.0"].silent, found["host-1-C"].held) == (5, 1.0, 1)


# The screen


def made(**changes: object) -> RunStatus:
    """A run with many partitions and consumers, and a long name."""
    partitions = 64
    lags = {number: (number, 2, float(number)) for number in range(partitions)}
    consumers = {
        f"rank-{rank}.0:{'0' * 26}": ConsumerStanding(name=f"rank-{rank}.0:{'0' * 26}", held=rank, silent=rank * 10.0)
        for rank in range(32)
    }
    whole = RunStatus(
        run="exp1",
        location="redis://a-host-with-a-rather-long-name.example.com:6379/0?run=an-experiment-with-a-long-name",
        time=1.7e9,
        hints=1000,
        published=100,
        feed=tuple(
            GroupStanding(name=name, waiting=9, held=1, seconds=63.0, by_partition=lags)
            for name in ("archiver", "materializer")
        ),
        ready=(
            GroupStanding(name="trainer", waiting=12345, held=7, seconds=700.0, by_partition=lags, consumers=consumers),
        ),
        leases=tuple(LeaseStanding(holder=f"host-{'0' * 26}" if n % 2 else "", silent=1.0) for n in range(partitions)),
        server=ServerStanding(name="redis 8.2.1", uptime=9000, clients=8, used_memory=8 << 30, maxmemory=10 << 30),
        archive=ArchiveStanding(location="s3://b", packs=64, by_partition=(1,) * partitions, seconds=3.0),
    )
    return msgspec.structs.replace(whole, **changes)


def drawn(status: RunStatus, width: int, height: int = 1000) -> str:
    console = Console(width=width, height=height, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(screen(status, Rates(hints=1234.5, received=5e7), width=width, height=height))
    return captured.get()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_screen_fits_its_width_and_says_the_same_in_any(width):
    text = drawn(made(), width)
    assert max(map(len, text.splitlines())) <= width
    for said in (
        "80%",
        "1,234 hints/s",
        "50.0 MB/s in",
        "64 packs",
        "32 of 64 partitions",
        "12,345",
        "12 min",
        "rank-31.0",
    ):
        assert said in text, said


@pytest.mark.parametrize("height", [24, 40, 60])
def test_the_screen_fits_its_height_and_counts_what_it_leaves_out(height):
    text = drawn(made(), 100, height)
    assert len(text.splitlines()) <= height
    assert re.search(r"and \d+ more consumers", text)
    assert re.search(r"and \d+ more partitions", text)


def test_the_longest_waiting_come_first():
    text = drawn(made(), 120, 40)
    assert text.index("rank-31.0") < text.index("rank-30.0")
    rows = re.findall(r"^ +(\d+) +\?", text, re.MULTILINE)
    assert rows[:3] == ["63", "62", "61"]


def test_names_from_a_store_do_not_reach_the_terminal_as_they_are():
    hostile = GroupStanding(name="trainer\x1b[2J", consumers={"x": ConsumerStanding(name="[red]x\x1b[2J", held=1)})
    text = drawn(made(ready=(hostile,)), 120)
    assert "\x1b" not in text
    assert "[red]x\\x1b[2J" in text


# The command


def test_json_has_what_is_measured(durable, folder):
    finish(durable)
    result = invoke("status", folder, "--json", "--interval", "0.05")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["run"]) == (0, "main")
    assert document["backlog"]["trajectories"] == 1
    assert {one["name"] for one in document["feed"]} == {ARCHIVER, MATERIALIZER}
    assert document["rates"]["commands"] > 0
    assert len(document["leases"]) == durable.partitions


def test_once_prints_the_screen_to_a_pipe(durable, folder):
    result = invoke("status", folder, "--interval", "0.05", "--no-backlog")
    assert result.exit_code == 0
    assert re.search(r"^feed +archiver ", result.stdout, re.MULTILINE)
    assert "not measured" in result.stdout


def test_an_archive_has_no_status(durable, folder):
    result = invoke("status", folder / "archive")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "wants the run itself" in result.stderr


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_screen_shows_changes_until_it_is_stopped(durable, folder, width):
    with terminal(width, "status", folder, "--interval", "0.1") as screen_:
        screen_.wait_for("0 trajectories")
        finish(durable)
        screen_.wait_for("1 trajectories")
        assert screen_.ended(signal.SIGTERM) == 0
    assert screen_.written.count(b"\x1b[?1049h") == screen_.written.count(b"\x1b[?1049l") == 1  # the screen is put back


def test_the_live_screen_outlives_its_server(own_server, run_name):
    trajstore.open(own_server.url(run_name), partitions=1).close()
    with terminal(100, "status", own_server.url(run_name), "--interval", "0.1") as screen_:
        screen_.wait_for("materializer")
        own_server.kill()
        screen_.wait_for("did not answer")
        seen = len(screen_.written)
        own_server.start()
        screen_.wait_for("materializer", after=seen)
        assert screen_.ended(signal.SIGINT) == 0


def test_the_exporter_serves_the_run_until_it_is_stopped(durable, folder):
    finish(durable)
    with started("status", folder, "--listen", "0", "--log-format", "json") as process:
        url = said_address(process)
        page = get(f"{url}/metrics")
        assert page.status == 200
        assert 'trajstore_run_up{run="main"} 1.0' in page.body
        assert re.search(r'trajstore_run_unarchived_trajectories{partition="\d",run="main"} 1.0', page.body)
        until(lambda: get(f"{url}/readyz").status == 200)
        code, out, _ = ended(process, signal.SIGTERM)
    assert (code, out) == (0, "")
