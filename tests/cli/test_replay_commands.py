"""`replay`, `why`, `diff`, `doctor` and what `ls` explains: what they say, in a terminal, a pipe and as JSON."""

import json
import os
import pty
import re
import shutil
import subprocess

import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.cli.running import COMMAND, environment, in_terminal, invoke, started
from tests.consumers.chains import record_chain
from tests.consumers.rollouts import finish, materialize
from trajstore.archiver import Archiver


def document(*arguments):
    """The one JSON document that a command prints."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failed(*arguments, code=1):
    """The message of a command that must fail."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert "Traceback" not in result.stderr
    return result.stderr


def lost_and_gone_on_from(store):
    """A trajectory whose first writer vanished, and whose second one went on where it stood."""
    lost = store.create()
    lost.segment(context=[1, 2]).tokens([3])
    store.flush()
    with store.get(lost.id).segment() as segment:
        segment.tokens([4])
        segment.close("stop")
    store.flush()
    return lost.id


def test_replay_prints_every_step_once(seed, folder):
    page = invoke("replay", folder, seed).stdout
    assert re.findall(r"^ *\d+/11  (\S+)  (\w+)", page, re.MULTILINE) == [
        ("1-0", "TrajectoryOpened"),
        ("2-0", "SegmentOpened"),
        ("2-1", "Tokens"),
        ("2-2", "Routing"),
        ("2-3", "SegmentClosed"),
        ("3-0", "SegmentOpened"),
        ("3-1", "Tokens"),
        ("3-2", "Routing"),
        ("3-3", "SegmentClosed"),
        ("4-0", "Rewarded"),
        ("5-0", "TrajectoryClosed"),
    ]
    assert "  rows 0-6: now of segment 1 (3-2), instead of segment 0 (2-2)\n" in page
    assert "  rows 7-8: now of segment 1 (3-2), which were missing\n" in page
    assert "       0  0000000011\n          111111111·\n" in page
    assert page.count("one letter per token") == 1


def test_replay_prints_the_lines_of_tokens_that_changed(durable, folder):
    """Else the page of a long rollout grows with the square of its length."""
    id = record_chain(durable).id
    strips = re.findall(r"^ +(\d+)  0", invoke("replay", folder, id, "--until", "2-3").stdout, re.MULTILINE)
    assert strips == ["0", "0", "70", "0", "70"]  # the prompt, the output, its rows; nothing at the close


def test_replay_until_ends_at_the_event(seed, folder):
    assert "3/3  2-1  Tokens" in invoke("replay", folder, seed, "--until", "2-1").stdout
    assert "no event 9-9" in failed("replay", folder, seed, "--until", "9-9")
    assert "not an event id" in failed("replay", folder, seed, "--until", "now")


def test_replay_json_is_the_steps(seed, folder):
    steps = document("replay", folder, seed, "--policy", "as_sampled")
    assert len(steps) == 11
    assert steps[7]["event"]["id"] == "3-2"
    assert steps[7]["changes"]["rows"] == [
        {"start": 7, "stop": 9, "before": None, "after": {"segment": 1, "event": "3-2"}}
    ]
    assert steps[7]["rows_of"] == [
        {"start": 0, "stop": 7, "segment": 0},
        {"start": 7, "stop": 9, "segment": 1},
        {"start": 9, "stop": 10, "segment": -1},
    ]
    assert steps[2]["changes"]["tokens"] == [5, 8]
    assert (steps[-1]["status"], steps[-1]["reward"], steps[-1]["problem"]) == ("completed", 1.0, None)


def test_replay_in_a_terminal_goes_where_it_is_told(seed, folder):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "replay", str(folder), seed, "--until", "2-0"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment({"TERM": "dumb"}),
    )
    os.close(theirs)
    written = b""

    def answer(prompt, text):
        nonlocal written
        while prompt not in written:
            written += os.read(ours, 1 << 16)
        told, written = written, b""
        os.write(ours, text)
        return told.decode()

    assert "2/11  2-0" in answer(b"2-0 (n b g s q) > ", b"n\n")
    assert "3/11  2-1" in answer(b"2-1 (n b g s q) > ", b"g 3-2\n")
    assert "instead of segment 0" in answer(b"3-2 (n b g s q) > ", b"b\n")
    assert "7/11  3-1" in answer(b"3-1 (n b g s q) > ", b"g 9-9\n")
    assert "no event 9-9" in answer(b"3-1 (n b g s q) > ", b"nonsense\n")
    assert "n next, b back" in answer(b"3-1 (n b g s q) > ", b"s\n")
    assert "test/1" in answer(b"3-1 (n b g s q) > ", b"g 5-0\n")
    answer(b"5-0 (n b g s q) > ", b"\n")
    assert "last event" in answer(b"5-0 (n b g s q) > ", b"q\n")
    assert process.wait(20) == 0
    os.close(ours)


def test_why_tells_the_winner_and_what_it_overrode(seed, folder):
    page = invoke("why", folder, seed, "--token", "6").stdout
    assert re.search(r"^token +id 11, of segment 0 \(event 2-1\), sampled under v1, logprob -0.25$", page, re.MULTILINE)
    assert re.search(r"^row +of segment 1 \(event 3-2\), computed under v2$", page, re.MULTILINE)
    assert re.search(r"^ +1  3-2 +0-8 +computed  v2 +test/1  wins$", page, re.MULTILINE)
    assert re.search(r"^ +0  2-2 +0-6 +computed  v1 +test/1  overridden$", page, re.MULTILINE)
    assert (
        "segment 0 (ended with abort): a later recording of the row wins; it has other experts in 3 of 3 layers" in page
    )
    assert re.search(r"^ +2  7 1 +0 1 \*$", page, re.MULTILINE)
    assert "missing: it is the last token" in invoke("why", folder, seed, "--token", "-1").stdout


def test_why_json_has_the_experts_of_the_layers_asked_for(durable, folder):
    id = record_chain(durable).id
    found = document("why", folder, id, "--token", 40, "--layer", 2)
    assert [one["experts"] for one in found["candidates"]] == [[[2, 7]], [[2, 0]], [[2, 7]]]
    assert [one["same_set"] for one in found["candidates"]] == [None, [False], [True]]
    assert [one["outcome"] for one in found["candidates"]] == ["wins", "overridden", "overridden"]
    assert found["token"]["position"] == 40


def test_why_refuses_what_is_not_there(seed, folder):
    assert "there is no token 10" in failed("why", folder, seed, "--token", "10")
    assert "layer 9 does not route" in failed("why", folder, seed, "--token", "1", "--layer", "9")
    assert "Missing option '--token'" in failed("why", folder, seed, code=2)
    assert "no trajectory" in failed("why", folder, "01NONE", "--token", "0")


def test_diff_of_segments_is_that_of_the_fixtures(durable, folder):
    id = record_chain(durable).id
    page = invoke("diff", folder, id, 0, 1).stdout
    assert page.startswith("different")
    assert "83 rows x 4 layers: 79 cells with other experts, 31 only in order, in 51 rows" in page
    assert "84 and 108; the first 84 are equal, 84 of them the same events, and the second goes on" in page
    found = document("diff", folder, id, 0, 2)
    assert (found["routing"]["sets"], found["routing"]["rows_differing"], found["differs"]) == (103, 58, True)


def test_diff_of_trajectories_here_and_elsewhere(seed, durable, folder, tmp_path):
    other = record_seed_case(durable).id
    durable.flush()
    assert invoke("diff", folder, seed, "--other", other).stdout.startswith("the same")
    Archiver(durable).run(once=True)
    shutil.copytree(folder / "archive", tmp_path / "copy")
    found = document("diff", folder, seed, "--other-store", tmp_path / "copy")
    assert (found["differs"], found["tokens"]["shared"], found["routing"]["rows"]) == (False, 0, 9)
    assert found["second"] == f"{tmp_path / 'copy'} {seed}"
    assert document("diff", folder, seed, 0, 1, "--other", other)["second"] == f"{other} segment 1"


def test_diff_says_what_one_side_lacks(durable, folder):
    ids = []
    for routing, logprobs in ((SPEC, [-1.0, -1.0]), (SPEC, [float("nan")] * 2), (None, None), (None, None)):
        writer = durable.create(routing=routing)
        with writer.segment(context=[1, 2]) as segment:
            segment.tokens([3, 4], logprobs)
            if not ids:
                segment.routing(rows(3), start=0)
        ids.append(writer.id)
    durable.flush()
    page = invoke("diff", folder, ids[0], "--other", ids[1]).stdout
    assert page.startswith("different")
    assert "none to compare; 2 left out, not finite or not recorded, of which 2 differ all the same" in page
    assert "no row to compare; 3 rows only in the first, 0 only in the second" in page
    page = invoke("diff", folder, ids[0], "--other", ids[2]).stdout
    assert page.startswith("different")
    assert "a side was created without a routing spec" in page
    page = invoke("diff", folder, ids[2], "--other", ids[3]).stdout
    assert page.startswith("the same")
    assert "none on either side" in page


def test_diff_refuses_what_it_cannot_compare(seed, folder):
    assert "compare with what?" in failed("diff", folder, seed, code=2)
    assert "names no two segments" in failed("diff", folder, seed, "zero", "1", code=2)
    assert "has 2 segments, counted from 0; there is no segment 7" in failed("diff", folder, seed, 0, 7)
    assert "cannot be an id" in failed("diff", folder, seed, "--other", "../x")
    assert "does not exist" in failed("diff", folder, seed, "--other-store", folder.parent / "typo")


def test_doctor_of_a_sound_run_says_nothing_and_ends_with_zero(durable, folder):
    finish(durable)
    result = invoke("doctor", folder)
    assert result.exit_code == 0
    assert result.stdout.startswith("information: backlog")
    assert "0 errors, 0 warnings, 1 information" in result.stderr


def test_doctor_names_the_worst_first_with_a_command_that_can_be_pasted(durable, folder):
    writer = durable.create(routing=SPEC)
    segment = writer.segment(context=[1, 2])
    segment.tokens([3])
    durable.flush()
    result = invoke("doctor", folder, "--stale-seconds", "0")
    assert result.exit_code == 1
    first, advice, *_ = result.stdout.splitlines()
    assert first.startswith(f"warning: open-segment in trajectory {writer.id}, event 2-1: segment 0 is open")
    assert advice.startswith(f"    If its engine is gone, `trajstore resume {folder} {writer.id} --model DIR")
    assert "--takeover --max-tokens N` goes on from its 3 tokens" in advice
    assert result.stdout.splitlines()[-2].startswith("information")
    found = json.loads(invoke("doctor", folder, "--stale-seconds", "0", "--json").stdout)
    assert {one["kind"] for one in found} == {"open-segment", "backlog"}
    segment.close("stop")


def test_doctor_repeats_no_password(own_server, run_name):
    with own_server.client() as client:
        client.config_set("requirepass", "hush")
    url = own_server.url(run_name).replace("redis://", "redis://:hush@")
    with trajstore.open(url, partitions=1) as store:
        aborted = finish(store, status="aborted").id
        result = invoke("doctor", url, "--stale-seconds", "0")
    assert "hush" not in result.output
    assert f"`trajstore close '{own_server.url(run_name)}' {aborted} completed --reward R`" in result.stdout


def test_doctor_prints_some_of_each_kind_and_counts_the_rest(durable, folder):
    for _ in range(5):
        finish(durable, status="failed")
    page = invoke("doctor", folder, "--limit", "2").stdout
    assert page.count("information: failed") == 2
    assert "and 3 more of the kind failed (--limit, --json)" in page


def test_doctor_looks_at_a_bare_archive(durable, folder):
    aborted = finish(durable, status="aborted").id
    materialize(durable)
    Archiver(durable).run(once=True)
    found = json.loads(invoke("doctor", folder / "archive", "--json").stdout)
    assert [(one["kind"], one["severity"], one["trajectory"]) for one in found] == [("aborted", "information", aborted)]
    tokens = next((folder / "archive" / "packs").glob("*/*/tokens"))
    shutil.rmtree(tokens)
    result = invoke("doctor", folder / "archive")
    assert result.exit_code == 1
    assert "missing-file" in result.stdout


def test_close_ends_a_rollout_with_a_reward_and_says_so(durable, folder):
    id = durable.create().id
    durable.flush()
    result = invoke("close", folder, id, "completed", "--reward", "0.5")
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"{id} is closed as completed, with reward 0.5" in result.stderr
    loaded = durable.load(id)
    assert (loaded.status, loaded.reward) == ("completed", 0.5)
    assert "completed" in failed("close", folder, id, "failed")


def test_close_fences_a_writer_only_when_told_to(durable, folder):
    writer = durable.create()
    segment = writer.segment(context=[1, 2])
    durable.flush()
    for more in ((), ("--reward", "1")):
        assert "another writer's segment is open" in failed("close", folder, writer.id, "aborted", *more)
    assert invoke("close", folder, writer.id, "aborted", "--takeover", "--reward", "1").exit_code == 0
    assert (durable.load(writer.id).status, durable.load(writer.id).finish_reason) == ("aborted", "lost")
    segment.tokens([3])
    with pytest.raises(trajstore.Fenced):
        durable.flush(writer.id)


def test_close_refuses_what_it_does_not_understand(seed, durable, folder):
    assert "as what?" in failed("close", folder, seed, code=2)
    assert "as what?" in failed("close", folder, seed, "deleted", code=2)
    assert "give the ID" in failed("close", "failed", code=2)
    assert "which store?" in failed("close", seed, "failed", code=2)
    id = durable.create().id
    durable.flush()
    assert "reward" in failed("close", folder, id, "failed", "--reward", "nan")
    assert durable.load(id).status == "open"


def test_ls_finds_lost_and_superseded_rollouts_and_says_why(durable, folder):
    lost = durable.create()
    lost.segment(context=[1, 2]).tokens([3])
    durable.flush()
    durable.get(lost.id).close("aborted", takeover=True)
    rewound = durable.create(routing=SPEC)
    with rewound.segment(context=[1, 2]) as segment:
        segment.tokens([3, 4])
        segment.routing(rows(3), start=0)
    with rewound.segment(base=2, context=[9]) as segment:
        segment.no_routing("feature off")
        segment.close("error")
    rewound.close("failed")
    durable.flush()
    (one,) = document("ls", folder, "--finish", "lost", "--why")
    assert (one["id"], one["status"]) == (lost.id, "aborted")
    assert one["why"].split("; ") == [
        "segment 0 was lost: its writer vanished, and another one took over before it closed",
        "closed as aborted: it may be resumed",
    ]
    (one,) = document("ls", folder, "--superseded", "--why")
    assert one["id"] == rewound.id  # the lost one was closed, not gone on from
    assert one["why"].split("; ") == [
        "segment 1 failed",
        "closed as failed, for good",
        "2 tokens of segment 0 were superseded: segment 1 began at 2",
        "segment 1 has no routing: feature off",
    ]
    assert "why" not in document("ls", folder)[0]
    assert "superseded: segment 1 began at 2" in invoke("ls", folder, "--why").stdout
    assert document("ls", folder, "--finish", "stop") == []


def test_ls_and_doctor_mean_the_same_by_superseded(durable, folder):
    id = lost_and_gone_on_from(durable)
    assert [one["id"] for one in document("ls", folder, "--superseded")] == [id]
    findings = json.loads(invoke("doctor", folder, "--json").stdout)
    assert [one["trajectory"] for one in findings if one["kind"] == "superseded"] == [id]


def test_ls_tells_who_takes_the_end_of_a_segment_for_a_status(durable, folder):
    for end in ("lost", "abort"):
        told = failed("ls", folder, "--status", end, code=2)
        assert f"`trajstore ls --finish {end}` lists those" in " ".join(told.split())
    assert "'nothing'" in failed("ls", folder, "--status", "nothing", code=2)


def test_replay_says_which_event_found_a_segment_lost(durable, folder):
    id = lost_and_gone_on_from(durable)
    page = invoke("replay", folder, id).stdout
    assert page.count("segment 0 was lost") == 1
    assert "segment 0 was lost" in page.partition("  3-0  SegmentOpened")[2].partition("  3-1  Tokens")[0]
    assert {one["event"]["id"]: one["changes"]["lost"] for one in document("replay", folder, id)} == {
        "1-0": None,
        "2-0": None,
        "2-1": None,
        "3-0": 0,
        "3-1": None,
        "3-2": None,
    }


@pytest.mark.parametrize("routing", [SPEC, None])
def test_replay_of_a_long_trajectory_tells_its_runs_as_show_does(durable, folder, routing):
    writer = durable.create(routing=routing)
    with writer.segment(context=range(100)) as segment:
        segment.tokens(range(1900))
        if routing is not None:
            segment.routing(rows(1999), start=0)
        segment.close("abort")
    with writer.segment() as segment:
        segment.tokens(range(2))
        segment.close("stop")
    durable.flush()
    page = invoke("replay", folder, writer.id).stdout
    runs = re.findall(r"^  ((?:tokens|rows) of .*)$", page, re.MULTILINE)
    shown = invoke("show", folder, writer.id).stdout
    assert [re.sub(" +", " ", line) for line in runs] == [
        "tokens of 0-1999 segment 0, 2000-2001 segment 1",
        *(["rows of 0-1998 segment 0, 1999-2001 missing"] * (routing is not None)),
    ]
    assert all(re.sub(" +", " ", line) in re.sub(" +", " ", shown) for line in runs)


@pytest.mark.parametrize("width", [80, 120])
def test_screens_fit_their_terminal(durable, folder, width):
    """No table is wider than the terminal, which would wrap its lines and break its columns."""
    id = record_chain(durable).id
    for arguments in (("why", folder, id, "--token", "40"), ("diff", folder, id, "0", "1"), ("ls", folder, "--why")):
        page = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(width, *arguments).decode())
        lines = [line for line in page.splitlines() if not line.startswith("segment ")]
        assert max(map(len, lines)) <= width, page
        assert "─" in page


def test_a_closed_pipe_ends_replay_quietly(seed, folder):
    with started("replay", folder, seed) as process:
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=20)
    assert "Traceback" not in err
