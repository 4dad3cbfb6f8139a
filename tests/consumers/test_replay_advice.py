"""Whatever `doctor` advises works on what it was found on: each command is run, on a copy of the run."""

import json
import re
import shlex
import shutil
from contextlib import suppress

import pytest

torch = pytest.importorskip("torch")

import trajstore  # noqa: E402
from tests.cli.running import invoke  # noqa: E402
from tests.consumers.replayed import aborted_rollout, begin_rollout, model_of, save_models  # noqa: E402
from tests.consumers.rollouts import finish, materialize  # noqa: E402
from trajstore.archiver import Archiver  # noqa: E402
from trajstore.log.feed import MATERIALIZER, FeedFollower  # noqa: E402
from trajstore.ready_follower import ReadyFollower  # noqa: E402
from trajstore_transformers import TransformersEngine  # noqa: E402

pytestmark = pytest.mark.torch

LOOKS = {"events", "replay", "show", "status", "verify", "why"}
"""Commands that change nothing, and so need no copy."""


def ended(store, engine, reason, status=None, **options):
    """A rollout whose last segment ended so, perhaps closed."""
    writer, segment = begin_rollout(store, engine, tokens=3, **options)
    engine.abort_request(writer.id)
    segment.close(reason)
    if status:
        writer.close(status)
    return writer.id


def left(store, engine, *, lost, context=True):
    """A rollout in mid-segment, or one that another writer closed as aborted."""
    if context:
        writer, _ = begin_rollout(store, engine, tokens=3)
        engine.abort_request(writer.id)
    else:
        writer = store.create(routing=engine.routing_spec)
        writer.segment(engine="test/1")
    store.flush()
    if lost:
        store.get(writer.id).close("aborted", takeover=True)
    return writer.id


def holed(store, engine):
    """A rollout that was closed as aborted, and of which events were lost since."""
    id = aborted_rollout(store)
    again = store.get(id)
    for token in (7, 8):
        with again.segment(context=[token]) as segment:
            segment.tokens([9])
            store.flush()
    store.wire.call("XDEL", store.keys.entries(id), "4-0")


@pytest.fixture
def folder(tmp_path):
    """A run in which everything is wrong that can be, its server stopped."""
    with (
        trajstore.open(tmp_path / "run", partitions=2, ack="fsync") as store,
        TransformersEngine(model_of("v1"), weight_version="v1", seed=3) as engine,
    ):
        finish(store)
        Archiver(store).run(once=True)
        materialize(store)
        holed(store, engine)
        for lost in (False, True):
            for context in (False, True):
                left(store, engine, lost=lost, context=context)
        for reason in ("stop", "length", "error"):
            ended(store, engine, reason)
        for reason in ("stop", "length", "abort"):
            ended(store, engine, reason, "aborted")
        ended(store, engine, "error", "failed")
        ended(store, engine, "length", "truncated", group="late", group_size=3)
        store.create(group="late", group_size=3)
        rewound = store.create()
        for base in (0, 1):
            with rewound.segment(base=base, context=[1, 2, 3]) as segment:
                segment.close("stop")
        rewound.close()
        store.flush()
        FeedFollower(store.wire, store.keys, MATERIALIZER, "gone").poll([0], count=1)
        ReadyFollower(store.wire, store.keys, "look", "gone").leave()
        with suppress(trajstore.Fenced):
            store.close()
    return tmp_path / "run"


def advised(store, *options):
    """`(kind, words of a command)` of all that `doctor` advises."""
    found = json.loads(invoke("doctor", store, "--stale-seconds", "0", "--json", *options).stdout)
    return [
        (finding["kind"], shlex.split(command))
        for finding in found
        for command in re.findall("`(trajstore .*?)`", finding["what_to_do"])
    ]


def works(words, store, tmp_path):
    """Run a command of the advice; on a copy of the store if it changes anything."""
    given = {"DIR": tmp_path / "v1", "N": 5, "R": 1.0}
    _, name, where, *rest = words
    assert where == str(store)
    rest = [given.get(word, word) for word in rest]
    if name in ("archive", "materialize"):
        rest.append("--once")
    if name not in LOOKS:
        where = tmp_path / "copy"
        shutil.copytree(store, where)
    try:
        result = invoke(name, where, *rest)
    finally:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    assert result.exit_code == 0, f"{shlex.join(words)}: {result.output}"


def test_every_command_that_doctor_advises_works(folder, tmp_path):
    save_models(tmp_path)
    commands = advised(folder)
    by_kind = {kind: {words[1] for other, words in commands if other == kind} for kind, _ in commands}
    assert by_kind == {
        "aborted": {"resume", "close"},
        "backlog": {"archive"},
        "failed": {"replay"},
        "gap": {"show", "resume"},
        "idle": {"resume", "close"},
        "lost": {"resume", "close", "why"},
        "open-segment": {"resume", "close"},
        "superseded": {"replay"},
        "unbegun": {"close"},
        "unfinished": {"materialize"},
        "unfollowed": {"archive", "materialize"},
        "untaken": {"consumers", "status"},
    }
    for _, words in commands:
        works(words, folder, tmp_path)


def test_of_an_archive_nothing_is_advised_that_needs_its_run(folder, tmp_path):
    with trajstore.open(folder, ack="fsync") as store:
        Archiver(store, abandon_seconds=0.0).run(once=True)
    commands = advised(folder / "archive", "--every-log")
    assert {words[1] for _, words in commands} <= LOOKS
    assert {kind for kind, _ in commands} >= {"failed", "superseded"}
    for _, words in commands:
        works(words, folder / "archive", tmp_path)
