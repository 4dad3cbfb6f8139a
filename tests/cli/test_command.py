"""The command itself: its help, its lazy parts, and how it fails."""

import io
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import trajstore
from tests.cli.running import environment, invoke, run
from trajstore.cli.group import CommandGroup, _load
from trajstore.cli.signals import exiting_on_sigterm, graceful_stop, signals_held
from trajstore.errors import UNLOADABLE, Conflict, Fenced, NotFound, StoreFull

COMMANDS = sorted(point.name for point in entry_points(group="trajstore.commands"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_registered_command_has_help_with_an_example(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:.*trajstore {name}\b", result.stdout, re.DOTALL), result.stdout


def test_help_lists_every_command_and_the_exit_codes():
    result = invoke("--help")
    assert all(re.search(rf"^  {name} ", result.stdout, re.MULTILINE) for name in COMMANDS)
    assert "Exit codes: 0 done" in result.stdout


def test_version_and_module_run_are_the_installed_command():
    assert run("--version").stdout == f"trajstore {trajstore.__version__}\n"


def test_ls_does_not_import_torch(seed, folder):
    code = (
        "import sys; from trajstore.cli import main; main(['ls', sys.argv[1]], standalone_mode=False); "
        "loaded = {'torch', 'transformers', 'trajstore_demo'} & set(sys.modules); assert not loaded, loaded"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert seed in done.stdout


@pytest.fixture
def others(tmp_path: Path) -> dict[str, str]:
    """Environment with a distribution that registers commands: one works, the others fail."""
    info = tmp_path / "site" / "others-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[trajstore.commands]\nworks = others_works:command\ngone = others_gone:command\n"
        "nameless = others_works:nothing\ncrashes = others_crashes:command\nnumber = others_works:number\n"
    )
    (info.parent / "others_works.py").write_text(
        "import click\nnumber = 3\n@click.command()\ndef command():\n    click.echo('it works')\n"
    )
    (info.parent / "others_crashes.py").write_text("raise RuntimeError('no \\x1b[31mGPU')\n")
    return {"PYTHONPATH": os.pathsep.join([str(info.parent), os.environ.get("PYTHONPATH", "")])}


def test_commands_of_other_distributions_work(others):
    assert run("works", env=others).stdout == "it works\n"


def test_a_broken_command_stands_in_the_help_and_spoils_no_other(others):
    done = run("--help", env=others)
    assert done.returncode == 0
    assert "(cannot be loaded: ModuleNotFoundError" in done.stdout
    assert re.search(r"crashes +\(cannot be loaded: RuntimeError", done.stdout)
    assert all(re.search(rf"^  {name}\b", done.stdout, re.MULTILINE) for name in (*COMMANDS, "works"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gone", "No module named 'others_gone'"),
        ("nameless", "nothing"),
        ("crashes", "RuntimeError: no \\x1b[31mGPU"),
        ("number", "it is int, not a click command"),
    ],
)
def test_a_broken_command_says_why_when_called(others, name, why):
    done = run(name, "anything", "--json", env=others)
    assert done.returncode == 1
    assert done.stderr.startswith(f"trajstore: the command '{name}'")
    assert "registered by others" in done.stderr
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_interrupt_while_a_command_loads_is_no_broken_command():
    assert not issubclass(KeyboardInterrupt, UNLOADABLE)
    assert isinstance(_load(next(iter(entry_points(group="trajstore.commands", name="ls")))), click.Command)


def test_unknown_command_and_option_are_usage_errors():
    assert invoke("lss").exit_code == 2
    assert invoke("ls", "x", "--jsonn").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ExceptionGroup("2 failed", [Fenced("first\x1b[2J"), Conflict("second")]),
            1,
            "trajstore: first\\x1b[2J\nsecond\n",
        ),
        (NotFound("there is none"), 1, "trajstore: there is none\n"),
        (StoreFull("memory is full"), 1, "trajstore: memory is full\n"),
        (OSError(28, "No space left on device"), 1, "trajstore: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_becomes_one_message_and_a_code(error, code, said):
    def fail():
        raise error

    group = CommandGroup("trajstore", commands=[click.Command("fail", callback=fail)])
    result = CliRunner().invoke(group, ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)


@pytest.mark.parametrize("error", [ZeroDivisionError(), ExceptionGroup("mixed", [Fenced("a"), ZeroDivisionError()])])
def test_a_mistake_of_the_program_is_not_dressed_up(error):
    def fail():
        raise error

    group = CommandGroup("trajstore", commands=[click.Command("fail", callback=fail)])
    assert CliRunner().invoke(group, ["fail"]).exception is error


def test_sigterm_leaves_through_the_with_blocks():
    def command():
        with exiting_on_sigterm(), closing(opened):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    opened = io.BytesIO()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit:
        command()
    assert (exit.value.code, opened.closed) == (143, True)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with graceful_stop() as stopped:
        assert not stopped.is_set()
        os.kill(os.getpid(), number)
        assert stopped.is_set()
    assert signal.getsignal(number) == before


def test_signal_that_is_ignored_asks_nobody_to_stop():
    """A script has Ctrl-C ignored in what it runs in the background; its own workers took it for theirs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful_stop() as stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stopped.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped.is_set()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_held_signal_comes_when_the_block_is_over():
    def command():
        with exiting_on_sigterm():
            with signals_held():
                os.kill(os.getpid(), signal.SIGTERM)
                came.append("the rest of the block")
            came.append("what is after it")

    came = []
    with pytest.raises(SystemExit):
        command()
    assert came == ["the rest of the block"]


def test_signal_that_is_ignored_stays_so_in_what_is_started_and_takes_no_other_s_place():
    """As in a script's `trajstore demo &`, whose Ctrl-C is not meant for it."""

    def command():
        with exiting_on_sigterm(), signals_held():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            started.append(subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True))

    ask, started = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)", []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            command()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].stdout.strip() == "True"


def test_signals_are_held_in_the_main_thread_only():
    def start():
        with signals_held():
            return "started"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(start).result(20) == "started"
