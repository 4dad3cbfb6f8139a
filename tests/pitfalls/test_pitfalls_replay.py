"""Routing replayed in a trainer (PITFALLS.md, 14 to 17, 19). Each test names the upstream issue whose rule it holds."""

import pytest
import torch

import trajstore
from tests.consumers.routed import executed, executed_sets, forward, known, routing_of, trajectories
from tests.engines.models import tiny_model
from trajstore_trainer import MegatronRouter, RouterReplay, as_megatron, padded_batch

pytestmark = pytest.mark.torch


def replayed_as_recorded(model, batch):
    """Whether every known row is what the experts are called with."""
    with executed(model) as seen, torch.no_grad(), RouterReplay(model).forcing(batch):
        forward(model, batch)
    return torch.equal(executed_sets(seen, batch)[batch.routing_mask], known(batch))


def test_dense_layers_do_not_shift_the_rows_of_those_behind_them(embedded):
    """verl #5037, slime #810: dense-first layers shift the layer index; here rows go by the layer's global id."""
    model = tiny_model("qwen3_moe_dense_first")
    batch = padded_batch(trajectories(embedded, routing_of(model)))
    assert batch.routing.layer_ids == (1, 3)
    assert not torch.equal(batch.routed_experts[:, :, 0], batch.routed_experts[:, :, 1])
    assert replayed_as_recorded(model, batch)
    by_router = as_megatron(batch, routers=[MegatronRouter(1), MegatronRouter(3)])
    assert torch.equal(by_router[1], as_megatron(batch, routers=[MegatronRouter(3)])[0])
    with pytest.raises(trajstore.RoutingError, match=r"\[0\] have no recorded routing"):
        as_megatron(batch, routers=[MegatronRouter(0), MegatronRouter(1)])


def test_rows_are_bound_to_the_layers_in_use_not_to_the_order_in_which_routers_were_made(embedded):
    """miles #2570, verl #7340: a decoder that was rebuilt got its rows by the order of construction."""
    model = tiny_model()
    layers = model.get_decoder().layers
    for index in reversed(range(len(layers))):
        layers[index] = tiny_model(seed=index + 1).get_decoder().layers[index]
    assert replayed_as_recorded(model, padded_batch(trajectories(embedded, routing_of(model))))


def test_mtp_routers_carry_their_kind_and_get_no_decoder_rows(embedded):
    """NeMo-RL #3903: MTP layers count from 1 again, and the first of them took the rows of decoder layer 1."""
    spec = trajstore.RoutingSpec(layer_ids=(0, 1), top_k=2, num_experts=8, num_hidden_layers=2)
    batch = padded_batch(trajectories(embedded, spec))
    routers = [MegatronRouter(0), MegatronRouter(1), MegatronRouter(0, "mtp"), MegatronRouter(1, "mtp")]
    found = as_megatron(batch, routers=routers)
    assert [tuple(one.shape) for one in found] == [(batch.input_ids.numel(), 2)] * 4
    assert (found[0] >= 0).any()
    assert (found[1] >= 0).any()
    assert all((one == -1).all() for one in found[2:])


def test_layers_behind_the_decoder_do_not_take_part_in_a_replay(embedded):
    """NeMo-RL #3903: MTP layers mixed with decoder layers."""
    model = tiny_model()
    model.get_decoder().layers.append(tiny_model(seed=1).get_decoder().layers[0])
    assert RouterReplay(model).layer_ids == (0, 1, 2, 3)
    assert replayed_as_recorded(model, padded_batch(trajectories(embedded, routing_of(model))))


def test_a_forward_without_backward_leaks_nothing_into_the_next(embedded):
    """SkyRL #1908: a forward-only pass (old logprobs) left its queue to the training pass of another batch."""
    model = tiny_model().train()
    spec = routing_of(model)
    first, second = (padded_batch(trajectories(embedded, spec, seed=seed)) for seed in (0, 1))
    replay = RouterReplay(model)
    with replay.forcing(second):
        expected = forward(model, second)
    live = forward(model, second)
    for _ in range(2):
        with replay.forcing(first), torch.no_grad():
            forward(model, first)
    with executed(model) as seen, replay.forcing(second):
        logits = forward(model, second)
    logits.sum().backward()
    assert torch.equal(executed_sets(seen, second)[second.routing_mask], known(second))
    assert torch.equal(logits, expected)
    assert torch.equal(forward(model, second), live)


def test_a_missing_row_is_decided_by_the_live_router_and_is_not_expert_0(embedded):
    """NeMo-RL #2590: missing rows; a mask says so, up to the replay."""
    model = tiny_model()
    made = trajectories(embedded, routing_of(model), holes=True)
    batch = padded_batch(made)
    missing = batch.attention_mask.bool() & ~batch.routing_mask
    assert (batch.routed_experts[missing] == 0).all()
    with executed(model) as seen, torch.no_grad(), RouterReplay(model).forcing(batch):
        forward(model, batch)
    sets = executed_sets(seen, batch)[missing]
    assert (sets[..., 0] != sets[..., 1]).all(), "distinct experts"
    assert (sets != 0).any()
