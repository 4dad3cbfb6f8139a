"""Why a row is what it is: the winner, what it overrode, and the reasons for a hole."""

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows, seed_rows
from tests.consumers.chains import record_chain
from tests.engines.vllm_fixtures import rows_of
from trajstore.archiver import Archiver
from trajstore.errors import NotFound, SchemaError
from trajstore_replay import why
from trajstore_replay.agreement import row_versions


def outcomes(found):
    """`(event, outcome)` of every recording of the row."""
    return [(one.recording.event, one.outcome) for one in found.candidates]


@pytest.fixture
def seed(embedded):
    writer = record_seed_case(embedded)
    embedded.flush()
    return writer.id


def test_the_newest_segment_wins_and_says_what_it_overrode(embedded, seed):
    found = why(embedded, seed, 6)
    assert outcomes(found) == [("3-2", "wins"), ("2-2", "overridden")]
    assert (found.winner.weight_version, found.winner.engine, found.winner.finish_reason) == ("v2", "test/1", "stop")
    assert found.candidates[1].finish_reason == "abort"
    assert found.candidates[1].weight_version == "v1"
    assert found.candidates[0].experts == ((7, 1),) * 3
    assert found.candidates[1].experts == ((0, 1),) * 3
    assert found.candidates[1].same_set == (False,) * 3
    assert found.candidates[0].same_set is None
    assert found.missing == ()


def test_who_brought_the_token_and_what_its_row_decided(embedded, seed):
    found = why(embedded, seed, 7)
    token, decided = found.token, found.next_token
    assert (token.token_id, token.segment, token.event, token.logprob, token.weight_version) == (
        12, 0, "2-1", -0.125, "v1",
    )  # fmt: skip
    assert (decided.token_id, decided.segment, decided.weight_version) == (13, 1, "v2")
    context = why(embedded, seed, 2).token
    assert (context.sampled, context.logprob, context.weight_version, context.event) == (False, None, "", "2-0")


def test_as_sampled_gives_the_row_to_who_sampled_the_next_token(embedded, seed):
    assert outcomes(why(embedded, seed, 6, policy="as_sampled")) == [
        ("3-2", "did not sample the next token"),
        ("2-2", "wins"),
    ]
    assert outcomes(why(embedded, seed, 7, policy="as_sampled")) == [("3-2", "wins")]


def test_negative_positions_count_from_the_end_and_the_last_row_is_missing_by_right(embedded, seed):
    last = why(embedded, seed, -1)
    assert (last.token.position, last.next_token, last.candidates, last.reference) == (9, None, (), -1)
    assert last.missing == ("it is the last token, which has never been an input: a later segment records its row",)
    assert why(embedded, seed, -10).token.position == 0


@pytest.mark.parametrize("token", [10, -11])
def test_a_position_that_is_not_there_is_an_error(embedded, seed, token):
    with pytest.raises(SchemaError, match=f"has 10 tokens at event 3-3; there is no token {token}"):
        why(embedded, seed, token)


def test_layers_go_by_global_id(embedded):
    spec = trajstore.RoutingSpec(layer_ids=(2, 5), top_k=2, num_experts=8, num_hidden_layers=6)
    writer = embedded.create(routing=spec)
    given = rows(3, 4, spec)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(given, start=0)
    embedded.flush()
    found = why(embedded, writer.id, 1, layers=[5])
    assert (found.layers, found.candidates[0].experts) == ((5,), (tuple(given[1, 1].tolist()),))
    with pytest.raises(SchemaError, match=r"layer 0 does not route.*2, 5"):
        why(embedded, writer.id, 1, layers=[0])


def test_order_apart_is_the_same_set(embedded):
    writer = embedded.create(routing=SPEC)
    given = rows(3, 4)
    for flipped in (given, given[..., ::-1]):
        with writer.segment(context=[1, 2]) as segment:
            segment.tokens([3])
            segment.routing(flipped[:2], start=0)
    embedded.flush()
    older = why(embedded, writer.id, 0).candidates[1]
    assert (older.same_set, older.same_order) == ((True,) * 3, (False,) * 3)


def test_holes_name_their_reason(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5])
        segment.no_routing("the feature is off")
    open_one = writer.segment(context=[6])
    open_one.tokens([7])
    embedded.flush()
    assert why(embedded, writer.id, 1).missing == (
        "segment 0 has no routing: the feature is off",
        "segment 1 is still open: its routing may come yet",
    )
    embedded.get(writer.id).close("aborted", takeover=True)
    embedded.flush()
    assert "segment 1 was lost: its writer vanished" in why(embedded, writer.id, 1).missing[1]
    unrouted = embedded.create()
    with unrouted.segment(context=[1, 2]):
        pass
    embedded.flush()
    found = why(embedded, unrouted.id, 0)
    assert (found.layers, found.candidates) == ((), ())
    assert found.missing == ("the trajectory was created without a routing spec: no routing is recorded",)


def test_a_segment_that_was_rewound_is_no_reason(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4])
        segment.no_routing("of a past that was taken back")
    with writer.segment(base=1, context=[5, 6]) as segment:
        segment.tokens([7])
        segment.no_routing("the feature is off")
    embedded.flush()
    assert why(embedded, writer.id, 2).missing == ("segment 1 has no routing: the feature is off",)


def test_rows_of_a_recording_that_begins_later_are_found_by_position(embedded):
    writer = embedded.create(routing=SPEC)
    given = rows(3, 9)
    with writer.segment(context=[1, 2, 3]) as segment:
        segment.tokens([4, 5, 6])
        segment.routing(given, start=2)
    embedded.flush()
    for row in (2, 3, 4):
        assert why(embedded, writer.id, row).winner.experts == tuple(map(tuple, given[row - 2].tolist()))


def test_recomputed_rows_did_not_sample(embedded):
    """miles #3277, sglang #39633."""
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(rows(3), start=0, origin="recomputed")
    embedded.flush()
    assert why(embedded, writer.id, 1).winner.recording.origin == "recomputed"
    strict = why(embedded, writer.id, 1, policy="as_sampled")
    assert outcomes(strict) == [("2-2", "recomputed")]
    assert "rows that it did not recompute" in strict.missing[0]


def test_of_an_output_with_several_versions_the_row_has_that_of_its_next_token(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3, 4, 5, 6])
        segment.routing(rows(5), start=0)
        segment.close("stop", weight_versions=[("v1", 0, 2), ("v2", 2, 4)])
    embedded.flush()
    assert [why(embedded, writer.id, row).winner.weight_version for row in range(5)] == ["v1", "v1", "v1", "v2", "v2"]
    assert [why(embedded, writer.id, token).token.weight_version for token in range(6)] == [
        "", "", "v1", "v1", "v2", "v2",
    ]  # fmt: skip


def test_the_row_of_the_last_token_has_the_version_that_sampled_it(embedded):
    """The surplus row of some engines; a rerun splits rows by the same rule."""
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2], weight_version="v1") as segment:
        segment.tokens([3, 4])
        segment.routing(rows(4), start=0)
        segment.close("stop", weight_versions=[("v2", 1, 2)])
    embedded.flush()
    versions = [why(embedded, writer.id, row).winner.weight_version for row in range(4)]
    assert versions == ["v1", "v1", "v2", "v2"] == row_versions(embedded.load(writer.id)).tolist()


def test_as_sampled_the_surplus_row_has_decided_nothing_yet(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3])
        segment.routing(rows(3), start=0)
    embedded.flush()
    found = why(embedded, writer.id, -1, policy="as_sampled")
    assert outcomes(found) == [("2-2", "did not sample the next token")]
    assert "there is no next token yet" in found.candidates[0].because
    assert found.missing == (
        "it is the last token: under as_sampled its row counts once whoever recorded it brings the next one",
    )
    assert why(embedded, writer.id, -1).missing == ()


def test_as_sampled_a_recording_that_a_recomputed_one_hides_does_not_lose_to_a_row(embedded):
    writer = embedded.create(routing=SPEC)
    with writer.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(rows(3), start=0)
        segment.routing(rows(3, 1), start=0, origin="recomputed")
    embedded.flush()
    found = why(embedded, writer.id, 1, policy="as_sampled")
    assert outcomes(found) == [("2-3", "recomputed"), ("2-2", "overridden")]
    assert found.candidates[1].because.endswith("has the row, and says that it was recomputed")
    assert why(embedded, writer.id, 1).candidates[1].because == "a later recording of the row wins"


def test_until_a_note_is_what_had_happened_when_it_came(embedded, seed):
    writer = embedded.get(seed)
    writer.late_routing(segment=1, rows=seed_rows(1, 9)[3:5], start=3)
    writer.observe(seed_rows(0, 4), start=0, source="trainer")
    embedded.flush()
    found = why(embedded, seed, 3, until="note 1-0")
    assert (found.at, outcomes(found)) == (
        "note 1-0",
        [("note 1-0", "wins"), ("3-2", "overridden"), ("2-2", "overridden")],
    )
    assert outcomes(why(embedded, seed, 3, until="note 2-0"))[-1] == ("note 2-0", "observed")
    with pytest.raises(NotFound, match="no event note 9-0"):
        why(embedded, seed, 3, until="note 9-0")


def test_observations_are_shown_and_never_win(embedded, seed):
    embedded.get(seed).observe(seed_rows(0, 4), start=0, source="trainer", weight_version="v9")
    embedded.flush()
    found = why(embedded, seed, 3)
    assert outcomes(found) == [("3-2", "wins"), ("2-2", "overridden"), ("note 1-0", "observed")]
    assert (found.candidates[2].weight_version, found.candidates[2].same_set) == ("v9", (False,) * 3)
    assert outcomes(why(embedded, seed, 3, until="2-3"))[0] == ("2-2", "wins")


def test_observation_of_what_was_rewound_says_so(embedded, seed):
    embedded.get(seed).observe(seed_rows(0, 9), start=0, source="trainer")
    with embedded.get(seed).segment(base=6) as segment:
        segment.tokens([90, 91], [-0.5, -0.5])
    embedded.flush()
    assert outcomes(why(embedded, seed, 5))[-1] == ("note 1-0", "observed")
    assert outcomes(why(embedded, seed, 6))[-1] == ("note 1-0", "observed before a rewind")


def test_a_real_chain_from_the_archive_gives_the_rows_that_vllm_returned(durable_chain):
    archive, id = durable_chain
    for token in (0, 40, 82, 83, 106, 107):
        found = why(archive, id, token, layers=[2])
        expected = [
            tuple(rows_of(f"10_chain_reset_seg{number}")[token, 2].tolist())
            for number, count in ((3, 137), (2, 107), (1, 83))
            if token < count
        ]
        assert [one.experts[0] for one in found.candidates] == expected
        assert [one.recording.segment for one in found.candidates] == [2, 1, 0][: len(expected)]
        for one in found.candidates[1:]:
            assert one.same_set == (set(one.experts[0]) == set(expected[0]),)


@pytest.fixture
def durable_chain(tmp_path):
    """The chain in an archive without its server."""
    with trajstore.open(tmp_path / "chain", partitions=1, ack="fsync") as store:
        writer = record_chain(store)
        Archiver(store).run(once=True)
    return trajstore.open_archive(tmp_path / "chain" / "archive"), writer.id


def test_a_row_alone_can_be_read_of_a_recording(durable_chain, embedded):
    archive, id = durable_chain
    recording = archive.plan(id).history.segments[1].recordings[0]
    np.testing.assert_array_equal(
        archive.recorded_rows(id, recording, rows=(30, 33)), rows_of("10_chain_reset_seg2")[30:33]
    )
    assert archive.recorded_rows(id, recording, rows=(30, 30)).shape == (0, 4, 2)
    with pytest.raises(SchemaError, match=r"rows \[0, 107\), not \(100, 108\)"):
        archive.recorded_rows(id, recording, rows=(100, 108))


def test_payloads_come_in_the_order_asked_for_and_unknown_events_are_named(embedded, seed):
    first, none, second = embedded.payloads(seed, ["2-1", "2-3", "2-0"])
    assert np.frombuffer(first, "<i4", 3).tolist() == [10, 11, 12]
    assert bytes(none) == b""
    assert np.frombuffer(second, "<i4").tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(NotFound, match="no event 9-0"):
        embedded.payloads(seed, ["9-0"])
