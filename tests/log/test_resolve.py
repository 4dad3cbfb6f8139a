"""What became of a write, case by case: `judge` is pure, so each case is a literal."""

import dataclasses

import pytest

from tests.log.looking import NoArchive
from trajstore.entries import EntryStamp, entry_digest
from trajstore.errors import Fenced, SequenceGap
from trajstore.events import EventId, Rewarded, RoutingAbsent, TrajectoryOpened
from trajstore.log.batch import Batch, Item, Turn, freeze
from trajstore.log.resolve import (
    Landed,
    Nothing,
    Refused,
    Renumber,
    Resend,
    Seen,
    judge,
    judge_note,
)

MINE, THEIRS = 7, 8


class Archived(NoArchive):
    """An archive that holds these batches."""

    def __init__(self, *batches: Batch, nonce: int = MINE, notes: int = 0) -> None:
        self.stamps = {batch.at: EntryStamp(nonce, entry_digest(batch.entry)) for batch in batches}
        self.notes = notes

    def entry(self, id, at):
        return self.stamps.get(at)

    def note(self, id, at):
        return self.stamps.get(at)

    def last_note(self, id):
        return self.notes

    def last_entry(self, id):
        return max(self.stamps, default=None)


def batch(at, *, before=None, creates=False, sent=True, header=None, note=False):
    """One event at this id, by MINE."""
    at, before = EventId.parse(at), None if before is None else EventId.parse(before)
    turn = Turn(at.epoch, creates=creates, nonce=MINE, seq=at.seq)
    made = freeze("t", [Item(turn, header or RoutingAbsent(reason="x"), None)], note=note, summary=None, now=0.0)
    made.before, made.sent = before, sent
    return made


def seen(last, *, first=MINE, at_head=None, last_event=None, last_nonce=None):
    """What the server shows."""
    return Seen(
        last=None if last is None else EventId.parse(last),
        last_event=None if last_event is None else EventId.parse(last_event),
        first_nonce=first,
        at_head=at_head,
        last_nonce=last_nonce,
    )


def decide(server, *, head=None, acked=None, kept=(), holds_open=True, archive=None, acked_nonce=MINE):
    """`judge` with the usual rest."""
    return judge(
        "t",
        server,
        head=head,
        acked=None if acked is None else EventId.parse(acked),
        acked_nonce=acked_nonce if acked is not None else None,
        kept=list(kept),
        holds_open=holds_open,
        archive=archive or NoArchive(),
    )


def fenced(verdict):
    """True if another writer has it."""
    return isinstance(verdict, Refused) and isinstance(verdict.error, Fenced)


def test_own_bytes_at_the_id_mean_landed():
    head = batch("2-3", before="2-2")
    assert decide(seen("2-3", at_head=head.entry), head=head, acked="2-2") == Landed()


def test_own_bytes_at_the_id_mean_landed_even_if_a_newer_epoch_follows():
    head = batch("2-3", before="2-2")
    assert decide(seen("3-0", at_head=head.entry), head=head, acked="2-2") == Landed()


def test_other_bytes_at_the_id_mean_fenced():
    head, other = batch("3-0", before="2-2"), batch("3-0", header=Rewarded(reward=1.0))
    assert fenced(decide(seen("3-0", at_head=other.entry), head=head, acked="2-2"))


def test_same_event_by_another_nonce_means_fenced():
    head = batch("3-0", before="2-2")
    turn = Turn(3, nonce=THEIRS)
    twin = freeze("t", [Item(turn, head.items[0].header, None)], note=False, summary=None, now=0.0)
    assert fenced(decide(seen("3-0", at_head=twin.entry), head=head, acked="2-2"))


def test_absent_id_above_the_acknowledged_end_means_send_again():
    head = batch("2-3", before="2-2")
    assert decide(seen("2-2"), head=head, acked="2-2") == Resend([head], EventId(2, 2))


def test_first_entry_of_a_new_trajectory_is_sent_again_where_there_is_no_stream():
    head = batch("1-0", creates=True, header=TrajectoryOpened())
    assert decide(seen(None, first=None), head=head) == Resend([head], None)


def test_absent_id_below_a_newer_epoch_means_fenced():
    head = batch("2-3", before="2-2")
    assert fenced(decide(seen("3-0"), head=head, acked="2-2"))


def test_newer_epoch_concerns_only_a_writer_with_an_open_segment_or_a_batch_in_question():
    assert fenced(decide(seen("3-0"), acked="2-2"))
    assert decide(seen("3-0"), acked="2-2", holds_open=False) == Nothing()


def test_nothing_in_question_and_nothing_changed():
    assert decide(seen("2-2"), acked="2-2") == Nothing()
    assert decide(seen("2-2"), acked="2-2", holds_open=False) == Nothing()


def test_first_entry_of_the_epoch_by_another_means_fenced_though_the_end_is_lower():
    """The server lost the epoch and gave its number to another; sending on would interleave two writers."""
    head = batch("2-6", before="2-5")
    assert fenced(decide(seen("2-1", first=THEIRS), head=head, acked="2-5", kept=[head]))


def test_first_entry_that_was_trimmed_tells_nothing():
    head = batch("2-6", before="2-5")
    assert decide(seen("2-5", first=None), head=head, acked="2-5") == Resend([head], EventId(2, 5))


def test_lost_tail_that_is_kept_is_sent_again_and_the_doubtful_batch_after_it():
    kept = [batch("2-0", before="1-0"), batch("2-1", before="2-0"), batch("2-2", before="2-1")]
    head = batch("2-3", before="2-2")
    verdict = decide(seen("2-0"), head=head, acked="2-2", kept=kept)
    assert verdict == Resend([kept[1], kept[2], head], EventId(2, 0))


def test_lost_tail_is_sent_again_without_a_batch_in_question():
    kept = [batch("2-1", before="2-0"), batch("2-2", before="2-1")]
    assert decide(seen("2-1"), acked="2-2", kept=kept) == Resend([kept[1]], EventId(2, 1))


def test_lost_turn_is_not_sent_again_above_what_another_wrote_anew_in_the_place_of_its_forerunner():
    """Found by simulation seed 389: 3-0 and 4-0 were lost, another made 3-0 anew, and 4-0 did not fit it."""
    lost = batch("4-0", before="3-0")
    lost.before_nonce = THEIRS
    assert decide(seen("3-0", first=None, last_nonce=THEIRS), acked="4-0", kept=[lost]) == Resend([lost], EventId(3, 0))
    assert fenced(decide(seen("3-0", first=None, last_nonce=MINE), acked="4-0", kept=[lost]))


def test_lost_turn_is_not_sent_again_above_anothers_that_was_archived_and_trimmed_meanwhile():
    """Found by the simulation: an epoch with two writers, for the hot log does not tell any more whose its end is."""
    kept = [batch("3-0", before="2-0"), batch("3-1", before="3-0")]
    kept[1].before_nonce = MINE
    opened = batch("1-0", creates=True)
    theirs, mine = (Archived(opened, kept[0], nonce=nonce) for nonce in (THEIRS, MINE))
    verdict = decide(seen("3-0", first=None), acked="3-1", kept=kept, holds_open=False, archive=theirs)
    assert isinstance(verdict, Refused)
    assert isinstance(verdict.error, Fenced)
    verdict = decide(seen("3-0", first=None), acked="3-1", kept=kept, holds_open=False, archive=mine)
    assert verdict == Resend(kept[1:], EventId(3, 0))


def test_loss_above_which_another_has_gone_on_is_told_though_nothing_is_in_question():
    """Found by simulation seed 101: the handle's segment was closed and acknowledged, so it would never have asked."""
    lost = batch("5-2", before="5-0")
    verdict = decide(seen("6-0"), acked="5-2", kept=[lost], holds_open=False)
    assert isinstance(verdict, Refused)
    assert isinstance(verdict.error, SequenceGap)
    assert "5-2" in str(verdict.error)
    assert decide(seen("6-0", at_head=lost.entry), acked="5-2", kept=[lost], holds_open=False) == Nothing()
    deleted = dataclasses.replace(seen("6-0"), is_deleted=True)
    assert decide(deleted, acked="5-2", kept=[lost], holds_open=False) == Nothing()
    assert decide(seen("6-0"), acked="5-2", kept=[lost], holds_open=False, archive=Archived(lost)) == Nothing()


@pytest.mark.parametrize("last", ["6-0", None], ids=["trimmed", "no stream left"])
def test_loss_is_told_though_what_another_wrote_above_it_is_archived(last):
    """Found by simulation seed 6501: only of a deleted trajectory a newer entry says nothing of the older ones."""
    lost, first, above = batch("5-2", before="5-0"), batch("1-0", creates=True), batch("6-0")
    server = seen(last, first=None)
    told = decide(server, acked="5-2", kept=[lost], holds_open=False, archive=Archived(first, above))
    assert isinstance(told, Refused)
    assert isinstance(told.error, SequenceGap)
    assert decide(server, acked="5-2", kept=[lost], holds_open=False, archive=Archived(first, lost, above)) == Nothing()
    assert decide(server, acked="5-2", kept=[lost], holds_open=False, archive=Archived(above)) == Nothing(), "deleted"


def test_idle_writer_whose_epoch_another_has_written_anew_is_told_although_nothing_is_kept():
    """Found by simulation seed 8567: the server would take its next turn, above a longer epoch of the other's."""
    theirs, mine = (Archived(batch("5-0"), nonce=nonce) for nonce in (THEIRS, MINE))
    for server, archive in ((seen("5-3", first=THEIRS), Untouched()), (seen("5-3", first=None), theirs)):
        told = decide(server, acked="5-2", holds_open=False, archive=archive)
        assert isinstance(told, Refused)
        assert isinstance(told.error, SequenceGap)
        assert decide(dataclasses.replace(server, is_deleted=True), acked="5-2", holds_open=False) == Nothing()
    assert decide(seen("5-3"), acked="5-2", holds_open=False, archive=Untouched()) == Nothing(), "it has gone on"
    assert decide(seen("5-3", first=None), acked="5-2", holds_open=False, archive=mine) == Nothing()
    assert decide(seen("6-0", first=None), acked="5-2", holds_open=False, archive=Untouched()) == Nothing()


@pytest.mark.parametrize(
    "last",
    ["4-0", "3-0", "2-0", None],
    ids=["in a longer log", "in one as long", "in a shorter log", "no stream left"],
)
def test_loss_is_told_though_the_archive_has_an_entry_of_that_id_if_it_is_anothers(last):
    """Found by the simulation: what had been written anew was archived and trimmed before the writer looked again."""
    kept = [batch("2-0", before="1-0"), batch("3-0", before="2-0")]
    theirs = Archived(batch("3-0", before="2-0"), nonce=THEIRS)
    mine = Archived(batch("3-0", before="2-0"), nonce=MINE)
    for archive, verdict in ((theirs, Refused), (mine, Nothing)):
        found = decide(seen(last, first=None), acked="3-0", kept=kept, holds_open=False, archive=archive)
        assert isinstance(found, verdict)
    told = decide(seen(last, first=None), acked="3-0", kept=kept, holds_open=False, archive=theirs)
    assert isinstance(told.error, SequenceGap)
    assert "another writer has gone on" in str(told.error)


def test_nothing_is_written_above_anothers_archived_entry_that_has_the_lost_ones_id():
    """Found by simulation seed 7645: the log is as long as it was, and no longer shows whose its end is."""
    lost, head = batch("3-0", before="2-0"), batch("3-1", before="3-0", sent=False)
    theirs, mine = (Archived(lost, nonce=nonce) for nonce in (THEIRS, MINE))
    for question in (None, head):
        told = decide(seen("3-0", first=None), head=question, acked="3-0", kept=[lost], archive=theirs)
        assert isinstance(told, Refused)
        assert isinstance(told.error, SequenceGap)
        assert "entries up to 3-0, and another writer has gone on" in str(told.error)
    verdict = decide(seen("3-0", first=None), head=head, acked="3-0", kept=[lost], archive=mine)
    assert verdict == Resend([head], EventId(3, 0))


def test_turn_that_goes_on_over_a_trimmed_log_asks_whose_it_is_although_nothing_is_kept():
    """What is kept has a bound, which one busy writer reaches in less time than a server takes to sync."""
    lost, more, turn = batch("3-0"), batch("3-1", before="3-0"), batch("4-0", before="3-0")
    theirs = Archived(lost, nonce=THEIRS)
    for question in (None, more):
        told = decide(seen("3-0", first=None), head=question, acked="3-0", archive=theirs)
        assert isinstance(told, Refused)
        assert isinstance(told.error, SequenceGap)
    opening = decide(seen("3-0", first=None), head=turn, acked="3-0", archive=Untouched())
    assert opening == Resend([turn], EventId(3, 0)), "what went before a turn is mostly archived and trimmed"


@pytest.mark.parametrize("holds_open", [False, True])
def test_lost_turn_is_not_sent_again_above_anothers_tombstone(holds_open):
    """Found by simulation seeds 2894 and 5379: another deleted the trajectory anew, in a shorter log."""
    lost = batch("3-0", before="2-0")
    deleted = dataclasses.replace(seen("2-0", first=None, last_nonce=THEIRS), is_deleted=True)
    assert fenced(decide(deleted, acked="3-0", kept=[lost], holds_open=holds_open))
    assert fenced(decide(deleted, head=batch("3-1", before="3-0"), acked="3-0", kept=[lost], holds_open=holds_open))
    archive = Archived(batch("2-0"), nonce=THEIRS)
    assert fenced(decide(seen("2-0", first=None), acked="3-0", kept=[lost], holds_open=holds_open, archive=archive))


def test_trajectory_that_was_lost_whole_is_not_created_again_where_anothers_is_archived():
    kept = [batch("1-0", creates=True), batch("2-0", before="1-0")]
    archive = Archived(batch("1-0", creates=True), nonce=THEIRS)
    verdict = decide(seen(None), acked="2-0", kept=kept, archive=archive)
    assert isinstance(verdict, Refused)
    assert isinstance(verdict.error, SequenceGap)


def test_whole_trajectory_that_is_kept_is_created_again():
    kept = [batch("1-0", creates=True, header=TrajectoryOpened()), batch("2-0", before="1-0")]
    assert decide(seen(None, first=None), acked="2-0", kept=kept) == Resend(kept, None)


def test_stream_that_is_gone_is_not_created_from_its_middle():
    kept = [batch("2-0", before="1-0")]
    verdict = decide(seen(None, first=None), acked="2-0", kept=kept)
    assert isinstance(verdict, Refused)
    assert isinstance(verdict.error, SequenceGap)
    assert verdict.error.last_good == ""


@pytest.mark.parametrize("kept", [[], [("2-2", "2-1")]], ids=["nothing kept", "not enough kept"])
def test_lost_tail_that_is_not_kept_gives_the_epoch_up_and_names_the_ids(kept):
    head = batch("2-3", before="2-2")
    batches = [batch(at, before=before) for at, before in kept]
    verdict = decide(seen("1-0", first=None, last_event="1-4"), head=head, acked="2-2", kept=batches)
    assert isinstance(verdict, Refused)
    assert isinstance(verdict.error, SequenceGap)
    assert verdict.error.last_good == "1-4"
    assert "from after 1-4 up to 2-2" in str(verdict.error)


def test_new_epoch_is_not_opened_above_a_loss_of_the_old_one():
    head = batch("3-0", before="2-2")
    verdict = decide(seen("2-1"), head=head, acked="2-2")
    assert isinstance(verdict, Refused)
    assert isinstance(verdict.error, SequenceGap)


def test_entry_archived_and_trimmed_before_its_reply_was_read_back_has_landed():
    head = batch("2-3", before="2-2")
    assert decide(seen("2-3"), head=head, acked="2-2", archive=Archived(head)) == Landed()
    assert decide(seen(None, first=None), head=head, acked="2-2", archive=Archived(head)) == Landed()
    assert decide(seen("3-0", first=None), head=head, acked="2-2", archive=Archived(head)) == Landed()


def test_entry_of_another_in_the_archive_means_fenced():
    head = batch("2-3", before="2-2")
    assert fenced(decide(seen("2-3"), head=head, acked="2-2", archive=Archived(head, nonce=THEIRS)))


class Untouched(NoArchive):
    """An archive that nobody may ask: it takes a read of the disk, or a request."""

    def entry(self, id, at):
        raise AssertionError("asked")


def test_archive_is_not_asked_about_a_batch_that_was_never_sent():
    head = batch("2-3", before="2-2", sent=False)
    assert decide(seen("2-2"), head=head, acked="2-2", archive=Untouched()) == Resend([head], EventId(2, 2))


def test_archive_is_not_asked_about_what_no_crash_can_take_nor_about_what_is_there():
    """At a reconnect each idle handle is looked at, and of most the end was archived and trimmed long ago."""
    assert decide(seen("2-2", first=None), acked="2-2", holds_open=False, archive=Untouched()) == Nothing()
    assert decide(seen("2-2"), acked="2-2", kept=[batch("2-2")], archive=Untouched()) == Nothing()


def test_trimmed_stream_whose_end_is_the_acknowledged_one_is_as_it_was_left():
    assert decide(seen("2-2", first=None), acked="2-2") == Nothing()


def test_trajectory_that_was_archived_and_removed_tells_the_writer_to_open_it_again():
    acked, head = batch("2-2"), batch("3-0", before="2-2")
    assert fenced(decide(seen(None, first=None), head=head, acked="2-2", archive=Archived(acked)))
    assert decide(seen(None, first=None), acked="2-2", archive=Archived(acked)) == Nothing()
    assert fenced(decide(seen(None, first=None), head=head))


def test_deleted_and_removed_trajectory_is_no_loss_for_whoever_wrote_to_it():
    """Found by simulation seed 213: of a deleted trajectory the archive tells its tombstone only."""
    tombstone = Archived(batch("4-0"))
    assert decide(seen(None, first=None), acked="3-1", archive=tombstone) == Nothing()
    assert fenced(decide(seen(None, first=None), head=batch("3-2", before="3-1"), acked="3-1", archive=tombstone))


def test_reopening_what_was_removed_may_make_the_stream_again():
    head = batch("4-0", creates=True)
    assert decide(seen(None, first=None), head=head) == Resend([head], None)


def note(number, **options):
    """A note by MINE."""
    return batch(f"{number}-0", note=True, **options)


def test_note_that_is_there_has_landed():
    head = note(3)
    assert judge_note(head, seen("5-0", at_head=head.entry), NoArchive()) == Landed()
    assert judge_note(head, seen("5-0"), Archived(head)) == Landed()
    assert judge_note(head, seen(None), Archived(head, notes=3)) == Landed()


def test_note_whose_number_is_taken_gets_the_next():
    head, other = note(3), note(3, header=Rewarded(reward=1.0))
    assert judge_note(head, seen("5-0", at_head=other.entry), NoArchive()) == Renumber(6, creates=False)
    assert judge_note(head, seen("5-0"), Archived(notes=9)) == Renumber(10, creates=False)


def test_note_that_did_not_arrive_is_sent_again_as_it_is():
    head = note(3)
    assert judge_note(head, seen("2-0"), NoArchive()) == Resend([head], None)
    first = note(1, creates=True)
    assert judge_note(first, seen(None), NoArchive()) == Resend([first], None, creates=True)


def test_note_that_may_yet_arrive_keeps_its_number_though_the_stream_is_gone():
    """Under a lower one it would be there twice if it arrived after all."""
    head = note(3)
    assert judge_note(head, seen(None), NoArchive()) == Resend([head], None, creates=True)
    assert judge_note(head, seen(None), Archived(notes=2)) == Resend([head], None, creates=True)
    assert judge_note(head, seen(None), Archived(notes=3)) == Renumber(4, creates=True)


def test_first_note_makes_the_stream_and_counts_on_from_the_archive():
    head = note(1, sent=False)
    assert judge_note(head, seen(None), NoArchive()) == Renumber(1, creates=True)
    assert judge_note(head, seen(None), Archived(notes=4)) == Renumber(5, creates=True)
    assert judge_note(head, seen("4-0"), NoArchive()) == Renumber(5, creates=False)
