"""What a trainer's routers choose in a forward is recorded beside the rollout's routing, and folds into nothing."""

import numpy as np
import pytest
import torch

import trajstore
from tests.consumers.routed import FORMS, forward, routing_of, trajectories
from tests.engines.models import DEEPSEEK_ROUTER_CHOOSES, plain_forward, tiny_model
from trajstore_trainer import RouterReplay, observing, padded_batch

pytestmark = pytest.mark.torch


def observed(store, id):
    """The one observation of a trajectory: its header and its rows."""
    (note,) = store.notes(id)
    (recording,) = {pair.second for pair in store.overlaps(id) if pair.second.segment < 0}
    return note.header, store.recorded_rows(id, recording)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family",
    [
        "qwen3_moe",
        "qwen3_moe_dense_first",
        "mixtral",
        pytest.param("deepseek_v3", marks=pytest.mark.skipif(not DEEPSEEK_ROUTER_CHOOSES, reason="chooses elsewhere")),
    ],
)
def test_rows_of_every_trajectory_are_those_of_a_forward_of_it_alone(embedded, family, form):
    model = tiny_model(family)
    made = trajectories(embedded, routing_of(model))
    batch = FORMS[form](made)
    with observing(model, batch, embedded, weight_version="v4"), torch.no_grad():
        forward(model, batch)
    embedded.flush()
    for one in made:
        header, rows = observed(embedded, one.id)
        assert (header.source, header.weight_version, header.start) == ("trainer", "v4", 0)
        np.testing.assert_array_equal(rows, plain_forward(model, one.token_ids).experts)
        again = embedded.load(one.id)
        np.testing.assert_array_equal(again.routed_experts, one.routed_experts)
        np.testing.assert_array_equal(again.routing_mask, one.routing_mask)


@pytest.mark.parametrize("outer", ["observing", "replay"])
def test_under_a_replay_the_routers_own_choice_is_observed(embedded, outer):
    """In the first layer, which sees nothing of the replay, it is that of a forward without one."""
    model = tiny_model()
    made = trajectories(embedded, routing_of(model), (12,))
    batch = padded_batch(made)
    blocks = [
        observing(model, batch, embedded, weight_version="v4", source="audit"),
        RouterReplay(model).forcing(batch),
    ]
    first, second = blocks if outer == "observing" else blocks[::-1]
    with torch.no_grad(), first, second:
        forward(model, batch)
    embedded.flush()
    header, rows = observed(embedded, made[0].id)
    assert header.source == "audit"
    live = plain_forward(model, made[0].token_ids).experts
    np.testing.assert_array_equal(rows[:, 0], live[:, 0])
    assert (rows[:, 1:] != live[:, 1:]).any(), "the layers above see what the replay made of the first"


def test_nothing_is_recorded_if_the_block_raises_and_no_hook_stays(embedded):
    model = tiny_model()
    batch = padded_batch(made := trajectories(embedded, routing_of(model)))

    class Stop(Exception):
        pass

    def forward_and_stop():
        with observing(model, batch, embedded, weight_version="v4"), torch.no_grad():
            forward(model, batch)
            raise Stop

    with pytest.raises(Stop):
        forward_and_stop()
    embedded.flush()
    assert [embedded.notes(one.id) for one in made] == [[], [], []]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("forwards", [0, 2])
def test_not_one_forward_is_an_error(embedded, forwards):
    model = tiny_model()
    batch = padded_batch(trajectories(embedded, routing_of(model)))
    with pytest.raises(trajstore.Conflict, match=f"0: {forwards}"):  # noqa: SIM117
        with observing(model, batch, embedded, weight_version="v4"), torch.no_grad():
            [forward(model, batch) for _ in range(forwards)]


def test_other_tokens_than_the_batchs_are_refused(embedded):
    model = tiny_model()
    batch = padded_batch(made := trajectories(embedded, routing_of(model)))
    with pytest.raises(trajstore.RoutingError, match="layer 0 saw 4 tokens"):  # noqa: SIM117
        with observing(model, batch, embedded, weight_version="v4"), torch.no_grad():
            model(input_ids=batch.input_ids[:1, :4], use_cache=False)
    embedded.flush()
    assert embedded.notes(made[0].id) == []


def test_gradients_flow_and_a_trajectory_without_tokens_is_left_out(embedded):
    model = tiny_model().train()
    empty = embedded.create(routing=routing_of(model))
    made = trajectories(embedded, routing_of(model), (6,))
    batch = padded_batch([*made, embedded.load(empty.id)])
    with observing(model, batch, embedded, weight_version="v4"):
        logits = forward(model, batch)
    logits[batch.loss_mask].sum().backward()
    assert model.get_decoder().layers[0].mlp.gate.weight.grad.abs().max() > 0
    embedded.flush()
    assert len(embedded.notes(made[0].id)) == 1
    assert embedded.notes(empty.id) == []
