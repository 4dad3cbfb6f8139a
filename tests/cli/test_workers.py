"""`archive`, `materialize` and `stop`: work is done, progress is told, and they end when asked."""

import json
import signal

import pytest

import trajstore
from tests.builders import record_seed_case
from tests.cli.running import ended, in_terminal, invoke, run, started, until
from trajstore.ready import assembly_name

SEED_BYTES = 5 * 4 + 3 * 8 + 7 * 6 + 2 * 8 + 9 * 6
"""Payloads of the seed case: prompt, A B C with logprobs, their rows, D E with logprobs, their rows."""


def finished(store: trajstore.Store, count: int) -> list[str]:
    """Ids of new completed trajectories."""
    ids = []
    for _ in range(count):
        writer = record_seed_case(store)
        writer.close("completed")
        ids.append(writer.id)
    store.flush()
    return ids


def archived(store: trajstore.Store, ids: list[str]) -> bool:
    """Every event of these trajectories lies in a pack."""
    return all(event.stored != "hot" for id in ids for event in store.events(id))


def ready(store: trajstore.Store) -> list[bytes]:
    """Entries that trainers can read, as they are stored."""
    streams = [
        store.wire.call("XRANGE", store.keys.ready(partition), "-", "+") for partition in range(store.partitions)
    ]
    return [fields[1] for stream in streams for _, fields in stream]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_archive_works_until_it_is_asked_to_stop(durable, folder, how):
    with started("archive", folder, "--pack-seconds", "0", "--json") as process:
        assert "archiving" in process.stderr.readline()
        ids = finished(durable, 3)
        until(lambda: archived(durable, ids), what="the archive")
        code, out, errors = ended(process, how)
    assert code == 0
    account = json.loads(out)
    assert (account["nbytes"], account["stopped"], account["refused"]) == (3 * SEED_BYTES, True, 0)
    assert "stopped after" in errors.splitlines()[-1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_materialize_works_until_it_is_asked_to_stop(durable, folder, how):
    with started("materialize", folder, "--policy", "as_sampled", "--json") as process:
        assert "materializing" in process.stderr.readline()
        ids = finished(durable, 3)
        until(lambda: len(ready(durable)) == 3, what="the ready stream")
        code, out, errors = ended(process, how)
    assert code == 0
    account = json.loads(out)
    assert (account["trajectories"], account["groups"], account["tokens"], account["stopped"]) == (3, 3, 30, True)
    assert "stopped after" in errors.splitlines()[-1]
    for id in ids:
        assert any(id.encode() in entry and b"as_sampled" in entry for entry in ready(durable))


@pytest.mark.parametrize(("options", "seconds"), [((), 7 * 86400), (("--remember-seconds", "60"), 60)])
def test_what_was_published_is_remembered_for_as_long_as_is_said(durable, folder, options, seconds):
    (id,) = finished(durable, 1)
    assert invoke("materialize", folder, "--once", *options).exit_code == 0
    left = durable.wire.call("PTTL", durable.keys.assembly(assembly_name(id, None, None)))
    assert 0.9 * seconds < left / 1000 <= seconds


def test_once_drains_what_is_there_and_exits(durable, folder):
    finished(durable, 2)
    for command, name in (("materialize", "groups"), ("archive", "trajectories")):
        done = run(command, folder, "--once", "--json")
        assert done.returncode == 0
        account = json.loads(done.stdout)
        assert (account[name], account["stopped"]) == (2, False)
        assert "done after" in done.stderr.splitlines()[-1]
        again = json.loads(run(command, folder, "--once", "--json").stdout)
        assert again["trajectories"] == 0


def test_without_json_stdout_stays_empty(durable, folder):
    finished(durable, 1)
    for command in ("materialize", "archive"):
        result = invoke(command, folder, "--once")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "1 trajectories" in result.stderr.splitlines()[-1]


def test_archive_makes_an_archive_for_a_run_at_a_url(durable_server, run_name, tmp_path):
    url = durable_server.url(run_name)
    with trajstore.open(url, partitions=1) as store:
        [id] = finished(store, 1)
        expected = json.loads(invoke("show", url, id, "--json").stdout)
        result = invoke("archive", "--once", "--archive", tmp_path / "archive", env={"TRAJSTORE_URL": url})
        assert result.exit_code == 0, result.stderr
        # Others find the archive by the run.
        assert json.loads(invoke("show", url, id, "--json").stdout) == expected
    assert json.loads(invoke("show", tmp_path / "archive", id, "--json").stdout) == expected


def test_a_worker_shows_its_progress_in_a_terminal(durable, folder):
    finished(durable, 1)
    written = in_terminal(120, "materialize", folder, "--once").decode()
    assert "done after" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # the cursor is back


def test_a_worker_says_in_its_log_how_far_it_is(durable, folder, monkeypatch):
    finished(durable, 1)
    with started("materialize", folder) as process:
        assert "INFO materializing" in process.stderr.readline()
        assert "INFO 1 trajectories, 10 tokens" in process.stderr.readline()
        assert ended(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("command", ["archive", "materialize"])
def test_a_second_signal_ends_a_worker_that_cannot_stop(own_server, run_name, tmp_path, command):
    with trajstore.open(own_server.url(run_name), partitions=1, archive=tmp_path / "archive"):
        with started(command, own_server.url(run_name)) as process:
            assert "ing redis://" in process.stderr.readline()
            own_server.pause()  # a call that waits for this server takes 30 s
            code, out, _ = ended(process, signal.SIGTERM, signal.SIGINT)
            own_server.resume()
        assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        assert out == ""


@pytest.mark.parametrize("command", ["archive", "materialize"])
def test_once_without_a_server_is_an_error(own_server, run_name, tmp_path, command):
    with trajstore.open(own_server.url(run_name), partitions=1, archive=tmp_path / "archive"):
        pass
    own_server.kill()
    result = invoke(command, own_server.url(run_name), "--once", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("trajstore: the server did not answer")


def test_stop_ends_a_server_and_says_whether_there_was_one(durable, folder):
    finished(durable, 1)
    first = invoke("stop", folder, "--json")
    assert (first.exit_code, json.loads(first.stdout)) == (0, {"directory": str(folder), "was_running": True})
    assert first.stderr == f"stopped the server in {folder}\n"
    second = invoke("stop", folder)
    assert (second.exit_code, second.stdout) == (0, "")
    assert second.stderr == f"no server was running in {folder}\n"
    assert len(durable.list()) == 1  # the next call starts it again
