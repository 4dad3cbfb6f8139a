"""Wrong input on purpose: one clear message, the right exit code, and nothing created."""

from pathlib import Path

import pytest

import trajstore
from tests.cli.running import invoke, run

READING = (
    ("ls",),
    ("show", "ID"),
    ("events", "ID"),
    ("tail",),
    ("replay", "ID"),
    ("why", "ID", "--token", "0"),
    ("diff", "ID", "0", "1"),
    ("doctor",),
)
RUNNING = (("archive", "--once"), ("materialize", "--once"))


def call(command: tuple[str, ...], store: object) -> list[object]:
    """The command's words with STORE in its place."""
    name, *rest = command
    return [name, store, *rest]


def assert_failed(result, *said: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    if code == 1:
        assert result.stderr.startswith("trajstore: ")
        assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert all(one in result.stderr for one in said), result.stderr


@pytest.mark.parametrize("command", [*READING, *RUNNING])
def test_a_mistyped_directory_is_an_error_and_is_not_created(tmp_path, command):
    assert_failed(invoke(*call(command, tmp_path / "typo")), "typo does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [*READING, *RUNNING, ("stop",)])
def test_a_directory_that_holds_something_else_is_an_error_and_stays_as_it_is(tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    assert_failed(invoke(*call(command, tmp_path)), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_stop_of_a_mistyped_directory_creates_nothing(tmp_path):
    assert_failed(invoke("stop", tmp_path / "typo"), "no embedded store")
    assert list(tmp_path.iterdir()) == []


def test_stop_wants_a_directory():
    assert_failed(invoke("stop", "redis://127.0.0.1/0?run=x"), "directory", code=2)


@pytest.mark.parametrize("command", [*READING, *RUNNING])
@pytest.mark.parametrize(
    ("url", "said", "code"),
    [
        ("redis://127.0.0.1:1/0?run=x", "did not answer", 1),
        ("redis://127.0.0.1:1/0", "names no run", 1),
        ("redis://127.0.0.1:1/0?run=", "cannot be an id", 1),
        ("redis://127.0.0.1:port/0?run=x", "no usable Redis URL", 1),
        ("http://127.0.0.1:1/0?run=x", "no usable Redis URL", 1),
        ("redis://[127.0.0.1/0?run=x", "no URL", 2),
    ],
)
def test_a_bad_url_says_what_is_wrong_with_it(command, url, said, code):
    assert_failed(invoke(*call(command, url)), said, code=code)


@pytest.mark.parametrize("command", [*READING, *RUNNING])
def test_a_mistyped_run_is_an_error_and_is_not_begun(backend, run_name, command):
    assert_failed(invoke(*call(command, backend.url(run_name))), "there is no run", run_name)
    with backend.client() as client:
        assert client.keys(f"*{run_name}*") == []


def test_the_password_of_a_url_is_not_shown():
    result = invoke("ls", "redis://user:geheim@127.0.0.1:1/0")
    assert_failed(result, "names no run")
    assert "geheim" not in result.output


@pytest.mark.parametrize("command", [*READING, *RUNNING])
def test_without_a_store_it_says_what_to_give(command):
    assert_failed(invoke(*command), "TRAJSTORE_URL", "STORE", code=2)
    assert_failed(invoke(*command, env={"TRAJSTORE_URL": ""}), "TRAJSTORE_URL", "STORE", code=2)


@pytest.mark.parametrize("command", [("ls",), ("tail",), ("archive",), ("materialize",)])
def test_an_empty_store_argument_is_no_directory(command):
    assert_failed(invoke(*call(command, "")), "which store?", code=2)


@pytest.mark.parametrize("command", ["show", "events"])
def test_words_beyond_store_and_id_are_a_usage_error(command):
    assert_failed(invoke(command, env={"TRAJSTORE_URL": "x"}), "ID", code=2)
    assert_failed(invoke(command, "a", "b", "c"), "ID", code=2)


@pytest.mark.parametrize("command", ["show", "events"])
def test_an_unknown_id_is_an_error(seed, folder, command):
    assert_failed(invoke(command, folder, "01UNKNOWN"), "there is no trajectory '01UNKNOWN'")


@pytest.mark.parametrize("id", ["", "../x", "a b", "\udcff", "\x1b[31m", "x" * 201])
def test_an_id_that_cannot_be_one_is_an_error(tmp_path, id):
    assert_failed(invoke("show", tmp_path, id), "cannot be an id")


def test_an_id_of_broken_bytes_is_an_error(tmp_path):
    done = run("show", tmp_path, "\udcff")
    assert done.returncode == 1
    assert done.stderr.startswith("trajstore: ")


def test_bad_choices_and_numbers_are_usage_errors(seed, folder):
    for wrong in (
        ("show", folder, seed, "--policy", "newest"),
        ("show", folder, seed, "--routing"),
        ("ls", folder, "--status", "done"),
        ("materialize", folder, "--policy", "newest"),
        ("archive", folder, "--pack-mb", "0"),
        ("archive", folder, "--pack-seconds", "-1"),
        ("archive", folder, "--pack-seconds", "nan"),
        ("tail", folder, "--count", "0"),
        ("tail", folder, "--seconds", "nan"),
    ):
        assert_failed(invoke(*wrong), "Usage:", code=2)


@pytest.mark.parametrize(
    ("until", "said"), [("yesterday", "not an event id"), ("9-9", "no event 9-9"), ("2-7", "no event 2-7")]
)
def test_a_bad_until_is_an_error(seed, folder, until, said):
    assert_failed(invoke("show", folder, seed, "--until", until), said)


def test_what_the_file_system_refuses_is_an_error(tmp_path):
    assert_failed(invoke("ls", tmp_path / ("x" * 300)), "File name too long")


def test_a_damaged_archive_is_an_error(tmp_path):
    (tmp_path / "archive.json").write_text("{")
    assert_failed(invoke("ls", tmp_path), "archive.json in")


@pytest.mark.parametrize("command", [("tail",), *RUNNING])
def test_an_archive_is_no_run_to_work_on(durable, folder, command):
    assert_failed(invoke(*call(command, folder / "archive")), "is an archive")


def test_a_run_without_archive_says_how_to_give_one(durable_server, run_name):
    with trajstore.open(durable_server.url(run_name)):
        assert_failed(invoke("archive", durable_server.url(run_name), "--once"), "--archive FOLDER")


def test_an_archive_of_another_run_is_refused(durable_server, durable, folder, run_name):
    url = durable_server.url(run_name)
    with trajstore.open(url):
        assert_failed(invoke("archive", url, "--once", "--archive", folder / "archive"), "of another run")


def test_a_file_is_no_store(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    assert_failed(invoke("ls", tmp_path / "file"), "there is no trajstore in")
