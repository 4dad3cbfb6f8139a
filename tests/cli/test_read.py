"""`ls`, `show` and `events`: what they say, as tables and as JSON, wherever the trajectory lies."""

import json
import re
import shutil

import numpy as np
import pytest

import trajstore
from tests.builders import SPEC, record_seed_case, seed_rows
from tests.cli.running import in_terminal, invoke, run, started
from trajstore.archiver import Archiver

NASTY = "\x1b]0;owned\x07\x1b[2J[bold red]x[/bold red]:smile:\u202e\r\n"


def documents(*arguments: object, **options: object) -> object:
    """The one JSON document that a command prints."""
    result = invoke(*arguments, "--json", **options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_ls_shows_every_trajectory_of_a_store_at_a_url(store, backend):
    ids = [record_seed_case(store).id for _ in range(3)]
    store.flush()
    found = documents("ls", backend.url(store.run))
    assert [one["id"] for one in found] == sorted(ids)
    assert {one["status"] for one in found} == {"open"}
    assert {one["tokens"] for one in found} == {10}
    table = invoke("ls", backend.url(store.run)).stdout
    assert all(id in table for id in ids)


def test_ls_json_has_every_field_of_a_summary(seed, durable, folder):
    [found] = documents("ls", folder)
    [summary] = durable.list()
    assert found == {name: getattr(summary, name) for name in summary.__struct_fields__}
    assert (found["reward"], found["group"], found["status"], found["version"]) == (1.0, "prompt-17", "completed", 1)


def test_ls_selects_by_status_and_group(seed, durable, folder):
    other = durable.create(group="prompt-18")
    durable.create(group="prompt-18").close("failed")
    durable.flush()
    assert [one["id"] for one in documents("ls", folder, "--status", "completed")] == [seed]
    assert len(documents("ls", folder, "--status", "completed", "--status", "failed")) == 2
    assert [one["id"] for one in documents("ls", folder, "--group", "prompt-18", "--status", "open")] == [other.id]
    assert documents("ls", folder, "--mixed") == []
    assert documents("ls", folder, "--group", "none") == []


def test_ls_of_nothing_says_so_on_stderr_only(durable, folder):
    result = invoke("ls", folder)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no trajectories\n")
    assert documents("ls", folder) == []


def test_the_environment_names_the_store(seed, folder):
    env = {"TRAJSTORE_URL": str(folder)}
    assert [one["id"] for one in documents("ls", env=env)] == [seed]
    assert documents("show", seed, env=env)["id"] == seed
    assert len(documents("events", seed, env=env)) == 11
    assert documents("show", folder, seed, env={"TRAJSTORE_URL": "redis://127.0.0.1:1/0?run=x"})["id"] == seed


@pytest.mark.parametrize(
    ("policy", "source"),
    [("last_segment_wins", [1, 1, 1, 1, 1, 1, 1, 1, 1, -1]), ("as_sampled", [0, 0, 0, 0, 0, 0, 0, 1, 1, -1])],
)
def test_show_json_is_the_design_table(seed, folder, policy, source):
    found = documents("show", folder, seed, "--policy", policy)
    assert found["policy"] == policy
    assert found["token_ids"] == [1, 2, 3, 4, 5, 10, 11, 12, 13, 14]
    assert found["logprobs"] == [None] * 5 + [-0.5, -0.25, -0.125, -1.0, -2.0]
    assert found["loss_mask"] == [False] * 5 + [True] * 5
    assert found["segment_ids"] == [0] * 8 + [1] * 2
    assert found["weight_versions"] == [""] * 5 + ["v1"] * 3 + ["v2"] * 2
    assert found["routing_source"] == source
    assert found["routing_mask"] == [True] * 9 + [False]
    assert (found["tokens"], found["sampled_tokens"], found["known_rows"]) == (10, 5, 9)
    assert (found["status"], found["finish_reason"], found["reward"]) == ("completed", "stop", 1.0)
    assert (found["group"], found["metadata"], found["at"]) == ("prompt-17", {"task": "gsm8k"}, "5-0")
    assert found["routing"] == {"layer_ids": [0, 1, 2], "top_k": 2, "num_experts": 8, "num_hidden_layers": 3}
    assert [(s["index"], s["base"], s["context"], s["output"], s["end"]) for s in found["segments"]] == [
        (0, 0, 5, 3, 8),
        (1, 8, 0, 2, 10),
    ]
    assert found["segments"][0]["recordings"][0]["stop"] == 7
    assert "routed_experts" not in found


def test_show_gives_the_experts_on_demand(seed, durable, folder):
    found = documents("show", folder, seed, "--policy", "as_sampled", "--routing")
    expected = durable.load(seed, policy="as_sampled").routed_experts
    np.testing.assert_array_equal(np.array(found["routed_experts"], np.uint8), expected)


def test_show_until_gives_an_earlier_state(seed, folder):
    found = documents("show", folder, seed, "--until", "2-3")
    assert (found["at"], found["tokens"], found["status"], found["finish_reason"]) == ("2-3", 8, "open", "abort")


def test_nonfinite_logprobs_are_null_and_counted(durable, folder):
    """SkyRL #1909."""
    writer = durable.create()
    with writer.segment(context=[1], weight_version="v1") as segment:
        segment.tokens([2, 3, 4], [float("nan"), float("-inf"), -1.0])
    durable.flush()
    found = documents("show", folder, writer.id, "--routing")
    assert found["logprobs"] == [None, None, None, -1.0]
    assert (found["nonfinite_logprobs"], found["routing"], found["routed_experts"]) == (2, None, None)
    assert "2 of sampled tokens are NaN or infinite" in invoke("show", folder, writer.id).stdout


def test_show_tells_who_won(seed, folder):
    page = invoke("show", folder, seed, "--policy", "as_sampled").stdout
    lines = page.splitlines()
    assert lines[0] == seed
    assert re.search(r"^status +completed \(stop\)$", page, re.MULTILINE)
    assert re.search(r"^routing +9 of 10 rows \(90.0%\); 3 layers, top 2 of 8 experts$", page, re.MULTILINE)
    assert re.search(r"^ +0 +2 +0 +5 +3 +test/1 +v1 +abort +0-6 computed$", page, re.MULTILINE)
    assert "       0  0000000011\n          000000011·\n" in page
    assert "sampled by  5-7 v1, 8-9 v2" in lines
    assert "rows of     0-6 segment 0, 7-8 segment 1, 9 missing" in lines
    assert "rows under  0-6 v1, 7-8 v2, 9 missing" in lines


def test_events_json_has_what_was_recorded(seed, folder):
    found = documents("events", folder, seed)
    assert [one["id"] for one in found] == [
        "1-0", "2-0", "2-1", "2-2", "2-3", "3-0", "3-1", "3-2", "3-3", "4-0", "5-0"
    ]  # fmt: skip
    assert found[0]["group"] == "prompt-17"
    routing = found[3]
    assert (routing["type"], routing["start"], routing["rows"], routing["origin"]) == ("Routing", 0, 7, "computed")
    assert routing["payload"].keys() == {"nbytes", "crc"}
    assert routing["payload"]["nbytes"] == 7 * 3 * 2
    assert (routing["stored"], routing["note"]) == ("hot", False)
    assert re.fullmatch(r"[0-9a-f]{16}", routing["nonce"])
    assert found[4]["payload"] is None
    assert found[4]["cached_tokens"] is None  # a default is there too


def test_notes_come_on_demand(seed, durable, folder):
    durable.get(seed).observe(seed_rows(1, 9), start=0, source="trainer", weight_version="v3")
    durable.flush()
    assert len(documents("events", folder, seed)) == 11
    note = documents("events", folder, seed, "--notes")[-1]
    assert (note["id"], note["note"], note["source"]) == ("note 1-0", True, "trainer")
    assert "note 1-0" in invoke("events", folder, seed, "--notes").stdout


def test_an_archive_is_read_without_a_server(seed, durable, folder, monkeypatch):
    expected = documents("show", folder, seed, "--routing"), documents("ls", folder)
    Archiver(durable).run(once=True)
    durable.close()
    moved = folder.parent / "copy"
    shutil.copytree(folder / "archive", moved)
    monkeypatch.setenv("TRAJSTORE_SERVER", "/nowhere")
    assert (documents("show", moved, seed, "--routing"), documents("ls", moved)) == expected
    assert {one["stored"] for one in documents("events", f"file://{moved}", seed)} != {"hot"}
    assert seed in invoke("ls", moved).stdout


def test_a_trajectory_of_many_tokens_is_told_by_its_runs(durable, folder):
    writer = durable.create(routing=SPEC)
    with writer.segment(context=np.arange(1500), weight_version="v1") as segment:
        segment.tokens(np.arange(1500))
        segment.no_routing("feature off")
    durable.flush()
    page = invoke("show", folder, writer.id).stdout
    assert "one letter per token" not in page
    assert "rows of     0-2999 missing" in page
    assert "feature off" in page


def test_text_from_the_store_neither_marks_up_nor_controls_the_terminal(durable, folder):
    writer = durable.create(group="[red]g[/red]", metadata={"note": NASTY, NASTY: 1})
    with writer.segment(context=[1], engine=NASTY, weight_version=NASTY, sampling={"stop": NASTY}) as segment:
        segment.tokens([2])
        segment.no_routing(NASTY)
    durable.flush()
    for command in (("ls", folder), ("show", folder, writer.id), ("events", folder, writer.id)):
        piped = invoke(*command).stdout
        drawn = in_terminal(400, *command).decode()
        drawn = re.sub(r"\x1b\[[0-9;]*m", "", drawn).replace("\r\n", "\n")
        for written in (piped, drawn):
            assert written.replace("\n", "").isprintable(), written
            assert "[red]g[/red]" in written or command[0] == "events"
            assert "\\x1b[2J[bold red]x[/bold red]:smile:\\u202e" in written
    assert documents("show", folder, writer.id)["segments"][0]["engine"] == NASTY


@pytest.mark.parametrize("width", [20, 60, 150])
def test_a_terminal_of_any_width_shows_whole_ids(seed, folder, width):
    drawn = in_terminal(width, "ls", folder).decode()
    assert seed in drawn
    assert "completed" in drawn
    shown = in_terminal(width, "show", folder, seed).decode()
    assert ("╭" in shown, "segment" in shown) == (True, True)


def test_a_pipe_gets_neither_colour_nor_frames_nor_cut_lines(durable, folder):
    id = "x" * 200
    record_seed_case(durable, id=id, group="g" * 200)
    durable.flush()
    listed = run("ls", folder, env={"COLUMNS": "80"})
    assert re.search(rf"^{id} +open +{'g' * 200} ", listed.stdout, re.MULTILINE)
    assert listed.stderr == ""
    shown = run("show", folder, id, env={"COLUMNS": "80"}).stdout
    assert "\x1b" not in listed.stdout + shown
    assert not set("╭─│") & set(shown)


def test_an_output_that_lacks_letters_is_no_error(durable, folder):
    durable.create(group="prompt-漢")
    durable.flush()
    done = run("ls", folder, env={"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert "prompt-\\u6f22" in done.stdout


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize("command", ["ls", "events", "show"])
def test_a_closed_pipe_is_quiet(seed, folder, command, options):
    with started(command, folder, *(() if command == "ls" else (seed,)), *options) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(20) == 1


def test_reading_changes_nothing(seed, durable, folder):
    before = durable.events(seed), durable.list()
    for command in ("ls",), ("show", seed), ("events", seed):
        invoke(command[0], folder, *command[1:])
    assert (durable.events(seed), durable.list()) == before


def test_reading_a_closed_store_leaves_no_server_behind(tmp_path):
    with trajstore.open(tmp_path / "store", partitions=1) as store:
        id = record_seed_case(store).id
    assert run("show", tmp_path / "store", id, "--json").returncode == 0
    assert run("stop", tmp_path / "store").stderr == f"no server was running in {tmp_path / 'store'}\n"
