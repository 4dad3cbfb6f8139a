"""Pitfalls of size and speed: what is read, and how often. Each test names the upstream issue whose rule it holds."""

import numpy as np

import trajstore
from tests.builders import rows
from trajstore.archiver import Archiver

WIDE = trajstore.RoutingSpec(layer_ids=tuple(range(32)), top_k=8, num_experts=128, num_hidden_layers=32)
TOKENS = 16384


def archived(tmp_path):
    recorded = rows(TOKENS, spec=WIDE)
    with trajstore.open(tmp_path / "store", partitions=1, ack="fsync") as store:
        trajectory = store.create(routing=WIDE)
        with trajectory.segment(context=np.arange(TOKENS)) as segment:
            segment.routing(recorded, start=0)
        store.flush()
        Archiver(store).run(once=True)
    return trajectory.id, recorded


def routed_bytes(folder, read):
    """Bytes of `routed` that a fresh reader fetches for this."""
    archive = trajstore.open_archive(folder)
    found = read(archive)
    return archive._view._archive().packs.bytes_read("routed"), found


def test_a_rank_reads_its_rows_and_layers_and_no_more(tmp_path):
    """verl #6211 (45 GB broadcast), slime #2384 (the whole payload to every rank)."""
    id, recorded = archived(tmp_path)
    whole, everything = routed_bytes(tmp_path / "store", lambda archive: archive.load_routing(id))
    np.testing.assert_array_equal(everything.routed_experts, recorded)
    stage, found = routed_bytes(
        tmp_path / "store", lambda archive: archive.load_routing(id, layers=tuple(range(8, 16)))
    )
    np.testing.assert_array_equal(found.routed_experts, recorded[:, 8:16])
    assert stage < 0.3 * whole
    quarter, found = routed_bytes(tmp_path / "store", lambda archive: archive.load_routing(id, rows=(0, TOKENS // 4)))
    np.testing.assert_array_equal(found.routed_experts, recorded[: TOKENS // 4])
    assert quarter < 0.4 * whole


def test_results_own_their_memory_and_pin_no_chunk(tmp_path):
    """verifiers #1783: a view of a few rows kept the whole array alive."""
    id, _ = archived(tmp_path)
    archive = trajstore.open_archive(tmp_path / "store")
    few = archive.load_routing(id, rows=(10, 20)).routed_experts
    base = few if few.base is None else few.base
    assert base.nbytes == 10 * WIDE.row_bytes
