"""What `verify` finds that no checksum can: stale rows, gaps, contradictions, wrong counts. And what it does not."""

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from ulid import ULID

import trajstore
from tests.archive.sound import WIDE, make
from tests.builders import SPEC, record_seed_case, rows
from tests.core.packs import pack
from trajstore.archive.arrays.builder import encode_array
from trajstore.archive.index import Line, encode_table, make_table
from trajstore.archive.pieces import Known, row_view
from trajstore.archive.rebuild.rebuild import rebuild_archive
from trajstore.archive.record import FileDigest
from trajstore.archive.root import ARCHIVE_FORMAT, ArchiveInfo, ArchiveRoot
from trajstore.archive.verify.soundness import check_rows, improbable_steps
from trajstore.archive.verify.verify import verify
from trajstore.archive.writer import PackWriter, StagedEntry
from trajstore.archiver import Archiver
from trajstore.cli.verify import verify as command
from trajstore.entries import Entry, encode_entry, entry_digest
from trajstore.events import (
    SCHEMA_VERSION,
    EventId,
    PayloadInfo,
    Routing,
    SegmentClosed,
    SegmentOpened,
    TrajectoryOpened,
)
from trajstore.opening import read_archive

ROUTING = Path(__file__).parents[1] / "data" / "routing" / "small_moe_e128_l8_k8.npy"


def faults(place, **options):
    return [finding for finding in verify(place, **options) if finding.severity != "information"]


def kinds(place, **options):
    return {(finding.kind, finding.severity) for finding in faults(place, **options)}


# An archive written by hand: with right digests, so that only its sense can be wrong


class Hand:
    """An archive with one partition, into which chosen events are archived."""

    def __init__(self, folder):
        self.root = ArchiveRoot.at(folder)
        self.root.claim(ArchiveInfo(format=ARCHIVE_FORMAT, run="r", incarnation=str(ULID()), partitions=1))
        self.reader = read_archive(folder)

    def write(self, id, epochs, *, spec=WIDE, known=None, nonce=7, **options):
        """A pack with one entry for each epoch: `{epoch: [(header without payload, bytes), ...]}`."""
        staged = []
        for epoch, pairs in epochs.items():
            events = [header if data is None else with_payload(header, data) for header, data in pairs]
            data = encode_entry(Entry(SCHEMA_VERSION, nonce, 1.0, events))
            payloads = [b"" if payload is None else payload for _, payload in pairs]
            staged.append(StagedEntry(EventId(epoch, 0), False, nonce, entry_digest(data), 1.0, events, payloads))
        manifest = self.reader.manifest(0)
        newest = manifest.refresh()
        writer = PackWriter(self.root, self.reader.info, 0, spec)
        writer.add(id, staged, summary=None, known=known)
        return writer.publish(manifest, newest + 1, writer="hand", **options)


@pytest.fixture
def hand(tmp_path):
    return Hand(tmp_path / "archive")


def with_payload(header, data):
    return msgspec.structs.replace(header, payload=PayloadInfo(nbytes=len(data), crc=zlib.crc32(data)))


def opened(spec=WIDE):
    return TrajectoryOpened(routing=spec), None


def segment(tokens, recorded, *, start=0, base=0, digest=""):
    """Events of a segment whose whole input and output is context."""
    empty = PayloadInfo(nbytes=0, crc=0)
    tokens = np.asarray(tokens, "<i4")
    return [
        (SegmentOpened(base=base, context=len(tokens), input_digest=digest), tokens.tobytes()),
        (Routing(start=start, rows=len(recorded), payload=empty), np.ascontiguousarray(recorded).tobytes()),
        (SegmentClosed(finish_reason="stop"), None),
    ]


def stale(count, repeated):
    """Rows of which the ones from 5 on are the fifth, `repeated` times."""
    found = rows(count, seed=4, spec=WIDE)
    found[5 : 5 + repeated] = found[5]
    return found


def test_store_and_archive_of_all_kinds_are_sound(durable, folder):
    ids = make(durable, records=4)
    durable.delete(ids[1])
    trajectory = durable.create(id="plain")
    with trajectory.segment(context=[1]) as segment:
        segment.tokens([2])
    durable.flush()
    assert faults(durable) == []
    Archiver(durable).run(once=True)
    assert faults(durable) == []
    durable.close()
    assert faults(folder, workers=4) == []


def test_frozen_archive_of_version_1_is_sound():
    assert faults(Path(__file__).parents[1] / "data" / "stores" / "v1") == []


def test_archive_in_an_object_store_is_checked_alike(s3, run_name, tmp_path):
    options = {"archive": s3.url(run_name), "archive_options": s3.options}
    with trajstore.open(tmp_path / "store", partitions=2, ack="fsync", **options) as store:
        make(store, records=3)
        assert faults(store) == []
        archive = store.archive
        (first, *_) = archive.manifest(0).live()
        archive.root.storage.remove([f"packs/{first.pack}/routed/c/0/0/0"])
        assert {"missing-file", "array", "payload"} <= {fault.kind for fault in faults(store)}
    found = faults(s3.url(run_name), options=s3.options, workers=3)
    assert {"missing-file", "array", "payload"} <= {fault.kind for fault in found}
    assert {fault.pack for fault in found if fault.pack} >= {first.pack}


# Rows


def test_stale_row_is_found_where_the_token_changes(hand):
    """sglang #36404: one stale row repeated 67 times."""
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), stale(100, 67))})
    (found,) = faults(hand.root.location)
    assert (found.kind, found.trajectory, found.event) == ("repeated-rows", "t", "2-1")
    assert "rows 5 to 71" in found.what


def test_recording_that_is_one_stale_row_is_told_once_not_for_each_layer(hand):
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), rows(1, spec=WIDE).repeat(100, axis=0))})
    assert kinds(hand.root.location) == {("repeated-rows", "warning")}


def test_equal_rows_of_equal_tokens_are_no_fault(hand):
    hand.write("t", {1: [opened()], 2: segment(np.full(100, 3), stale(100, 67))})
    assert faults(hand.root.location) == []


def test_stale_row_of_a_resumed_segment_is_compared_with_its_own_tokens(hand):
    """The second segment rewinds to 4 and goes on with one token again and again; the first did not."""
    again = segment(np.full(96, 3), stale(100, 67), base=4)
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), rows(100, spec=WIDE)), 3: again})
    assert faults(hand.root.location) == []
    other = segment(np.arange(96), stale(100, 67), base=4)
    hand.write("u", {1: [opened()], 2: segment(np.full(100, 3), stale(100, 67)), 3: other})
    assert [(fault.trajectory, fault.event) for fault in faults(hand.root.location)] == [("u", "3-1")]


def test_layer_that_never_changes_is_found(hand):
    recorded = rows(200, seed=2, spec=WIDE)
    recorded[:, 3] = range(8)
    hand.write("t", {1: [opened()], 2: segment(np.arange(200), recorded)})
    (found,) = faults(hand.root.location)
    assert (found.kind, found.severity) == ("constant-layer", "warning")
    assert "layers 3 [0, 1, 2, 3, 4, 5, 6, 7]" in found.what


@pytest.mark.parametrize("bad", ["out of range", "repeated", "all zero"])
def test_experts_that_cannot_be_are_found(hand, bad):
    recorded = rows(20, spec=WIDE)
    recorded[7, 2] = {"out of range": range(121, 129), "repeated": [1, 2, 3, 4, 5, 6, 7, 7], "all zero": [0] * 8}[bad]
    hand.write("t", {1: [opened()], 2: segment(np.arange(20), recorded)})
    (found,) = faults(hand.root.location)
    assert (found.kind, found.severity) == ("experts", "error")
    assert "layer 2, row 7" in found.what


def test_rows_that_should_be_sorted_and_are_not_are_found(hand):
    spec = msgspec.structs.replace(WIDE, order="sorted")
    hand.write("t", {1: [opened(spec)], 2: segment(np.arange(20), rows(20, spec=WIDE))}, spec=spec)
    assert kinds(hand.root.location) == {("experts", "error")}


def test_recorded_routing_of_a_real_model_raises_no_alarm():
    """Even if every token differed from the one before, so that every equal neighbour counts."""
    recorded = np.load(ROUTING)
    same = (recorded[1:] == recorded[:-1]).all(axis=2)
    assert same.all(axis=1).mean() == pytest.approx(4.6e-5, rel=0.01), "what the threshold was derived from"
    assert same.mean() == pytest.approx(4.5e-3, rel=0.01)
    tokens = np.arange(len(recorded), dtype=np.int32)
    for at in range(0, len(recorded), 4096):
        assert list(check_rows(WIDE, recorded[at : at + 4096], tokens[at : at + 4096], start=at)) == []


def test_fewer_steps_are_improbable_the_more_a_row_says():
    tiny = trajstore.RoutingSpec(layer_ids=(0,), top_k=1, num_experts=2, num_hidden_layers=1)
    large = trajstore.RoutingSpec(layer_ids=tuple(range(48)), top_k=8, num_experts=128, num_hidden_layers=48)
    assert improbable_steps(tiny, 1) == 2000
    assert improbable_steps(SPEC, 3) > improbable_steps(WIDE, 8) > improbable_steps(large, 48) == 4
    assert improbable_steps(WIDE, 1) > improbable_steps(WIDE, 8)
    assert improbable_steps(msgspec.structs.replace(WIDE, order="sorted"), 8) > improbable_steps(WIDE, 8)


# Sequence


def test_gap_is_a_warning_that_names_the_last_good_event(hand):
    tokens = np.arange(30)
    lost = {1: [opened()], 2: segment(tokens, rows(30, spec=WIDE)), 4: segment([1], rows(31, spec=WIDE), base=40)}
    hand.write("t", lost)
    (found,) = faults(hand.root.location)
    assert (found.kind, found.severity, found.trajectory, found.event) == ("gap", "warning", "t", "2-2")


def test_gap_below_which_a_later_segment_began_is_no_fault(hand):
    hand.write(
        "t",
        {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE)), 4: segment([1], rows(3, spec=WIDE), base=2)},
    )
    assert faults(hand.root.location) == []


def test_input_that_is_not_what_the_log_holds_is_found(hand):
    hand.write("t", {1: [opened()], 2: segment([1, 2, 3], rows(3, spec=WIDE), digest="00" * 16)})
    assert kinds(hand.root.location) == {("input", "error")}


def test_rows_that_were_never_recorded_are_told_with_their_reason(durable, archive, folder):
    trajectory = durable.create(id="t", routing=SPEC)
    with trajectory.segment(context=[1, 2, 3, 4]) as segment:
        segment.tokens([5, 6])
        segment.routing(rows(2), start=1)
        segment.no_routing("feature off")
    archive()
    (found,) = verify(folder)
    assert (found.kind, found.severity, found.trajectory) == ("coverage", "information", "t")
    assert found.what == "3 of 6 rows have no routing: 0, 3 to 4; recorded reasons: feature off"


def test_reference_to_an_event_that_is_not_there_is_found_and_not_loaded(hand):
    recorded = rows(30, spec=WIDE)
    known = Known(WIDE.row_bytes)
    known.learn("9-9", 0, row_view(recorded.tobytes(), WIDE.row_bytes))
    hand.write("t", {1: [opened()], 2: segment(np.arange(30), recorded)}, known=known)
    assert kinds(hand.root.location) == {("reference", "error"), ("payload", "error")}
    with pytest.raises(trajstore.Corrupt, match="not in the archive"):
        trajstore.open_archive(hand.root.location).load("t")


def test_entry_in_two_packs_is_a_warning_and_a_different_one_an_error(hand):
    epochs = {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))}
    hand.write("t", epochs)
    hand.write("t", epochs)
    assert kinds(hand.root.location) == {("twice", "warning")}
    hand.write("t", epochs, nonce=8)
    assert kinds(hand.root.location) == {("twice", "warning"), ("twice", "error")}


# Records, tables, leftovers


def test_wrong_count_is_found(hand):
    writer = hand.write("t", {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))})
    counts = msgspec.structs.replace(writer.counts, recorded_rows=29)
    rewrite(hand, msgspec.structs.replace(writer, counts=counts))
    found = faults(hand.root.location)
    assert {fault.kind for fault in found} == {"counts", "record"}
    assert any("30 recorded_rows (said: 29)" in fault.what for fault in found)


def test_payload_that_is_not_its_headers_is_found_whatever_the_digests_say(hand):
    record = hand.write("t", {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))})
    tokens, codec = np.arange(30, dtype="<i4") + 1, record.codecs["tokens"]
    files = {f"tokens/{name}": data for name, data in encode_array(tokens, codec=codec).files.items()}
    for name, data in files.items():
        Path(hand.root.location, "packs", record.pack, name).write_bytes(data)
    digests = {name: FileDigest(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    rewrite(hand, msgspec.structs.replace(record, files=record.files | digests))
    (found,) = faults(hand.root.location)
    assert (found.kind, found.trajectory, found.event) == ("payload", "t", "2-0")
    with pytest.raises(trajstore.Corrupt, match="CRC"):
        trajstore.open_archive(hand.root.location).load("t")


@pytest.mark.parametrize(
    "change",
    [
        {"newest": 9.0},
        {"created": 5.0},
        {"writer": "somebody"},
        {"codecs": {"routed": "shuffle"}},
        {"replaces": [1]},
        {"files": {}},
        {"pack": "00/00000007-" + "0" * 26},
        {"pack": "../../elsewhere"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_record_that_says_something_else_than_its_pack_is_found(hand, change):
    record = hand.write("t", {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))})
    rewrite(hand, msgspec.structs.replace(record, **change))
    assert faults(hand.root.location)


def rewrite(hand, record):
    """Put another record in the place of one, as if it had been written so."""
    path = f"manifest/00/{record.number:08}.json"
    hand.root.storage.remove([path])
    read_archive(hand.root.location).manifest(0).append(record, [])


def test_table_that_leads_elsewhere_is_found(durable, archive, folder):
    make(durable, records=17)
    path = folder / "archive" / "index" / "00" / "00000001-00000016.safetensors"
    assert faults(folder) == []
    path.unlink()
    found = list(verify(folder))
    assert [(one.kind, one.severity) for one in found if "missing" in one.what] == [("lookup-table", "information")]
    wrong = make_table(1, [Line("somebody", 0, 5)])
    wrong.last = 16
    path.write_bytes(encode_table(wrong, incarnation=durable.archive.info.incarnation, partition=0))
    assert ("lookup-table", "error") in kinds(folder)


def test_pack_without_a_record_is_told_and_how_much_it_matters(hand):
    class Killed(BaseException):
        pass

    def die(step):
        if step == "moved":
            raise Killed

    epochs = {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))}
    with pytest.raises(Killed):
        hand.write("t", epochs, on_step=die)
    assert kinds(hand.root.location) == {("leftover", "warning")}
    hand.write("t", epochs)
    (found,) = verify(hand.root.location)
    assert (found.kind, found.severity) == ("leftover", "information")
    assert found.pack.startswith("00/00000001-")


def test_staged_pack_is_told_once(hand):
    hand.write("t", {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))})
    staging = Path(hand.root.location, "staging")
    for name in (str(ULID()), str(ULID())):
        for file in ("zarr.json", "tokens/zarr.json", "tokens/c/0", "routed/c/0/0/0"):
            (staging / name / file).parent.mkdir(parents=True, exist_ok=True)
            (staging / name / file).write_bytes(b"")
    (staging / str(ULID())).write_bytes(b"")
    told = [finding.what.partition(" ")[0] for finding in verify(hand.root.location)]
    assert sorted(told) == sorted(f"staging/{path.name}" for path in staging.iterdir())


def test_archive_that_was_rebuilt_is_sound_and_tells_what_was_set_aside(hand):
    hand.write("t", {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))})
    path = Path(hand.root.location, "manifest", "00", "00000001.json")
    path.write_bytes(path.read_bytes()[:-20])
    assert ("record", "error") in kinds(hand.root.location)
    rebuild_archive(hand.root)
    (found,) = verify(hand.root.location)
    assert (found.kind, found.severity) == ("leftover", "information")
    assert "00000001.json.damaged" in found.what


def test_newest_record_that_was_lost_with_its_pack_is_told_by_its_lookup_table(hand):
    record = hand.write("t", {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))})
    shutil.rmtree(Path(hand.root.location, "packs", record.pack))
    Path(hand.root.location, "manifest", "00", "00000001.json").unlink()
    assert kinds(hand.root.location) == {("record", "error")}


def test_list_of_a_replaced_pack_must_stay_and_nothing_else_of_it(hand):
    epochs = {1: [opened()], 2: segment(np.arange(30), rows(30, spec=WIDE))}
    first = hand.write("t", epochs)
    hand.write("t", epochs, replaces=[1])
    assert faults(hand.root.location) == []
    storage = hand.root.storage
    stays = ("zarr.json", "trajectories/")
    storage.remove(f"packs/{first.pack}/{name}" for name in first.files if not name.startswith(stays))
    assert faults(hand.root.location) == []
    storage.remove([f"packs/{first.pack}/trajectories/c/0"])
    assert ("missing-file", "error") in kinds(hand.root.location)


# Against the hot log


def test_hot_and_archived_copies_are_compared_by_digest_and_by_fold(durable):
    """An archiver was killed before it trimmed: everything lies in both."""
    id = record_seed_case(durable).id
    durable.get(id).observe(rows(4), start=1, source="trainer")
    durable.flush()
    entries, notes = durable.hot.read(id)
    pack(durable, id, entries=entries, notes=notes)
    assert faults(durable) == []


@pytest.mark.parametrize(("note", "kind"), [(False, "contradiction"), (True, "contradiction")], ids=["entry", "note"])
def test_archived_entry_that_is_not_the_hot_one_is_found(durable, note, kind):
    id = record_seed_case(durable).id
    durable.get(id).observe(rows(4), start=1, source="trainer")
    durable.flush()
    hot = durable.hot.read(id)
    changed = [
        [
            entry._replace(data=entry.data.replace(b"trainer", b"reniart").replace(b"test/1", b"test/2"))
            for entry in some
        ]
        for some in hot
    ]
    pack(durable, id, entries=hot[0] if note else changed[0], notes=changed[1] if note else hot[1])
    found = faults(durable)
    assert {fault.kind for fault in found} == {kind}
    assert all(fault.trajectory == id and fault.event.startswith("note") == note for fault in found)


def test_archived_rows_that_fold_otherwise_than_the_hot_ones_are_found(durable):
    """The digest is of the headers, so it takes the fold to see a payload that was changed with its checksum."""
    id = record_seed_case(durable).id
    durable.flush()
    entries, _ = durable.hot.read(id)
    staged = [StagedEntry.from_hot(e.at, e.data, list(durable.hot.payloads(id, e.events()))) for e in entries]
    for i, entry in enumerate(staged):
        events, payloads = list(entry.events), list(entry.payloads)
        for k, header in enumerate(events):
            if isinstance(header, Routing):
                payloads[k] = payloads[k][::-1]
                events[k] = with_payload(header, payloads[k])
        staged[i] = entry._replace(events=events, payloads=payloads)
    manifest = durable.archive.manifest(0)
    writer = PackWriter(durable.archive.root, durable.archive.info, 0, SPEC)
    writer.add(id, staged, summary=None)
    writer.publish(manifest, manifest.refresh() + 1, writer="hand")
    found = [fault for fault in faults(durable) if fault.kind == "fold"]
    assert {fault.trajectory for fault in found} == {id}
    assert any("last_segment_wins" in fault.what and "routed_experts" in fault.what for fault in found)
    assert any("as_sampled" in fault.what for fault in found)


def test_summary_that_the_log_does_not_bear_out_is_found_until_it_is_rebuilt(durable, archive):
    one, other = record_seed_case(durable).id, record_seed_case(durable).id
    archive()
    durable.get(one).reward(1.0)
    durable.flush()
    assert faults(durable) == []
    name = durable.keys.summaries(0)
    for id in (one, other):
        wrong = msgspec.structs.replace(durable.hot.summary(id), tokens=3)
        durable.wire.call("HSET", name, id, msgspec.msgpack.encode(wrong))
    assert {(fault.kind, fault.trajectory) for fault in faults(durable)} == {("summary", one), ("summary", other)}
    durable.wire.call("DEL", name)
    assert {(fault.kind, fault.trajectory) for fault in faults(durable)} == {("summary", one)}
    durable.rebuild_summaries()
    assert faults(durable) == []


def test_backlog_is_told(durable, archive):
    record_seed_case(durable)
    durable.flush()
    (found,) = [finding for finding in verify(durable) if finding.kind == "backlog"]
    assert found.severity == "information"
    assert "9 events of 1 trajectories" in found.what
    archive()
    assert [finding for finding in verify(durable) if finding.kind == "backlog"] == []


# Selections and the command


def test_chosen_trajectories_and_packs_alone_are_checked(hand):
    first = hand.write("t", {1: [opened()], 2: segment(np.arange(100), stale(100, 67))})
    second = hand.write("u", {1: [opened()], 2: segment(np.arange(100), stale(100, 67))})
    place = hand.root.location
    assert {fault.trajectory for fault in faults(place)} == {"t", "u"}
    assert {fault.trajectory for fault in faults(place, ids=["u"])} == {"u"}
    assert {fault.trajectory for fault in faults(place, packs=[first.pack])} == {"t"}
    assert {fault.trajectory for fault in faults(place, packs=[first.pack, second.pack])} == {"t", "u"}
    with pytest.raises(trajstore.NotFound, match="nobody"):
        faults(place, ids=["nobody"])
    with pytest.raises(trajstore.NotFound, match="no pack 00/x"):
        faults(place, packs=[first.pack, "00/x"])
    with pytest.raises(trajstore.NotFound, match="no archive"):
        faults(place + "/packs")


def test_quick_looks_at_sizes_and_not_at_content(hand):
    record = hand.write("t", {1: [opened()], 2: segment(np.arange(100), stale(100, 67))})
    path = Path(hand.root.location, "packs", record.pack, "tokens", "c", "0")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert faults(hand.root.location, quick=True) == []
    path.write_bytes(data[:-1])
    assert kinds(hand.root.location, quick=True) == {("size", "error")}


def test_findings_come_while_records_are_checked(hand):
    for name in "abc":
        hand.write(name, {1: [opened()], 2: segment(np.arange(100), stale(100, 67))})
    heard = []
    found = verify(hand.root.location, on_record=lambda done, total: heard.append((done, total)))
    assert next(found).trajectory == "a"
    assert max(heard) < (3, 3)
    assert [finding.trajectory for finding in found] == ["b", "c"]
    assert max(heard) == (3, 3)


def run(*arguments):
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_command_says_by_its_exit_code_whether_all_is_sound(durable, archive, folder):
    record_seed_case(durable)
    archive()
    assert run(folder).exit_code == 0
    assert run(folder / "archive").exit_code == 0
    (folder / "archive" / "notes.txt").write_text("hello")
    result = run(folder / "archive")
    assert result.exit_code == 1
    assert "warning: foreign-file: notes.txt" in result.stdout
    assert run(folder, "--id", "a", "--pack", "b").exit_code == 2
    assert run(folder, "--quick", "--id", "a").exit_code == 2


def test_command_prints_an_array_for_programs(hand):
    hand.write("t", {1: [opened()], 2: segment(np.arange(100), stale(100, 67))})
    result = run(hand.root.location, "--json")
    assert result.exit_code == 1
    (found,) = json.loads(result.stdout)
    assert (found["kind"], found["severity"], found["trajectory"]) == ("repeated-rows", "warning", "t")
    assert found.keys() == {"kind", "severity", "what", "what_to_do", "pack", "trajectory", "event"}
    shutil.rmtree(Path(hand.root.location, "packs"))
    assert len(json.loads(run(hand.root.location, "--json").stdout)) > 1
    Path(hand.root.location, "archive.json").write_text("{")
    (found,) = json.loads(run(hand.root.location, "--json").stdout)
    assert found["kind"] == "identity"
