"""Trainers and materializers end as `kill -9` ends them: each trajectory is trained on exactly once by checkpoint.

By acknowledgement it is at least once. Real processes, and the counts are those of what they wrote.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest

from tests.consumers.rollouts import finish, look, wait_until
from trajstore_trainer import TrajectoryDataset

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]

MATERIALIZE = """
import sys
import trajstore
from trajstore.materializer import Materializer

with trajstore.open(sys.argv[1], create=False) as store:
    Materializer(store, claim_seconds=0.5).run()
"""

TRAIN_WITH_CHECKPOINTS = """
import json, os, signal, sys
from trajstore_trainer import TrajectoryDataset

folder, rank, world, source, target, every, die_at, die_on = sys.argv[1:]

def reach(point, step):
    if (die_at, point, step) == ("stand still", "committed", int(die_on)):
        signal.pause()
    if (point, step) == (die_at, int(die_on)):
        os.kill(os.getpid(), signal.SIGKILL)

with TrajectoryDataset(
    folder, rank=int(rank), world_size=int(world), checkpoints=True, lease=2.0, timeout=120.0, prefetch_groups=2
) as dataset:
    trained = []
    if source:
        checkpoint = json.loads(source)
        trained = checkpoint["trained"]
        dataset.load_state_dict(checkpoint["state"])
    for step, ready in enumerate(dataset, 1):
        reach("handed out", step)
        trained += [one.id for one in ready.trajectories]
        if step % int(every) == 0:
            state = dataset.state_dict()
            with open(target + ".new", "w") as file:
                json.dump({"trained": trained, "state": state}, file)
            reach("checkpoint written", step)
            os.rename(target + ".new", target)
            reach("checkpoint durable", step)
            dataset.commit(state)
            reach("committed", step)
"""

TRAIN_WITH_ACKNOWLEDGEMENT = """
import os, signal, sys
from trajstore_trainer import TrajectoryDataset

folder, rank, world, journal, die_on, die_at = sys.argv[1:]
with TrajectoryDataset(
    folder, rank=int(rank), world_size=int(world), lease=2.0, timeout=120.0, prefetch_groups=2
) as dataset, open(journal, "a") as file:
    for step, ready in enumerate(dataset, 1):
        if die_at == "handed out" and step == int(die_on):
            os.kill(os.getpid(), signal.SIGKILL)
        for one in ready.trajectories:
            file.write(one.id + "\\n")
        file.flush()
        if die_at == "trained" and step == int(die_on):
            os.kill(os.getpid(), signal.SIGKILL)
        dataset.acknowledge()
"""

HOLD = """
import sys
import trajstore
from trajstore_trainer import TrajectoryDataset

with TrajectoryDataset(sys.argv[1], rank=0, world_size=2, checkpoints=True, lease=1.0, timeout=60.0) as dataset:
    next(iter(dataset))
    state = dataset.state_dict()
    print("holds", flush=True)
    sys.stdin.readline()
    for call in (lambda: dataset.commit(state), lambda: next(iter(dataset))):
        try:
            call()
            print("went on", flush=True)
        except trajstore.Fenced:
            print("fenced", flush=True)
"""


@contextmanager
def process(code, *arguments, **options):
    """A Python process that does not outlive the block."""
    with subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **options) as started:
        try:
            yield started
        finally:
            started.kill()


def produce(store, first, count):
    """`count` groups of two, closed and flushed, not materialized; their ids."""
    return [
        finish(store, group=f"g{first + i}", group_size=2, seed=first + i).id for i in range(count) for _ in range(2)
    ]


def trained_of(files):
    return [id for file in files if file.exists() for id in json.loads(file.read_text())["trained"]]


@pytest.mark.parametrize("last_world", [2, 3, 1])
def test_each_trajectory_is_in_the_checkpoints_exactly_once_whatever_is_killed(embedded, tmp_path, last_world):
    """Two ranks; one dies at a named point, the job ends and begins again from its checkpoints; materializers die too.
    Then a job of another size goes on."""
    made, folder = [], tmp_path / "store"
    files = [tmp_path / f"checkpoint-{rank}" for rank in range(2)]
    for die_at in ("handed out", "checkpoint written", "checkpoint durable", "committed"):
        made += produce(embedded, len(made) // 2, 16)
        sources = [file.read_text() if file.exists() else "" for file in files]
        with (
            process(MATERIALIZE, folder) as materializer,
            process(TRAIN_WITH_CHECKPOINTS, folder, 0, 2, sources[0], files[0], 2, "stand still", 8),
            process(TRAIN_WITH_CHECKPOINTS, folder, 1, 2, sources[1], files[1], 2, die_at, 4) as victim,
        ):
            assert victim.wait(120) == -signal.SIGKILL
            wait_until(files[0].exists, seconds=60)  # the other one may have been slower to start
            materializer.kill()
    before = trained_of(files)
    assert len(set(before)) == len(before)
    assert 0 < len(before) < len(made)
    states = [json.loads(file.read_text())["state"] for file in files]
    later = [tmp_path / f"later-{rank}" for rank in range(last_world)]
    source = json.dumps({"trained": [], "state": states})
    ranks = [(folder, rank, last_world, source, file, 1, "never", 0) for rank, file in enumerate(later)]
    with ExitStack() as job:
        job.enter_context(process(MATERIALIZE, folder))
        for rank in ranks:
            job.enter_context(process(TRAIN_WITH_CHECKPOINTS, *rank))
        wait_until(lambda: len(set(trained_of([*files, *later]))) == len(made), seconds=120)
        wait_until(lambda: look(embedded) == [])
    assert sorted(trained_of([*files, *later])) == sorted(made)


def test_each_trajectory_is_trained_on_at_least_once_whoever_dies_for_good(embedded, tmp_path):
    """A rank dies with groups handed out, another after training and before it acknowledged; nobody restarts them."""
    folder, journals = tmp_path / "store", [tmp_path / f"journal-{rank}" for rank in range(3)]
    made = produce(embedded, 0, 12)
    with (
        process(MATERIALIZE, folder) as materializer,
        process(TRAIN_WITH_ACKNOWLEDGEMENT, folder, 1, 3, journals[1], 2, "handed out") as first,
        process(TRAIN_WITH_ACKNOWLEDGEMENT, folder, 2, 3, journals[2], 2, "trained") as second,
    ):
        assert first.wait(60) == second.wait(60) == -signal.SIGKILL
        materializer.kill()
    made += produce(embedded, 12, 6)
    with (
        process(MATERIALIZE, folder),
        process(TRAIN_WITH_ACKNOWLEDGEMENT, folder, 0, 3, journals[0], 0, "never"),
    ):
        wait_until(lambda: journals[0].exists() and look(embedded) == [] and counted(journals).keys() == set(made), 60)
    counts = counted(journals)
    assert counts.keys() == set(made)
    twice = {id for id, count in counts.items() if count > 1}
    assert counts.total() == len(made) + 2
    assert twice == set(journals[2].read_text().split()[-2:]), "only what was trained on and not acknowledged"


def counted(journals):
    return Counter(id for journal in journals if journal.exists() for id in journal.read_text().split())


def test_rank_that_stood_still_while_it_was_started_again_elsewhere_is_fenced(embedded, tmp_path):
    """It cannot commit what its successor has been given meanwhile, nor go on."""
    made = produce(embedded, 0, 1)
    with (
        process(MATERIALIZE, tmp_path / "store"),
        process(HOLD, tmp_path / "store", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as zombie,
        TrajectoryDataset(embedded, rank=0, world_size=2, checkpoints=True, lease=1.0, timeout=60.0) as heir,
    ):
        assert zombie.stdout.readline() == "holds\n"
        zombie.send_signal(signal.SIGSTOP)
        ready = next(iter(heir))
        assert sorted(one.id for one in ready.trajectories) == sorted(made)
        zombie.send_signal(signal.SIGCONT)
        told, _ = zombie.communicate("go on\n", timeout=60)
        assert told.split() == ["fenced", "fenced"]
        heir.commit(heir.state_dict())
        assert look(embedded) == []
