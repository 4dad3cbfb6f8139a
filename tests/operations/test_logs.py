"""Log lines for programs: one object a line, with names that are documented, and without secrets."""

import ast
import json
import logging
import re
import signal
import sys
from pathlib import Path

import pytest

import trajstore
from tests.cli.running import ended, run, started, until
from tests.consumers.rollouts import finish
from trajstore.cli.logs import FIELDS, JsonLines, json_line

ROOT = Path(trajstore.__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()
ALWAYS = ("time", "level", "logger", "event", "message")


def named() -> dict[str, set[str]]:
    """Events that log calls of the library name, and the fields beside each."""
    found: dict[str, set[str]] = {}
    for path in (*ROOT.glob("trajstore/**/*.py"), *ROOT.glob("consumers/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            extra = [word.value for word in getattr(node, "keywords", ()) if word.arg == "extra"]
            if isinstance(node, ast.Call) and extra and isinstance(extra[0], ast.Dict):
                keys = [key.value for key in extra[0].keys]
                found.setdefault(extra[0].values[keys.index("event")].value, set()).update(keys)
    return found


def test_the_page_has_every_event_and_no_other():
    table = PAGE[PAGE.index("| event | |") :].partition("\n\n")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(re.findall("`([a-z-]+)`", " ".join(cells))) == sorted(named())


def test_lines_name_only_fields_that_are_written():
    for event, fields in named().items():
        assert fields <= {"event", *FIELDS}, event
    for field in (*ALWAYS, *FIELDS, "exception"):
        assert f"`{field}`" in PAGE, field


def test_a_line_has_its_time_in_utc_and_the_fields_that_it_names():
    record = logging.makeLogRecord(
        {
            "name": "x",
            "levelno": 30,
            "levelname": "WARNING",
            "msg": "lost %d",
            "args": (3,),
            "created": 1.5,
            "msecs": 500,
        }
        | {"event": "lease-lost", "partition": 3, "secret": "not a field"}
    )
    assert json_line(record) == {
        "time": "1970-01-01T00:00:01.500Z",
        "level": "warning",
        "logger": "x",
        "event": "lease-lost",
        "message": "lost 3",
        "partition": 3,
    }


def test_a_line_with_an_exception_is_still_one_line():
    try:
        raise ValueError("a\nb")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", 40, "f", 1, "m", (), sys.exc_info())
    assert json_line(record)["event"] == "message"
    assert "ValueError: a\nb" in json_line(record)["exception"]


def test_a_name_that_is_no_utf_8_is_written_with_its_bytes_escaped(capsys):
    handler = JsonLines()
    handler.run = "run-\udcff"
    handler.handle(logging.makeLogRecord({"msg": "cannot read %s", "args": ("exp\udce9",), "account": {"a\udc80": 1}}))
    (line,) = lines(capsys.readouterr().err)
    assert (line["message"], line["run"]) == ("cannot read exp\\udce9", "run-\\udcff")
    assert line["account"] == {"a\\udc80": 1}


@pytest.mark.parametrize(
    "record", [{"msg": "%d", "args": ("no number",)}, {"msg": "x", "account": {(1, 2): 1, None: 2}}]
)
def test_a_line_that_cannot_be_written_ends_nobody(capsys, record):
    JsonLines().handle(logging.makeLogRecord(record))
    assert "--- Logging error ---" in capsys.readouterr().err


def lines(text: str) -> list[dict[str, object]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(set(ALWAYS) <= set(line) for line in found)
    return found


@pytest.mark.parametrize("command", ["archive", "materialize"])
def test_a_workers_whole_stderr_is_objects(durable, folder, command):
    finish(durable)
    with started(command, folder, "--log-format", "json") as process:
        first = process.stderr.readline()
        until(lambda: all(not group.waiting for group in feeds(durable)))
        code, out, errors = ended(process, signal.SIGTERM)
    found = lines(first + errors)
    assert (code, out) == (0, "")
    assert [found[0]["event"], found[-1]["event"]] == ["started", "ended"]
    assert {line["run"] for line in found} == {"main"}
    assert found[-1]["account"]["trajectories"] >= 0


def feeds(store):
    from trajstore.status import measure_status

    name = {"archiver", "materializer"}
    return [group for group in measure_status(store).feed if group.consumers and group.name in name]


def test_the_environment_chooses_too_and_a_failure_is_an_object():
    done = run("archive", "nowhere", env={"TRAJSTORE_LOG": "json"})
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = lines(done.stderr)
    assert (line["event"], line["level"]) == ("failed", "error")
    assert "nowhere does not exist" in line["message"]


def test_no_line_holds_the_password(own_server, run_name, tmp_path):
    trajstore.open(own_server.url(run_name), partitions=1, archive=tmp_path / "archive").close()
    with own_server.client() as client:
        client.config_set("requirepass", "S3cr3tW0rd")
    url = own_server.url(run_name).replace("redis://", "redis://default:{}@")
    wrong = run("archive", url.format("Wr0ngW0rd"), "--once", "--log-format", "json")
    assert wrong.returncode == 1
    assert lines(wrong.stderr)[-1]["event"] == "failed"
    right = run("archive", url.format("S3cr3tW0rd"), "--once", "--log-format", "json")
    assert lines(right.stderr)[-1]["event"] == "ended"
    assert "W0rd" not in wrong.stderr + right.stderr
