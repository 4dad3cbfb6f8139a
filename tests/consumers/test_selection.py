"""Which groups are trained on: whole ones, by policy; what is left out is counted, and found again."""

import logging
from itertools import islice

import pytest

import trajstore
from tests.consumers.rollouts import abort, finish, look, materialize, resume, wait_until
from trajstore_trainer import Selection, TrajectoryDataset, TrajectoryReader
from trajstore_trainer.filtered import FilteredLog
from trajstore_trainer.selection import judge, trailing_integer
from trajstore_trainer.session import Session

pytestmark = pytest.mark.torch


@pytest.fixture
def dataset(store):
    """Makes datasets over the store, `dataset(max_staleness=1)`; closes them at the end."""
    made = []

    def make(*, checkpoints=False, **options):
        made.append(TrajectoryDataset(store, checkpoints=checkpoints, timeout=10.0, selection=Selection(**options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def take(dataset, count=1):
    """Ids of the members of so many groups."""
    return [sorted(one.id for one in ready.trajectories) for ready in islice(dataset, count)]


def nothing(dataset):
    """Nothing comes to it for a while."""
    dataset._timeout = 0.4
    with pytest.raises(TimeoutError):
        next(iter(dataset))
    return True


def judged(store, *, version=None, **options):
    """What becomes of the one entry that is ready."""
    materialize(store)
    (ready,) = TrajectoryReader(store).take(timeout=5.0)
    return judge(ready, Selection(**options), version=version)


# Versions


@pytest.mark.parametrize(("label", "number"), [("v12", 12), ("7", 7), ("step-3-v004", 4)])
def test_age_of_a_version_is_the_integer_at_its_end(label, number):
    assert trailing_integer(label) == number


@pytest.mark.parametrize("label", ["latest", "", "v3/bf", "v3\n", "v³"])
def test_label_without_one_is_named(label):
    with pytest.raises(trajstore.SchemaError, match="version_key") as error:
        trailing_integer(label)
    assert repr(label) in str(error.value)


@pytest.mark.parametrize(("now", "why"), [(3, ""), (5, ""), (6, "stale")])
def test_staleness_counts_from_the_oldest_version_that_sampled_a_token(store, now, why):
    first = abort(store, version="v3")
    resume(store, first, "completed", version="v5")
    assert judged(store, version=now, max_staleness=2).why == why


def test_staleness_is_counted_when_a_group_is_used_not_when_it_is_read(store, dataset):
    made = [finish(store, version="v1"), finish(store, version="v3")]
    materialize(store)
    one = dataset(max_staleness=1)
    one.weight_version = "v2"
    assert one.weight_version == 2
    first = take(one)
    one.weight_version = 4
    if first == [[made[0].id]]:
        assert take(one) == [[made[1].id]]
    else:
        assert nothing(one), "the other was read ahead under version 2, and is stale by now"
        assert one.counts.passed_over == {"stale": 1}


def test_unreadable_label_is_named_with_its_trajectory_and_the_group_is_not_lost(store, dataset):
    trajectory = finish(store, version="latest")
    materialize(store)
    one = dataset(max_staleness=1)
    with pytest.raises(trajstore.SchemaError, match=r"dataset\.weight_version"):
        take(one)
    one.weight_version = 5
    for _ in range(2):
        with pytest.raises(trajstore.SchemaError, match="'latest'") as error:
            take(one)
        assert trajectory.id in str(error.value)
    one.close()
    again = dataset(max_staleness=1, version_key=_named_version)
    again.weight_version = 5
    assert take(again) == [[trajectory.id]]


def _named_version(label):
    return {"latest": 4}[label]


# Members


def test_group_comes_whole(store, dataset):
    made = [finish(store, group="g", group_size=3, status=status) for status in ("completed", "truncated", "completed")]
    materialize(store)
    assert take(dataset()) == [sorted(one.id for one in made)]


@pytest.mark.parametrize(("unfit", "kept"), [("drop", 0), ("rest", 2)])
def test_failed_member(store, unfit, kept):
    made = [finish(store, group="g", group_size=3, status=status) for status in ("completed", "failed", "completed")]
    verdict = judged(store, unfit=unfit)
    assert len(verdict.keep) == kept
    assert verdict.reasons[made[1].id] == "failed"
    assert verdict.why == ("failed" if unfit == "drop" else "")
    assert len(verdict.reasons) == 3 - kept


def test_rest_of_a_group_that_is_too_small_is_dropped(store):
    for status in ("completed", "failed", "failed"):
        finish(store, group="g", group_size=3, status=status)
    verdict = judged(store, unfit="rest")
    assert (verdict.keep, verdict.why) == ([], "too few members left")
    assert sorted(verdict.reasons.values()) == ["failed", "failed", "its group was dropped"]


def test_deleted_member_leaves_a_group_that_is_not_whole(store):
    made = [finish(store, group="g", group_size=3) for _ in range(3)]
    materialize(store)
    store.delete(made[0].id)
    verdict = judged(store)
    assert (verdict.keep, verdict.why) == ([], "missing")
    assert verdict.reasons[made[0].id] == "missing"


def test_member_deleted_before_its_group_was_whole_is_missed_too(store):
    made = [finish(store, group="g", group_size=3) for _ in range(2)]
    materialize(store)
    store.delete(made[0].id)
    finish(store, group="g", group_size=3)
    assert judged(store).why == "missing"


@pytest.mark.parametrize("size", [2, 3], ids=["of that size", "of a raised one"])
def test_member_beyond_the_size_makes_no_group_be_trained_on_twice(store, dataset, size):
    """The materializer publishes the group again, with all its members."""
    made = [finish(store, group="g", group_size=2) for _ in range(2)]
    materialize(store)
    one = dataset()
    assert take(one) == [sorted(member.id for member in made)]
    late = finish(store, group="g", group_size=size)
    materialize(store)
    assert nothing(one)
    (record,) = one.filtered()
    assert late.id in record.reasons
    assert record.why == "more members than the group's size"


@pytest.mark.parametrize(
    ("late", "early", "whole", "why"),
    [
        ("wait", False, True, "waits for a late member"),
        ("drop", False, False, "a member is late"),
        ("rest", True, False, "an earlier version of the group was decided on"),
    ],
)
def test_group_with_a_late_member_waits_or_is_decided_for_good(store, dataset, late, early, whole, why):
    made = [finish(store, group="g", group_size=3) for _ in range(2)]
    materialize(store, group_seconds=0)
    one = dataset(late=late)
    assert take(one) == [ids_of(made)] if early else nothing(one)
    made.append(finish(store, group="g", group_size=3))
    materialize(store)
    one._timeout = 10.0
    assert take(one) == [ids_of(made)] if whole else nothing(one)
    assert why in one.counts.passed_over
    assert {record.why for record in one.filtered()} >= {why}


def test_group_dropped_with_nothing_readable_in_it_stays_dropped(store, dataset):
    first = finish(store, group="g", group_size=2)
    materialize(store, group_seconds=0)
    store.wire.call("UNLINK", store.keys.ready_payload(first.id, 1))
    store.wire.call("XDEL", store.keys.entries(first.id), "2-0")
    one = dataset(late="drop", unfit="rest", min_members=1)
    assert nothing(one)
    assert one.counts.passed_over == {"a member is late": 1}
    finish(store, group="g", group_size=2)
    materialize(store)
    assert nothing(one)
    assert one.counts.passed_over["an earlier version of the group was decided on"] == 1


def test_late_member_is_not_taken_for_a_missing_one(store):
    for _ in range(3):
        finish(store, group="g", group_size=4)
    materialize(store, group_seconds=0)
    verdict = judged(store, late="rest", unfit="drop")
    assert len(verdict.keep) == 3
    assert verdict.decides


def test_group_that_lost_a_member_and_got_another_is_not_trained_on_twice(store, dataset):
    """It has as many members as it should, but another one had come: what is left of it was trained on."""
    made = [finish(store, group="g", group_size=2) for _ in range(2)]
    materialize(store)
    one = dataset()
    assert take(one) == [ids_of(made)]
    store.delete(made[0].id)
    finish(store, group="g", group_size=2)
    materialize(store)
    assert nothing(one)
    assert one.counts.passed_over == {"more members than the group's size": 1}


@pytest.mark.parametrize("name", ["aborted", "late"])
def test_unknown_policy_is_refused_and_named(name):
    with pytest.raises(trajstore.SchemaError, match=f"{name}= is 'wait', 'drop' or 'rest', not 'never'"):
        Selection(**{name: "never"})


def test_mixed_versions_and_missing_routing_are_unfit_where_they_are_not_wanted(store, dataset):
    mixed = abort(store, tokens=10)
    resume(store, mixed, "completed")
    unrouted = finish(store, routing=None)
    routed = finish(store, tokens=10)
    failed = finish(store, status="failed")
    materialize(store)
    one = dataset(mixed_versions=False, max_missing_routing=0.05)
    assert take(one) == [[routed.id]]
    assert nothing(one)
    assert one.counts.filtered == {"mixed versions": 1, "missing routing": 1, "failed": 1}
    assert {id: why for record in one.filtered() for id, why in record.reasons.items()} == {
        mixed.id: "mixed versions",
        unrouted.id: "missing routing",
        failed.id: "failed",
    }


def test_row_of_the_last_token_does_not_count_as_missing(store):
    finish(store, tokens=10)
    assert len(judged(store, max_missing_routing=0.0).keep) == 1


# Aborted members


def aborted_group(store):
    made = [abort(store, group="g", group_size=3), *(finish(store, group="g", group_size=3) for _ in range(2))]
    materialize(store)
    return made


def ids_of(made):
    return sorted(one.id for one in made)


def test_group_waits_for_an_aborted_member_and_then_comes_whole(store, dataset):
    made = aborted_group(store)
    one = dataset()
    assert nothing(one)
    assert [record.why for record in one.filtered()] == ["waits for an aborted member"]
    resume(store, made[0], "completed")
    materialize(store)
    one._timeout = 10.0
    assert take(one) == [ids_of(made)]


def test_rest_of_a_group_is_trained_on_once_whatever_becomes_of_its_aborted_member(store, dataset):
    made = aborted_group(store)
    one = dataset(aborted="rest")
    assert take(one) == [ids_of(made[1:])]
    resume(store, made[0], "completed")
    materialize(store)
    assert nothing(one)
    assert one.counts.passed_over == {"an earlier version of the group was decided on": 1}
    one.acknowledge()
    assert look(store) == []


def test_dropped_group_stays_dropped(store, dataset):
    made = aborted_group(store)
    one = dataset(aborted="drop")
    assert nothing(one)
    resume(store, made[0], "completed")
    materialize(store)
    assert nothing(one)
    assert one.counts.passed_over == {"aborted": 1, "an earlier version of the group was decided on": 1}
    assert one.counts.groups == 0


def test_rest_of_a_group_comes_again_after_a_crash(store, dataset):
    """The decision is its entry's."""
    made = aborted_group(store)
    first = dataset(aborted="rest")
    had = take(first)
    first.close()
    resume(store, made[0], "completed")
    materialize(store)
    second = dataset(aborted="rest")
    assert take(second) == had
    assert nothing(second)


def test_aborted_trajectory_that_is_trained_on_as_it_is_does_not_come_again_resumed(store, dataset):
    trajectory = abort(store)
    materialize(store)
    one = dataset(statuses=("completed", "aborted"))
    assert take(one) == [[trajectory.id]]
    resume(store, trajectory, "completed")
    materialize(store)
    assert nothing(one)


@pytest.mark.parametrize("options", [{"aborted": "rest"}, {"statuses": ("completed", "aborted")}])
def test_group_is_trained_on_once_in_whatever_order_its_entries_are_used(store, options):
    """One rank has read the earlier entry ahead, and another gets the later one first."""
    made = aborted_group(store)
    reading = {"world_size": 2, "timeout": 10.0, "prefetch_groups": 1, "selection": Selection(**options)}
    with (
        TrajectoryDataset(store, rank=0, **reading) as slow,
        TrajectoryDataset(store, rank=1, **reading) as quick,
    ):
        wait_until(lambda: slow._begin() and slow._session.prefetched)
        resume(store, made[0], "completed")
        materialize(store)
        assert take(quick) == [ids_of(made)]
        assert nothing(slow)
        assert slow.counts.passed_over == {"an earlier version of the group was decided on": 1}


def test_decision_outlives_the_materializers_memory_of_the_group(store, dataset):
    month = 30 * 86400
    made = [finish(store, group="g", group_size=2), abort(store, group="g", group_size=2)]
    materialize(store, assembly_seconds=month)
    one = dataset(aborted="rest", min_members=1)
    assert take(one) == [[made[0].id]]
    decided = store.keys.chosen("g", "trainer")
    assert store.wire.call("TTL", decided) > month
    store.wire.call("EXPIRE", decided, 60)
    resume(store, made[1], "completed")
    materialize(store, assembly_seconds=month)
    assert nothing(one)
    assert store.wire.call("TTL", decided) > month, "another entry of it may come after this one"


# What is left out


def test_group_that_others_took_over_before_it_was_handed_out_is_put_on_record_by_them_alone(
    store, dataset, monkeypatch
):
    """Who decides records: others may know other weights, and train on all of it."""
    aborted_group(store)
    one = dataset(aborted="rest")
    monkeypatch.setattr(Session, "hand_out", lambda *_: False)
    assert nothing(one)
    assert one.filtered() == []


def test_group_whose_record_the_server_did_not_take_is_the_next_again(store, dataset, monkeypatch):
    made = aborted_group(store)
    one = dataset(aborted="rest")
    write, refusals = FilteredLog.write, iter([trajstore.Unavailable("no answer")])

    def refused_once(*args):
        for error in refusals:
            raise error
        write(*args)

    monkeypatch.setattr(FilteredLog, "write", refused_once)
    with pytest.raises(trajstore.Unavailable, match="no answer"):
        next(iter(one))
    one.acknowledge()
    assert len(look(store)) == 1, "it was not handed out"
    assert take(one) == [ids_of(made[1:])]
    assert [record.reasons for record in one.filtered()] == [{made[0].id: "aborted"}]


def test_what_is_left_out_is_counted_logged_and_loads(store, dataset, caplog):
    caplog.set_level(logging.INFO, "trajstore_trainer")
    failed = [finish(store, group="g", group_size=2, status="failed") for _ in range(2)]
    finish(store, group="h", group_size=2)
    kept = finish(store, group="h", group_size=2)
    materialize(store)
    one = dataset()
    assert kept.id in take(one)[0]
    assert nothing(one)
    one.acknowledge()
    assert look(store) == []
    (record,) = dataset().filtered(reason="failed")
    assert (record.group, record.version, record.why) == ("g", 2, "failed")
    assert record.reasons == {member.id: "failed" for member in failed}
    assert one.filtered(reason="stale") == []
    assert all(len(store.load(id)) == 5 for id in record.reasons)
    assert all(f"{member.id} (failed)" in caplog.text for member in failed)
    assert (one.counts.passed_over, one.counts.filtered) == ({"failed": 1}, {"failed": 2})


def test_what_is_left_out_after_a_checkpoint_is_decided_anew(store, dataset):
    finish(store, version="v1")
    materialize(store)
    first = dataset(checkpoints=True, max_staleness=1)
    before = first.state_dict()
    first.weight_version = 9
    assert nothing(first)
    assert first.filtered() == [], "not committed"
    first.close()
    second = dataset(checkpoints=True, max_staleness=1)
    second.weight_version = 2
    second.load_state_dict(before)
    assert len(take(second)) == 1


def test_what_is_left_out_before_a_checkpoint_is_on_record_once_it_is_committed(store, dataset):
    trajectory = finish(store, version="v1")
    materialize(store)
    first = dataset(checkpoints=True, max_staleness=1)
    first.weight_version = 9
    assert nothing(first)
    state = first.state_dict()
    first.commit(state)
    first.commit(state)
    assert [list(record.reasons) for record in first.filtered()] == [[trajectory.id]]
    assert look(store) == []


def test_senseless_selections_are_refused():
    for options in (
        {"statuses": "completed"},
        {"statuses": ("open",)},
        {"aborted": "no"},
        {"unfit": "wait"},
        {"max_staleness": -1},
        {"max_missing_routing": 2.0},
    ):
        with pytest.raises(trajstore.SchemaError):
            Selection(**options)
