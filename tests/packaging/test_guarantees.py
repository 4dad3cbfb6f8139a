"""docs/guarantees.md: every test that it names is there, and every promise names one."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "guarantees.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)


def test_every_promise_names_a_test_that_is_there():
    assert NAMED
    for file, name in NAMED:
        functions = {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if hasattr(node, "name")}
        assert name in functions, f"{file} has no {name}"


def test_every_row_of_the_table_names_one():
    rows = [line for line in PAGE.splitlines() if line.startswith("| **")]
    assert len(rows) > 10
    assert [row for row in rows if "::test_" not in row] == []
