"""Publishing where the record's number is taken: by the archiver itself, whose put was sent twice, or by another."""

from pathlib import Path

import pytest

import trajstore
from tests.archive.test_compaction import compacted, live
from tests.builders import record_seed_case
from tests.cli.running import invoke
from tests.core.packs import pack
from tests.s3 import Proxy
from trajstore.archive.record import record_path
from trajstore.archiver import Archiver


@pytest.fixture
def resending(s3):
    """A proxy that sends the put of every record twice, and hands on the answer to the second."""

    def rule(request, ask):
        if request.method == "PUT" and "/manifest/" in request.path:
            statuses.append(ask(request).status)
            answer = ask(request)
            statuses.append(answer.status)
            return answer
        return ask(request)

    statuses: list[int] = []
    with Proxy(s3, rule) as proxy:
        yield proxy
        assert statuses == [200, 412] * (len(statuses) // 2), "the record was there, and was not replaced"
        assert statuses


@pytest.fixture
def on_s3(folder, s3, run_name, resending):
    place = s3.url(run_name)
    with trajstore.open(folder, partitions=1, ack="fsync", archive=place, archive_options=resending.options) as store:
        yield store


def rounds(store, count):
    """So many packs of a finished trajectory each; tokens by id."""
    found = {}
    for _ in range(count):
        trajectory = record_seed_case(store)
        found[trajectory.id] = trajectory.token_ids.tolist()
        store.flush()
        assert Archiver(store).run(once=True).packs == 1
    return found


def test_record_that_was_sent_twice_is_the_archivers_own_and_keeps_its_pack(on_s3):
    found = rounds(on_s3, 1)
    (record,) = live(on_s3.archive)
    files = {file.path for file in on_s3.archive.root.storage.list(f"packs/{record.pack}")}
    assert files == {f"packs/{record.pack}/{name}" for name in record.files}
    assert {id: on_s3.load(id).token_ids.tolist() for id in found} == found


def test_compaction_whose_record_was_sent_twice_is_one(on_s3):
    found = rounds(on_s3, 2)
    record = compacted(on_s3.archive)
    assert [one.pack for one in live(on_s3.archive)] == [record.pack]
    assert {id: on_s3.load(id).token_ids.tolist() for id in found} == found


@pytest.mark.parametrize("theirs", [b"", b"{}"])
def test_pack_stays_where_nobody_can_say_whose_its_number_is(durable, folder, theirs):
    """An unreadable record may name it. `gc` leaves it, too; a rebuild takes it in."""
    trajectory = record_seed_case(durable)
    durable.flush()
    path = Path(folder) / "archive" / record_path(0, 1)

    def damage(step):
        if step == "moved":
            path.parent.mkdir(parents=True)
            path.write_bytes(theirs)

    entries, _ = durable.hot.read(trajectory.id)
    with pytest.raises(trajstore.Fenced):
        pack(durable, trajectory.id, entries=entries, on_step=damage)
    (place,) = (Path(folder) / "archive" / "packs" / "00").iterdir()
    assert (place / "events").is_dir()
    assert invoke("rebuild", folder).exit_code == 0
    alone = trajstore.open_archive(folder)
    assert [event.id for event in alone.events(trajectory.id)] == [e.id for e in durable.events(trajectory.id)]
    assert {event.stored for event in alone.events(trajectory.id)} == {f"00/{place.name}"}
