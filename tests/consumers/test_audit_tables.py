"""An audit as tables: they add up to what was counted, and Parquet and JSON give them back."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.consumers.audits import HOSTILE, empty_audit, made_up_audit
from trajstore.errors import Conflict
from trajstore_audit.document import audit_document, shown_place
from trajstore_audit.parquet import PairParts, prepare_folder, write_tables
from trajstore_audit.result import PairDrift
from trajstore_audit.tables import COLUMNS, PAIR_COLUMNS, tables
from trajstore_audit.thresholds import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "audit.md"


def pair(number):
    return PairDrift(
        id=f"t{number}",
        group=None,
        against="segments",
        first_event="2-3",
        second_event="3-3",
        first_segment=0,
        second_segment=1,
        start=0,
        stop=10,
        first_version="v1",
        second_version="v2",
        gap=1,
        first_engine="e",
        second_engine="e",
        first_origin="computed",
        second_origin="computed",
        source="",
        tokens=10,
        tokens_differing=number % 7,
        cells=40,
        differing=number % 9,
        order_changes=0,
        jaccard=0.5,
        referenced=0,
        row=None,
        layer=None,
    )


def test_tables_add_up_to_the_counts():
    audit = made_up_audit()
    found = tables(audit)
    for against, drift in (("segments", audit.segments), ("observations", audit.observations)):
        rows = [i for i, one in enumerate(found["load"]["against"]) if one == against]
        assert sum(found["load"]["second"][i] for i in rows) == drift.load.second.sum()
        rows = [i for i, one in enumerate(found["positions"]["against"]) if one == against]
        assert sum(found["positions"]["differing"][i] for i in rows) == drift.positions.differing.sum()
        gaps = [i for i, one in enumerate(found["version_gaps"]["against"]) if one == against]
        assert [found["version_gaps"]["cells"][i] for i in gaps] == [one.counts.cells for one in drift.version_gaps]
        (total,) = [i for i, one in enumerate(found["totals"]["against"]) if one == against]
        assert found["totals"]["router_disagreement"][total] == drift.total.share


def test_what_was_skipped_is_missing_or_was_left_out_is_counted_by_reason():
    table = tables(made_up_audit())["coverage"]
    counts = dict(zip(zip(table["what"], table["reason"], strict=True), table["count"], strict=True))
    assert counts["skipped", "deleted"] == 2
    assert counts["missing", "feature off"] == 800
    assert counts["left_out", "rewound"] == 40


def test_layers_with_fewer_experts_have_fewer_rows():
    audit = made_up_audit(layers=2, experts=8)
    audit.observations = None
    audit.segments.load.num_experts = [8, 4]
    found = tables(audit)["load"]
    assert list(zip(found["layer"], found["expert"], strict=True)) == [(1, i) for i in range(8)] + [
        (2, i) for i in range(4)
    ]


@pytest.mark.parametrize("sampled", [False, True])
def test_parquet_gives_every_table_back_with_its_types(tmp_path, sampled):
    audit = made_up_audit(sampled=sampled)
    prepare_folder(tmp_path)
    assert sorted(path.name for path in write_tables(audit, tmp_path)) == sorted(f"{name}.parquet" for name in COLUMNS)
    types = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
    for name, expected in tables(audit).items():
        read = parquet.read_table(tmp_path / f"{name}.parquet")
        assert read.to_pydict() == expected
        assert [(field.name, field.type) for field in read.schema] == [(c.name, types[c.type]) for c in COLUMNS[name]]
    bounds = parquet.read_table(tmp_path / "totals.parquet")["router_disagreement_low"].to_pylist()
    assert all((bound is not None) == sampled for bound in bounds)


def test_parquet_of_an_empty_audit_has_its_columns(tmp_path):
    write_tables(empty_audit(), tmp_path)
    read = parquet.read_table(tmp_path / "worst.parquet")
    assert read.num_rows == 0
    assert read.schema.names == [column.name for column in COLUMNS["worst"]]
    assert read.schema.field("cells").type == pa.int64()


def test_parquet_says_what_its_columns_are(tmp_path):
    write_tables(empty_audit(), tmp_path)
    for name, columns in COLUMNS.items():
        fields = parquet.read_schema(tmp_path / f"{name}.parquet")
        assert [fields.field(c.name).metadata[b"description"].decode() for c in columns] == [c.what for c in columns]


def test_parquet_says_what_was_audited_and_not_the_password(tmp_path):
    write_tables(made_up_audit(), tmp_path)
    said = parquet.read_schema(tmp_path / "layers.parquet").metadata[b"trajstore.audit"]
    assert json.loads(said)["place"] == "redis://host:6379/0?run=exp1"
    assert b"geheim" not in said


def test_pairs_are_written_in_parts_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore_audit.parquet._PART_ROWS", 40)
    prepare_folder(tmp_path)
    given = [pair(number) for number in range(100)]
    with PairParts(tmp_path) as sink:
        sink(given[:30])
        assert list((tmp_path / "pairs").iterdir()) == []
        sink(given[30:60])
        assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["part-00000.parquet"]
        sink(given[60:])
    assert len(list((tmp_path / "pairs").iterdir())) == 3
    read = parquet.read_table(tmp_path / "pairs")
    assert read.to_pylist() == [msgspec.structs.asdict(one) for one in given]
    assert read.schema.names == [column.name for column in PAIR_COLUMNS]


def test_pairs_of_an_audit_without_any_are_an_empty_table(tmp_path):
    with PairParts(tmp_path):
        pass
    assert parquet.read_table(tmp_path / "pairs").num_rows == 0


def test_pair_columns_have_the_types_of_their_fields():
    by_type = {"int64": (int,), "float64": (float,), "string": (str,)}
    values = msgspec.structs.asdict(pair(3)) | {"group": "g", "row": 3, "layer": 1}
    assert all(isinstance(values[column.name], by_type[column.type]) for column in PAIR_COLUMNS)


def test_an_earlier_audits_tables_go_and_nothing_else_does(tmp_path):
    prepare_folder(tmp_path)
    write_tables(made_up_audit(), tmp_path)
    with PairParts(tmp_path) as sink:
        sink([pair(1)])
    (tmp_path / "load.unfinished").write_text("of one that was killed")
    prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]
    assert list((tmp_path / "pairs").iterdir()) == []
    (tmp_path / "pairs" / "notes.txt").write_text("mine")
    write_tables(made_up_audit(), tmp_path)
    with pytest.raises(Conflict, match=r"notes\.txt"):
        prepare_folder(tmp_path)
    assert (tmp_path / "totals.parquet").exists()


def test_a_table_of_the_same_name_that_is_not_an_audits_stays(tmp_path):
    own = pa.table({"layer": [1, 2]})
    (tmp_path / "pairs").mkdir()
    for place in (tmp_path / "layers.parquet", tmp_path / "pairs" / "part-00000.parquet"):
        parquet.write_table(own, place)
        with pytest.raises(Conflict, match=place.name):
            prepare_folder(tmp_path)
        with pytest.raises(Conflict, match=place.name):
            PairParts(tmp_path)
        assert parquet.read_table(place) == own
        place.unlink()
    (tmp_path / "worst.parquet").write_bytes(b"PAR1, or not")
    with pytest.raises(Conflict, match="worst"):
        prepare_folder(tmp_path)
    with pytest.raises(Conflict, match="is no folder"):
        prepare_folder(tmp_path / "worst.parquet")


def test_an_earlier_audits_tables_stay_until_there_is_something_new(tmp_path):
    with PairParts(tmp_path) as sink:
        sink([pair(1)])
    write_tables(made_up_audit(), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RuntimeError), PairParts(tmp_path) as sink:
        raise RuntimeError
    assert sorted(tmp_path.rglob("*")) == before
    with PairParts(tmp_path) as sink:
        sink([pair(2)])
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "pairs"]
    assert parquet.read_table(tmp_path / "pairs").num_rows == 1


def test_the_document_holds_the_same_numbers_and_is_json():
    audit = made_up_audit(sampled=True)
    said = json.loads(msgspec.json.encode(audit_document(audit)))
    for against, drift in (("segments", audit.segments), ("observations", audit.observations)):
        assert said[against]["total"]["router_disagreement"] == drift.total.share
        assert said[against]["total"]["router_disagreement_low"] == audit.interval(drift.total).low
        np.testing.assert_array_equal(said[against]["positions"]["differing"], drift.positions.differing)
        np.testing.assert_array_equal(said[against]["load"]["second"], drift.load.second)
        assert [one["id"] for one in said[against]["worst"]] == [one.id for one in drift.worst]
    assert said["findings_by_kind"] == {"shifted": 1, "unexpected-change": 1}


def test_the_document_of_nothing_is_nulls_not_nan():
    said = json.loads(msgspec.json.encode(audit_document(empty_audit())))
    assert said["segments"]["total"]["router_disagreement"] is None
    assert (said["observations"], said["logprobs"]) == (None, None)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("runs/exp1", "runs/exp1"),
        ("redis://user:geheim@host:6379/0?run=exp1&password=geheim", "redis://host:6379/0?run=exp1"),
        ("s3://bucket/exp1?aws_secret_access_key=geheim", "s3://bucket/exp1"),
    ],
)
def test_a_place_is_shown_without_what_is_secret(place, shown):
    assert shown_place(place) == shown


def test_the_page_names_every_table_and_column():
    page = PAGE.read_text()
    for name, columns in (*COLUMNS.items(), ("pairs", PAIR_COLUMNS)):
        assert f"`{name}`" in page, name
        for column in columns:
            assert f"`{column.name}`" in page, f"{column.name} of {name}"


def test_the_page_names_every_metric():
    page = PAGE.read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []


def test_a_notebook_shows_the_headline_and_escapes_what_a_store_says():
    audit = made_up_audit(sampled=True)
    assert "<td>5.00 %</td><td>2.00 %</td>" in audit._repr_html_()
    assert "145 of 2,000 trajectories; findings: 1 shifted, 1 unexpected-change" in audit._repr_html_()
    hostile = made_up_audit(hostile=True)._repr_html_()
    assert HOSTILE not in hostile
    assert "<script" not in hostile
    assert "0 of 0 trajectories; findings: none" in empty_audit()._repr_html_()
