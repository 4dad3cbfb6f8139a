"""Equal rows are stored once, and every fold stays what it was: within a trajectory, over packs, among a group."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.builders import SPEC, rows
from trajstore.archive.pieces import Known, SharedRows, row_view

WIDE = trajstore.RoutingSpec(layer_ids=tuple(range(8)), top_k=8, num_experts=128, num_hidden_layers=8)


def counts(store):
    """(rows stored, rows recorded) over all live packs."""
    manifest = store.archive.manifest(0)
    manifest.refresh()
    live = [record.counts for record in manifest.live()]
    return sum(count.rows for count in live), sum(count.recorded_rows for count in live)


def rollout(
    store, recorded, *, segments, prompt, output, drift=lambda index, rows: rows, after=lambda: None, **options
):
    """A trajectory of several segments, each of which records the whole sequence anew."""
    trajectory = store.create(routing=WIDE, **options)
    total = prompt
    for index in range(segments):
        context = np.arange(prompt) if index == 0 else []
        with store.get(trajectory.id).segment(context=context) if index else trajectory.segment(context=context) as seg:
            seg.tokens(np.arange(output) + total, np.full(output, -0.5))
            total += output
            seg.routing(drift(index, recorded[: total - 1]), start=0)
            seg.close("abort" if index < segments - 1 else "stop")
        after()
    return trajectory.id


def same_from_both(store, id, before):
    for policy in ("last_segment_wins", "as_sampled"):
        for until in [None, *(event.id for event in store.events(id))]:
            loaded = store.load(id, policy=policy, until=until)
            expected = before[policy, until]
            np.testing.assert_array_equal(loaded.routed_experts, expected.routed_experts)
            np.testing.assert_array_equal(loaded.routing_mask, expected.routing_mask)
            np.testing.assert_array_equal(loaded.routing_source, expected.routing_source)
            np.testing.assert_array_equal(loaded.token_ids, expected.token_ids)


def every_fold(store, id):
    store.flush()
    return {
        (policy, until): store.load(id, policy=policy, until=until)
        for policy in ("last_segment_wins", "as_sampled")
        for until in [None, *(event.id for event in store.events(id))]
    }


def test_prefix_without_drift_is_stored_once_within_a_pack(durable, archive):
    recorded = rows(1000, spec=WIDE)
    id = rollout(durable, recorded, segments=3, prompt=100, output=200)
    before = every_fold(durable, id)
    archive()
    assert counts(durable) == (699, 299 + 499 + 699)
    same_from_both(durable, id, before)


def test_drifted_rows_are_written_and_the_others_referenced(durable, archive):
    recorded, other = rows(1000, spec=WIDE), rows(1000, seed=1, spec=WIDE)

    def drift(index, found):
        changed = found.copy()
        if index == 1:
            changed[50:60] = other[50:60]
            changed[200] = other[200]
        return changed

    id = rollout(durable, recorded, segments=2, prompt=100, output=200, drift=drift)
    before = every_fold(durable, id)
    archive()
    assert counts(durable) == (499 + 11, 299 + 499)
    same_from_both(durable, id, before)


def test_prefix_is_referenced_into_earlier_packs(durable, archive):
    recorded = rows(1000, spec=WIDE)
    id = rollout(durable, recorded, segments=3, prompt=100, output=200, after=archive)
    assert len({event.stored for event in durable.events(id)}) == 3
    assert counts(durable) == (699, 299 + 499 + 699)
    np.testing.assert_array_equal(durable.load(id).routed_experts[:699], recorded[:699])
    np.testing.assert_array_equal(durable.load(id, until="3-0").routed_experts[:299], recorded[:299])


def test_history_over_many_packs_is_written_anew_before_reading_touches_ever_more(durable, archive):
    recorded = rows(1000, spec=WIDE)
    id = rollout(durable, recorded, segments=12, prompt=10, output=40, after=archive)
    np.testing.assert_array_equal(durable.load(id).routed_experts[:489], recorded[:489])
    winners = [event for event in durable.plan(id).needed() if event.type == "Routing"]
    assert all(len({extent.pack for extent in event.extents}) <= 5 for event in winners)
    stored, recorded_rows = counts(durable)
    assert 489 < stored < recorded_rows / 2


def test_equal_prompt_rows_and_tokens_of_a_group_are_shared_inside_a_pack(durable, archive):
    prompt, ids = rows(500, spec=WIDE), []
    for member in range(4):
        recorded = np.concatenate([prompt, rows(100, seed=10 + member, spec=WIDE)])
        ids.append(rollout(durable, recorded, segments=1, prompt=500, output=100, group="g"))
    before = {id: every_fold(durable, id) for id in ids}
    archive()
    assert counts(durable) == (500 + 4 * 99, 4 * 599)
    (record,) = durable.archive.manifest(0).live()
    assert record.counts.tokens == 500 + 4 * 100
    for id in ids:
        same_from_both(durable, id, before[id])


def test_members_of_different_groups_share_no_rows(durable, archive):
    prompt = rows(500, spec=WIDE)
    for group in ("a", "b", None):
        rollout(durable, prompt, segments=1, prompt=400, output=100, group=group)
    archive()
    assert counts(durable) == (3 * 499, 3 * 499)


def test_observation_that_saw_the_same_costs_nothing(durable, archive):
    recorded = rows(1000, spec=WIDE)
    id = rollout(durable, recorded, segments=1, prompt=100, output=200)
    archive()
    durable.get(id).observe(recorded[:299], start=0, source="trainer", weight_version="v1")
    archive()
    assert counts(durable) == (299, 2 * 299)
    (overlap,) = durable.overlaps(id)
    np.testing.assert_array_equal(durable.recorded_rows(id, overlap.second), recorded[:299])


def test_partial_reads_give_the_rows_and_layers_asked_for(durable, archive):
    recorded = rows(3000, spec=WIDE)
    id = rollout(durable, recorded, segments=3, prompt=1000, output=600)
    hot = durable.load(id).routed_experts
    for archived in (False, True):
        if archived:
            archive()
        found = durable.load_routing(id, rows=(900, 2100), layers=(6, 2))
        np.testing.assert_array_equal(found.routed_experts, hot[900:2100][:, [6, 2]])
        assert found.routing_mask.all()
        np.testing.assert_array_equal(durable.load_routing(id).routed_experts, hot)
    with pytest.raises(trajstore.SchemaError, match="rows"):
        durable.load_routing(id, rows=(0, 10**6))
    for bad in ((0, 10**6), 5, (3,), ("a", "b"), (-1, 3), (3, 1), (True, 3), (0, np.True_), (0, 2.0), (0, None), "ab"):
        with pytest.raises(trajstore.SchemaError, match="rows"):
            durable.load_routing(id, rows=bad)
    for layers in (np.array([6, 2]), iter([6, 2]), [np.uint8(6), 2], {6: 0, 2: 0}):
        found = durable.load_routing(id, rows=np.array([900, 2100]), layers=layers)
        np.testing.assert_array_equal(found.routed_experts, hot[900:2100][:, [6, 2]])
    for bad in ((99,), 1, (), iter(()), [True], [np.True_], [1.0], [None], ["x"], "1", [[1]], np.array([1.0]), (-1,)):
        with pytest.raises(trajstore.SchemaError, match="layers"):
            durable.load_routing(id, layers=bad)


recordings = st.lists(
    st.tuples(st.integers(0, 40), st.lists(st.integers(0, 2), min_size=1, max_size=60)), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(recordings, st.sampled_from([6, 8, 64]))
def test_pieces_of_any_recordings_make_up_their_rows(recorded, row_bytes):
    known, stored, made = Known(row_bytes), {}, {}
    for number, (start, values) in enumerate(recorded):
        data = b"".join(bytes([value]) * row_bytes for value in values)
        found, event = b"", str(number)
        for a, b, reference in known.place(event, start, row_view(data, row_bytes)):
            if reference is None:
                stored.setdefault(event, {}).update({i: data[i * row_bytes : (i + 1) * row_bytes] for i in range(a, b)})
                found += data[a * row_bytes : b * row_bytes]
            else:
                source, first, count = reference
                assert count == b - a
                found += b"".join(stored[source][i] for i in range(first, first + count))
        assert found == data, "references lead to stored rows, never to other references"
        made[event] = found


@settings(max_examples=200, deadline=None)
@given(recordings, st.integers(0, 50))
def test_shared_rows_of_a_group_are_those_of_the_first_member(recorded, length):
    shared, store = SharedRows(8, length), b""
    for start, values in recorded:
        data = b"".join(bytes([value]) * 8 for value in values)
        found = b""
        for a, b, place in list(shared.place(start, row_view(data, 8))):
            if place is None:
                shared.learn(start + a, row_view(data[a * 8 : b * 8], 8), len(store) // 8)
                store += data[a * 8 : b * 8]
                found += data[a * 8 : b * 8]
            else:
                found += store[place[0] * 8 : sum(place) * 8]
        assert found == data


def test_small_rows_are_not_cut_into_pieces(durable, archive):
    """A run that is shorter than its own mention is written."""
    first, second = rows(40, seed=1), rows(40, seed=2)
    second[10:14] = first[10:14]
    trajectory = durable.create(routing=SPEC)
    for index, found in enumerate((first, second)):
        handle = durable.get(trajectory.id) if index else trajectory
        with handle.segment(context=np.arange(40) if not index else []) as segment:
            segment.tokens([1])
            segment.routing(found, start=0)
        durable.flush()
    archive()
    assert counts(durable)[0] == 80
    np.testing.assert_array_equal(durable.load(trajectory.id).routed_experts[:40], second)


def test_history_that_drifts_everywhere_is_archived_and_read_in_time_that_grows_with_it(durable, archive):
    """Every second row differs, so a recording has thousands of pieces, each found by bisection."""
    recorded = rows(6000, spec=WIDE)

    def drift(index, found):
        changed = found.copy()
        changed[index % 2 :: 2] = rows(len(changed[index % 2 :: 2]), seed=index, spec=WIDE)
        return changed

    id = rollout(durable, recorded, segments=4, prompt=5000, output=200, drift=drift, after=archive)
    last = drift(3, recorded[:5799])
    np.testing.assert_array_equal(durable.load(id).routed_experts[:5799], last)
    np.testing.assert_array_equal(durable.load_routing(id, rows=(10, 4000)).routed_experts, last[10:4000])


def test_rows_far_into_a_sequence_take_memory_for_themselves_alone():
    known = Known(64)
    for start in (1 << 40, (1 << 40) + 20):
        assert [place for _, _, place in known.place(str(start), start, row_view(bytes(64 * 20), 64))] == [None]


def test_damaged_old_pack_does_not_keep_new_segments_from_the_archive(durable, archive, folder):
    recorded = rows(1000, spec=WIDE)
    id = rollout(durable, recorded, segments=1, prompt=100, output=200)
    archive()
    (shard,) = (folder / "archive" / "packs" / "00").glob("*/routed/c/0/0/0")
    data = bytearray(shard.read_bytes())
    data[20] ^= 0x40
    shard.write_bytes(data)
    with durable.get(id).segment(context=[1]) as segment:
        segment.routing(recorded[:300], start=0)
    assert archive().refused == 0
    np.testing.assert_array_equal(durable.load(id).routed_experts[:300], recorded[:300])
