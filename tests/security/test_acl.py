"""Least privilege: each role works under the rules of docs/security.md, needs them all, and no run has another's."""

from collections.abc import Iterator

import pytest

import trajstore
from tests.conftest import REAL
from tests.security.acl import RULES, allows, denials, load, recorded, url_as
from tests.security.roles import ACTS, begin, fill
from tests.servers import RealServer, binary_of, running

pytestmark = pytest.mark.torch

SELDOM = {
    "producer": {"+unwatch"},  # another was first, which is seen before anything is sent
    "archiver": {"+persist", "+xlen", "+unwatch"},  # a note that comes while keys are about to go; one only created
    "admin": {"+unwatch"},
}
"""Rights that a race or a long time brings into use, and no act."""

HIDDEN = [[b"CONFIG", b"GET", b"appendfsync"]]
"""Sent by whoever has the right to it; the server does not tell of such commands."""


@pytest.fixture(scope="module", params=REAL)
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A server with users."""
    if binary_of(request.param) is None:
        pytest.skip(f"backend {request.param}: no server of that kind on this machine")
    with running(request.param, tmp_path_factory.mktemp("guarded"), appendfsync="always") as server:
        yield server


def test_the_page_has_rules_for_every_role():
    assert RULES.keys() == ACTS.keys()


@pytest.mark.parametrize("role", ACTS)
def test_a_role_needs_all_its_rights_and_no_other(guarded, run_name, tmp_path, role):
    """Taking any one away, the server would refuse a command that the role was seen to send."""
    with guarded.client() as client:
        user = load(client, run_name, role)
        with recorded(guarded) as commands:
            if role == "admin":
                begin(url_as(guarded, run_name, role), tmp_path / "archive", 10.0)
                sent = commands()
            else:
                begin(guarded.url(run_name), tmp_path / "archive", 10.0)
                sent = []
            fill(guarded.url(run_name))
            commands()
            ACTS[role](url_as(guarded, run_name, role), 10.0)
            sent += [*commands(), *HIDDEN]
        assert denials(client, user) == []
        unused = []
        for right in RULES[role]:
            load(client, run_name, role, rights=[one for one in RULES[role] if one != right])
            if all(allows(client, user, command) for command in sent):
                unused.append(right)
        assert set(unused) == SELDOM.get(role, set())


@pytest.mark.parametrize("other", ["{}x", "{}:00", "{}:0x", "{}:00:00"])
def test_no_role_reaches_into_another_run(guarded, run_name, tmp_path, other):
    """Whatever the other is called: `exp1x` or `exp1:00` beside `exp1`."""
    name = other.format(run_name)
    with trajstore.open(guarded.url(name), archive=tmp_path / "archive", partitions=1) as store:
        _fill_other(store)
    with guarded.client() as client:
        keys = [key for key in client.keys("*") if name.encode() in key]
        assert len(keys) >= 8
        for role in ACTS:
            user = load(client, run_name, role)
            for key in keys:
                for command in _uses(key):
                    assert not allows(client, user, command), f"{user} may {command}"


def test_reader_that_writes_is_told_what_it_may_not(guarded, run_name, tmp_path):
    """The command, and where the rules of its role stand."""
    begin(guarded.url(run_name), tmp_path / "archive", 10.0)
    with guarded.client() as client:
        load(client, run_name, "reader")
    with trajstore.open(url_as(guarded, run_name, "reader"), create=False, timeout=1.0) as store:
        id = store.create().id
        with pytest.raises(trajstore.Unavailable, match=r"not written.*refused MULTI.*lacks.*docs/security\.md"):
            store.flush(id)
        with pytest.raises(trajstore.Unavailable, match=r"refused UNLINK: .*docs/security\.md"):
            store.wire.call("UNLINK", store.keys.entries("x"))


def test_writer_without_a_right_is_told_which_command_was_refused(guarded, run_name, tmp_path):
    """Also where the server says only that some key was refused."""
    begin(guarded.url(run_name), tmp_path / "archive", 10.0)
    with guarded.client() as client:
        load(client, run_name, "producer", rights=[one for one in RULES["producer"] if not one.endswith(":feed")])
    with trajstore.open(url_as(guarded, run_name, "producer"), create=False, timeout=1.0) as store:
        trajectory = store.create()
        trajectory.close()
        with pytest.raises(trajstore.Unavailable, match=r"not written.*refused XADD: .*docs/security\.md"):
            store.flush(trajectory.id)


def _fill_other(store: trajstore.Store) -> None:
    with store.create(id="theirs").segment(context=range(500)) as segment:
        segment.tokens([1])


def _uses(key: bytes) -> list[list[bytes]]:
    return [
        [b"GET", key],
        [b"EXISTS", key],
        [b"XRANGE", key, b"-", b"+"],
        [b"XADD", key, b"*", b"e", b""],
        [b"HSET", key, b"f", b"v"],
        [b"SET", key, b"v"],
        [b"UNLINK", key],
        [b"WATCH", key],
    ]
