"""Packs written anew as one: every fold stays what it was, deleted data is gone, no crash or race loses anything."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import combinations

import msgspec
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.archive.test_archiver import everything
from tests.archive.test_stored_once import WIDE, counts, rollout
from tests.builders import SPEC, record_seed_case, rows
from tests.cli.running import invoke
from tests.data.stores import make
from trajstore.archive.index import encode_table, make_table
from trajstore.archive.pack import ARRAYS
from trajstore.archive.record import encode_record
from trajstore.archive.upkeep.candidates import Candidate, Candidates, due
from trajstore.archive.upkeep.compaction import compact
from trajstore.archive.upkeep.garbage import find_garbage, remove_garbage
from trajstore.archiver import Archiver
from trajstore.opening import read_archive

STEPS = ("staged", "synced", "moved", "recorded")


def live(reader, partition=0):
    manifest = reader.manifest(partition)
    manifest.refresh()
    return list(manifest.live())


def compacted(reader, records=None, **options):
    """Compact these records of partition 0, all live ones unless told."""
    return compact(reader, 0, live(reader) if records is None else records, writer="test", **options)


def compact_all(reader, **options):
    """Whatever is due, until nothing is; returns how many compactions that took."""
    done = 0
    for partition in range(reader.info.partitions):
        candidates = Candidates(reader, partition, remnants=True, **options)
        while True:
            while not candidates.look():
                pass
            records = candidates.due()
            if not records:
                break
            compact(reader, partition, records, writer="test")
            done += 1
    return done


def collect(reader):
    """Remove garbage at once."""
    found = list(find_garbage(reader, now=time.time(), grace=0.0))
    remove_garbage(reader, found)
    return found


def data_files(reader):
    """Packs that have files with events or payloads."""
    return {
        "/".join(file.path.split("/")[1:3])
        for file in reader.root.storage.list("packs")
        if file.path.split("/")[3] in ("tokens", "logprobs", "routed", "events")
    }


def test_small_packs_become_one_and_every_read_stays_the_same(durable, archive, folder):
    ids, before = [], {}
    for _ in range(9):
        trajectory = record_seed_case(durable)
        archive()
        ids.append(trajectory.id)
        before[trajectory.id] = everything(durable, trajectory.id)
    summaries = durable.list()
    assert compact_all(durable.archive) == 1
    (record,) = live(durable.archive)
    assert record.replaces == list(range(1, 10))
    assert (record.counts.trajectories, record.newest) == (9, max(summary.updated for summary in summaries))
    for removed in (False, True):
        if removed:
            assert len(collect(durable.archive)) == 9
            assert data_files(durable.archive) == {record.pack}
        for store in (durable, trajstore.open_archive(folder)):
            assert {id: everything(store, id) for id in ids} == before
            assert store.list() == summaries
    assert compact_all(durable.archive) == 0
    assert collect(durable.archive) == []


def test_a_trajectorys_entries_and_notes_of_several_packs_come_together(durable, archive):
    trajectory = durable.create(routing=SPEC)
    with trajectory.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5], [-0.5, -0.25])
        segment.routing(rows(4), start=0)
    archive()
    trajectory.observe(rows(4, seed=1), start=0, source="trainer")
    archive()
    trajectory.late_routing(rows(4, seed=2), segment=0, start=0)
    archive()
    trajectory.close("completed")
    archive()
    before = everything(durable, trajectory.id)
    notes = [(note.id, note.header, note.nonce, note.time) for note in durable.notes(trajectory.id)]
    assert len(live(durable.archive)) == 4
    summary = durable.archive.find(trajectory.id).summary
    compacted(durable.archive)
    ((_, line),) = durable.archive.find(trajectory.id).parts
    assert (line.summary, summary.status) == (summary, "completed")
    assert (line.first, line.last, line.last_note) == ("1-0", "3-0", 2)
    assert everything(durable, trajectory.id) == before
    assert [(note.id, note.header, note.nonce, note.time) for note in durable.notes(trajectory.id)] == notes
    with pytest.raises(trajstore.Conflict, match="final"):
        durable.get(trajectory.id).segment()


def test_parts_of_a_resumed_trajectory_can_be_compacted_in_any_order(durable, archive, folder, tmp_path):
    """Rows that other packs refer to stay where the references lead, or what they lead to is written anew."""
    recorded, other = rows(1000, spec=WIDE), rows(1000, seed=1, spec=WIDE)

    def drift(index, found):
        changed = found.copy()
        if index:
            changed[20 * index : 20 * index + 10] = other[20 * index : 20 * index + 10]
        if index == 3:
            changed[20:30] = other[20:30]
        return changed

    def go_on():
        durable.get(id_of[0]).observe(recorded[:60], start=0, source="trainer") if id_of else None
        archive()

    id_of = []
    id_of.append(rollout(durable, recorded, segments=4, prompt=50, output=40, drift=drift, after=go_on))
    durable.get(id_of[0]).observe(other[:60], start=0, source="trainer")
    archive()
    before, observed = everything(durable, id_of[0]), observations(durable, id_of[0])
    packs = len(live(durable.archive))
    assert packs == 5
    chosen = [some for size in (1, 2, 3, 4) for some in combinations(range(packs), size)]
    for number, some in enumerate(chosen):
        copy = shutil.copytree(folder / "archive", tmp_path / f"copy-{number}")
        reader, offline = read_archive(copy), trajstore.open_archive(copy)
        all_records = live(reader)
        compacted(reader, [all_records[i] for i in some])
        collect(reader)
        assert everything(offline, id_of[0]) == before, some
        assert observations(offline, id_of[0]) == observed
        rest = live(reader)
        compacted(reader, rest[: len(rest) // 2 or 1])
        compacted(reader)
        collect(reader)
        assert everything(trajstore.open_archive(copy), id_of[0]) == before, some


def observations(store, id):
    overlaps = store.overlaps(id)
    recordings = {one.event: one for overlap in overlaps for one in (overlap.first, overlap.second)}
    return {event: store.recorded_rows(id, one).tobytes() for event, one in recordings.items()}


def test_rows_that_repeat_a_pack_that_stays_are_not_written_again(durable, archive):
    recorded = rows(1000, spec=WIDE)
    id = rollout(durable, recorded, segments=3, prompt=100, output=200, after=archive)
    before = everything(durable, id)
    first, *others = live(durable.archive)
    compacted(durable.archive, others)
    assert counts(durable) == (699, 299 + 499 + 699)
    compacted(durable.archive, [record for record in live(durable.archive) if record.number != first.number])
    assert counts(durable) == (699, 299 + 499 + 699)
    assert everything(durable, id) == before


def test_members_of_a_group_share_their_prompt_once_their_packs_are_one(durable, archive):
    prompt, ids = rows(500, spec=WIDE), []
    for member in range(3):
        recorded = np.concatenate([prompt, rows(100, seed=10 + member, spec=WIDE)])
        ids.append(rollout(durable, recorded, segments=1, prompt=500, output=100, group="g", after=archive))
    before = {id: everything(durable, id) for id in ids}
    assert counts(durable) == (3 * 599, 3 * 599)
    compacted(durable.archive)
    assert counts(durable) == (500 + 3 * 99, 3 * 599)
    assert {id: everything(durable, id) for id in ids} == before


MARKER = "a-private-prompt"
PRIVATE = np.frombuffer((MARKER * 4).encode(), "<i4")
"""Tokens whose bytes are the marker."""


def holders(folder):
    """Files, and decoded arrays, of an archive in which the marker stands."""
    found = {str(path) for path in folder.rglob("*") if path.is_file() and MARKER.encode() in path.read_bytes()}
    for group in (folder / "packs").glob("*/*"):
        for name in ARRAYS:
            if list((group / name).glob("c/**/*")) and MARKER.encode() in zarr.open_array(group / name)[:].tobytes():
                found.add(str(group / name))
    return found


def test_nothing_of_a_deleted_prompt_is_left_after_compaction_and_gc(durable, archive, folder):
    others = [record_seed_case(durable, group="g").id for _ in range(2)]
    private = durable.create(routing=SPEC, group="g", metadata={"source": MARKER})
    with private.segment(context=PRIVATE, sampling={"stop": MARKER}) as segment:
        segment.tokens(PRIVATE, np.zeros(len(PRIVATE)))
        segment.routing(rows(len(PRIVATE)), start=0)
    archive()
    private.observe(rows(8), start=0, source=MARKER)
    private.reward(1.0)
    archive()
    before = {id: everything(durable, id) for id in others}
    assert len(holders(folder / "archive")) >= 3, "tokens, events of both packs"
    assert compact_all(durable.archive) == 0
    durable.delete(private.id, reason="asked for")
    archive()
    assert compact_all(durable.archive) == 1
    collect(durable.archive)
    assert holders(folder / "archive") == set()
    assert {id: everything(durable, id) for id in others} == before
    for store in (durable, trajstore.open_archive(folder)):
        with pytest.raises(trajstore.NotFound, match=r"deleted.*asked for"):
            store.load(private.id)
    with pytest.raises(trajstore.Conflict, match="never reused"):
        durable.create(id=private.id)
    assert compact_all(durable.archive) == 0, "a tombstone alone is nothing to remove"


def test_tombstone_outlives_every_compaction(durable, archive, folder):
    private = record_seed_case(durable)
    archive()
    durable.delete(private.id)
    archive(grace_seconds=0.001)
    compact_all(durable.archive)
    for _ in range(3):
        compacted(durable.archive)
        collect(durable.archive)
        with pytest.raises(trajstore.NotFound, match="deleted"):
            trajstore.open_archive(folder).load(private.id)
    ((_, line),) = durable.archive.find(private.id).parts
    assert line.first == line.last == line.summary.last


def test_members_of_a_deleted_ones_group_keep_the_rows_that_they_shared(durable, archive):
    prompt, ids = rows(500, spec=WIDE), []
    for member in range(3):
        recorded = np.concatenate([prompt, rows(100, seed=10 + member, spec=WIDE)])
        ids.append(rollout(durable, recorded, segments=1, prompt=500, output=100, group="g"))
    archive()
    before = {id: everything(durable, id) for id in ids[1:]}
    durable.delete(ids[0])
    archive()
    assert compact_all(durable.archive) == 1
    collect(durable.archive)
    assert counts(durable) == (500 + 2 * 99, 2 * 599)
    assert {id: everything(durable, id) for id in ids[1:]} == before


def test_a_stale_compaction_is_fenced_and_leaves_nothing(durable, archive):
    ids = [record_seed_case(durable).id for _ in range(2)]
    archive()
    ids.append(record_seed_case(durable).id)
    before = None

    def archive_meanwhile(step):
        nonlocal before
        if step == "moved":
            archive()
            before = {id: everything(durable, id) for id in ids}

    with pytest.raises(trajstore.Fenced):
        compacted(durable.archive, on_step=archive_meanwhile)
    assert [record.replaces for record in live(durable.archive)] == [(), ()]
    assert data_files(durable.archive) == {record.pack for record in live(durable.archive)}
    assert {id: everything(durable, id) for id in ids} == before
    compacted(durable.archive)
    assert {id: everything(durable, id) for id in ids} == before


def test_what_was_replaced_meanwhile_is_not_compacted_again(durable, archive, folder):
    record_seed_case(durable)
    archive()
    records = live(durable.archive)
    compacted(read_archive(folder), records)
    with pytest.raises(trajstore.Fenced, match="replaced or dropped"):
        compacted(durable.archive, records)
    assert len(live(durable.archive)) == 1


def test_shapes_are_not_mixed(durable, archive):
    record_seed_case(durable)
    rollout(durable, rows(100, spec=WIDE), segments=1, prompt=10, output=20)
    archive()
    assert len(live(durable.archive)) == 2
    with pytest.raises(trajstore.Conflict, match="one pack holds one shape"):
        compacted(durable.archive)
    assert len(live(durable.archive)) == 2


def test_a_damaged_pack_stays_as_it_is_and_is_named(durable, archive, folder):
    whole = record_seed_case(durable).id
    archive()
    broken = record_seed_case(durable).id
    archive()
    pack = live(durable.archive)[1].pack
    path = folder / "archive" / "packs" / pack / "tokens" / "c" / "0"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    before = everything(durable, whole)
    with pytest.raises(trajstore.Corrupt) as caught:
        compacted(read_archive(folder))
    assert pack in str(caught.value)
    assert broken in str(caught.value)
    assert len(live(durable.archive)) == 2
    assert everything(durable, whole) == before


def test_pack_to_which_lookup_tables_do_not_lead_stays_as_it_is(durable, archive, folder):
    """A table that is right in itself and forgets a trajectory, which then seems to have had nothing to be kept."""
    ids = []
    for _ in range(9):
        ids.append(record_seed_case(durable).id)
        archive(grace_seconds=0.001)
    before = {id: everything(durable, id) for id in ids}
    pack = live(durable.archive)[3].pack
    table = folder / "archive" / "index" / "00" / "00000004-00000004.safetensors"
    table.write_bytes(encode_table(make_table(4, []), incarnation=durable.archive.info.incarnation, partition=0))
    with pytest.raises(trajstore.Corrupt, match=f"{ids[3]}.*rebuild"):
        compacted(read_archive(folder))
    assert len(live(durable.archive)) == 9
    result = invoke("compact", folder)
    assert (result.exit_code, ids[3] in result.stderr) == (1, True)
    assert [record.pack for record in live(read_archive(folder)) if not record.replaces] == [pack], "the others are one"
    assert invoke("gc", folder, "--grace", "0s").exit_code == 0
    assert invoke("rebuild", folder).exit_code == 0
    again = trajstore.open_archive(folder)
    assert {id: everything(again, id) for id in ids} == before


def test_pack_that_lists_the_trajectories_of_another_stays_as_it_is(durable, archive, folder):
    for _ in range(9):
        record_seed_case(durable)
        archive()
    packs = [record.pack for record in live(durable.archive)]
    one, other = (folder / "archive" / "packs" / pack / "trajectories" for pack in packs[2:4])
    aside = one.with_name("aside")
    for source, target in ((one, aside), (other, one), (aside, other)):
        source.rename(target)
    with pytest.raises(trajstore.Corrupt, match=f"{packs[2]} .*not what record 3 says"):
        compacted(read_archive(folder))
    result = invoke("compact", folder)
    assert (result.exit_code, packs[2] in result.stderr, packs[3] in result.stderr) == (1, True, True)
    assert [record.pack for record in live(read_archive(folder))] == packs


@pytest.mark.parametrize("field", ["entries", "notes"])
def test_pack_of_which_less_is_found_than_its_record_counts_stays_as_it_is(durable, archive, field):
    trajectory = record_seed_case(durable)
    trajectory.observe(rows(4), start=0, source="trainer")
    archive()
    (record,) = live(durable.archive)
    more = {field: getattr(record.counts, field) + 1}
    path = f"manifest/00/{record.number:08}.json"
    durable.archive.root.storage.remove([path])
    counts = msgspec.structs.replace(record.counts, **more)
    durable.archive.root.storage.create(path, encode_record(msgspec.structs.replace(record, counts=counts)))
    reader = read_archive(durable.archive.root.location)
    with pytest.raises(trajstore.Corrupt, match=f"pack {record.pack} .* its record counts"):
        compacted(reader)
    assert [one.pack for one in live(reader)] == [record.pack]


COMPACT_AND_DIE = """
import os, signal, sys
from trajstore.archive.upkeep.compaction import compact
from trajstore.opening import read_archive

def die(step):
    if step == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

reader = read_archive(sys.argv[1])
reader.manifest(0).refresh()
compact(reader, 0, list(reader.manifest(0).live()), writer="dies", on_step=die)
"""


@pytest.mark.parametrize("step", STEPS)
def test_compaction_killed_at_any_step_loses_and_doubles_nothing(durable, archive, folder, step):
    ids = []
    for _ in range(3):
        ids.append(record_seed_case(durable).id)
        archive()
    before = {id: everything(durable, id) for id in ids}
    durable.delete(ids.pop())
    archive()
    del before[next(iter(before.keys() - set(ids)))]
    killed = subprocess.run([sys.executable, "-c", COMPACT_AND_DIE, str(folder), step], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(live(durable.archive)) == (1 if step == "recorded" else 4)
    for store in (durable, trajstore.open_archive(folder)):
        assert {id: everything(store, id) for id in ids} == before
    collect(durable.archive)
    assert {id: everything(trajstore.open_archive(folder), id) for id in ids} == before
    record_seed_case(durable)
    archive()
    compacted(durable.archive)
    collect(durable.archive)
    assert {id: everything(trajstore.open_archive(folder), id) for id in ids} == before


def test_readers_never_notice_that_packs_are_replaced_and_removed(durable, archive, folder):
    """A reader's loop of loads, in its own reader and in the store's, over compactions whose old files go at once."""
    ids = []
    for _ in range(4):
        ids.append(record_seed_case(durable).id)
        archive()
    before = {id: everything(durable, id) for id in ids}
    stop, failures, loads = threading.Event(), [], [0, 0]

    def read_on(number, store):
        try:
            while not stop.is_set():
                for id in ids:
                    assert everything(store, id) == before[id]
                    loads[number] += 1
        except (trajstore.TrajstoreError, AssertionError) as error:
            failures.append(error)

    readers = [
        threading.Thread(target=read_on, args=(number, store))
        for number, store in enumerate((durable, trajstore.open_archive(folder)))
    ]
    for thread in readers:
        thread.start()
    try:
        writer = read_archive(folder)
        deadline = time.monotonic() + 60
        for _ in range(25):
            records = live(writer)
            compacted(writer, records[:2])
            collect(writer)
            seen = sum(loads)
            while sum(loads) == seen and not failures and time.monotonic() < deadline:
                stop.wait(0.001)
    finally:
        stop.set()
        for thread in readers:
            thread.join()
    assert failures == []
    assert min(loads) > 0


def test_archiver_compacts_what_it_holds_while_it_is_idle(durable, archive, folder):
    ids, before = [], {}
    for _ in range(8):
        ids.append(record_seed_case(durable).id)
        archive()
    before = {id: everything(durable, id) for id in ids}
    assert len(live(durable.archive)) == 8, "with `once` there is no idle time"
    archiver = Archiver(durable, lease_seconds=0.5)
    run_until(archiver, lambda: len(live(durable.archive)) == 1)
    assert archiver.done.compactions == 1
    assert {id: everything(durable, id) for id in ids} == before
    durable.delete(ids[0])
    archive(lease_seconds=0.5)
    run_until(Archiver(durable, lease_seconds=0.5), lambda: trajectories(durable.archive) == 7 + 1)


def trajectories(reader):
    """Lines in all packs together; of a deleted one the tombstone's."""
    return sum(record.counts.trajectories for record in live(reader))


def test_archiver_that_shall_not_compact_does_not(durable, archive):
    for _ in range(8):
        record_seed_case(durable)
        archive()
    archiver, turns = Archiver(durable, compact=False), []
    run_until(archiver, lambda: len(turns) >= 5, on_progress=turns.append)
    assert len(live(durable.archive)) == 8


def run_until(archiver, condition, **options):
    """Run an archiver until a condition holds."""
    stop = threading.Event()
    thread = threading.Thread(target=archiver.run, kwargs={"stop": stop, **options})
    thread.start()
    deadline = time.monotonic() + 30
    try:
        while not condition():
            assert time.monotonic() < deadline
            stop.wait(0.02)
    finally:
        stop.set()
        thread.join()


def test_compaction_on_an_object_store(s3, tmp_path):
    where = s3.url(f"compaction-{tmp_path.name}")
    with trajstore.open(
        tmp_path / "store", archive=where, archive_options=s3.options, partitions=1, ack="fsync"
    ) as store:
        ids = []
        for _ in range(3):
            ids.append(record_seed_case(store).id)
            store.flush()
            Archiver(store).run(once=True)
        before = {id: everything(store, id) for id in ids}
        store.delete(ids[0])
        Archiver(store).run(once=True)
    reader = read_archive(where, s3.options)
    assert compact_all(reader) == 1
    compacted(reader)
    collect(reader)
    offline = trajstore.open_archive(where, options=s3.options)
    assert {id: everything(offline, id) for id in ids[1:]} == {id: before[id] for id in ids[1:]}
    with pytest.raises(trajstore.NotFound, match="deleted"):
        offline.load(ids[0])
    assert data_files(reader) == {record.pack for record in live(reader)}


def test_packs_of_version_1_become_packs_of_today(tmp_path):
    folder = shutil.copytree(make.FOLDER / "v1" / "archive", tmp_path / "archive")
    offline = trajstore.open_archive(folder)
    before = {summary.id: everything(offline, summary.id) for summary in offline.list()}
    assert before
    reader = read_archive(folder)
    for partition in range(reader.info.partitions):
        for record in live(reader, partition):
            compact(reader, partition, [record], writer="test")
    assert {record.format for partition in (0, 1) for record in live(reader, partition)} == {2}
    collect(reader)
    assert {id: everything(trajstore.open_archive(folder), id) for id in before} == before


def candidates_of(sizes, *, shape=(3, 2, "|u1"), unwanted=False):
    return [Candidate(number, shape, nbytes, unwanted) for number, nbytes in enumerate(sizes, 1)]


def test_fewer_than_eight_small_packs_wait():
    assert due(candidates_of([10] * 7), pack_bytes=1000) == []
    assert due(candidates_of([10] * 8), pack_bytes=1000) == list(range(1, 9))
    assert due(candidates_of([10] * 7 + [250]), pack_bytes=1000) == []
    assert due(candidates_of([10] * 7 + [200]), pack_bytes=1000) == [], "it would be written anew for little"


def test_one_unwanted_pack_is_due_however_large():
    assert due(candidates_of([10**6], unwanted=True), pack_bytes=1000) == [1]


def test_packs_of_other_shapes_are_not_merged_but_those_without_routing_go_along():
    other = [one._replace(number=one.number + 100, shape=(4, 2, "|u1")) for one in candidates_of([10] * 7)]
    plain = [one._replace(number=one.number + 200, shape=None) for one in candidates_of([5])]
    assert due(candidates_of([10] * 7) + other, pack_bytes=1000) == []
    assert due(candidates_of([10] * 7) + other[:6] + plain, pack_bytes=1000) == [*range(1, 8), 201]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=60), st.booleans())
def test_what_is_merged_fits_into_a_pack(sizes, unwanted):
    candidates = candidates_of(sizes, unwanted=unwanted)
    chosen = due(candidates, pack_bytes=1000)
    assert len(chosen) == len(set(chosen))
    assert sum(sizes[number - 1] for number in chosen) <= 1000
    if not unwanted:
        assert all(sizes[number - 1] < 250 for number in chosen)
        assert len(chosen) >= 8 or not chosen


def test_each_byte_is_written_anew_a_few_times_only():
    """Ten thousand packs of 1 KB, compacted as they come: the work grows with the logarithm, not with their number."""
    packs, rewritten, number = [], 0, 0
    for _ in range(10_000):
        number += 1
        packs.append(Candidate(number, None, 1000, False))
        while chosen := due(packs, pack_bytes=64 << 20):
            merged = sum(one.nbytes for one in packs if one.number in chosen)
            rewritten += merged
            number += 1
            packs = [*(one for one in packs if one.number not in chosen), Candidate(number, None, merged, False)]
    assert rewritten < 10_000 * 1000 * 6
    assert len(packs) < 40


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.integers(0, 2)),
        st.tuples(st.just("resume"), st.integers(0, 5)),
        st.tuples(st.just("observe"), st.integers(0, 5)),
        st.tuples(st.just("delete"), st.integers(0, 5)),
        st.tuples(st.just("archive"), st.just(0)),
        st.tuples(st.just("compact"), st.integers(0, 255)),
        st.tuples(st.just("collect"), st.just(0)),
    ),
    min_size=4,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ACTIONS)
def test_any_order_of_archiving_compacting_deleting_and_removing_reads_the_same(durable, archive, folder, actions):
    recorded, ids, gone, expected, drawn = rows(400, spec=WIDE), [], set(), {}, 0
    for action, argument in actions:
        alive = [id for id in ids if id not in gone]
        id = alive[argument % len(alive)] if alive else None
        if action == "create":
            trajectory = durable.create(routing=WIDE, group=f"g{argument}" if argument else None)
            record(trajectory.segment(context=np.arange(20)), recorded[:29])
            ids.append(trajectory.id)
        elif action == "resume" and id is not None:
            drawn += 1
            length = len(durable.load(id)) + 9
            changed = recorded[:length].copy()
            changed[drawn % 20 : drawn % 20 + 3] = rows(3, seed=drawn, spec=WIDE)
            record(durable.get(id).segment(), changed)
        elif action == "observe" and id is not None:
            durable.get(id).observe(recorded[argument : argument + 15], start=argument, source="trainer")
        elif action == "delete" and id is not None:
            durable.delete(id)
            gone.add(id)
        elif action == "archive":
            archive()
        elif action == "compact":
            records = live(durable.archive)
            some = [one for i, one in enumerate(records) if argument >> i % 8 & 1]
            if some:
                compacted(durable.archive, some)
            compact_all(durable.archive)
        elif action == "collect":
            collect(durable.archive)
        if action in ("create", "resume", "observe", "delete"):
            durable.flush()
            expected = {id: (everything(durable, id), observations(durable, id)) for id in ids if id not in gone}
        assert {id: (everything(durable, id), observations(durable, id)) for id in expected} == expected
    archive()
    compact_all(durable.archive)
    collect(durable.archive)
    offline = trajstore.open_archive(folder)
    assert {id: (everything(offline, id), observations(offline, id)) for id in expected} == expected
    for id in gone:
        with pytest.raises(trajstore.NotFound, match="deleted"):
            offline.load(id)


def record(segment, found):
    with segment:
        segment.tokens(np.arange(10), np.full(10, -0.5))
        segment.routing(found, start=0)


def test_deletion_of_what_cannot_be_read_any_more_goes_through(durable, archive, folder):
    trajectory = record_seed_case(durable)
    archive()
    (shard,) = (folder / "archive" / "packs" / "00").glob("*/events/c/0")
    data = bytearray(shard.read_bytes())
    data[20] ^= 0x40
    shard.write_bytes(data)
    durable.close()
    with trajstore.open(folder, ack="fsync") as again:
        with pytest.raises(trajstore.Corrupt):
            again.load(trajectory.id)
        assert again.delete(trajectory.id) == 1
        assert again.delete(trajectory.id) == 0
        done = Archiver(again).run(once=True)
        assert (done.refused, done.entries) == (0, 1)
        with pytest.raises(trajstore.NotFound, match="deleted"):
            again.load(trajectory.id)
