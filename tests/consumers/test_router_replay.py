"""Router replay: recorded experts are what is executed, gated by the live router, and nothing of it stays behind."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import trajstore
from tests.consumers.routed import FORMS, executed, executed_sets, forward, known, routing_of, trajectories
from tests.engines.models import DEEPSEEK_ROUTER_CHOOSES, tiny_model
from trajstore_trainer import RouterReplay
from trajstore_transformers.capture import find_routers

pytestmark = pytest.mark.torch

needs_deepseek = pytest.mark.skipif(not DEEPSEEK_ROUTER_CHOOSES, reason="this transformers chooses outside the router")
FAMILIES = [
    "qwen3_moe",
    "qwen3_moe_dense_first",
    "mixtral",
    "olmoe",
    "gpt_oss",
    pytest.param("deepseek_v3", marks=needs_deepseek),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_of(embedded, model, form="padded", **options):
    return FORMS[form](trajectories(embedded, routing_of(model), **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_row_is_executed_as_recorded_and_the_live_router_decides_the_others(embedded, family, form):
    model = tiny_model(family)
    batch = batch_of(embedded, model, form)
    with executed(model) as seen, torch.no_grad():
        forward(model, batch)
        with RouterReplay(model).forcing(batch), own_choices(model) as chosen:
            forward(model, batch)
    live, replayed = (executed_sets(seen, batch, call) for call in (0, 1))
    assert torch.equal(replayed[batch.routing_mask], known(batch))
    assert (live[batch.routing_mask] != known(batch)).any(-1).float().mean() > 0.5
    of_routers = torch.stack([chosen[layer_id] for layer_id in sorted(chosen)], 1).reshape(replayed.shape)
    unknown = ~batch.routing_mask
    assert unknown.sum() > len(batch.ids)
    assert torch.equal(replayed[unknown], of_routers[unknown])


@pytest.mark.parametrize("family", FAMILIES)
def test_output_and_gradients_are_those_of_masked_gating_written_plainly(embedded, family):
    """Every expert runs on every token; a gate that is 0 outside the recorded experts weighs them."""
    model = tiny_model(family).train()
    plain = copy.deepcopy(model)
    batch = batch_of(embedded, model)
    with RouterReplay(model).forcing(batch):
        logits = forward(model, batch)
    gate_plainly(plain, family, batch)
    expected = forward(plain, batch)
    at = batch.loss_mask
    torch.testing.assert_close(logits[at], expected[at], atol=1e-5, rtol=1e-5)
    loss(logits, batch).backward()
    loss(expected, batch).backward()
    assert all(router.weight.grad.abs().max() > 1e-4 for router in find_routers(model)[0].values())
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4, rtol=1e-3, msg=f"{name}: {{}}".format)


def test_a_replay_of_the_models_own_choice_changes_no_bit(embedded):
    """The gating is the family's own, so what differs under a replay differs for the experts' sake."""
    model = tiny_model(dtype=torch.float32).train()
    batch = batch_of(embedded, model)
    with executed(model) as seen:
        expected = forward(model, batch)
    loss(expected, batch).backward()
    gradients = take_gradients(model)
    own = torch.stack([seen[layer_id][0][0] for layer_id in sorted(seen)], 1).reshape(batch.routed_experts.shape)
    same = SimpleNamespace(
        routed_experts=own, routing_mask=torch.ones_like(batch.routing_mask), routing=routing_of(model)
    )
    with RouterReplay(model).forcing(same):
        logits = forward(model, batch)
    loss(logits, batch).backward()
    assert torch.equal(logits, expected)
    for name, gradient in take_gradients(model).items():
        assert torch.equal(gradient, gradients[name]), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("backward", ["within", "after", "under another"])
def test_a_layer_recomputed_by_gradient_checkpointing_sees_the_rows_of_its_forward(embedded, backward, reentrant):
    model = tiny_model().train()
    batch = batch_of(embedded, model)
    other = batch_of(embedded, model, seed=1)
    replay = RouterReplay(model)
    with replay.forcing(batch):
        loss(forward(model, batch), batch).backward()
    expected = take_gradients(model)
    with replay.forcing(other):
        loss(forward(model, other), other).backward()
    of_other = take_gradients(model)
    checkpoint_layers(model, reentrant=reentrant)
    model.enable_input_require_grads()
    with executed(model) as seen:
        with replay.forcing(batch):
            value = loss(forward(model, batch), batch)
            if backward == "within":
                value.backward()
        if backward == "after":
            value.backward()
        if backward == "under another":
            with replay.forcing(other):
                value_of_other = loss(forward(model, other), other)
                value.backward()
    assert len(seen[0]) == (3 if backward == "under another" else 2), "the layers were recomputed"
    assert_gradients(take_gradients(model), expected)
    assert replay_hooks(model) == 0
    if backward == "under another":
        value_of_other.backward()
        assert_gradients(take_gradients(model), of_other)


def test_other_checkpointing_fails_rather_than_recompute_with_the_live_router(embedded):
    """A whole model under torch's checkpoint is recomputed in the block, or not at all."""
    model = tiny_model().train()
    batch = batch_of(embedded, model)
    replay = RouterReplay(model)
    with replay.forcing(batch):
        loss(forward(model, batch), batch).backward()
    expected = take_gradients(model)
    with replay.forcing(batch):
        loss(checkpoint(forward, model, batch, use_reentrant=False), batch).backward()
    assert_gradients(take_gradients(model), expected)
    with replay.forcing(batch):
        value = loss(checkpoint(forward, model, batch, use_reentrant=False), batch)
    with pytest.raises(RuntimeError, match=r"[Rr]ecomput"):
        value.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_works_under_autocast(embedded, family):
    model = tiny_model(family, dtype=torch.float32).train()
    batch = batch_of(embedded, model, "packed")
    with executed(model) as seen, torch.autocast("cpu", torch.bfloat16), RouterReplay(model).forcing(batch):
        value = loss(forward(model, batch).float(), batch)
    value.backward()
    assert torch.equal(executed_sets(seen, batch)[batch.routing_mask], known(batch))
    assert all(router.weight.grad.isfinite().all() for router in find_routers(model)[0].values())
    assert all(router.weight.grad.abs().max() > 0 for router in find_routers(model)[0].values())


def test_a_model_in_half_precision_is_replayed_with_weights_of_its_dtype(embedded):
    model = tiny_model(dtype=torch.bfloat16)
    batch = batch_of(embedded, model)
    with executed(model) as seen, RouterReplay(model).forcing(batch), torch.no_grad():
        forward(model, batch)
    assert seen[0][0][1].dtype == torch.bfloat16
    assert torch.equal(executed_sets(seen, batch)[batch.routing_mask], known(batch))


def test_a_padded_and_a_packed_batch_give_the_same_logits(embedded):
    model = tiny_model()
    made = trajectories(embedded, routing_of(model))
    logits = {}
    for form, collate in FORMS.items():
        batch = collate(made)
        with RouterReplay(model).forcing(batch), torch.no_grad():
            logits[form] = forward(model, batch)[batch.loss_mask]
    for form in FORMS:
        torch.testing.assert_close(logits[form], logits["padded"], atol=1e-5, rtol=1e-5)


def test_more_than_256_experts_are_replayed(embedded):
    model = tiny_model(num_experts=300, num_experts_per_tok=4, moe_intermediate_size=8)
    batch = batch_of(embedded, model)
    assert batch.routed_experts.dtype == torch.int16
    with executed(model) as seen, RouterReplay(model).forcing(batch), torch.no_grad():
        forward(model, batch)
    assert known(batch).max() > 255
    assert torch.equal(executed_sets(seen, batch)[batch.routing_mask], known(batch))


def test_router_logits_of_the_auxiliary_loss_stay_the_live_ones(embedded):
    model = tiny_model(num_hidden_layers=1)
    batch = batch_of(embedded, model)
    ask = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_router_logits": True}
    with torch.no_grad():
        live = model(**ask)
        with RouterReplay(model).forcing(batch):
            replayed = model(**ask)
    assert torch.equal(live.router_logits[0], replayed.router_logits[0])
    assert not torch.equal(live.logits, replayed.logits)


def test_the_model_is_as_it_was_after_the_block_and_after_an_exception(embedded):
    model = tiny_model().train()
    checkpoint_layers(model, reentrant=False)
    batch = batch_of(embedded, model)
    replay = RouterReplay(model)
    assert replay_hooks(model) == 0
    before = forward(model, batch)
    functions = [layer._gradient_checkpointing_func for layer in model.get_decoder().layers]
    with replay.forcing(batch):
        assert replay_hooks(model) == 4
        replayed = forward(model, batch)
    assert not torch.equal(before, replayed)

    class Stop(Exception):
        pass

    with pytest.raises(Stop), replay.forcing(batch):
        raise Stop
    assert replay_hooks(model) == 0
    assert [layer._gradient_checkpointing_func for layer in model.get_decoder().layers] == functions
    assert torch.equal(forward(model, batch), before)


def test_replays_do_not_nest(embedded):
    model = tiny_model()
    batch = batch_of(embedded, model)
    with RouterReplay(model).forcing(batch), torch.no_grad():
        with pytest.raises(trajstore.Conflict, match="already under a replay"), RouterReplay(model).forcing(batch):
            pass
        assert replay_hooks(model) == 4, "the outer one goes on"
        forward(model, batch)


def test_another_number_of_tokens_is_refused(embedded):
    model = tiny_model()
    batch = batch_of(embedded, model)
    with pytest.raises(trajstore.RoutingError, match=r"layer 0 saw 5 tokens, the batch has \d+"):  # noqa: SIM117
        with RouterReplay(model).forcing(batch), torch.no_grad():
            model(input_ids=batch.input_ids[:1, :5], use_cache=False)
    assert replay_hooks(model) == 0


def test_rows_of_another_model_are_refused(embedded):
    model, dense_first = tiny_model(), tiny_model("qwen3_moe_dense_first")
    of_dense_first = batch_of(embedded, dense_first)
    with pytest.raises(trajstore.SchemaError, match=r"layers \[0, 2\] have no rows"):
        RouterReplay(model).forcing(of_dense_first).__enter__()
    with pytest.raises(trajstore.SchemaError, match=r"layers \[0, 2\] have no router"):
        RouterReplay(dense_first).forcing(batch_of(embedded, model)).__enter__()
    wider = batch_of(embedded, tiny_model(num_experts=16))
    with pytest.raises(trajstore.SchemaError, match=r"layer 0 picks 2 of 8 experts, the batch's rows 2 of 16"):  # noqa: SIM117
        with RouterReplay(model).forcing(wider), torch.no_grad():
            forward(model, wider)


def test_a_block_in_which_another_model_ran_is_refused(embedded):
    model, reference = tiny_model(), tiny_model(seed=1)
    batch = batch_of(embedded, model)
    with pytest.raises(trajstore.Conflict, match=r"layers \[0, 1, 2, 3\] of Qwen3MoeForCausalLM did not run under"):  # noqa: SIM117
        with RouterReplay(model).forcing(batch), torch.no_grad():
            forward(reference, batch)


def test_a_model_that_was_compiled_without_hooks_is_refused_rather_than_run_live(embedded):
    """Compiled code guards against no new hooks; compiled under them, it has them only within blocks."""
    model = tiny_model(dtype=torch.float32)
    batch = batch_of(embedded, model)
    replay = RouterReplay(model)
    with torch.no_grad():
        live = forward(model, batch)
        with replay.forcing(batch):
            expected = forward(model, batch)
        compiled = torch.compile(model, backend="eager")
        forward(compiled, batch)
        with pytest.raises(trajstore.Conflict, match="compile it within the first block"), replay.forcing(batch):
            forward(compiled, batch)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            with replay.forcing(batch):
                torch.testing.assert_close(forward(compiled, batch), expected)
        torch.testing.assert_close(forward(compiled, batch), live)


def test_a_batch_without_routing_or_with_bad_rows_is_refused(embedded):
    model = tiny_model()
    spec, replay = routing_of(model), RouterReplay(model)
    ids, mask = torch.zeros(5, 4, 2, dtype=torch.uint8), torch.ones(5, dtype=torch.bool)

    def enter(experts, mask, routing=spec):
        replay.forcing(SimpleNamespace(routed_experts=experts, routing_mask=mask, routing=routing)).__enter__()

    with pytest.raises(trajstore.SchemaError, match="no routing to replay"):
        enter(None, mask, None)
    with pytest.raises(trajstore.RoutingError, match=r"expected integers \[5, 4, 2\]"):
        enter(ids[:, :3], mask)
    with pytest.raises(trajstore.RoutingError, match="expected integers"):
        enter(ids, mask.long())
    ids[3, 2, 1] = 8
    with pytest.raises(trajstore.RoutingError, match="token 3 is routed to expert 8 at layer 2") as caught:
        enter(ids, mask)
    assert (caught.value.row, caught.value.layer) == (3, 2)
    mask[3] = False
    with executed(model) as seen, torch.no_grad():  # noqa: SIM117
        with replay.forcing(SimpleNamespace(routed_experts=ids, routing_mask=mask, routing=spec)):
            model(input_ids=torch.ones(1, 5, dtype=torch.int64))
    assert seen[2][0][0].max() < 8, "what stands at a missing row does not matter"


def test_a_router_of_an_unknown_class_wants_a_gating(embedded):
    model = tiny_model()

    class FooTopKRouter(type(model.get_decoder().layers[1].mlp.gate)):
        pass

    model.get_decoder().layers[1].mlp.gate.__class__ = FooTopKRouter
    with pytest.raises(trajstore.SchemaError, match=r"FooTopKRouter \(layer 1 of .*pass gatings="):
        RouterReplay(model)
    batch = batch_of(embedded, model)

    def gating(router, logits, experts):
        chosen = logits.float().softmax(-1).gather(-1, experts)
        return chosen / chosen.sum(-1, keepdim=True) if router.norm_topk_prob else chosen

    with executed(model) as seen, torch.no_grad():  # noqa: SIM117
        with RouterReplay(model, gatings={"FooTopKRouter": gating}).forcing(batch):
            forward(model, batch)
    assert torch.equal(executed_sets(seen, batch)[batch.routing_mask], known(batch))


def test_a_gating_that_is_not_the_routers_own_is_refused_before_it_weighs_anything(embedded):
    model = tiny_model()
    batch = batch_of(embedded, model)
    wrong = {"Qwen3MoeTopKRouter": lambda router, logits, experts: logits.sigmoid().gather(-1, experts)}
    with pytest.raises(trajstore.SchemaError, match="layer 0 weighs its experts otherwise"):  # noqa: SIM117
        with RouterReplay(model, gatings=wrong).forcing(batch), torch.no_grad():
            forward(model, batch)


def test_the_package_is_imported_without_transformers():
    """The `trainer` extra brings torch only."""
    code = "import sys, trajstore_trainer as t; assert 'transformers' not in sys.modules; t.RouterReplay; t.observing"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def loss(logits, batch):
    """Cross entropy of the batch's own tokens where they were sampled, so that every position's row matters."""
    chosen = torch.log_softmax(logits, -1).gather(-1, batch.input_ids[..., None])[..., 0]
    return -(chosen * batch.loss_mask).sum()


def checkpoint_layers(model, *, reentrant):
    """Gradient checkpointing by any name that transformers 5 gave it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def take_gradients(model):
    """Of all parameters, by name; they begin anew afterwards."""
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return taken


def assert_gradients(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-9, rtol=1e-6, msg=name)


def replay_hooks(model):
    """How many hooks of a replay are on the model."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(type(hook).__module__.startswith("trajstore_trainer") for hook in hooks)


def own_choices(model):
    """What the routers themselves choose, by layer: sorted ids `[N, K]`, taken before any other hook."""

    class Choices(dict):
        def __enter__(self):
            self.handles = [
                router.register_forward_hook(
                    lambda _, __, output, layer_id=layer_id: self.update({layer_id: output[2].sort(-1).values}),
                    prepend=True,
                )
                for layer_id, router in find_routers(model)[0].items()
            ]
            return self

        def __exit__(self, *_):
            for handle in self.handles:
                handle.remove()

    return Choices()


def gate_plainly(model, family, batch):
    """Replace every MoE block: a gate `[N, E]`, 0 for experts not chosen, and the sum over all experts."""
    recorded, mask = batch.routed_experts.flatten(0, -3).long(), batch.routing_mask.flatten()
    for index, (layer_id, router) in enumerate(find_routers(model)[0].items()):
        block = model.get_decoder().layers[layer_id].mlp

        def run(hidden, block=block, router=router, rows=recorded[:, index]):
            tokens = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.nn.functional.linear(tokens, router.weight.to(tokens.dtype), getattr(router, "bias", None))
            chosen = torch.zeros_like(logits, dtype=torch.bool)
            chosen.scatter_(1, torch.where(mask[:, None], rows, logits.topk(rows.shape[1]).indices), True)
            if family == "gpt_oss":
                gate = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
            elif family == "deepseek_v3":
                gate = logits.sigmoid() * chosen
                gate = gate / gate.sum(-1, keepdim=True) * router.routed_scaling_factor
            else:
                gate = logits.softmax(-1) * chosen
                if getattr(router, "norm_topk_prob", True):
                    gate = gate / gate.sum(-1, keepdim=True)
            output = torch.zeros_like(tokens)
            for expert in range(logits.shape[-1]):
                every = torch.full((len(tokens), 1), expert)
                output = output + gate[:, expert, None] * block.experts(tokens, every, torch.ones_like(tokens[:, :1]))
            output = output.reshape(hidden.shape)
            if family == "deepseek_v3":
                return output + block.shared_experts(hidden)
            return (output, gate) if family == "gpt_oss" else output

        block.forward = run
