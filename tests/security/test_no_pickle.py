"""No pickle anywhere: nothing that runs code from data is called, and no array of objects is read."""

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zarr

import trajstore
from trajstore.archive.arrays.shard import ShardReader
from trajstore.archive.storage.local import LocalStorage

ROOT = Path(__file__).parents[2]

SOURCES = sorted(
    path for folder in ("trajstore", "engines", "consumers", "examples") for path in (ROOT / folder).rglob("*.py")
)

FORBIDDEN = frozenset(
    {"pickle", "_pickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
)
"""Modules that turn data into objects of any class."""

BETWEEN_OWN = frozenset({"multiprocessing", "distributed", "dask", "ray"})
"""Modules that pickle what one of our own processes sends another, over pipes or connections of its own."""

ALLOWED = {"consumers/trajstore_audit/running.py": {"multiprocessing", "distributed"}}
"""Who uses which of those."""


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def dangers(tree: ast.AST) -> Iterator[str]:
    """Calls that run code from data, or would if asked to."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "__import__", "os.system") or options.get("shell") == "True":
            yield ast.unparse(node)
        if options.get("allow_pickle", "False") != "False":
            yield ast.unparse(node)
        if called.endswith("torch.load") and options.get("weights_only") != "True":
            yield ast.unparse(node)
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield ast.unparse(node)
        if options.get("trust_remote_code", "False") != "False":
            yield ast.unparse(node)


def test_no_module_imports_what_unpickles():
    found = {}
    for path in SOURCES:
        names = set(imports(ast.parse(path.read_text())))
        if bad := names & FORBIDDEN:
            found[str(path.relative_to(ROOT))] = bad
    assert found == {}


def test_what_pickles_between_own_processes_is_known():
    found = {}
    for path in SOURCES:
        if names := set(imports(ast.parse(path.read_text()))) & BETWEEN_OWN:
            found[str(path.relative_to(ROOT))] = names
    assert found == ALLOWED


def test_no_call_runs_code_from_data():
    found = {
        str(path.relative_to(ROOT)): calls for path in SOURCES if (calls := [*dangers(ast.parse(path.read_text()))])
    }
    assert found == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "eval(text)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=given)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(code):
    tree = ast.parse(code)
    assert set(imports(tree)) & FORBIDDEN or list(dangers(tree))


@pytest.mark.parametrize(
    "changes",
    [
        {"data_type": "object"},
        {"data_type": "string"},
        {"data_type": "variable_length_bytes"},
        {"data_type": {"name": "null_terminated_bytes", "configuration": {"length_bytes": 4}}},
        {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
        {"codecs": [{"name": "bytes"}, {"name": "pickle"}]},
    ],
)
def test_zarr_array_of_anything_but_numbers_is_refused(tmp_path, changes):
    zarr.create_array(tmp_path / "a", shape=(4,), chunks=(4,), dtype="uint8", zarr_format=3)[:] = np.arange(4)
    path = tmp_path / "a" / "zarr.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | changes))
    with pytest.raises(trajstore.Corrupt):
        ShardReader(LocalStorage(tmp_path), "a").read(0, 4)


def test_zarr_array_of_what_no_pack_holds_is_refused_when_opened(tmp_path):
    zarr.create_array(tmp_path / "a", shape=(4,), chunks=(4,), dtype="complex64", zarr_format=3)[:] = np.arange(4)
    with pytest.raises(trajstore.Corrupt, match="no numbers, or more than"):
        ShardReader(LocalStorage(tmp_path), "a")
