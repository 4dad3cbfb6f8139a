"""What a rank holds: spans against the frameworks' own cutting, layers of a stage, routing read as ranges."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trajstore
from tests.builders import SPEC, record_seed_case, rows
from tests.consumers.rollouts import finish, materialize
from trajstore.archiver import Archiver
from trajstore.blob import to_blob
from trajstore_trainer import (
    RoutingPlace,
    Span,
    TrajectoryReader,
    context_spans,
    packed_batch,
    pipeline_layers,
    read_routing,
    routing_layers,
    take,
)

pytestmark = pytest.mark.torch

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=6)
GROUPS = st.integers(1, 5)


def sequences(lengths):
    """Tokens that say where they are: 1000 * sequence + position + 1."""
    return [1000 * i + np.arange(length) + 1 for i, length in enumerate(lengths)]


def padded(sequence, multiple):
    return np.pad(sequence, (0, -len(sequence) % multiple))


def zigzag_of_megatron(sequence, size, rank):
    """Megatron-Core's `get_batch_on_this_cp_rank` for one padded sequence: view as 2 * size chunks, select two."""
    if size == 1:
        return sequence
    chunks = sequence.reshape(2 * size, -1)
    return chunks[[rank, 2 * size - rank - 1]].reshape(-1)


@given(LENGTHS, GROUPS, st.integers(1, 3))
def test_zigzag_is_what_megatron_cuts_from_each_padded_sequence(lengths, size, factor):
    align = (2 * size if size > 1 else 1) * factor
    tokens = sequences(lengths)
    for rank in range(size):
        expected = np.concatenate([zigzag_of_megatron(padded(one, align), size, rank) for one in tokens])
        spans = context_spans(lengths, size=size, rank=rank, align=align)
        np.testing.assert_array_equal(take(tokens, spans), expected)


@given(LENGTHS, GROUPS, st.integers(1, 3), st.integers(1, 7))
def test_contiguous_is_an_equal_share_of_the_padded_buffer(lengths, size, align, total):
    """verl's `preprocess_thd_engine(cp_layout="contiguous")`; with `align` 1 slime's all-gather layout."""
    tokens = sequences(lengths)
    buffer = padded(np.concatenate([padded(one, align) for one in tokens]), np.lcm(total, size))
    for rank, expected in enumerate(np.split(buffer, size)):
        spans = context_spans(lengths, size=size, rank=rank, layout="contiguous", align=align, align_total=total)
        np.testing.assert_array_equal(take(tokens, spans), expected)


@given(LENGTHS, GROUPS, st.sampled_from(["zigzag", "contiguous"]), st.integers(1, 5))
def test_the_ranks_of_a_group_hold_every_token_once_and_equally_many_rows(lengths, size, layout, total):
    tokens = sequences(lengths)
    held = [
        take(tokens, context_spans(lengths, size=size, rank=rank, layout=layout, align_total=total), fill=0)
        for rank in range(size)
    ]
    assert len({len(one) for one in held}) == 1
    found = np.concatenate(held)
    np.testing.assert_array_equal(np.sort(found[found > 0]), np.concatenate(tokens))


def test_a_batch_padded_to_one_width_is_cut_by_that_width():
    """Right-padded `[B, W]` batches: every sequence takes W columns."""
    spans = context_spans([3, 8, 5], size=2, rank=0, align=8)
    np.testing.assert_array_equal(
        take(sequences([3, 8, 5]), spans).reshape(3, 4),
        [[1, 2, 0, 0], [1001, 1002, 1007, 1008], [2001, 2002, 0, 0]],
    )


def test_one_rank_holds_everything_in_token_order():
    for layout in ("zigzag", "contiguous"):
        assert context_spans([3, 0, 2], size=1, rank=0, layout=layout) == [Span(0, 0, 3), Span(2, 0, 2)]


def test_spans_cut_a_packed_batch_as_they_cut_its_trajectories(embedded):
    made = [finish(embedded, tokens=n, seed=n) for n in (3, 6, 1)]
    loaded = [embedded.load(one.id) for one in made]
    batch = packed_batch(loaded, align=4)
    bounds = batch.cu_seqlens_padded.tolist()
    for rank in range(2):
        spans = context_spans([len(one) for one in loaded], size=2, rank=rank)
        parts = [batch.input_ids.numpy()[a:b] for a, b in itertools.pairwise(bounds)]
        whole = np.concatenate([zigzag_of_megatron(part, 2, rank) for part in parts])
        np.testing.assert_array_equal(take([one.token_ids for one in loaded], spans), whole)
        held = read_routing(embedded, [RoutingPlace.of(one) for one in loaded], spans=spans)
        np.testing.assert_array_equal(held.routed_experts, take([one.routed_experts for one in loaded], spans))
        np.testing.assert_array_equal(held.routing_mask, take([one.routing_mask for one in loaded], spans))
        assert len(held.routing_mask) == len(whole)


@pytest.mark.parametrize("align", [3, 0, 2])
def test_an_alignment_that_zigzag_cannot_use_is_refused(align):
    with pytest.raises(trajstore.SchemaError, match=f"align {align} must be a positive multiple of 4"):
        context_spans([8], size=2, rank=0, align=align)


def test_ranks_and_layouts_that_are_not_there_are_refused():
    for options in ({"size": 2, "rank": 2}, {"size": 2, "rank": -1}, {"size": 2, "rank": 0, "layout": "ring"}):
        with pytest.raises(ValueError, match="there is no rank"):
            context_spans([8], **options)


def test_stages_hold_their_decoder_layers_that_route():
    """verl #5037, slime #810: dense layers first; a stage is cut by decoder layer, not by routing layer."""
    spec = trajstore.RoutingSpec(layer_ids=tuple(range(3, 8)), top_k=2, num_experts=8, num_hidden_layers=8)
    assert [pipeline_layers(spec, size=4, rank=rank) for rank in range(4)] == [(), (3,), (4, 5), (6, 7)]
    assert [pipeline_layers(spec, size=2, rank=rank, virtual=2) for rank in range(2)] == [(4, 5), (3, 6, 7)]
    assert routing_layers(spec, range(5)) == (3, 4)
    with pytest.raises(trajstore.SchemaError, match="8 layers cannot be split evenly over 3 pipeline ranks"):
        pipeline_layers(spec, size=3, rank=0)
    with pytest.raises(trajstore.SchemaError, match="no pipeline rank 2 of 2"):
        pipeline_layers(spec, size=2, rank=2)


def test_a_stage_of_dense_layers_reads_nothing_and_still_has_its_rows(embedded):
    spec = trajstore.RoutingSpec(layer_ids=(2, 3), top_k=2, num_experts=8, num_hidden_layers=4)
    one = embedded.load(finish(embedded, routing=spec).id)
    held = read_routing(embedded, [RoutingPlace.of(one)], layers=pipeline_layers(spec, size=2, rank=0))
    assert held.routed_experts.shape == (5, 0, 2)
    assert not held.routing_mask.any()


def test_what_was_delivered_is_read_even_after_the_trajectory_went_on(embedded):
    one = embedded.load(record_seed_case(embedded).id, policy="as_sampled")
    place = RoutingPlace.of(one)
    with embedded.get(one.id).segment(weight_version="v3") as segment:
        segment.tokens([15])
        segment.routing(rows(10, seed=9), start=0)
        segment.close("stop")
    embedded.flush()
    held = read_routing(embedded, [place], layers=(2, 0))
    np.testing.assert_array_equal(held.routed_experts, one.routed_experts[:, [2, 0]])
    np.testing.assert_array_equal(held.routing_mask, one.routing_mask)
    assert held.layer_ids == (2, 0)
    assert held.spans == (Span(0, 0, 10),)


def test_hot_and_archived_routing_read_the_same(open_store, tmp_path):
    store = open_store(archive=tmp_path / "archive")
    loaded = [store.load(finish(store, tokens=n, seed=n).id) for n in (5, 9)]
    places = [RoutingPlace.of(one) for one in loaded]
    spans = context_spans([len(one) for one in loaded], size=2, rank=1)
    hot = read_routing(store, places, layers=(1,), spans=spans)
    Archiver(store).run(once=True)
    cold = read_routing(trajstore.open_archive(tmp_path / "archive"), places, layers=(1,), spans=spans)
    np.testing.assert_array_equal(hot.routed_experts, cold.routed_experts)
    np.testing.assert_array_equal(hot.routing_mask, cold.routing_mask)
    np.testing.assert_array_equal(cold.routed_experts, take([one.routed_experts[:, [1]] for one in loaded], spans))


def delivered(store, spec=SPEC, tokens=9):
    """A trajectory as a trainer gets it, and still ready."""
    finish(store, tokens=tokens, seed=tokens, routing=spec)
    materialize(store)
    (entry,) = TrajectoryReader(store).take()
    return entry.trajectories[0]


def sent(store):
    """Bytes that the server has sent so far."""
    return int(store.wire.call("INFO", "stats").decode().partition("total_net_output_bytes:")[2].split()[0])


def test_while_it_lies_ready_a_rank_reads_its_rows_and_no_others(embedded):
    """slime #2384: the whole payload to every rank."""
    wide = trajstore.RoutingSpec(layer_ids=tuple(range(32)), top_k=8, num_experts=128, num_hidden_layers=32)
    one = delivered(embedded, wide, tokens=4000)
    whole = one.routed_experts.nbytes
    for rank in range(4):
        spans = context_spans([len(one)], size=4, rank=rank)
        before = sent(embedded)
        held = read_routing(embedded, [RoutingPlace.of(one)], layers=(3, 9), spans=spans)
        assert sent(embedded) - before < 0.3 * whole
        np.testing.assert_array_equal(held.routed_experts, take([one.routed_experts[:, [3, 9]]], spans))
        np.testing.assert_array_equal(held.routing_mask, take([one.routing_mask], spans))


def test_ranks_that_read_one_after_another_read_one_fold(embedded):
    """A late recording between two ranks' reads changes what is folded again, not what was delivered."""
    one = delivered(embedded)
    place = RoutingPlace.of(one)
    embedded.get(one.id).late_routing(segment=0, rows=rows(10, seed=77), start=0)
    embedded.flush()
    assert not np.array_equal(embedded.load(one.id).routed_experts, one.routed_experts)
    np.testing.assert_array_equal(read_routing(embedded, [place]).routed_experts, one.routed_experts)


def lay_ready(store, one, **changed):
    """Lay another fold ready in its place: what is read shows where it was read."""
    blob = to_blob(dataclasses.replace(one, routed_experts=np.full_like(one.routed_experts, 5), **changed))
    store.wire.call("SET", store.keys.ready_payload(one.id, one.version), blob)


@pytest.mark.parametrize("changed", [{"policy": "as_sampled"}, {"at": "2-1"}, {"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}])
def test_a_payload_of_another_fold_is_not_taken_for_this_one(embedded, changed):
    one = delivered(embedded)
    place = RoutingPlace.of(one)
    lay_ready(embedded, one)
    assert read_routing(embedded, [place]).routed_experts.eq(5).all()
    lay_ready(embedded, one, **changed)
    np.testing.assert_array_equal(read_routing(embedded, [place]).routed_experts, one.routed_experts)


@pytest.mark.parametrize("left", [0, 4, 30, 400, -10])
def test_a_payload_that_is_damaged_or_went_is_folded_again(embedded, left):
    one = delivered(embedded)
    payload = embedded.keys.ready_payload(one.id, 1)
    embedded.wire.call("SET", payload, embedded.wire.call("GET", payload)[:left])
    held = read_routing(embedded, [RoutingPlace.of(one)])
    np.testing.assert_array_equal(held.routed_experts, one.routed_experts)


def test_a_payload_that_is_laid_anew_while_it_is_read_is_not_read_by_the_old_header(embedded, monkeypatch):
    one = delivered(embedded)
    ask = embedded.wire.call_all

    def after_another_was_laid(commands):
        lay_ready(embedded, one, metadata={"longer": "than before"})
        return ask(commands)

    monkeypatch.setattr(embedded.wire, "call_all", after_another_was_laid)
    np.testing.assert_array_equal(read_routing(embedded, [RoutingPlace.of(one)]).routed_experts, one.routed_experts)


def test_what_was_deleted_is_not_read_from_what_is_left_of_it(embedded):
    one = delivered(embedded)
    payload = embedded.keys.ready_payload(one.id, 1)
    blob = embedded.wire.call("GET", payload)
    embedded.delete(one.id)
    embedded.wire.call("SET", payload, blob)
    with pytest.raises(trajstore.NotFound, match="deleted"):
        read_routing(embedded, [RoutingPlace.of(one)])


def test_routing_that_differs_in_order_alone_is_read_sorted(embedded):
    ascending = trajstore.RoutingSpec(layer_ids=(0, 1, 2), top_k=2, num_experts=8, num_hidden_layers=3, order="sorted")
    loaded = [embedded.load(finish(embedded, seed=1, routing=spec).id) for spec in (SPEC, ascending)]
    held = read_routing(embedded, [RoutingPlace.of(one) for one in loaded])
    np.testing.assert_array_equal(held.routed_experts[:5], held.routed_experts[5:])
    np.testing.assert_array_equal(held.routed_experts[5:], loaded[1].routed_experts)


def test_what_cannot_be_read_is_refused_by_name(embedded):
    other = trajstore.RoutingSpec(layer_ids=(0,), top_k=2, num_experts=8, num_hidden_layers=3)
    a, b, plain = (embedded.load(finish(embedded, routing=spec).id) for spec in (SPEC, other, None))
    with pytest.raises(trajstore.SchemaError, match=f"{a.id} and {b.id} cannot be in one batch"):
        read_routing(embedded, [RoutingPlace.of(a), RoutingPlace.of(b)])
    with pytest.raises(trajstore.SchemaError, match=f"{plain.id} was created without a routing spec"):
        RoutingPlace.of(plain)
    with pytest.raises(trajstore.SchemaError, match="at least one trajectory"):
        read_routing(embedded, [])
    with pytest.raises(trajstore.SchemaError, match="no sequence"):
        take([], [])
    with pytest.raises(trajstore.SchemaError, match=r"layers must name routing layers by global id, not \[7\]"):
        read_routing(embedded, [RoutingPlace.of(a)], layers=(7,))
