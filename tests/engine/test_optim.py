"""Our optimisers and torch's: the same steps, checkpoints that either can go on from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_cases import equal_state, parameters, tiny_config
from torch import Tensor, nn

from puat_fast.engine import optim
from puat_fast.networks import Networks
from puat_fast.noise import Noise

SGD_OPTIONS = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
ADAM_OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.0, 0.99), "eps": 1e-8}


def nets() -> Networks:
    return Networks.build(tiny_config(), 3, Noise(0))


def set_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    params = list(net.parameters())
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]


def ours(name: str, net: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return optim.Adam(net.parameters(), **ADAM_OPTIONS)
    teacher: dict[Tensor, Tensor] = {p: p.detach().clone() for p in net.parameters()}
    return optim.SGD(groups_of(net), teacher, **SGD_OPTIONS)


def theirs(name: str, net: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(net.parameters(), **ADAM_OPTIONS)
    return torch.optim.SGD(groups_of(net), **SGD_OPTIONS)


def go(optimizer: torch.optim.Optimizer, net: nn.Module, seeds: range) -> None:
    for seed in seeds:
        set_gradients(net, seed)
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("first", [ours, theirs])
@pytest.mark.parametrize("second", [ours, theirs])
def test_checkpoints_of_either_load_into_the_other(name, first, second):
    expected, net = nets().C, nets().C
    go(theirs(name, expected), expected, range(5))
    before = first(name, net)
    go(before, net, range(3))
    state = copy.deepcopy(before.state_dict())
    after = second(name, net)
    after.load_state_dict(state)
    kept = copy.deepcopy(before.state_dict()["state"])
    assert equal_state(after.state_dict()["state"], kept)
    assert all(own.keys() == kept[0].keys() for own in kept.values())
    go(after, net, range(3, 5))
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_loaded_steps_are_not_shared():
    net = nets().G
    first, second = ours("adam", net), ours("adam", net)
    go(first, net, range(2))
    second.load_state_dict(first.state_dict())
    go(second, net, range(2, 3))
    assert {int(own["step"]) for own in first.state.values()} == {2}
    assert {int(own["step"]) for own in second.state.values()} == {3}


def test_the_teacher_follows_where_it_is_told_to():
    both = nets()
    optimizer = optim.sgd(both.C, both.C_ema, tiny_config().optim)
    with torch.no_grad():
        for p in both.C_ema.parameters():
            p.mul_(0.5)
    before = parameters(both.C_ema)
    go(optimizer, both.C, range(1))
    assert equal_state(parameters(both.C_ema), before)  # no decay was set
    for group in optimizer.param_groups:
        group["ema_decay"] = 0.75
    go(optimizer, both.C, range(1, 2))
    for p_ema, old, p in zip(both.C_ema.parameters(), before, both.C.parameters(), strict=True):
        torch.testing.assert_close(p_ema, 0.75 * old + 0.25 * p)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_parameters_without_gradient_are_left_alone(name):
    net, expected = nets().C, nets().C
    for optimizer, of in ((ours(name, net), net), (theirs(name, expected), expected)):
        set_gradients(of, 0)
        without = list(of.parameters())[3]
        without.grad = None
        optimizer.step()
        assert not optimizer.state[without]
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_state_has_the_layout_of_the_weights(name):
    net = nets().C
    optimizer = ours(name, net)
    go(optimizer, net, range(1))
    for p, own in optimizer.state.items():
        assert all(t.stride() == p.stride() for key, t in own.items() if key != "step")
