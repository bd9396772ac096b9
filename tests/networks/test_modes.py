"""frozen_running_stats, eval_mode, training_only: what a phase may switch, and that it is switched back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from puat_fast.config import Config
from puat_fast.networks import Networks
from puat_fast.networks.classifier import Classifier
from puat_fast.networks.layers import batch_norms, eval_mode, frozen_running_stats
from puat_fast.noise import Noise


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def C() -> Classifier:
    torch.manual_seed(0)
    return Classifier(3, 10, 1)


def test_frozen_statistics_change_no_buffer_and_use_the_batch(C):
    x, before = torch.rand(4, 3, 32, 32), buffers(C)
    with frozen_running_stats(C):
        frozen = C(x)
        assert equal(buffers(C), before)
    updating = C(x)
    torch.testing.assert_close(frozen, updating)  # batch statistics
    assert not equal(buffers(C), before)  # and outside they are updated again
    assert not torch.allclose(frozen, C.eval()(x), atol=1e-3)


def test_frozen_statistics_have_the_gradient_of_train_mode(C):
    x = torch.rand(4, 3, 32, 32, requires_grad=True)
    with frozen_running_stats(C):
        (frozen,) = torch.autograd.grad(C(x)[:, 0].sum(), x)
    (train,) = torch.autograd.grad(C(x)[:, 0].sum(), x)
    torch.testing.assert_close(frozen, train)


def test_frozen_statistics_in_eval_mode_are_the_running_ones(C):
    x = torch.rand(4, 3, 32, 32)
    C(x)
    expected = C.eval()(x)
    with frozen_running_stats(C):
        torch.testing.assert_close(C(x), expected)


@pytest.mark.parametrize("manager", [frozen_running_stats, eval_mode])
def test_an_error_inside_does_not_leave_it_switched(C, manager):
    with pytest.raises(KeyError), manager(C):
        raise KeyError
    assert C.training and all(norm.update_stats for norm in batch_norms(C))


def test_frozen_statistics_nest(C):
    with frozen_running_stats(C):
        with frozen_running_stats(C):
            pass
        before = buffers(C)
        C(torch.rand(4, 3, 32, 32))
        assert equal(buffers(C), before)


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_gives_the_mode_back(C, training):
    C.train(training)
    with eval_mode(C):
        assert not any(m.training for m in C.modules())
    assert all(m.training is training for m in C.modules())


def test_eval_mode_gives_every_part_its_own_mode_back():
    """A user's classifier may hold a frozen BatchNorm inside a network in train mode."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    model[1].eval()
    with eval_mode(model):
        assert not model[1].training
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize("name", ["G", "D", "C", "A", "C_ema"])
def test_training_only_one_network(name):
    config = Config.preset("paper", classifier={"depth": 10, "width": 1}, gan={"width": 8, "z_dim": 8})
    nets = Networks.build(config, 3, Noise(0))
    with nets.training_only(name):
        for other, net in nets.items():
            assert all(p.requires_grad is (other == name) for p in net.parameters())
    assert not any(p.requires_grad for _, net in nets.items() for p in net.parameters())


def test_building_leaves_the_global_generator_alone():
    config = Config.preset("paper", classifier={"depth": 10, "width": 1}, gan={"width": 8, "z_dim": 8})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = Networks.build(config, 3, Noise(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    b = Networks.build(config, 3, Noise(0))
    for (_, net), (_, other) in zip(a.items(), b.items(), strict=True):
        assert equal(net.state_dict(), other.state_dict())  # seeded by the configuration alone


def test_the_teacher_is_a_copy_with_weights_of_its_own_and_the_same_noise():
    config = Config.preset("paper", classifier={"depth": 10, "width": 1}, gan={"width": 8, "z_dim": 8})
    noise = Noise(0)
    nets = Networks.build(config, 3, noise)
    assert equal(nets.C.state_dict(), nets.C_ema.state_dict())
    assert not {p.data_ptr() for p in nets.C.parameters()} & {p.data_ptr() for p in nets.C_ema.parameters()}
    assert nets.C.augment.noise is noise and nets.C_ema.augment.noise is noise
