"""Every gating that is registered is that of the router class of the installed transformers, to the bit."""

import ast
import importlib
import pkgutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.models

from trajstore_trainer.replay.gating import GATINGS, Scores

pytestmark = pytest.mark.torch

EXPERTS, HIDDEN, TOKENS = 16, 24, 40


def find_classes():
    """Router class by name, those of them that this transformers has; found in the sources, imported one by one."""
    found = {}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        path = Path(transformers.models.__path__[0], package.name, f"modeling_{package.name}.py")
        if path.exists() and any(f"class {name}(" in (text := path.read_text()) for name in GATINGS):
            names = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)} & set(GATINGS)
            module = importlib.import_module(f"transformers.models.{package.name}.{path.stem}")
            found |= {name: getattr(module, name) for name in names}
    return found


CLASSES = find_classes()


def make_router(name, *, norm_topk_prob, dtype):
    """A router with random weights, of any family: its configuration has every name that any of them asks for."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        moe_topk=4,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=1.75,
        route_scale=1.75,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        moe_norm_min=1e-12,
        rms_norm_eps=1e-6,
    )
    router = CLASSES[name](config).to(dtype)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for buffer in router.buffers():
        torch.nn.init.normal_(buffer, std=0.5)
    return router


def answer(name, router, hidden):
    """The router's `(logits, weights, experts)`; some are handed the bias that only the choice depends on."""
    bias = torch.linspace(-0.5, 0.5, EXPERTS)
    if name == "MiniMaxM2TopKRouter":
        return router(hidden, bias)
    return router(hidden[None], bias) if name == "AfmoeTokenChoiceRouter" else router(hidden)


@pytest.mark.parametrize("norm_topk_prob", [True, False], ids=["normalised", "as is"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_routers_own_choice_is_weighed_as_the_router_weighs_it(name, dtype, norm_topk_prob):
    router = make_router(name, norm_topk_prob=norm_topk_prob, dtype=dtype)
    logits, weights, experts = answer(name, router, torch.randn(TOKENS, HIDDEN, dtype=dtype))[:3]
    found = GATINGS[name](router, logits, experts).to(weights.dtype)
    assert torch.equal(found, weights)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_an_expert_that_the_router_did_not_choose_has_a_weight_and_a_gradient(name):
    """Weights taken from what the choice left would be 0, and so would their gradient."""
    router = make_router(name, norm_topk_prob=True, dtype=torch.float32)
    logits, _, experts = answer(name, router, torch.randn(TOKENS, HIDDEN))[:3]
    logits = logits.detach().requires_grad_()
    others = torch.stack([torch.tensor([e for e in range(EXPERTS) if e not in row][:4]) for row in experts.tolist()])
    weights = GATINGS[name](router, logits, others)
    assert (weights > 0).all()
    weights[:, 0].sum().backward()
    assert (logits.grad.gather(1, others[:, :1]) != 0).all()


def test_the_families_are_those_of_this_transformers():
    """A name that no transformers has would be a spelling mistake; an older one may lack some families."""
    assert len(CLASSES) > 15
    by_gating = defaultdict(list)
    for name in CLASSES:
        by_gating[GATINGS[name]].append(name)
    assert {one.score for one in by_gating} == {"softmax", "sigmoid", "softmax of chosen"}


def test_a_floor_bounds_the_divisor():
    gating = Scores(score="sigmoid", normalise=True, floor="least")
    router = SimpleNamespace(least=10.0)
    weights = gating(router, torch.zeros(1, 4), torch.tensor([[0, 3]]))
    torch.testing.assert_close(weights, torch.full((1, 2), 0.05))
