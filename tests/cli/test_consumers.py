"""`trajstore consumers`: which groups take finished trajectories, and the end of one."""

import json

import pytest

from tests.cli.running import invoke
from trajstore.materializer import Materializer
from trajstore.ready_follower import ReadyFollower


@pytest.fixture
def published(durable, seed):
    """One trajectory is ready; the group `look` has it in hand, and its consumer is gone."""
    Materializer(durable, group_seconds=0.0).run(once=True)
    look = ReadyFollower(durable.wire, durable.keys, "look", "rank-0")
    assert len(look.poll(count=1)) == 1


def test_groups_are_listed_with_what_is_kept_for_them(folder, published):
    shown = [line.split() for line in invoke("consumers", folder).stdout.splitlines()]
    rows = {cells[0]: cells[1:3] + cells[-1:] for cells in shown if cells and cells[0] in ("look", "trainer")}
    assert rows == {"look": ["0", "1", "1"], "trainer": ["1", "0", "0"]}
    found = {one["name"]: one for one in json.loads(invoke("consumers", folder, "--json").stdout)}
    assert (found["look"]["held"], found["trainer"]["waiting"]) == (1, 1)
    assert found["look"]["consumers"]["rank-0"]["held"] == 1
    assert all(one["seconds"] > 0 for one in found.values())


def test_group_is_removed_once_it_has_no_consumers_or_by_force(folder, durable, published):
    refused = invoke("consumers", folder, "--remove", "look")
    assert refused.exit_code == 1
    assert "has consumers: rank-0" in refused.stderr
    assert "--force" in refused.stderr
    removed = invoke("consumers", folder, "--remove", "look", "--force", "--json")
    assert removed.exit_code == 0
    assert [one["name"] for one in json.loads(removed.stdout)] == ["trainer"]
    assert "consumer group 'look' is removed" in removed.stderr
    ReadyFollower(durable.wire, durable.keys, "look", "rank-0").leave()
    assert invoke("consumers", folder, "--remove", "look").exit_code == 0
    assert "is the last consumer group" in invoke("consumers", folder, "--remove", "trainer").stderr


def test_what_cannot_be_removed_is_said(folder, published):
    missing = invoke("consumers", folder, "--remove", "luck")
    assert missing.exit_code == 1
    assert "no consumer group 'luck'; its groups: look, trainer" in missing.stderr
    assert invoke("consumers", folder, "--force").exit_code == 2
