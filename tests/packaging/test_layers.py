"""The table of docs/code.md holds: imports inside the library run downwards."""

import ast
from pathlib import Path

import trajstore

LIBRARY = Path(trajstore.__file__).parent

LAYERS = (
    {"__main__", "cli"},
    {
        "archiver",
        "abandon",
        "mending",
        "materializer",
        "ready",
        "ready_follower",
        "consumer_groups",
        "blob",
        "exchange",
        "recovery",
        "metrics",
        "metric_names",
        "asking",
        "health",
        "status",
        "pulse",
    },
    {"adapter", "threaded", "engine"},
    {"opening", "store", "reading", "writing", "segment_writer"},
    {"view", "recorded", "backlog"},
    {"archive"},
    {"server", "locks", "binaries"},
    {"log", "deletion"},
    {"fold", "history", "overlaps", "standing", "summary", "trajectory"},
    {"events", "entries", "upcast", "routing", "ingest", "limits", "errors", "chance", "crc", "slabs"},
)
"""Modules and folders of the library from the top down."""


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trajstore."):
            yield node.module.split(".")[1]


def test_imports_run_downwards():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    upwards = []
    for path in LIBRARY.rglob("*.py"):
        name = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if name != "__init__":
            upwards += [f"{path.name} -> {other}" for other in imports_of(path) if rank[other] < rank[name]]
    assert upwards == []


def test_every_module_stands_in_the_table():
    page = (LIBRARY.parent / "docs" / "code.md").read_text()
    for path in LIBRARY.rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "cli" and path.name != "__main__.py":
            assert path.name in page, f"{path.name} is not in docs/code.md"
