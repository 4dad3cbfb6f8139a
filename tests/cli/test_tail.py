"""`tail`: the run's feed, live, and as one JSON document however it ends."""

import json
import signal

import pytest

import trajstore
from tests.builders import record_seed_case, seed_rows
from tests.cli.running import ended, invoke, started
from trajstore.log.feed import FeedTail
from trajstore.materializer import Materializer


def following(process) -> None:
    """Wait until the tail has its place in the feed."""
    assert "following" in process.stderr.readline()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_tail_json_is_one_document_also_when_it_is_stopped(durable, folder, how):
    with started("tail", folder, "--json") as process:
        following(process)
        assert process.stdout.readline() == "[\n"
        id = record_seed_case(durable, group="prompt-17").id
        durable.flush()
        lines = [process.stdout.readline(), process.stdout.readline()]  # each is there before the next comes
        first = json.loads(lines[0])
        code, rest, errors = ended(process, how)
    assert (code, errors) == (0, "")
    found = json.loads("[" + "".join(lines) + rest)
    assert first == found[0]
    assert (first["id"], first["type"], first["event"], first["note"]) == (id, "SegmentClosed", "2-0", False)
    assert first["group"] == "prompt-17"
    assert (found[-1]["status"], found[-1]["tokens"], found[-1]["segments"]) == ("open", 10, 2)


def test_tail_without_any_event_is_an_empty_array(durable, folder):
    with started("tail", folder, "--json") as process:
        following(process)
        code, out, _ = ended(process, signal.SIGTERM)
    assert code == 0
    assert json.loads(out) == []


def test_tail_prints_a_line_as_it_happens(durable, folder):
    with started("tail", folder, "--count", "1") as process:
        following(process)
        writer = durable.create()
        writer.close("truncated")
        durable.flush()
        code, out, _ = ended(process)
    assert code == 0
    assert f"  {writer.id}  trajectory closed (2-0)     truncated  0 tokens  0 segments\n" in out


def test_tail_from_start_shows_what_the_feed_holds(store, backend):
    writer = record_seed_case(store)
    writer.observe(seed_rows(1, 9), start=0, source="trainer")
    writer.close("completed")
    store.flush()
    result = invoke("tail", backend.url(store.run), "--from-start", "--seconds", "0.2", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert {one["id"] for one in found} == {writer.id}
    assert {one["type"] for one in found} == {"SegmentClosed", "RoutingObserved", "TrajectoryClosed"}
    assert {one["event"] for one in found if one["note"]} == {"1-0"}
    assert found[-1]["status"] == "completed"
    assert [one["time"] for one in found] == sorted(one["time"] for one in found)
    lines = invoke("tail", backend.url(store.run), "--from-start", "--seconds", "0.2").stdout.splitlines()
    assert len(lines) == len(found)
    one = invoke("tail", backend.url(store.run), "--from-start", "--count", "1", "--json").stdout
    assert json.loads(one) == found[:1]


def test_tail_begins_with_what_comes_now(seed, folder):
    assert json.loads(invoke("tail", folder, "--seconds", "0.1", "--json").stdout) == []


def test_following_the_feed_loses_nothing_between_polls_and_takes_nothing(store):
    tail = FeedTail(store.wire, store.keys)
    assert tail.poll(count=10, block=0.01) == []
    ids = []
    for _ in range(3):
        writer = store.create()
        writer.close("completed")
        store.flush()
        ids.append(writer.id)
    seen = []
    while hints := tail.poll(count=1, block=0.01):
        seen += hints
    assert sorted(hint.id for hint in seen) == sorted(ids)
    assert Materializer(store).run(once=True).trajectories == 3


def test_an_error_while_following_still_leaves_one_document(own_server, run_name):
    with trajstore.open(own_server.url(run_name), partitions=1) as store:
        record_seed_case(store)
        store.flush()
        with started("tail", own_server.url(run_name), "--from-start", "--json") as process:
            following(process)
            lines = [process.stdout.readline(), process.stdout.readline()]
            own_server.kill()
            code, rest, errors = ended(process)
    assert code == 1
    assert errors.startswith("trajstore: the server did not answer")
    assert json.loads("".join(lines) + rest)


def test_a_closed_pipe_ends_tail_quietly(durable, folder):
    with started("tail", folder) as process:
        following(process)
        process.stdout.close()
        durable.create().close("completed")
        durable.flush()
        assert process.stderr.read() == ""
        assert process.wait(20) == 1
