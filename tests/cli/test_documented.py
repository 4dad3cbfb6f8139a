"""Every command is documented, and options of one meaning have one name, wherever they are."""

import re
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

import trajstore
from tests.cli.running import invoke

ROOT = Path(trajstore.__file__).parent.parent
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = {point.name: point for point in entry_points(group="trajstore.commands") if point.value.startswith("traj")}

EXAMPLES_ONLY = {"demo"}
"""What is no tool to be used on a store: `make demo` is its documentation."""

READING = {"audit", "diff", "doctor", "events", "ls", "replay", "rerun", "show", "verify", "why"}
"""What only looks, and so works on a bare archive, too."""


SHARED = {"--dry-run", "--group", "--id", "--json", "--layer", "--policy", "--status", "--until", "--workers"}
"""Options that several commands have."""


def command(name):
    loaded = COMMANDS[name].load()
    assert isinstance(loaded, click.Command)
    return loaded


def options(name):
    return {flag: one for one in command(name).params if isinstance(one, click.Option) for flag in one.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_written_about(name):
    if name in EXAMPLES_ONLY:
        return
    about = [page for page, text in PAGES.items() if re.search(rf"`?trajstore {name}\b", text)]
    assert about, f"no page has `trajstore {name}`"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for_and_the_help_shows_it(name):
    shown = invoke(name, "--help").stdout
    for flag, option in options(name).items():
        assert option.help, f"{flag} of {name} has no help"
        assert flag in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_examples_that_name_the_command_and_its_options(name):
    shown = f"{command(name).help}\n{command(name).epilog}"
    assert re.search("Examples?:", shown), name
    examples = [line for line in shown.split("Example")[-1].splitlines() if "trajstore " in line]
    assert examples
    for line in examples:
        assert re.search(rf"\btrajstore {name}\b", line), line
        for flag in re.findall(r"(?<=\s)(--[a-z][a-z-]*)", line.split("|")[0]):
            assert flag in options(name), f"{line}: {name} has no option {flag}"


@pytest.mark.parametrize("name", sorted(READING))
def test_what_looks_gives_json(name):
    assert "--json" in options(name)
    assert options(name)["--json"].is_flag


def test_options_of_one_meaning_are_the_same_everywhere():
    takes, metavars = {}, {}
    for name in COMMANDS:
        for flag, option in options(name).items():
            if flag in SHARED:
                takes.setdefault(flag, {}).setdefault((type(option.type).__name__, option.is_flag), []).append(name)
                if option.metavar is not None:
                    metavars.setdefault(flag, {}).setdefault(option.metavar, []).append(name)
    assert set(takes) == SHARED
    assert all(len(found) == 1 for found in takes.values()), takes
    assert all(len(found) == 1 for found in metavars.values()), metavars


def test_exit_codes_stand_in_the_help_of_the_whole_and_where_they_are_special():
    assert "Exit codes: 0 done" in invoke("--help").stdout
    for name in ("verify", "doctor", "diff"):
        assert re.search(r"[Ee]xit\s+code", command(name).help), name
