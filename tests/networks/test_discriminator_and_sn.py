"""D and spectral norm: size, projection, power iterations and gradients (spec 1.2)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from puat_fast.networks.discriminator import Discriminator, DownBlock
from puat_fast.networks.layers import SNConv2d, SNEmbedding, SNLinear, SpectralNorm

LAYERS = {
    "conv": lambda: SNConv2d(3, 8, 3, gain=2**0.5),
    "conv1x1": lambda: SNConv2d(5, 8, 1, gain=1.0),
    "linear": lambda: SNLinear(9, 1),
    "embedding": lambda: SNEmbedding(4, 6),
}


@pytest.fixture(params=LAYERS)
def layer(request) -> SpectralNorm:
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def iterate(layer: SpectralNorm, times: int) -> None:
    for _ in range(times):
        layer.normalised_weight()


def test_full_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator(10).parameters()) == 4_338_945


def test_every_weight_is_spectrally_normalised():
    D = Discriminator(3, 8)
    normed = {id(m.weight) for m in D.modules() if isinstance(m, SpectralNorm)}
    assert normed == {id(p) for name, p in D.named_parameters() if name.endswith("weight")}
    assert len(normed) == 4 * 3 + 2


def test_shapes():
    D, x = Discriminator(5, 8), torch.rand(3, 3, 32, 32)
    assert D(x, torch.tensor([0, 4, 2])).shape == (3, 1)
    assert D(x).shape == (3, 5)
    assert D(x.requires_grad_(), torch.tensor([0, 4, 2])).sum().isfinite()


@pytest.mark.parametrize("per_class", [False, True])
def test_all_classes_at_once_equal_one_by_one(per_class):
    torch.manual_seed(0)
    D, x = Discriminator(5, 8, per_class).double(), torch.rand(3, 3, 32, 32, dtype=torch.float64)
    D(x)  # u, v away from their initial values
    D.eval()
    one_by_one = torch.cat([D(x, torch.full((3,), k)) for k in range(5)], dim=1)
    torch.testing.assert_close(D(x), one_by_one)
    assert one_by_one.std(dim=1).min() > 1e-4


def test_head_sums_over_space():
    torch.manual_seed(0)
    D, x, y = Discriminator(3, 8).double().eval(), torch.rand(2, 3, 32, 32).double(), torch.tensor([1, 2])
    h = F.relu(D.blocks((x - 0.5) / 0.5))
    assert h.shape == (2, 8, 2, 2)
    h = h.sum((2, 3))
    expected = D.linear(h) + (D.embedding.normalised_weight()[y] * h).sum(1, keepdim=True)
    torch.testing.assert_close(D(x, y), expected)


@pytest.mark.parametrize("first", [True, False])
def test_down_block_is_the_formula(first):
    torch.manual_seed(0)
    block, x = DownBlock(4, 6, first).double().eval(), torch.randn(2, 4, 8, 8).double()
    r = block.conv2(F.relu(block.conv1(x if first else F.relu(x))))
    pool = lambda h: F.avg_pool2d(h, 2)  # noqa: E731
    shortcut = block.shortcut(pool(x)) if first else pool(block.shortcut(x))
    torch.testing.assert_close(block(x), pool(r) + shortcut)


def test_initial_weights():
    torch.manual_seed(0)
    conv = SNConv2d(16, 32, 3, gain=2**0.5)
    bound = 2**0.5 * (6 / ((16 + 32) * 9)) ** 0.5
    assert 0.98 * bound < conv.weight.abs().max() <= bound
    assert 0.8 * (16 * 9) ** -0.5 < conv.bias.abs().max() <= (16 * 9) ** -0.5
    assert conv.u.norm().item() == pytest.approx(1) and conv.v.norm().item() == pytest.approx(1)


def test_sigma_becomes_the_largest_singular_value(layer):
    iterate(layer, 500)
    weight = layer.normalised_weight().flatten(1)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=1e-6)


def test_one_iteration_per_forward_also_without_gradient(layer):
    flat, u = layer.weight.detach().flatten(1), layer.u.clone()
    for k in range(3):
        with torch.set_grad_enabled(k == 1):
            layer.normalised_weight()
        v = F.normalize(flat.T @ u, dim=0)
        u = F.normalize(flat @ v, dim=0)
        torch.testing.assert_close(layer.u, u)
        torch.testing.assert_close(layer.v, v)


def test_no_iteration_in_eval_mode(layer):
    layer.eval()
    u, v = layer.u.clone(), layer.v.clone()
    first = layer.normalised_weight()
    assert torch.equal(first, layer.normalised_weight())
    assert torch.equal(layer.u, u) and torch.equal(layer.v, v)
    torch.testing.assert_close(first, layer.weight / (u @ layer.weight.flatten(1) @ v))


def test_gradient_flows_through_sigma_with_u_and_v_constant(layer):
    """d/dW of <R, W / sigma(W)> at fixed u, v: R / sigma - <R, W> / sigma^2 u v^T."""
    R = torch.randn_like(layer.weight)
    (layer.normalised_weight() * R).sum().backward()
    W, u, v = layer.weight.detach(), layer.u, layer.v
    sigma = u @ W.flatten(1) @ v
    expected = R / sigma - (R * W).sum() / sigma**2 * torch.outer(u, v).view_as(W)
    torch.testing.assert_close(layer.weight.grad, expected)
    assert not u.requires_grad and u.grad is None and v.grad is None


def test_u_and_v_are_state_and_no_parameters():
    D = Discriminator(3, 8)
    assert not any(name.endswith((".u", ".v")) for name, _ in D.named_parameters())
    assert {"linear.u", "linear.v", "embedding.u"} <= set(D.state_dict())


def test_two_forwards_then_one_backward():
    """The second power iteration must not spoil the first graph: the gradient is the sum of both."""
    torch.manual_seed(0)
    D, x, y = Discriminator(3, 8).double(), torch.rand(2, 3, 32, 32).double(), torch.tensor([0, 1])
    state = {k: v.clone() for k, v in D.state_dict().items()}
    (D(x, y).sum() + D(x).sum()).backward()
    together = [p.grad.clone() for p in D.parameters()]
    D.load_state_dict(state)
    D.zero_grad()
    D(x, y).sum().backward()
    D(x).sum().backward()
    torch.testing.assert_close([p.grad for p in D.parameters()], together)


@pytest.mark.parametrize(("per_class", "times"), [(False, 1), (True, 4)])
def test_lookups_of_the_embedding(per_class, times):
    """official-v1 looks it up K times in D(x, all): K power iterations, all other layers make one."""
    torch.manual_seed(0)
    D, x = Discriminator(4, 8, per_class).double(), torch.rand(2, 3, 32, 32).double()
    flat, u = D.embedding.weight.detach(), D.embedding.u.clone()
    for _ in range(times):
        u = F.normalize(flat @ F.normalize(flat.T @ u, dim=0), dim=0)
    conv = D.blocks[0].conv1
    conv_u = conv.u.clone()
    D(x)
    torch.testing.assert_close(D.embedding.u, u)
    w = conv.weight.detach().flatten(1)
    torch.testing.assert_close(conv.u, F.normalize(w @ F.normalize(w.T @ conv_u, dim=0), dim=0))
