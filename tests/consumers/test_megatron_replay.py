"""Routing as Megatron-Core takes it: one tensor per router, sequence first, and nothing made up amid a sequence."""

import pytest
import torch

import trajstore
from tests.consumers.routed import FORMS, trajectories
from trajstore_trainer import (
    MegatronRouter,
    RoutingPlace,
    Span,
    as_megatron,
    context_spans,
    packed_batch,
    padded_batch,
    read_routing,
)

pytestmark = pytest.mark.torch

SPEC = trajstore.RoutingSpec(layer_ids=(1, 3), top_k=2, num_experts=8, num_hidden_layers=4)


def test_tokens_of_a_padded_batch_come_sequence_first(embedded):
    """Megatron's hidden states are [sequence, batch, hidden], and a router flattens them as they lie."""
    made = trajectories(embedded, SPEC)
    batch = padded_batch(made)
    first, second = as_megatron(batch)
    rows, width = batch.input_ids.shape
    for index, found in enumerate((first, second)):
        assert found.dtype == torch.int64, "it goes into gather"
        assert found.shape == (rows * width, 2)
        for row in range(rows):
            for column in range(width):
                expected = [-1, -1]
                if batch.routing_mask[row, column]:
                    expected = batch.routed_experts[row, column, index].tolist()
                assert found[column * rows + row].tolist() == expected


def test_tokens_of_a_packed_batch_keep_their_order(embedded):
    batch = packed_batch(trajectories(embedded, SPEC), align=4)
    found = torch.stack(as_megatron(batch), 1)
    assert torch.equal(found[batch.routing_mask], batch.routed_experts[batch.routing_mask].long())
    assert (found[~batch.routing_mask] == -1).all()


def test_routers_are_served_in_the_order_given_by_the_id_of_their_layer(embedded):
    batch = packed_batch(trajectories(embedded, SPEC))
    one, three = as_megatron(batch)
    assert not torch.equal(one, three)
    swapped = as_megatron(batch, routers=[MegatronRouter(3), MegatronRouter(1)])
    assert torch.equal(swapped[0], three)
    assert torch.equal(swapped[1], one)
    (stage,) = as_megatron(batch, routers=[MegatronRouter(3)])
    assert torch.equal(stage, three)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_router_without_recorded_rows_is_refused_by_its_layer(embedded, layer):
    batch = packed_batch(trajectories(embedded, SPEC))
    with pytest.raises(trajstore.RoutingError, match=rf"layers \[{layer}\] have no recorded routing") as caught:
        as_megatron(batch, routers=[MegatronRouter(1), MegatronRouter(layer)])
    assert caught.value.layer == layer


@pytest.mark.parametrize("form", FORMS)
def test_distinct_ids_stand_in_at_the_ends_and_in_padding_only(embedded, form):
    batch = FORMS[form](trajectories(embedded, SPEC, holes=False))
    order = torch.arange(batch.routing_mask.numel()).reshape(batch.routing_mask.shape).t().flatten()
    unknown = ~batch.routing_mask.flatten()[order]
    assert unknown.any()
    for found in as_megatron(batch, missing="distinct"):
        assert (found[unknown] == torch.tensor([0, 1])).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_row_missing_amid_a_sequence_is_not_made_up(embedded, form):
    """NeMo-RL #2590, SkyRL: missing is not expert 0, and dummy ids are right only where nobody looks."""
    made = trajectories(embedded, SPEC)
    with pytest.raises(trajstore.RoutingError, match=f"{made[0].id} has no recorded routing for 1 tokens") as caught:
        as_megatron(FORMS[form](made), missing="distinct")
    assert caught.value.row == 2


def test_a_batch_without_routing_and_an_unknown_filling_are_refused(embedded):
    made = trajectories(embedded, SPEC, holes=False)
    with pytest.raises(trajstore.SchemaError, match='"negative" or "distinct"'):
        as_megatron(padded_batch(made), missing="zero")
    plain = embedded.create(routing=None)
    with plain.segment(context=[1]) as segment:
        segment.tokens([2])
    embedded.flush()
    with pytest.raises(trajstore.SchemaError, match="no routing to replay"):
        as_megatron(padded_batch([embedded.load(plain.id)]))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_ranks_own_rows_and_layers_are_given_in_its_order(embedded, rank):
    """A pipeline stage with layer 3 and half of each sequence, zigzag."""
    made = trajectories(embedded, SPEC, (9, 5, 12), holes=False)
    spans = context_spans([len(one) for one in made], size=2, rank=rank)
    share = read_routing(embedded, [RoutingPlace.of(one) for one in made], layers=(3,), spans=spans)
    (found,) = as_megatron(share)
    assert torch.equal(found[share.routing_mask], share.routed_experts[share.routing_mask][:, 0].long())
    assert (found[~share.routing_mask] == -1).all()
    (distinct,) = as_megatron(share, missing="distinct")
    assert torch.equal(distinct[share.routing_mask], found[share.routing_mask])
    assert (distinct[~share.routing_mask] == torch.tensor([0, 1])).all()
    with pytest.raises(trajstore.RoutingError, match=r"\[1\] have no recorded routing"):
        as_megatron(share, routers=[MegatronRouter(1)])


def test_a_row_missing_at_the_end_of_a_ranks_share_but_amid_its_sequence_is_not_made_up(embedded):
    made = trajectories(embedded, SPEC, (12,))
    share = read_routing(embedded, [RoutingPlace.of(made[0])], spans=[Span(0, 0, 3)])
    assert share.routing_mask.tolist() == [True, True, False]
    with pytest.raises(
        trajstore.RoutingError, match="trajectory 0 of the rank has no recorded routing for 1"
    ) as caught:
        as_megatron(share, missing="distinct")
    assert caught.value.row == 2
