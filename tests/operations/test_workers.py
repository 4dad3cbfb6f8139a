"""Workers as processes: what they tell over HTTP while they run, and how they end."""

import json
import re
import signal
import subprocess
import sys

import pytest

import trajstore
from tests.cli.running import ended, environment, invoke, started, until
from tests.consumers.rollouts import finish, materialize
from tests.operations.exposed import parsed
from tests.operations.http import get, said_address

WORKERS = {"archive": "trajstore_archiver_trajectories_total", "materialize": "trajstore_materializer_groups_total"}


@pytest.mark.parametrize("command", WORKERS)
def test_a_worker_tells_how_it_is_and_what_it_has_done(durable, folder, command):
    with started(command, folder, "--listen", "0", "--log-format", "json") as process:
        url = said_address(process)
        assert get(f"{url}/healthz") == (200, "alive\n")
        assert get(f"{url}/readyz") == (200, "ready\n")
        finish(durable)
        until(lambda: parsed(get(f"{url}/metrics").body)[f"{WORKERS[command]}{{run=main}}"] == 1)
        page = parsed(get(f"{url}/metrics").body)
        name = {"archive": "archiver", "materialize": "materializer"}[command]
        assert page[f"trajstore_worker_in_trouble{{run=main,worker={name}}}"] == 0
        assert page["process_resident_memory_bytes{}"] > 0
        assert ended(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("command", WORKERS)
def test_a_worker_whose_server_is_away_is_alive_and_not_ready(own_server, run_name, tmp_path, command):
    trajstore.open(own_server.url(run_name), partitions=1, archive=tmp_path / "archive").close()
    with started(command, own_server.url(run_name), "--listen", "0", "--log-format", "json") as process:
        url = said_address(process)
        until(lambda: get(f"{url}/readyz").status == 200)
        own_server.kill()
        until(lambda: get(f"{url}/readyz").status == 503)
        assert get(f"{url}/healthz").status == 200
        until(lambda: "in_trouble" in get(f"{url}/metrics").body and trouble(url) == 1)
        own_server.start()
        until(lambda: get(f"{url}/readyz").status == 200 and trouble(url) == 0)
        assert ended(process, signal.SIGTERM)[0] == 0


def trouble(url):
    page = parsed(get(f"{url}/metrics").body)
    return next(value for name, value in page.items() if name.startswith("trajstore_worker_in_trouble"))


@pytest.mark.parametrize("command", WORKERS)
def test_a_worker_that_cannot_finish_is_ended_at_the_drain_timeout(own_server, run_name, tmp_path, command):
    trajstore.open(own_server.url(run_name), partitions=1, archive=tmp_path / "archive").close()
    options = ("--drain-timeout", "0.5", "--log-format", "json", "--json")
    with started(command, own_server.url(run_name), *options) as process:
        assert "started" in process.stderr.readline()
        own_server.pause()  # a call that waits for this server takes 30 s
        code, out, errors = ended(process, signal.SIGTERM)
        own_server.resume()
    assert (code, out) == (1, "")
    assert [json.loads(line)["event"] for line in errors.splitlines()][-2:] == ["stopping", "drain-overdue"]


def test_an_archiver_finishes_the_pack_at_hand_before_it_ends(durable, folder):
    """Whenever it is asked: what it has published is whole, and what it has not is where it was."""
    ids = [finish(durable).id for _ in range(20)]
    with started("archive", folder, "--pack-seconds", "0", "--log-format", "json") as process:
        assert "started" in process.stderr.readline()
        until(lambda: any(event.stored != "hot" for event in durable.events(ids[0])))
        code, _, errors = ended(process, signal.SIGTERM)
    assert code == 0
    assert "left-uncleanly" not in errors
    assert invoke("verify", folder).exit_code == 0
    assert all(len(durable.load(id)) == 5 for id in ids)
    assert all(not lease.holder for lease in status_of(durable).leases)


def status_of(store):
    from trajstore.status import measure_status

    return measure_status(store)


@pytest.mark.torch
def test_a_trainer_that_turns_sigterm_into_an_exit_leaves_its_claims_to_the_next(durable, folder):
    """As docs/operations.md says, also from within a wait for the next group."""
    from trajstore_trainer import TrajectoryDataset

    finish(durable, group="g", group_size=1)
    materialize(durable)
    code = (
        "import signal, sys\n"
        "from trajstore_trainer import TrajectoryDataset\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))\n"
        "with TrajectoryDataset(sys.argv[1]) as dataset:\n"
        "    for _ in dataset:\n"
        "        print('handed out', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    with process:
        assert process.stdout.readline() == "handed out\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    with TrajectoryDataset(durable, timeout=20.0) as dataset:  # at once, not after the lease of 60 s
        assert next(iter(dataset)).group == "g"
        assert dataset.counts.again == 1


def test_an_address_that_is_none_is_wrong_usage():
    result = invoke("archive", "runs/none", "--listen", "::1:80")
    assert result.exit_code == 2
    assert re.search("no address to listen on", result.stderr)
