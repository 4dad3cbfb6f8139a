"""A dataset's state as plain data: found wherever it lies, and whether those of all ranks are there."""

import json

import pytest

import trajstore
from trajstore.ready import EntryPlace
from trajstore_trainer.checkpoint import DatasetState, find_states, require_enough, require_own
from trajstore_trainer.filtered import Filtered

pytestmark = pytest.mark.torch


def state(rank=0, world_size=1, worker=0, workers=1, entries=("0/17-0",), filtered=()):
    return DatasetState(
        run="R",
        group="trainer",
        rank=rank,
        world_size=world_size,
        worker=worker,
        workers=workers,
        consumer=f"rank-{rank}.{worker}:X",
        entries=list(entries),
        filtered=list(filtered),
    )


def test_state_survives_json_with_what_was_filtered():
    record = Filtered(entry="1/9-2", group="g", version=3, why="", reasons={"a": "failed"})
    before = state(entries=("0/17-0", "1/9-2"), filtered=(record,))
    (after,) = find_states(json.loads(json.dumps(before.to_dict())))
    assert after == before
    assert after.places == [EntryPlace(0, "17-0"), EntryPlace(1, "9-2")]


def test_states_are_found_at_any_depth_and_in_order():
    states = [state(rank, 3).to_dict() for rank in range(3)]
    tree = {"model": "weights", "steps": [1, 2, b"x"], "data": {"ranks": (states[0], [states[1], {"deep": states[2]}])}}
    assert [one.rank for one in find_states(tree)] == [0, 1, 2]
    assert list(find_states({"a": [1, None, "text"]})) == []


def test_own_states_only():
    assert len(require_own([state().to_dict()], run="R", group="trainer")) == 1
    for other in ({"run": "S"}, {"group": "evaluation"}):
        with pytest.raises(trajstore.Conflict):
            require_own([state().to_dict() | other], run="R", group="trainer")
    with pytest.raises(trajstore.SchemaError, match="no state"):
        require_own([], run="R", group="trainer")


@pytest.mark.parametrize("broken", [{"entries": None}, {"entries": [3]}, {"rank": "0"}, {"trajstore_dataset": 9}])
def test_what_is_no_state_of_this_version_is_refused(broken):
    with pytest.raises(trajstore.SchemaError):
        list(find_states(state().to_dict() | broken))


@pytest.mark.parametrize(
    ("there", "world", "rank", "world_size"),
    [
        ([(0, 0)], 1, 0, 1),
        ([(0, 0), (1, 0)], 2, 1, 2),
        ([(1, 0)], 2, 1, 2),
        ([(0, 0), (1, 0)], 2, 2, 3),
        ([(0, 0), (1, 0)], 2, 0, 1),
    ],
)
def test_states_of_all_ranks_or_of_this_one_are_enough(there, world, rank, world_size):
    require_enough([state(r, world, w) for r, w in there], rank=rank, world_size=world_size)


def test_state_of_one_worker_is_enough_for_it():
    require_enough([state(worker=1, workers=2)], rank=0, world_size=1)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (2, 3), (1, 4)])
def test_missing_ranks_are_named_where_they_are_needed(rank, world_size):
    states = [state(1, 3), state(2, 3)] if world_size != 3 else [state(0, 3), state(1, 3)]
    with pytest.raises(trajstore.SchemaError, match=f"rank {0 if world_size != 3 else 2} are missing"):
        require_enough(states, rank=rank, world_size=world_size)
