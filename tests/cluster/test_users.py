"""The access rules of docs/security.md serve on a cluster, with the two rights that docs/cluster.md adds."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.crc import key_slot

import trajstore
from tests.cluster.conftest import StartCluster
from tests.cluster.nodes import Cluster
from tests.security.acl import RULES, load
from tests.security.roles import ACTS, begin, fill

pytestmark = pytest.mark.torch

FURTHER = ("+cluster|slots", "+asking")


@pytest.fixture
def guarded(start_cluster: StartCluster) -> Iterator[Cluster]:
    return start_cluster(appendfsync="always")


def as_user(cluster: Cluster, run: str, role: str, rights: list[str]) -> str:
    """The URL by which a role with these rights opens a run."""
    for node in cluster.nodes:
        with node.client() as client:
            load(client, run, role, rights=rights)
    return cluster.url(run).replace("redis://", f"redis://{run}-{role}:{role}-pw@")


def test_every_role_does_its_work_with_two_rights_more(guarded: Cluster, run_name: str, tmp_path: Path) -> None:
    assert all(right in (Path(__file__).parents[2] / "docs" / "cluster.md").read_text() for right in FURTHER)
    for role, act in ACTS.items():
        run = f"{run_name}-{role}"
        begin(as_user(guarded, run, "admin", [*RULES["admin"], *FURTHER]), tmp_path / role, 10.0)
        fill(guarded.url(run))
        act(as_user(guarded, run, role, [*RULES[role], *FURTHER]), 10.0)


def test_user_who_may_not_ask_where_slots_are_is_told_so(guarded: Cluster, run_name: str, tmp_path: Path) -> None:
    begin(guarded.url(run_name), tmp_path / "archive", 10.0)
    with pytest.raises(trajstore.Unavailable, match=r"refused CLUSTER.*ACL"):
        trajstore.open(as_user(guarded, run_name, "reader", RULES["reader"]), timeout=5.0)


def test_user_who_may_not_look_at_the_server_is_told_so(guarded: Cluster, run_name: str, tmp_path: Path) -> None:
    begin(guarded.url(run_name), tmp_path / "archive", 10.0)
    rights = [*RULES["reader"], *FURTHER, "-info"]
    with pytest.raises(trajstore.Unavailable, match=r"refused INFO.*ACL"):
        trajstore.open(as_user(guarded, run_name, "reader", rights), timeout=5.0)


def test_user_needs_asking_while_a_slot_is_on_its_way(guarded: Cluster, run_name: str, tmp_path: Path) -> None:
    begin(guarded.url(run_name), tmp_path / "archive", 10.0)
    with trajstore.open(guarded.url(run_name)) as store:
        id = store.create().id
        store.flush()
        feed = store.keys.feed(0)
    refused = []

    def look() -> None:
        try:
            reader.events(id)
        except trajstore.Unavailable as error:
            refused.append(str(error))

    for rights in (FURTHER, FURTHER[:1]):
        target = next(node for node in guarded.nodes if node is not guarded.owner(feed))
        with trajstore.open(as_user(guarded, run_name, "reader", [*RULES["reader"], *rights])) as reader:
            assert not refused
            guarded.move(key_slot(feed.encode()), target, between=look)
    assert any("asking" in one for one in refused)
